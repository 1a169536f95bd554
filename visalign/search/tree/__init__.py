"""Diffusion tree sampling and search: the tree, its rules, rollouts, file and picture. From outside: `dts`, `reading`."""
