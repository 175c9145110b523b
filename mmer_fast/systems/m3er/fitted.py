"""Modules whose buffers come from the training data, and whose sizes are known only then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class FittedModule(nn.Module):
    """A module whose buffers have a first dimension that `fit` decides: loading a checkpoint takes its size."""

    def assign(self, **values: Tensor) -> None:
        """Give buffers new values of any first dimension, on the device and in the dtype of the old ones."""
        for name, value in values.items():
            setattr(self, name, value.to(getattr(self, name)))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, buffer in self._buffers.items():
            stored = state_dict.get(prefix + name)
            if buffer is not None and stored is not None and stored.shape[1:] == buffer.shape[1:]:
                setattr(self, name, buffer.new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
