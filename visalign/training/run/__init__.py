"""A run's folder: metrics, pictures, checkpoints that are whole or absent, the report, what the user is told.

From outside: `folder` (metrics, stopping), `report`, `checkpoint`, `outcome`.
"""
