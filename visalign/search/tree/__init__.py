"""Diffusion tree sampling and search: the tree, its rules, rollouts, file, picture. From outside: `dts`, `reading`."""
