"""A training under way: its parts, micro-batches, scoring beside sampling, gradients, updates, evaluation.

From outside (trainers): `loop`, `batches`, `learning`; the rest is theirs.
"""
