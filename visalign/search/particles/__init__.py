"""Particles that move together and are resampled: Feynman-Kac steering, SVDD, twisted samplers (TDS, DAS).

From outside: `steering`, `svdd`, `twisted`, `resampling`.
"""
