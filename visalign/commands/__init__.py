"""The `visalign` command: `cli` reads the line, a file a command does the work. From outside: `cli.main`."""
