"""What a variant runs on: simulation, int8 kernels of oneDNN and its own, inductor."""
