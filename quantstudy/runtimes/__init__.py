"""The ways to run a variant: simulation, int8 kernels of oneDNN, inductor, its ONNX file on other runtimes."""
