from __future__ import annotations

import pytest
from tied_model import Model, loss


@pytest.fixture
def model() -> Model:
    """With the gradients of one backward pass."""
    model = Model()
    loss(model).backward()
    return model
