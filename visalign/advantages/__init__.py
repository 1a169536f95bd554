"""Rewards to advantages, as pure functions of tensors: by group, by prompt, by denoising step, by a tree's edges.

From outside: `group`, `per_prompt`, `process_values`, `tree`. Knows nothing of models.
"""
