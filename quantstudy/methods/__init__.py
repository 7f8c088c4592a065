"""The quantization methods, each a function from the fp32 model to a variant."""
