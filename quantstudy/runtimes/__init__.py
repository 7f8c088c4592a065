"""What a variant runs on: simulation, oneDNN's int8 kernels, inductor."""
