"""mmer_fast as an attention implementation of Hugging Face transformers.

    from mmer_fast.integrations.huggingface import register_attention
    register_attention()
    model = AutoModel.from_config(config, attn_implementation="mmer_fast")

Two functions are registered. `attention_mask` says what a layer may see in as few numbers as possible: (B, S) for the
keys that count under a causal rule that holds from the first position on, (B, 1, 1, S) for the keys that count without
one, and (B, 1, L, S) for everything else (a window, several packed sequences, a part of a prompt behind cached keys).
`attention_forward` runs `masked_attention` with it: padded keys are skipped, and in the first form, where queries and
keys are the same tokens, padded queries behind the last token too, whose attention is then 0. Models pass on keyword
arguments that they do not know, so that ``model(..., key_weights=weights)`` gives every layer soft key weights.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from mmer_fast.nn.padding import reach
from mmer_fast.ops.attention import masked_attention
from mmer_fast.ops.attention_checks import drawn_seed
from mmer_fast.ops.sdpa import mask_and_bias, same_width

_INSTALL = "pip install 'transformers>=5.4'"
_UNSUPPORTED = ("softcap", "s_aux", "cache")


def register_attention(name: str = "mmer_fast") -> None:
    """Makes ``attn_implementation=name`` known to transformers; again with the same name changes nothing.

    Args:
        name: under which configurations and ``from_pretrained`` ask for it.

    Raises:
        ImportError: transformers is missing, or older than 5.4 (its masks were asked for in another way then).
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
    except ImportError as error:
        raise ImportError(f"register_attention needs transformers: {_INSTALL} ({error})") from error
    if "q_length" not in inspect.signature(masking_utils.sdpa_mask).parameters:
        raise ImportError(f"register_attention needs transformers 5.4 or newer: {_INSTALL}")
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    **others: Any,
) -> Tensor | None:
    """The mask of a layer, called by transformers.

    Args:
        batch_size, q_length, kv_length: B, L and S.
        q_offset, kv_offset: positions of the first query and of the first key: ints, with a static cache a tensor.
        mask_function: whether query i may see key j; transformers' causal one and its bidirectional one are known.
        attention_mask: (B, positions) bool, True at the tokens.
        local_size: of a window; `mask_function` has it too.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether a mask of a shape of our own is welcome.
        use_vmap, others: for transformers' own function.

    Returns:
        None, (B, S), (B, 1, 1, S) or (B, 1, L, S) bool, as the module's docstring says; None if every query sees every
        key that the module's causality lets it see.
    """
    from transformers import masking_utils

    mask_function = masking_utils.causal_mask_function if mask_function is None else mask_function
    plain = not use_vmap and local_size is None
    at_start = isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0
    causal = plain and allow_is_causal_skip and at_start and mask_function is masking_utils.causal_mask_function
    free = plain and allow_is_bidirectional_skip and mask_function is masking_utils.bidirectional_mask_function
    if causal and q_length > 1:
        return _keys(attention_mask, kv_length, kv_offset)
    if free:
        keys = _keys(attention_mask, kv_length, kv_offset)
        return None if keys is None else keys[:, None, None]
    return masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        **others,
    )


def _keys(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """(B, S): what the mask over all positions says of the S keys; those beyond it do not exist yet."""
    if attention_mask is None:
        return None
    missing = kv_offset + kv_length - attention_mask.shape[1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing), value=False)
    return attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    key_weights: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention of a layer, called by transformers.

    Args:
        module: the layer; its ``is_causal`` (True unless it has one) is asked where the argument is None.
        query: (B, H, L, E), floating.
        key: (B, Hk, S, E), Hk a divisor of H.
        value: (B, Hk, S, Ev).
        attention_mask: what `attention_mask` returned; or a mask of four dimensions that the caller made, broadcastable
            to (B, H, L, S), bool (True attends) or added to the scores.
        is_causal: asked where there is no mask. A mask (B, S) is causal, one of four dimensions has it all.
        dropout: probability with which a weight is dropped.
        scaling: factor of the scores; ``1/sqrt(E)`` unless given.
        position_bias: added to the scores, broadcastable to (B, H, L, S).
        key_weights: (B, S) or (B, H, S) in [0, 1], as in `masked_attention`: what a model is called with reaches its
            layers, ``model(ids, attention_mask=mask, key_weights=weights)``.

    Returns:
        (B, L, H, Ev) contiguous, and None for the weights, which never exist.

    Raises:
        ValueError: a layer that needs soft caps, attention sinks or a paged cache.
    """
    for name in _UNSUPPORTED:
        if others.get(name) is not None:
            raise ValueError(f"{name} is not served by mmer_fast (attn_implementation='eager' does), got a value")
    queries, keys, width = query.shape[2], key.shape[2], query.shape[3]
    shape = (query.shape[0], query.shape[1], queries, keys)
    mask: Tensor | None
    query_lengths = None
    if attention_mask is not None and attention_mask.dim() == 2:
        causal, mask, bias = True, attention_mask, None
        query_lengths = reach(mask).clamp(max=queries)
    else:
        of_module = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = attention_mask is None and queries > 1 and bool(of_module)  # a single query is the last one
        mask, bias = mask_and_bias(attention_mask, shape)
    if position_bias is not None:
        _, added = mask_and_bias(position_bias, shape)
        bias = added if bias is None or added is None else bias + added
    out = masked_attention(
        *same_width(query, key, value),
        key_weights,
        lengths=None,
        query_lengths=query_lengths,
        mask=mask,
        bias=bias,
        causal=causal,
        scale=width**-0.5 if scaling is None else scaling,
        dropout_p=dropout,
        seed=drawn_seed(dropout, query.device),
    )
    assert isinstance(out, Tensor)
    return out[..., : value.shape[3]].transpose(1, 2).contiguous(), None
