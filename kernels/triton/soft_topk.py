"""Soft top-k in Triton.

    T_i = sigma(sign (s_i - lambda) / tau),   lambda such that sum_i T_i = k

A program holds as many short rows as pay, or one row up to `BLOCK_LIMIT` entries, in registers, and reads
and writes memory once. A longer row is read again in every sweep, a chunk at a time. Block shapes are fixed
by the row length, so the first call tunes nothing. The math (soft_topk_math.py) follows
kernels/common/soft_topk_solver.h step by step. Half types are computed in float32, float64 in float64; sums
are accumulated in float64.
"""

from .soft_topk_backward import soft_topk_backward
from .soft_topk_forward import soft_topk_forward
from .soft_topk_rows import BLOCK_LIMIT

__all__ = ["BLOCK_LIMIT", "soft_topk_backward", "soft_topk_forward"]
