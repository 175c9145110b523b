"""Drop-in modules for those of `torch.nn`: the same arguments, parameters and results, without paying for padding."""

from mmer_fast.nn.attention import MultiheadAttention
from mmer_fast.nn.transformer import TransformerEncoder, TransformerEncoderLayer

__all__ = ["MultiheadAttention", "TransformerEncoder", "TransformerEncoderLayer"]
