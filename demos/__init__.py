"""The workbench: one page in a browser to compare, search, score, collect preferences and look into runs.

`app.demo` serves it, `model_session` holds the model, `jobs` the long work, `tabs` a file a tab.
From outside: `app`, `settings`.
"""
