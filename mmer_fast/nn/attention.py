"""Multi-head attention with the interface of `torch.nn.MultiheadAttention`, on `masked_attention`.

The class inherits PyTorch's constructor, so parameters, their initialisation and state dicts are the same by
construction; only the forward pass is new. It projects in the layout that it is given and hands the kernel views.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmer_fast.nn.masks import attended_keys, weights_of_attention, with_batch
from mmer_fast.ops import _validate
from mmer_fast.ops import attention_checks as checks
from mmer_fast.ops.attention import masked_attention, packed_attention
from mmer_fast.ops.attention_checks import drawn_seed
from mmer_fast.ops.packing import PackedLayout


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` that skips padding and takes weights of the keys.

    Constructor, parameters and state dict are PyTorch's, and so are the results, but for three things: a query without
    any key gives the bias of the output projection (attention 0) where PyTorch gives NaN; errors are ValueError and
    TypeError; ``is_causal=True`` needs no `attn_mask`.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        key_weights: Tensor | None = None,
        lengths: Tensor | None = None,
        query_lengths: Tensor | None = None,
        seed: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` to `key` and `value`.

        Args:
            query: ``(L, N, E)``, ``(N, L, E)`` with ``batch_first``, or ``(L, E)``, floating. Where query, key and
                value are one tensor they are projected by one product.
            key, value: ``(S, N, kdim)`` and ``(S, N, vdim)``, or with dimensions as those of `query`.
            key_padding_mask: ``(N, S)``, or ``(S,)`` without a batch. Bool, True at the keys to ignore: they are
                skipped. Floating: added to the scores of the key.
            need_weights: also return the attention weights. That costs an array of L x S for each head, which is
                otherwise never made, and the scores a second time: say False unless they are looked at. The output is
                the same to the bit.
            attn_mask: ``(L, S)`` or ``(N H, L, S)``. Bool, True where a query may *not* attend, or floating, added to
                the scores.
            average_attn_weights: the mean of the weights over the heads, instead of those of each head.
            is_causal: query i attends to the keys j <= i. `attn_mask` is then taken to say just that, and not read.
            key_weights: m in [0, 1], ``(N, S)`` or ``(N, H, S)``, with a gradient: weights become
                ``m_j e^(x_ij) / sum_l m_l e^(x_il)``. A key of weight 0 is excluded.
            lengths: ``(N,)`` integers in [0, S], the first keys that count.
            query_lengths: ``(N,)`` integers in [0, L], the first queries that count; attention is 0 at the others.
            seed: of dropout, an int or an int64 tensor of one element; drawn from PyTorch's generator unless given.

        Returns:
            The output in the layout of `query`, and None or the weights, ``(N, L, S)``, ``(N, H, L, S)`` with
            ``average_attn_weights=False``, without N for inputs without a batch. As in PyTorch dropout shows in them,
            and S counts the keys that `add_bias_kv` and `add_zero_attn` append.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype or shape; what came and what was expected.

        Excluded keys may hold anything, but where gradients of the parameters are wanted padding has to be finite:
        it goes through the projections. `forward_packed` has no padding at all.
        """
        self._check(query, key, value)
        _validate.flag("is_causal", is_causal)
        _validate.flag("need_weights", need_weights)
        _validate.flag("average_attn_weights", average_attn_weights)
        batched = query.dim() == 3
        if not batched:
            key_padding_mask, key_weights, lengths, query_lengths = with_batch(
                key_padding_mask=key_padding_mask,
                key_weights=key_weights,
                lengths=lengths,
                query_lengths=query_lengths,
            )
        q, k, v = (self._split(x) for x in self._project(query, key, value))
        shape = (*q.shape[:3], k.shape[2])
        keys = attended_keys(key_padding_mask, attn_mask, is_causal, key_weights, lengths, shape, q.device)
        if self._appends:
            checks.lengths("lengths", lengths, q, "S", shape[3])
            of_keys = {"(N, S)": (shape[0], shape[3]), "(N, H, S)": (shape[0], shape[1], shape[3])}
            checks.key_weights(key_weights, q, of_keys)
            k, v = self._with_appended(k, v)
            keys = keys.followed_by(self._appends, shape, q.device)

        dropout_p = self.dropout if self.training else 0.0
        seed = drawn_seed(dropout_p, q.device) if seed is None else seed
        attended, lse = masked_attention(
            q,
            k,
            v,
            keys.weights,
            lengths=keys.lengths,
            query_lengths=query_lengths,
            mask=keys.mask,
            bias=keys.bias,
            causal=keys.causal,
            dropout_p=dropout_p,
            seed=seed,
            return_lse=True,
        )
        out = self.out_proj(self._merge(attended, batched))
        if not need_weights:
            return out, None
        weights = weights_of_attention(q, k, lse, keys, dropout_p, seed).to(query.dtype)
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights if batched else weights.squeeze(0)

    def forward_packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout_q: PackedLayout,
        layout_k: PackedLayout | None = None,
        key_weights: Tensor | None = None,
        is_causal: bool = False,
        *,
        bias: Tensor | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """Attend within each sample of a packed batch.

        Args:
            query: ``(Tq, E)``, the tokens of all samples end to end, as `mmer_fast.pack` gives them.
            key, value: ``(Tk, kdim)`` and ``(Tk, vdim)``.
            layout_q: where the samples of `query` are.
            layout_k: where those of `key` are, if elsewhere.
            key_weights: ``(Tk,)`` or ``(Tk, H)``, as in `forward`.
            is_causal: position i of a sample attends to its positions j <= i.
            bias: added to the scores, ``(1|B, 1|H, 1|Lq, Lk)`` with Lq and Lk the ``max_seqlen`` of the layouts.
            seed: of dropout, as in `forward`.

        Returns:
            ``(Tq, E)``.

        Raises:
            TypeError, ValueError: as in `forward`; tokens that are not as many as the layout's; a module with
                `add_bias_kv` or `add_zero_attn`, which would put a key into every sample.
        """
        if self._appends:
            raise ValueError("forward_packed needs a module without add_bias_kv and add_zero_attn")
        _validate.flag("is_causal", is_causal)
        layout_k = layout_q if layout_k is None else layout_k
        check_layout("layout_q", layout_q)
        check_layout("layout_k", layout_k)
        for name, x, layout in (("query", query, layout_q), ("key", key, layout_k), ("value", value, layout_k)):
            if _validate.floating_tensor(name, x).dim() != 2 or x.shape[0] != layout.total:
                raise ValueError(f"{name} must have shape ({layout.total}, E) as its layout says, got {tuple(x.shape)}")
        self._check(query, key, value)
        dropout_p = self.dropout if self.training else 0.0
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in self._project(query, key, value))
        attended = packed_attention(
            q,
            k,
            v,
            layout_q.cu_seqlens,
            layout_k.cu_seqlens,
            max_seqlen_q=layout_q.max_seqlen,
            max_seqlen_k=layout_k.max_seqlen,
            key_weights=key_weights,
            bias=bias,
            causal=is_causal,
            dropout_p=dropout_p,
            seed=drawn_seed(dropout_p, q.device) if seed is None else seed,
        )
        assert isinstance(attended, Tensor)
        return self.out_proj(attended.flatten(1))

    @property
    def _appends(self) -> int:
        """How many keys are appended to those of the caller."""
        return int(self.bias_k is not None) + int(self.add_zero_attn)

    def check_input(self, name: str, x: Tensor) -> None:
        """Checks what the projections take: a floating tensor of their device and, without autocast, their dtype."""
        _validate.dense_tensor(name, x)
        weight = self.out_proj.weight
        # What is sharded or wrapped is not what the projections see in the end.
        if torch.compiler.is_compiling() or not _validate.is_plain(weight) or weight.is_meta:
            return
        _validate.same_device(name, x, weight, "the parameters")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
            raise TypeError(f"{name} must have the dtype {weight.dtype} of the parameters, got {x.dtype}")

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.check_input("query", query)
        if key is not query:
            self.check_input("key", key)
        if value is not key:
            self.check_input("value", value)
        if query.dim() not in (2, 3):
            raise ValueError(f"query must have two or three dimensions, got {tuple(query.shape)}")
        widths = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for (name, width), x in zip(widths.items(), (query, key, value), strict=True):
            if x.dim() != query.dim() or x.shape[-1] != width:
                raise ValueError(
                    f"{name} must have the {query.dim()} dimensions of query and width {width}, got {tuple(x.shape)}"
                )
        if value.shape[:-1] != key.shape[:-1]:
            raise ValueError(
                f"value must have the length and batch size of key, {tuple(key.shape[:-1])}, "
                f"got {tuple(value.shape[:-1])}"
            )
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and key.shape[batch] != query.shape[batch]:
            raise ValueError(f"key must have the batch size {query.shape[batch]} of query, got {key.shape[batch]}")

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections, (..., E) each, in as few products as the inputs allow."""
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
            return q, k, v
        elif key is value:
            k, v = F.linear(key, weight[width:], None if bias is None else bias[width:]).chunk(2, dim=-1)
            return F.linear(query, weight[:width], None if bias is None else bias[:width]), k, v
        else:
            weights = weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _split(self, x: Tensor) -> Tensor:
        """Projected tokens of any layout as a view (N, H, T, D)."""
        x = x.unflatten(-1, (self.num_heads, -1))
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merge(self, x: Tensor, batched: bool) -> Tensor:
        """(N, H, L, D) in the layout of the caller, the heads side by side."""
        if not batched:
            return x.squeeze(0).transpose(0, 1).flatten(1)
        return (x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)).flatten(2)

    def _with_appended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (N, H, S, D) with the learnt one and the zero one behind them, as the options say."""
        batch, heads, _, width = k.shape
        extended = []
        for x, learnt in ((k, self.bias_k), (v, self.bias_v)):
            parts = [x]
            if learnt is not None:
                parts.append(learnt.view(1, heads, 1, width).expand(batch, -1, -1, -1).to(x.dtype))
            if self.add_zero_attn:
                parts.append(x.new_zeros((batch, heads, 1, width)))
            extended.append(torch.cat(parts, dim=2))
        return extended[0], extended[1]


def check_layout(name: str, layout: object) -> None:
    if not isinstance(layout, PackedLayout):
        raise TypeError(f"{name} must be a PackedLayout, got {type(layout).__name__}")
