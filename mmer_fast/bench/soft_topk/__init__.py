"""Soft top-k against yardsticks, the same plan in plain PyTorch, and packages."""
