"""What a machine with a GPU can tell about the CUDA kernels, and what can be counted without one."""
