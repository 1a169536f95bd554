"""Sampling with a record: rollouts, trees of them, chains that gradients pass, noise by keys, windows of noisy steps.

From outside: `rollout`, `branching`, `backprop`, `noising`, `windows`, `seeds`. Talks to a Generator by its protocol
and to `visalign.transitions`; knows nothing of rewards or training.
"""
