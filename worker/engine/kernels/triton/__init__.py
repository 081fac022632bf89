"""Kernels in Triton, for CUDA. Only to be imported where triton is installed."""
