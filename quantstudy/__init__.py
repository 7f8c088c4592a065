"""Quantize a vision model every way worth trying and measure what each way costs and buys."""
