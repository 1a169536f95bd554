"""Rewards that check: GenEval's detector, OCR, JPEG size, ControlNet cycles, the shapes world's exact judge."""
