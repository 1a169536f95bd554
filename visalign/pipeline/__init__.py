"""Any stock diffusers pipeline as a policy: its own loop is driven, step by step, by functions of ours.

`generator` is the door; `stepping` stands in for the scheduler, `loop` says what a step does, `prompt_memo` encodes
each prompt once, `calls` knows what goes into a call and comes out. Knows nothing of rewards, training or search.
From outside: `generator.Generator`, `calls`, `variants` (LoRAs at any strength), `encoding`.
"""
