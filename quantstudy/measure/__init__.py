"""What a variant costs and how good it is: accuracy, size, arithmetic, latency, memory."""
