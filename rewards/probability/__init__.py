"""Rewards read from a VLM's token probabilities: yes-token, VQAScore, PromptEcho, RewardDance, PaCo, rubrics."""
