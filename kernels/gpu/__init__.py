"""The operators as Triton kernels: only what imports Triton, or serves what does."""
