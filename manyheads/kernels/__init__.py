"""Triton kernels for NVIDIA GPUs. They need triton, so nothing that runs without a GPU imports this package."""
