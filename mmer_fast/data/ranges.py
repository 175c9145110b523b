"""The arguments of the generators of data, held to their ranges: a `DataError` names the one that is not."""

from __future__ import annotations

from collections.abc import Mapping

from mmer_fast.data.errors import DataError


def check_sizes(sizes: Mapping[str, int], seed: int) -> None:
    """Split -> number of samples, of the arguments ``n_<split>``, at least 1; the seed, at least 0."""
    check_least({f"n_{name}": (size, 1) for name, size in sizes.items()} | {"seed": (seed, 0)})


def check_least(values: Mapping[str, tuple[int, int]]) -> None:
    """Name -> (value, least value)."""
    for name, (value, least) in values.items():
        if value < least:
            raise DataError(f"{name}: expected at least {least}; got {value}")


def check_factors(**values: float) -> None:
    """Finite values >= 0."""
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise DataError(f"{name}: expected a finite value >= 0; got {value}")


def check_parts(**shares: float) -> None:
    """Shares of one whole."""
    if min(shares.values()) < 0 or not sum(shares.values()) <= 1:
        got = " and ".join(f"{share}" for share in shares.values())
        raise DataError(f"{', '.join(shares)}: expected values >= 0 with a sum of at most 1; got {got}")
