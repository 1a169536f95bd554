"""Rewards read from a head on a VLM's hidden state: HPSv3, EditReward, DeScore."""
