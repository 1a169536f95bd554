"""Rewards of a picture among others: pairwise win rates, sets, diversity, distances of distributions.

From outside: `pairwise.PairReward`, `sets`, `candidates`.
"""
