"""The equation grafted = instruct + scale * (tuned - base), and the three places where it happens."""
