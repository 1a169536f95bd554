"""Search and gradients over the noise a picture is made of: random, zero-order, paths, rollover, ReNO, DNO."""
