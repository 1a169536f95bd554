"""Attacks on rewards: pictures that deserve nothing, and adversarial patches. From outside: `probes.probe`, `attacks`."""
