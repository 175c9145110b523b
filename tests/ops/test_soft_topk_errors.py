"""Bad input: the message names the argument, what was expected and what came."""

from __future__ import annotations

import math

import pytest
import torch

import mmer_fast as mf

SCORES = torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "scores must be a torch.Tensor, got list", ([1.0], 1)),
        (TypeError, "scores must be float32.*got torch.int64", (torch.zeros(2, 3, dtype=torch.int64), 1)),
        (TypeError, r"scores must be a dense tensor, .*, got torch\.sparse_coo", (SCORES.to_sparse(), 1)),
        (ValueError, "scores must have at least one dimension", (torch.tensor(1.0), 1)),
        (ValueError, r"k must be within \[0, 5\], got 6", (SCORES, 6)),
        (ValueError, r"k must be within \[0, 5\], got -1", (SCORES, -1)),
        (ValueError, "k must be within .*got nan", (SCORES, math.nan)),
        (TypeError, "k must be a number, got str", (SCORES, "2")),
        (TypeError, "k must be a number, got bool", (SCORES, True)),
        (TypeError, "k must be a floating-point or integer tensor", (SCORES, torch.tensor([True] * 3))),
        (ValueError, r"k must broadcast to the batch shape \(3,\).*got \(4,\)", (SCORES, torch.ones(4))),
        (ValueError, r"k must broadcast", (SCORES, torch.ones(2, 3))),
        (ValueError, r"k must be within \[0, 5\] in every row, got 9", (SCORES, torch.tensor([1.0, 9.0, 2.0]))),
    ],
)
def test_scores_and_k(error, match, arguments):
    with pytest.raises(error, match=match):
        mf.soft_topk(*arguments)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "epsilon must be finite and > 0, got 0", {"epsilon": 0.0}),
        (ValueError, "epsilon must be finite and > 0, got -1", {"epsilon": -1}),
        (ValueError, "epsilon must be finite and > 0, got inf", {"epsilon": math.inf}),
        (ValueError, "epsilon must be finite and > 0 in every row, got 0", {"epsilon": torch.tensor([1.0, 0.0, 1.0])}),
        (ValueError, r"epsilon must broadcast", {"epsilon": torch.ones(3, 5)}),
        (TypeError, "epsilon must be a number, got NoneType", {"epsilon": None}),
        (TypeError, "lengths must be an integer tensor, got torch.float32", {"lengths": torch.ones(3)}),
        (TypeError, "lengths must be an integer tensor, got list", {"lengths": [1, 2, 3]}),
        (ValueError, r"lengths must have the batch shape \(3,\)", {"lengths": torch.ones(4, dtype=torch.long)}),
        (ValueError, r"lengths must be within \[0, n=5\], got 6 in row 1", {"lengths": torch.tensor([5, 6, 5])}),
        (ValueError, r"lengths must be within \[0, n=5\], got -2 in row 2", {"lengths": torch.tensor([5, 5, -2])}),
        (ValueError, r"k must be within \[0, 1\], the valid entries of row 1", {"lengths": torch.tensor([5, 1, 5])}),
        (TypeError, "mask must be a bool tensor, got torch.float32", {"mask": torch.ones(3, 5)}),
        (ValueError, r"mask must have the shape \(3, 5\)", {"mask": torch.ones(3, 4, dtype=torch.bool)}),
        (ValueError, "k must be within .* valid entries of row 0", {"mask": torch.zeros(3, 5, dtype=torch.bool)}),
        (
            ValueError,
            "lengths and mask are alternatives",
            {"lengths": torch.tensor([5, 5, 5]), "mask": torch.ones(3, 5, dtype=torch.bool)},
        ),
        (ValueError, "solver must be 'newton' or 'sinkhorn', got 'adam'", {"solver": "adam"}),
        (ValueError, "iterations is for solver='sinkhorn'", {"iterations": 5}),
        (ValueError, r"iterations must be within \[1, 2\^63\), got 0", {"solver": "sinkhorn", "iterations": 0}),
        (ValueError, r"iterations must be within \[1, 2\^63\), got 1", {"solver": "sinkhorn", "iterations": 10**30}),
        (TypeError, "iterations must be an int, got float", {"solver": "sinkhorn", "iterations": 2.5}),
        (ValueError, "normalizer must be a number > 0 or 'max', got 'min'", {"normalizer": "min"}),
        (ValueError, "normalizer must be finite and > 0, got 0", {"normalizer": 0}),
        (TypeError, "largest must be a bool, got int", {"largest": 1}),
        (TypeError, "return_info must be a bool, got str", {"return_info": "no"}),
        (ValueError, "backend must be one of 'reference'.*got 'tpu'", {"backend": "tpu"}),
    ],
)
def test_options(error, match, options):
    with pytest.raises(error, match=match):
        mf.soft_topk(SCORES, 2, **options)


def test_a_backend_that_cannot_serve_says_every_reason():
    with pytest.raises(mf.BackendUnavailable, match=r"cuda: .*cpu tensors") as caught:
        mf.soft_topk(SCORES, 2, backend="cuda")
    for name in ("reference: can run", "cpu:", "triton:"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, r"ratio must be within \[0, 1\], got 1.5", {"ratio": 1.5}),
        (TypeError, "ratio must be a number, got str", {"ratio": "0.4"}),
        (ValueError, r"k must be within \[0, 5\], got 7", {"k": 7}),
        (
            ValueError,
            r"k must be within \[0, 3\], the valid entries of row 1, got 4",
            {"k": 4, "lengths": torch.tensor([5, 3, 4])},
        ),
        (ValueError, "epsilon must be finite and > 0", {"epsilon": 0.0}),
    ],
)
def test_temporal_mask(error, match, options):
    with pytest.raises(error, match=match):
        mf.temporal_mask(SCORES, **options)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize(("layout", "got"), [(torch.strided, "a nested tensor"), (torch.jagged, r"torch\.jagged")])
def test_nested_scores(layout, got):
    nested = torch.nested.nested_tensor([torch.zeros(3), torch.zeros(5)], layout=layout)
    with pytest.raises(TypeError, match=rf"scores must be a dense tensor, with lengths .*, got {got}"):
        mf.soft_topk(nested, 1)
