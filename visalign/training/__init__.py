"""What all trainers share: what is refused before a model loads, the loop, the run's folder, the hacking watch.

Rooms: `before`, `loop`, `run`, `watch`, `reward_gradient`; at the top `policy` (what is trained) and `attention`. From
outside: `loop.trainer` (Trainer, train), `before.options.CommonConfig`, `policy`, `run.folder`, `run.report`.
"""
