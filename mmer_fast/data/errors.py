"""The exceptions that reading or validating a data set raises."""

from __future__ import annotations


class DataError(ValueError):
    """A data set that cannot be used; the message names the file or key, what was expected and what came."""


class MissingPart(DataError):
    """A data set without a split, or without labels, that its purpose needs (`needs.Needs`)."""
