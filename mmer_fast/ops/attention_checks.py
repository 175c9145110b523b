"""Checks of attention's arguments; each says the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from mmer_fast.ops import _backends, _validate

WIDEST_GPU_HEAD = 128
LONGEST_SAMPLE = 2**31 - 1024  # tokens that the kernels count in 32 bits
MOST_TOKENS = 2**31 - 1  # of a packed batch, whose cu_seqlens are int32


def tensors(q: Tensor, k: Tensor, v: Tensor, shape: str) -> tuple[Tensor, Tensor, Tensor]:
    """Checks q of `shape`, (B, H, L, D) or packed (Tq, H, D), and k and v; returns them in the dtype of autocast."""
    dims = shape.count(",") + 1
    q, k, v = (_autocast(_validate.dense_tensor(name, x)) for name, x in (("q", q), ("k", k), ("v", v)))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != dims:
            wanted = shape if name == "q" else shape.replace("Tq", "Tk").replace("H", "Hk").replace("L", "S")
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype {q.dtype} of q, got {x.dtype}")
        _on_device(name, x, q)
        if x.shape[-1] != q.shape[-1]:
            raise ValueError(f"{name} must have the head width {q.shape[-1]} of q, got {x.shape[-1]}")
        if dims == 4 and x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must have the batch size {q.shape[0]} of q, got {x.shape[0]}")
    if q.shape[-1] == 0:
        raise ValueError(f"q must have a head width D >= 1, got shape {tuple(q.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape {tuple(k.shape)} of k, got {tuple(v.shape)}")
    heads, key_heads = q.shape[1], k.shape[1]
    if key_heads == 0 or heads % key_heads != 0:
        raise ValueError(f"k must have a number of heads that divides the {heads} of q, got {key_heads}")
    return q, k, v


def _autocast(x: Tensor) -> Tensor:
    """In the dtype of autocast where that is on, as for PyTorch's own attention."""
    device = x.device.type
    # "meta" by name: TorchDynamo of torch 2.10 cannot trace torch.amp.is_autocast_available.
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _on_device(name: str, x: Tensor, q: Tensor) -> None:
    _validate.same_device(name, x, q, "q")


def _may_read(x: Tensor) -> bool:
    """Whether to look at the values: free of cost on the CPU, asked for in checked mode."""
    return _validate.can_read(x) or (
        _backends.is_checked() and not torch.compiler.is_compiling() and _validate.is_plain(x)
    )


def lengths(name: str, value: Tensor | None, q: Tensor, letter: str, longest: int) -> None:
    """Checks (B,) integers in [0, `longest`]; `letter` is the dimension's name."""
    if value is None:
        return
    _validate.integer_tensor(name, value)
    _on_device(name, value, q)
    if value.shape != q.shape[:1]:
        raise ValueError(f"{name} must have shape (B,) = ({q.shape[0]},), got {tuple(value.shape)}")
    if _may_read(value):
        _validate.lengths_within(name, value, letter, longest)


def mask(value: Tensor | None, q: Tensor, keys: int) -> None:
    if value is None:
        return
    _validate.bool_tensor("mask", value)
    _on_device("mask", value, q)
    if value.shape != (q.shape[0], keys):
        raise ValueError(
            f"mask must have shape (B, S) = {(q.shape[0], keys)}, got {tuple(value.shape)} (what differs from query to "
            "query belongs into bias, as -inf)"
        )


def key_weights(value: Tensor | None, q: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if value is None:
        return
    _validate.floating_tensor("key_weights", value)
    _on_device("key_weights", value, q)
    if tuple(value.shape) not in shapes.values():
        wanted = " or ".join(f"{names} = {shape}" for names, shape in shapes.items())
        raise ValueError(f"key_weights must have shape {wanted}, got {tuple(value.shape)}")
    readable = not torch.compiler.is_compiling() and _validate.is_plain(value)
    if _backends.is_checked() and readable and value.numel() > 0:
        outside = ~((value >= 0) & (value <= 1))  # NaN too
        if bool(outside.any()):
            place = tuple(int(i) for i in outside.nonzero()[0])
            raise ValueError(f"key_weights must be within [0, 1], got {float(value[place]):g} at {place}")


def bias(value: Tensor | None, q: Tensor, shape: tuple[int, int, int, int]) -> Tensor | None:
    if value is None:
        return None
    _validate.floating_tensor("bias", value)
    _on_device("bias", value, q)
    fits = value.dim() == 4 and value.shape[3] == shape[3]
    if not fits or any(given not in (1, full) for given, full in zip(value.shape, shape, strict=True)):
        wanted = ", ".join(f"1|{n}" for n in shape[:3])
        raise ValueError(f"bias must have shape (1|B, 1|H, 1|L, S) = ({wanted}, {shape[3]}), got {tuple(value.shape)}")
    return value


def cu_seqlens(which: str, value: Tensor, longest: int | None, tokens: Tensor) -> tuple[Tensor, int]:
    """Checks cu_seqlens of q or k and the length of the longest sample; returns them, int32 and known."""
    name = f"cu_seqlens_{which}"
    _validate.integer_tensor(name, value)
    _on_device(name, value, tokens)
    if value.dim() != 1 or value.shape[0] < 1:
        raise ValueError(f"{name} must have shape (B + 1,), got {tuple(value.shape)}")
    total = tokens.shape[0]
    if not torch.compiler.is_compiling() and total > MOST_TOKENS:
        raise ValueError(f"{which} must have at most {MOST_TOKENS} tokens, which int32 counts, got {total}")
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, (int, torch.SymInt))):
        raise TypeError(f"max_seqlen_{which} must be an int, got {type(longest).__name__}")
    if _may_read(value):
        ends = value.tolist()
        if ends[0] != 0 or ends[-1] != total:
            raise ValueError(f"{name} must go from 0 to the {total} tokens of {which}, got {ends[0]} to {ends[-1]}")
        counts = [end - start for start, end in pairwise(ends)]
        if min(counts, default=0) < 0:
            sample = next(i for i, count in enumerate(counts) if count < 0)
            raise ValueError(f"{name} must not decrease, got {ends[sample]} then {ends[sample + 1]} at sample {sample}")
        needed = max(counts, default=0)
        if longest is not None and longest < needed:
            raise ValueError(f"max_seqlen_{which} must be >= {needed}, the longest sample, got {longest}")
        longest = needed if longest is None else longest
    elif longest is None:
        readable = not torch.compiler.is_compiling() and _validate.is_plain(value) and not value.is_meta
        readable = readable and value.shape[0] > 1
        longest = int(value.diff().amax()) if readable else total
    return value.to(torch.int32), longest


def scale(value: float | None, q: Tensor) -> float:
    if value is None:
        return q.shape[-1] ** -0.5
    result = _validate.number("scale", value)
    if not -math.inf < result < math.inf:  # not isfinite, which breaks a graph whose scale varies
        raise ValueError(f"scale must be finite, got {result:g}")
    return result


def dropout_p(value: float) -> float:
    result = _validate.number("dropout_p", value)
    if not 0 <= result < 1:
        raise ValueError(f"dropout_p must be within [0, 1), got {result:g}")
    return result


def drawn_seed(p: float, device: torch.device) -> Tensor | None:
    """A seed for dropout from PyTorch's generator of the device, which `torch.manual_seed` governs; None without it."""
    return torch.randint(0, 2**63 - 1, (1,), device=device) if p > 0 else None


def seed(value: int | Tensor | None, p: float, q: Tensor) -> Tensor | None:
    """The seed as an int64 tensor on the device of q: reading a number from it would break graphs and wait."""
    if p == 0:
        return None
    if value is None:
        # "error", not "warn"; a graph cannot ask.
        if not torch.compiler.is_compiling() and torch.get_deterministic_debug_mode() == 2:
            raise ValueError(
                f"seed must be given for dropout_p={p:g} while torch.use_deterministic_algorithms(True) is on, got None"
            )
        return drawn_seed(p, q.device)
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() != 1:
            raise TypeError(
                f"seed must be an int64 tensor of one element, got {value.dtype} of shape {tuple(value.shape)}"
            )
        _on_device("seed", value, q)
        return value.reshape(1)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"seed must be an int or an int64 tensor, got {type(value).__name__}")
    if not 0 <= value < 2**63:
        raise ValueError(f"seed must be within [0, 2^63), got {value}")
    return torch.full((1,), value, dtype=torch.int64, device=q.device)
