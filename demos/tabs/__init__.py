"""The workbench's tabs, a file each: compare, search, score, prefer, runs."""
