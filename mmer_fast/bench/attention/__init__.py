"""Attention with soft key weights against PyTorch's and flash kernels' ways to its result."""
