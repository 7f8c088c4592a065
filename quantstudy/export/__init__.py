"""ONNX files of the fp32 model and of its quantized variants."""
