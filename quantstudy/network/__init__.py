"""Networks: architectures, their weights and checkpoints, and their captured graphs."""
