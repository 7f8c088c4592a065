"""The training loop, its resume and its curves."""
