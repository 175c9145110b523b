"""Transformer encoders with the interface of `torch.nn`'s, which compute on tokens and not on padding.

With `lengths` or a bool padding mask the tokens are packed once on the way in, go through all layers as (total, E), and
are unpacked once on the way out. A batch without padding is not copied. The price is that the sizes are read, which on
CUDA waits for the device once a call; under ``torch.compile`` the batch therefore stays padded (see `nn/padding.py`).

Tensors are named as in PyTorch's classes; B batch, T time, E width, H heads, total the tokens of the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmer_fast.nn.attention import MultiheadAttention
from mmer_fast.nn.masks import is_causal_mask
from mmer_fast.nn.tokens import Beside, OnTokens
from mmer_fast.ops import _validate
from mmer_fast.ops.packing import PackedLayout

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class TransformerEncoderLayer(OnTokens):
    """`torch.nn.TransformerEncoderLayer` without the padding: the same arguments, parameters and results at tokens.

    Padding comes out as 0 and may hold anything, NaN too. The attention of a token without any key is 0.

    Args:
        d_model, nhead, dim_feedforward, dropout, layer_norm_eps, batch_first, norm_first, bias, device, dtype: as
            there.
        activation: ``"relu"``, ``"gelu"`` or a callable.

    Raises:
        ValueError: another string as `activation`.
    """

    mask_name = "src_mask"

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(activation, str) and activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be 'relu', 'gelu' or a callable, got {activation!r}")
        self.self_attn = MultiheadAttention(
            d_model, nhead, dropout, bias, batch_first=batch_first, device=device, dtype=dtype
        )
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias, device, dtype)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias, device, dtype)
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)
        self.norm2 = nn.LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = _ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self.batch_first = batch_first
        self.heads = nhead

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        lengths: Tensor | None = None,
        key_weights: Tensor | None = None,
        layout: PackedLayout | None = None,
    ) -> Tensor:
        """Attention and feed-forward, each with residual, dropout and LayerNorm.

        Args:
            src: floating. ``(T, B, E)``, ``(B, T, E)`` with ``batch_first``, ``(T, E)``; with a layout ``(total, E)``.
            src_mask: ``(T, T)`` or ``(B H, T, T)``, bool (True may not attend) or floating (added to the scores). With
                a layout T is its ``max_seqlen`` and counts within the sample; ``(1|B, 1|H, T, T)`` is taken too.
            src_key_padding_mask: ``(B, T)``, or ``(T,)`` without a batch. Bool, True at the padding, wherever it is. A
                floating one is added to the scores of the key; then nothing counts as padding, as in PyTorch.
            is_causal: token i attends to the tokens j <= i; `src_mask`, if given, is taken to say just that.
            lengths: ``(B,)`` integers in [0, T]: the first tokens count; combines with the mask.
            key_weights: ``(B, T)`` or ``(B, H, T)`` in [0, 1], with a gradient, as in `mmer_fast.masked_attention`;
                with a layout ``(total,)`` or ``(total, H)``.
            layout: of packed tokens.

        Returns:
            The shape of `src`; 0 in the padding.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype or shape; what came and what was expected.
        """
        _validate.flag("is_causal", is_causal)
        self.self_attn.check_input("src", src)
        width = self.self_attn.embed_dim
        if src.dim() > 0 and src.shape[-1] != width:
            raise ValueError(f"src must have width {width}, got {tuple(src.shape)}")
        return self._encode(src, Beside(src_mask, src_key_padding_mask, is_causal, lengths, key_weights, layout))

    def forward_packed(
        self,
        tokens: Tensor,
        layout: PackedLayout,
        key_weights: Tensor | None = None,
        src_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """`forward` on packed tokens ``(total, E)``, to ``(total, E)``."""
        return self(tokens, src_mask, is_causal=is_causal, key_weights=key_weights, layout=layout)

    def _run(self, x: Tensor, beside: Beside) -> Tensor:
        if self.norm_first:
            x = x + self.dropout1(self._attend(self.norm1(x), beside))
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(x + self.dropout1(self._attend(x, beside)))
        return self.norm2(x + self._feed_forward(x))

    def _attend(self, x: Tensor, beside: Beside) -> Tensor:
        mask, padding_mask, is_causal, lengths, key_weights, layout = beside
        if layout is not None:
            return self.self_attn.forward_packed(x, x, x, layout, None, key_weights, is_causal, bias=mask)
        out, _ = self.self_attn(
            x,
            x,
            x,
            key_padding_mask=padding_mask,
            need_weights=False,
            attn_mask=mask,
            is_causal=is_causal,
            key_weights=key_weights,
            query_lengths=lengths,
        )
        return out

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))


class TransformerEncoder(OnTokens):
    """`torch.nn.TransformerEncoder` whose layers see tokens only.

    Args:
        encoder_layer: a `mmer_fast.nn.TransformerEncoderLayer`; copied, so that all layers start equal, as there.
        num_layers: how many copies.
        norm: applied to the tokens behind the last layer, before they are unpacked (padding stays 0).
        enable_nested_tensor, mask_check: accepted for PyTorch's sake; packing takes the place of nested tensors.

    Raises:
        TypeError: a layer of another class.
    """

    def __init__(
        self,
        encoder_layer: TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(encoder_layer, TransformerEncoderLayer):
            raise TypeError(
                f"encoder_layer must be a mmer_fast.nn.TransformerEncoderLayer, got {type(encoder_layer).__name__}"
            )
        self.layers = nn.ModuleList(copy.deepcopy(encoder_layer) for _ in range(num_layers))
        self.num_layers = num_layers
        self.norm = norm
        self.enable_nested_tensor = enable_nested_tensor
        self.mask_check = mask_check
        self.batch_first = encoder_layer.batch_first
        self.heads = encoder_layer.heads

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        lengths: Tensor | None = None,
        key_weights: Tensor | None = None,
        layout: PackedLayout | None = None,
    ) -> Tensor:
        """All layers one after the other, and the norm.

        Args:
            is_causal: None looks whether `mask` is the causal one, which is then not read by any layer (not under
                ``torch.compile``: looking would break the graph).
            src, mask, src_key_padding_mask, lengths, key_weights, layout: as in `TransformerEncoderLayer.forward`.

        Returns:
            The shape of `src`; 0 in the padding.

        Raises:
            TypeError, ValueError: as there.
        """
        _validate.dense_tensor("src", src)
        if mask is not None:
            _validate.bool_or_floating_tensor("mask", mask)
            _validate.same_device("mask", mask, src, "src")
        if is_causal is not None:
            _validate.flag("is_causal", is_causal)
        else:
            is_causal = mask is not None and not torch.compiler.is_compiling() and is_causal_mask(mask)
        return self._encode(src, Beside(mask, src_key_padding_mask, is_causal, lengths, key_weights, layout))

    def forward_packed(
        self,
        tokens: Tensor,
        layout: PackedLayout,
        key_weights: Tensor | None = None,
        mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """`forward` on packed tokens ``(total, E)``, to ``(total, E)``."""
        return self(tokens, mask, is_causal=is_causal, key_weights=key_weights, layout=layout)

    def _run(self, x: Tensor, beside: Beside) -> Tensor:
        mask, padding_mask, is_causal, lengths, key_weights, layout = beside
        for layer in self.layers:
            x = layer(x, mask, padding_mask, is_causal, lengths=lengths, key_weights=key_weights, layout=layout)
        return x if self.norm is None else self.norm(x)
