"""What only `trainers/reward_backprop.py` and `adjoint_matching.py` use: options of the gradient methods, their parts,
and a reward that is differentiated."""
