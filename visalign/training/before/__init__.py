"""Before a model loads: options, their file and command line, and all that can be refused or warned of early.

From outside: `options.CommonConfig`, `config`, `preflight.make_plan`, `doctor`.
"""
