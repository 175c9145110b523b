"""Attention with soft key weights in Triton.

    p_ij = m_j e^(x_ij) / sum_l m_l e^(x_il),   x_ij = scale q_i . k_j + b_ij,   o_i = sum_j p_ij v_j

Forward: a program owns a block of queries of one head and walks over the keys with an online softmax. Backward: one
kernel owns blocks of queries (dq), one blocks of keys (dk, dv, dm), one, where it is wanted, blocks of the bias's
gradient; each draws the probabilities again from the log-sum-exp. Every output has one owner and one order of
summation: the same inputs give the same bits. m is a factor, never a logarithm. Factors have the inputs' type, sums are
float32. Tiles are fixed by type and sizes (attention_tiles.py), so the first call tunes nothing.
"""

from .attention_arguments import unsupported
from .attention_backward import attention_backward
from .attention_forward import attention_forward

__all__ = ["attention_backward", "attention_forward", "unsupported"]
