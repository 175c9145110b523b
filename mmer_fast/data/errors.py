"""The one exception that reading or validating a data set raises."""

from __future__ import annotations


class DataError(ValueError):
    """A data set that cannot be used; the message names the file or key, what was expected and what came."""
