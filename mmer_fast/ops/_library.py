"""The dispatcher namespace ``mmer_fast``: schemas, fakes and kernels that Python provides.

Schemas are defined here, in Python, so that they exist also where the compiled library does not (a pure-Python
install): the compiled library only adds kernels for the ``CPU`` and ``CUDA`` keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

NAMESPACE = "mmer_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(name: str, schema: str) -> None:
    """Defines ``mmer_fast::name`` with `schema` (arguments and returns, without the name)."""
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))


def implement(name: str, function: Callable, *, key: str = "CompositeExplicitAutograd") -> None:
    """Registers a Python kernel for ``mmer_fast::name``."""
    LIBRARY.impl(name, function, key)
