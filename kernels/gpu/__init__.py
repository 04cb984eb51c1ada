"""The operators as Triton kernels, with their launchers and launch settings."""
