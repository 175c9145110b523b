"""Which backend the automatic choice takes: a table of the operator, and what a call cannot have."""

from __future__ import annotations

import pytest

from mmer_fast.ops import _backends


@pytest.fixture(autouse=True)
def _everything_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_REASONS", dict.fromkeys(_backends._REASONS))


def test_each_operator_has_its_order():
    assert _backends.select("soft_topk", "cuda", None) == "cuda"
    assert _backends.select("masked_attention", "cuda", None) == "triton"
    assert _backends.select("packed_attention", "cpu", None) == "cpu"


def test_a_call_may_rule_out_backends():
    assert _backends.select("masked_attention", "cuda", None, {"triton": "no"}) == "cuda"
    cannot = {"triton": "too wide", "cuda": "too wide"}
    assert _backends.select("masked_attention", "cuda", None, cannot, quiet=True) == "reference"
    _backends._Choice.warned.discard(("masked_attention", "cuda"))
    with pytest.warns(RuntimeWarning, match=r"slow reference backend for cuda tensors .*triton: too wide"):
        _backends.select("masked_attention", "cuda", None, cannot)
    with pytest.raises(_backends.BackendUnavailable, match="triton: too wide"):
        _backends.select("masked_attention", "cuda", "triton", cannot)
