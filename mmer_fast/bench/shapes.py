"""Cases of a user's own shapes: ``mmer-fast bench --op soft_topk --case B=64,n=500,k=50 --dtype float32``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmer_fast.bench import timing
from mmer_fast.bench.attention import cases as attention_cases
from mmer_fast.bench.attention import measure as attention_measure
from mmer_fast.bench.attention import peers as attention_peers
from mmer_fast.bench.harness import Row
from mmer_fast.bench.perturbation import cases as perturbation_cases
from mmer_fast.bench.perturbation import measure as perturbation_measure
from mmer_fast.bench.perturbation import peers as perturbation_peers
from mmer_fast.bench.soft_topk import cases as soft_topk_cases
from mmer_fast.bench.soft_topk import measure as soft_topk_measure
from mmer_fast.bench.soft_topk import peers as soft_topk_peers


class ShapeError(ValueError):
    """A case, dtype or contestant that the operator does not have."""


@dataclass(frozen=True)
class Size:
    """A number of a case.

    Attributes:
        meaning: for people.
        default: None of one that must be given.
        at_least, at_most: its range.
        whole: whether it is an integer.
    """

    meaning: str
    default: float | None = None
    at_least: float = 1
    at_most: float = math.inf
    whole: bool = True

    def read(self, name: str, text: str) -> float:
        """Raises `ShapeError` where `text` is no such number."""
        expected = f"{'an integer' if self.whole else 'a number'} of at least {self.at_least:g}"
        expected += f" and at most {self.at_most:g}" if self.at_most < math.inf else ""
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            value = math.nan
        if not self.at_least <= value <= self.at_most or math.isinf(value):
            raise ShapeError(f"--case: {name} must be {expected}, got {text!r}")
        return value


@dataclass(frozen=True)
class Operator:
    """An operator as `mmer-fast bench` sees it.

    Attributes:
        sizes: by name, in the order in which they are shown.
        dtypes: torch's name → that of the operator's cases.
        build: (name, sizes, dtype of the cases) -> a case.
        measure: (case, contestants, device, plan) -> rows.
        select: (device, parts of names or None) -> contestants.
        show: prints the rows of a case.
        packages: distributions whose versions a result has.
    """

    sizes: Mapping[str, Size]
    dtypes: Mapping[str, str]
    build: Callable[[str, dict[str, Any], str], Any]
    measure: Callable[[Any, Any, str, timing.Plan], list[Row]]
    select: Callable[[str, list[str] | None], Sequence[Any]]
    show: Callable[[list[Row]], None]
    packages: tuple[str, ...]

    @property
    def usage(self) -> str:
        """What a case looks like, e.g. ``B=...,n=...[,k=...]``."""
        given = ",".join(f"{name}=..." for name, size in self.sizes.items() if size.default is None)
        return given + "".join(f"[,{name}=...]" for name, size in self.sizes.items() if size.default is not None)


def read_case(operator: Operator, text: str, dtype: str) -> Any:
    """The case that ``name=number,name=number`` describes.

    Raises:
        ShapeError: another name, dtype or number than the operator has, a name twice, or one that is missing.
    """
    if dtype not in operator.dtypes:
        raise ShapeError(f"--dtype must be one of {', '.join(operator.dtypes)}, got {dtype!r}")
    values = {name: size.default for name, size in operator.sizes.items() if size.default is not None}
    given: set[str] = set()
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        if not equals or name not in operator.sizes:
            raise ShapeError(f"--case must look like {operator.usage}, got {part!r}")
        if name in given:
            raise ShapeError(f"--case: {name} must be given once, got {text!r}")
        given.add(name)
        values[name] = operator.sizes[name].read(name, number)
    if missing := [name for name in operator.sizes if name not in values]:
        raise ShapeError(f"--case must look like {operator.usage}, got {text!r} without {', '.join(missing)}")
    return operator.build(text, values, operator.dtypes[dtype])


def _soft_topk(name: str, sizes: dict[str, Any], dtype: str) -> soft_topk_cases.Case:
    k = sizes["k"] or None
    if k is not None and k >= sizes["n"]:
        raise ShapeError(f"--case: k must be below n, got k={k}, n={sizes['n']}")
    return soft_topk_cases.Case(
        name, sizes["B"], sizes["n"], k=k, epsilon=sizes["epsilon"], dtype=dtype, ragged=bool(sizes["ragged"])
    )


def _attention(name: str, sizes: dict[str, Any], dtype: str) -> attention_cases.Case:
    return attention_cases.Case(name, sizes["B"], sizes["H"], sizes["D"], sizes["L"], dtype, sizes["padding"])


def _perturbation(name: str, sizes: dict[str, Any], dtype: str) -> perturbation_cases.Case:
    model = perturbation_cases.Small(sizes["tensors"], sizes["size"])
    return perturbation_cases.Case(name, model, dtype, radius=0.05 if dtype == "fp32" else 5.0)


def _packages(contestants: Sequence[Any]) -> tuple[str, ...]:
    return tuple(sorted({contestant.package for contestant in contestants if contestant.package}))


OPERATORS = {
    "soft_topk": Operator(
        sizes={
            "B": Size("rows"),
            "n": Size("scores of a row", at_least=2),
            "k": Size("how many are chosen; 0: 0.4 n", 0, at_least=0),
            "epsilon": Size("temperature", 0.1, at_least=1e-3, whole=False),
            "ragged": Size("1: lengths drawn from 1..n", 0, at_least=0, at_most=1),
        },
        dtypes={"float32": "float32", "bfloat16": "bfloat16"},
        build=_soft_topk,
        measure=soft_topk_measure.measure,
        select=soft_topk_peers.select,
        show=soft_topk_measure.show,
        packages=_packages(soft_topk_peers.CONTESTANTS),
    ),
    "attention": Operator(
        sizes={
            "B": Size("samples"),
            "L": Size("tokens of the longest sample"),
            "H": Size("heads", 8),
            "D": Size("width of a head", 64),
            "padding": Size("share of padding", 0.5, at_least=0, at_most=0.95, whole=False),
        },
        dtypes={"float32": "fp32", "bfloat16": "bf16"},
        build=_attention,
        measure=attention_measure.measure,
        select=attention_peers.select,
        show=attention_measure.show,
        packages=_packages(attention_peers.CONTESTANTS),
    ),
    "perturbation": Operator(
        sizes={"tensors": Size("parameters"), "size": Size("entries of each")},
        dtypes={"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"},
        build=_perturbation,
        measure=perturbation_measure.measure,
        select=perturbation_peers.select,
        show=perturbation_measure.show,
        packages=_packages(perturbation_peers.CONTESTANTS),
    ),
}
