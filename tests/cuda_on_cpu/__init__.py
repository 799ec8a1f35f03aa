"""CUDA kernels on the CPU: see README.md."""
