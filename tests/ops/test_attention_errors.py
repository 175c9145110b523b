"""Bad input to attention: the error names the argument, what was expected and what came."""

from __future__ import annotations

import re

import pytest
import torch

import mmer_fast as mf
from mmer_fast import _extension

Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8)

PADDED = {
    "not a tensor": ({"q": [1.0]}, TypeError, "q must be a torch.Tensor, got list"),
    "integer q": ({"q": Q.long()}, TypeError, "q must be float32, float64, bfloat16 or float16, got torch.int64"),
    "sparse": (
        {"k": K.to_sparse()},
        TypeError,
        "k must be a dense tensor, with lengths where rows are ragged, got torch.sparse_coo",
    ),
    "dimensions": ({"q": Q[0]}, ValueError, "q must have shape (B, H, L, D), got (4, 5, 8)"),
    "dimensions of k": ({"k": K[0]}, ValueError, "k must have shape (B, Hk, S, D), got (2, 6, 8)"),
    "dtypes": ({"k": K.half()}, TypeError, "k must have the dtype torch.float32 of q, got torch.float16"),
    "device": ({"v": K.to("meta")}, ValueError, "v must be on the device of q (cpu), got meta"),
    "width": ({"k": K[..., :7]}, ValueError, "k must have the head width 8 of q, got 7"),
    "no width": ({"q": Q[..., :0], "k": K[..., :0], "v": K[..., :0]}, ValueError, "q must have a head width D >= 1"),
    "batch": ({"k": K[:1], "v": K[:1]}, ValueError, "k must have the batch size 2 of q, got 1"),
    "k and v": ({"v": K[:, :, :5]}, ValueError, "v must have the shape (2, 2, 6, 8) of k, got (2, 2, 5, 8)"),
    "heads": (
        {"k": torch.zeros(2, 3, 6, 8), "v": torch.zeros(2, 3, 6, 8)},
        ValueError,
        "k must have a number of heads that divides the 4 of q, got 3",
    ),
    "weights shape": (
        {"key_weights": torch.ones(2, 5)},
        ValueError,
        "key_weights must have shape (B, S) = (2, 6) or (B, H, S) = (2, 4, 6), got (2, 5)",
    ),
    "weights dtype": ({"key_weights": torch.ones(2, 6, dtype=torch.bool)}, TypeError, "key_weights must be float32"),
    "mask dtype": ({"mask": torch.ones(2, 6)}, TypeError, "mask must be a bool tensor, got torch.float32"),
    "return_lse": ({"return_lse": "no"}, TypeError, "return_lse must be a bool, got str"),
    "mask shape": (
        {"mask": torch.ones(5, 6, dtype=torch.bool)},
        ValueError,
        "mask must have shape (B, S) = (2, 6), got (5, 6) (what differs from query to query belongs into bias",
    ),
    "lengths dtype": ({"lengths": torch.ones(2)}, TypeError, "lengths must be an integer tensor, got torch.float32"),
    "lengths shape": ({"lengths": torch.ones(3).long()}, ValueError, "lengths must have shape (B,) = (2,), got (3,)"),
    "lengths beyond": (
        {"lengths": torch.tensor([6, 7])},
        ValueError,
        "lengths must be within [0, S=6], got 7 in row 1",
    ),
    "query lengths": (
        {"query_lengths": torch.tensor([-1, 2])},
        ValueError,
        "query_lengths must be within [0, L=5], got -1 in row 0",
    ),
    "bias": (
        {"bias": torch.zeros(2, 4, 6, 6)},
        ValueError,
        "bias must have shape (1|B, 1|H, 1|L, S) = (1|2, 1|4, 1|5, 6), got (2, 4, 6, 6)",
    ),
    "bias dimensions": ({"bias": torch.zeros(5, 6)}, ValueError, "got (5, 6)"),
    "scale": ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    "scale type": ({"scale": "1"}, TypeError, "scale must be a number, got str"),
    "dropout": ({"dropout_p": 1.0}, ValueError, "dropout_p must be within [0, 1), got 1"),
    "seed": ({"dropout_p": 0.1, "seed": -1}, ValueError, "seed must be within [0, 2^63), got -1"),
    "seed type": ({"dropout_p": 0.1, "seed": 0.5}, TypeError, "seed must be an int or an int64 tensor, got float"),
    "seed tensor": (
        {"dropout_p": 0.1, "seed": torch.zeros(2, dtype=torch.int64)},
        TypeError,
        "seed must be an int64 tensor of one element, got torch.int64 of shape (2,)",
    ),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be one of"),
}


@pytest.mark.parametrize("case", PADDED)
def test_padded(case):
    changed, error, message = PADDED[case]
    with pytest.raises(error, match=re.escape(message)):
        mf.masked_attention(**{"q": Q, "k": K, "v": K, **changed})


TOKENS = torch.zeros(5, 2, 8)
CU = torch.tensor([0, 3, 5])

PACKED = {
    "dimensions": ({"q": Q}, ValueError, "q must have shape (Tq, H, D), got (2, 4, 5, 8)"),
    "decreasing": (
        {"cu_seqlens_q": torch.tensor([0, 3, 2, 5])},
        ValueError,
        "cu_seqlens_q must not decrease, got 3 then 2 at sample 1",
    ),
    "start": ({"cu_seqlens_q": CU + 1}, ValueError, "cu_seqlens_q must go from 0 to the 5 tokens of q, got 1 to 6"),
    "end": ({"cu_seqlens_k": CU - CU}, ValueError, "cu_seqlens_k must go from 0 to the 5 tokens of k, got 0 to 0"),
    "shape": ({"cu_seqlens_q": CU[None]}, ValueError, "cu_seqlens_q must have shape (B + 1,), got (1, 3)"),
    "dtype": ({"cu_seqlens_q": CU.float()}, TypeError, "cu_seqlens_q must be an integer tensor, got torch.float32"),
    "samples": (
        {"cu_seqlens_k": torch.tensor([0, 5])},
        ValueError,
        "cu_seqlens_k must have the shape (3,) of cu_seqlens_q, got (2,)",
    ),
    "other keys": (
        {"k": TOKENS[:4], "v": TOKENS[:4]},
        ValueError,
        "cu_seqlens_k must go from 0 to the 4 tokens of k, got 0 to 5",
    ),
    "maximum": ({"max_seqlen_q": 2}, ValueError, "max_seqlen_q must be >= 3, the longest sample, got 2"),
    "maximum type": ({"max_seqlen_k": 3.0}, TypeError, "max_seqlen_k must be an int, got float"),
    "weights": (
        {"key_weights": torch.ones(2, 5)},
        ValueError,
        "key_weights must have shape (Tk,) = (5,) or (Tk, H) = (5, 2), got (2, 5)",
    ),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed(case):
    changed, error, message = PACKED[case]
    with pytest.raises(error, match=re.escape(message)):
        mf.packed_attention(**{"q": TOKENS, "k": TOKENS, "v": TOKENS, "cu_seqlens_q": CU, **changed})


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan")])
def test_checked_mode_looks_at_the_weights(bad):
    m = torch.ones(2, 6)
    m[1, 4] = bad
    mf.masked_attention(Q, K, K, m)
    with mf.checked(), pytest.raises(ValueError, match=r"key_weights must be within \[0, 1\], got \S+ at \(1, 4\)"):
        mf.masked_attention(Q, K, K, m)


def test_dropout_under_determinism_needs_a_seed():
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match=r"seed must be given for dropout_p=0\.1 while"):
            mf.masked_attention(Q, K, K, dropout_p=0.1)
        mf.masked_attention(Q, K, K, dropout_p=0.1, seed=0)
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)  # as tests/conftest.py has it


def test_a_backend_that_cannot_serve_says_why():
    with pytest.raises(mf.BackendUnavailable, match="float64 is computed by the reference backend alone"):
        mf.masked_attention(Q.double(), K.double(), K.double(), backend="cpu")
    with pytest.raises(mf.BackendUnavailable, match="masked_attention: backend='cuda' cannot serve cpu tensors"):
        mf.masked_attention(Q, K, K, backend="cuda")


@pytest.mark.skipif(_extension.unavailable_reason() is not None, reason="needs the compiled library")
@pytest.mark.parametrize("case", ["cu_seqlens", "weights", "bias", "lengths", "dtype", "seed", "mixed layouts"])
def test_the_compiled_operator_checks_for_itself(case):
    """Who calls the dispatcher's operator without the public function must not reach beyond the memory."""
    q, k = torch.zeros(5, 2, 8), torch.zeros(6, 2, 8)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 5], [0, 2, 6]))
    arguments = [q, k, k, None, None, None, None, None, cu_q, cu_k, 3, 4, False, 0.3, 0.0, None, False]
    place, value, message = {
        "cu_seqlens": (9, torch.tensor([0, 2, 9], dtype=torch.int32), "cu_seqlens_k must not decrease"),
        "weights": (3, torch.ones(5), "key_weights must have shape"),
        "bias": (5, torch.zeros(1, 1, 2, 4), "bias must have shape"),
        "lengths": (6, torch.tensor([1, 1]), "lengths, query_lengths and mask are for padded"),
        "dtype": (1, k.half(), "k must have the dtype of q"),
        "seed": (14, 0.5, "seed must be an int64 tensor"),
        "mixed layouts": (8, None, "cu_seqlens_q and cu_seqlens_k belong to packed"),
    }[case]
    torch.ops.mmer_fast.attention_forward(*arguments)
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mmer_fast.attention_forward(*arguments)
