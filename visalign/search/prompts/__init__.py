"""Search over words: critics with refinement, and prompts rewritten before they are drawn.

From outside: `critics`, `refine`, `rewriting`.
"""
