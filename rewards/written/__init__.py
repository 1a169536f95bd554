"""Rewards that a VLM writes out: UnifiedReward, EditScore, VideoScore2, Rational Rewards, rubrics that are learned."""
