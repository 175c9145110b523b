"""Calls the public operators and modules with what hypothesis draws, in a process of its own, which a crash may end.

    python run_argument_fuzz.py LAST

Prints one line of JSON, ``{name: what was wrong, or null}``, with the names of STRATEGIES. The file LAST has the call
that is being made: after a crash, the one that did it.
"""

from __future__ import annotations

import copy
import faulthandler
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from argument_strategies import STRATEGIES
from drawn_tensors import Arguments, flat
from fuzzing import examples
from hypothesis import HealthCheck, given
from torch import Tensor
from weight_strategies import ALSO_NAMED

import mmer_fast as mf

EXAMPLES = 60
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 4e-2, torch.float16: 8e-3}
ERRORS = (TypeError, ValueError, mf.BackendUnavailable)


def describe(function: Callable[..., Any], arguments: Arguments) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, Tensor):
            values = "" if value.is_meta else f" {value.tolist()}"
            values += f" grad {shown(value.grad)}" if value.is_leaf and value.grad is not None else ""
            return f"<{value.dtype} {tuple(value.shape)} strides {value.stride()} on {value.device}{values}>"
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(map(shown, value))}]"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{name!r}: {shown(item)}' for name, item in value.items())}}}"
        return repr(value)

    return f"{function.__name__}({', '.join(f'{name}={shown(value)}' for name, value in arguments.items())})"


def names_an_argument(message: str, function: Callable[..., Any]) -> bool:
    words = set(inspect.signature(function).parameters) | {"backend"} | ALSO_NAMED.get(function, set())
    return any(re.search(rf"(?<!\w){word}(?!\w)", message) for word in words)


def reference(function: Callable[..., Any], arguments: Arguments) -> Any:
    with mf.use_backend("reference"):
        return function(**{name: value for name, value in arguments.items() if name != "backend"})


def comparable(function: Callable[..., Any], arguments: Arguments) -> bool:
    """Whether the backends promise the same: not of random numbers, nor where float32 overflows on the way."""
    drawn = arguments.get("dropout_p") and arguments["seed"] is None
    products = any(kind in function.__name__.lower() for kind in ("attention", "transformer"))
    squares = products or arguments.get("solver") == "sinkhorn"
    floating = [x for x in flat(list(arguments.values())) if x.is_floating_point() and not x.is_meta]
    moderate = all(bool((x.double().abs() < 1e15).all()) for x in floating)
    return not drawn and (moderate or not squares)


def close(got: Tensor, expected: Tensor) -> bool:
    if got.is_meta or got.numel() == 0:
        return got.shape == expected.shape and got.dtype == expected.dtype
    tolerance = TOLERANCE[got.dtype]
    return torch.allclose(got.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def with_gradients(function: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    """The results, and then a backward pass through them, which must not fail."""
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize > 1
    }
    results = list(flat(function(**{**arguments, **leaves})))
    differentiable = [x for x in results if x.requires_grad]
    if differentiable:
        torch.autograd.grad(differentiable, list(leaves.values()), differentiable, allow_unused=True)
    return [x.detach() for x in results]


def check(function: Callable[..., Any], arguments: Arguments) -> None:
    """An error that names an argument, or the reference's result."""
    in_place = function.__name__.endswith("_")
    untouched = copy.deepcopy(arguments) if in_place else arguments
    try:
        if in_place or function.__name__ == "grad_norm":
            results = list(flat(function(**arguments)))
        else:
            results = with_gradients(function, arguments)
    except ERRORS as error:
        if not names_an_argument(str(error), function):
            raise AssertionError(f"{type(error).__name__} names no argument: {error}") from error
        return
    if not comparable(function, arguments):
        return
    expected = [x.detach() for x in flat(reference(function, untouched))]
    if in_place or function.__name__ == "grad_norm":  # norms that are not finite need not be so in the same way
        results, expected = ([x.masked_fill(~x.isfinite(), torch.inf) for x in got] for got in (results, expected))
    if in_place:
        name = "params" if "params" in arguments else "module_or_params"
        results += list(flat(arguments[name]))
        expected += list(flat(untouched[name]))
    assert len(results) == len(expected)
    for got, want in zip(results, expected, strict=True):
        assert close(got, want), f"{got} is not {want}"


def main(last: str) -> None:
    faulthandler.enable()
    warnings.simplefilter("ignore", RuntimeWarning)  # of what falls back to the reference
    torch.set_num_threads(1)
    problems: dict[str, str | None] = {}
    for name, strategy in STRATEGIES.items():

        @examples(EXAMPLES, suppress_health_check=list(HealthCheck))
        @given(call=strategy)
        def search(call: tuple[Callable[..., Any], Arguments]) -> None:
            Path(last).write_text(described := describe(*call))
            try:
                check(*call)
            except Exception as error:
                raise AssertionError(f"{described}\n{type(error).__name__}: {error}") from error

        try:
            search()
            problems[name] = None
        except BaseException as error:
            problems[name] = "\n\n".join(map(str, getattr(error, "exceptions", [error])))
    print(json.dumps(problems))


if __name__ == "__main__":
    main(*sys.argv[1:])
