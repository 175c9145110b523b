"""The benchmark of attention with soft key weights against PyTorch's and flash kernels' ways to its result."""
