"""What this machine is and has: hardware, software, the low-bit kernels that work."""
