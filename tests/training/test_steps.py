"""What is said of a step that would be slow on this machine."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
from small_training import TRAIN, small_data, small_model

from mmer_fast.training import steps


@pytest.mark.parametrize("has_products", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bfloat16_is_warned_of_where_the_cpu_has_no_products_of_it(
    monkeypatch: pytest.MonkeyPatch, precision: str, has_products: bool
) -> None:
    monkeypatch.setattr(steps, "has_bfloat16_products", lambda: has_products)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        steps.chosen_step(small_model(small_data()), dataclasses.replace(TRAIN, precision=precision))
    slow = precision == "bfloat16" and not has_products
    assert ["some ten times slower" in str(warning.message) for warning in said] == ([True] if slow else [])
