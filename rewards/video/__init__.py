"""Rewards of videos, (N, F, 3, H, W), and image rewards over their frames."""
