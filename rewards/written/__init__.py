"""Rewards that a VLM writes out: UnifiedReward, EditScore, VideoScore2, Rational Rewards, learned and automatic rubrics."""
