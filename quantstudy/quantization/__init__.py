"""Quantization itself: schemes, packing, the quantized layer, observers and the file of a quantized model."""
