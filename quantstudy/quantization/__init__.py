"""The heart: schemes, packing, the quantized layer, observers, methods and the file of a quantized model."""
