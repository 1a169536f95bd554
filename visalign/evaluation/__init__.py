"""Contestants on the same prompts from the same noise: pictures, scores, and a table of who wins by how much.

`visalign eval` is its command, docs/eval.md its guide. From prompt to table: `plan` (all that can be refused),
`drawing` and `judging` (`store` keeps what they make, so that nothing is made twice), `results` (the statistics),
`record` and `page`.
"""
