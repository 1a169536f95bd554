"""The hacking watch: series of a training, tests of them, findings, and what a run does about one.

From outside: `monitor.Monitor`, `hacking.MonitorOptions`.
"""
