"""The dispatcher's namespace of the operators: schemas, fakes and kernels that Python provides.

Schemas are defined here, in Python, so that they exist also where the compiled library does not (a pure-Python
install): the compiled library only adds kernels for the ``CPU`` and ``CUDA`` keys. A build under another namespace
changes NAMESPACE, and MMER_NAMESPACE of csrc/tensor.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "mmer_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def qualified(name: str) -> str:
    """``NAMESPACE::name``."""
    return f"{NAMESPACE}::{name}"


def operator_of(name: str) -> Any:
    """The dispatcher's operator of a defined name."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def define(name: str, schema: str) -> None:
    """Defines the operator `name` with `schema` (arguments and returns, without the name)."""
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))


def implement(name: str, function: Callable, *, key: str = "CompositeExplicitAutograd") -> None:
    """Registers a Python kernel for the operator `name`."""
    LIBRARY.impl(name, function, key)
