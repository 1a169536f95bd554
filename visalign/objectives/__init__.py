"""Losses as pure functions of tensors, from log-probabilities and advantages, rewards or data to (N,).

From outside: `policy_gradient`, `rebel`, `reward_gradient`, `single_step`, `adjoint`. Knows transitions alone.
"""
