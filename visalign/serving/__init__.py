"""Rewards over HTTP: the server. Its client is the reward `remote`."""
