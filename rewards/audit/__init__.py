"""Attacks on rewards: pictures that deserve nothing, adversarial patches. From outside: `probes.probe`, `attacks`."""
