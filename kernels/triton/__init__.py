"""Triton kernels of mmer_fast, one file an operator.

The package imports nothing: ``import mmer_fast.triton`` works without Triton; ``mmer_fast.triton.soft_topk``
needs it.
"""
