"""What a variant runs on: simulation, int8 kernels of oneDNN, inductor, its ONNX file on other runtimes."""
