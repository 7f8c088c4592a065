"""Networks: architectures, their weights and checkpoints, and what is known of their graphs."""
