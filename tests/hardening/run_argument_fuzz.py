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
from drawn_tensors import Arguments, Call, flat
from fuzzed_gradients import Gradients, check_gradients, with_gradients
from fuzzed_modules import check_module
from fuzzing import examples
from gradient_bounds import BOUNDS
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from module_strategies import MODULE_STRATEGIES
from torch import Tensor
from weight_strategies import ALSO_NAMED, WEIGHT_STRATEGIES

import mmer_fast as mf

EXAMPLES = 60
EXAMPLES_OF_OPERATORS = 150  # of which some have a gradient that is not 0
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
    products = any(kind in function.__name__.lower() for kind in ("attention", "transformer", "_kl_"))
    squares = products or arguments.get("solver") == "sinkhorn"
    floating = [x.double().abs() for x in flat(list(arguments.values())) if x.is_floating_point() and not x.is_meta]
    moderate = all(bool((x < 1e15).all()) for x in floating)
    # normalizer="max" makes a temperature of the square of the largest finite score
    hot = arguments.get("normalizer") == "max" and any(bool(((x >= 1e15) & x.isfinite()).any()) for x in floating)
    return not drawn and not hot and (moderate or not squares)


def close(got: Tensor, expected: Tensor) -> bool:
    if got.is_meta or got.numel() == 0:
        return got.shape == expected.shape and got.dtype == expected.dtype
    tolerance = TOLERANCE[got.dtype]
    return torch.allclose(got.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def has_gradients(function: Callable[..., Any]) -> bool:
    return not function.__name__.endswith("_") and function.__name__ != "grad_norm"


def check(function: Callable[..., Any], arguments: Arguments, seed: int) -> bool:
    """An error that names an argument, or the reference's result and gradients. Whether some of these are not 0."""
    untouched = arguments if has_gradients(function) else copy.deepcopy(arguments)
    gradients: Gradients = {}
    try:
        if has_gradients(function):
            results, gradients = with_gradients(function, arguments, seed)
        else:
            results = list(flat(function(**arguments)))
    except ERRORS as error:
        if not names_an_argument(str(error), function):
            raise AssertionError(f"{type(error).__name__} names no argument: {error}") from error
        return False
    if not comparable(function, arguments):
        return False
    if any(x.is_meta for x in (*results, *flat(gradients))):
        return False
    if "options" in arguments:
        check_module(function, arguments, seed, results, gradients)
    else:
        check_results(function, arguments, untouched, results)
    if function.__name__ in BOUNDS:
        check_gradients(function, arguments, seed, gradients)
    return any(bool(grad.any()) for grad in flat(gradients))


def check_results(
    function: Callable[..., Any], arguments: Arguments, untouched: Arguments, results: list[Tensor]
) -> None:
    """They are the reference's of the `untouched` arguments, which what works in place has changed."""
    expected = [x.detach() for x in flat(reference(function, untouched))]
    if not has_gradients(function):  # norms that are not finite need not be so in the same way
        results, expected = ([x.masked_fill(~x.isfinite(), torch.inf) for x in got] for got in (results, expected))
    if function.__name__.endswith("_"):
        name = "params" if "params" in arguments else "module_or_params"
        results += list(flat(arguments[name]))
        expected += list(flat(untouched[name]))
    assert len(results) == len(expected)
    for got, want in zip(results, expected, strict=True):
        assert close(got, want), f"{got} is not {want}"


def problem_of(name: str, last: Path) -> str | None:
    """What is wrong with calls of STRATEGIES[name]: the first error, or that no gradient but 0 was compared."""
    compared: list[bool] = []
    has_gradient = name not in WEIGHT_STRATEGIES
    is_operator = has_gradient and name not in MODULE_STRATEGIES

    @examples(EXAMPLES_OF_OPERATORS if is_operator else EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(call=STRATEGIES[name], seed=st.integers(0, 999))
    def search(call: Call, seed: int) -> None:
        last.write_text(described := describe(*call))
        try:
            compared.append(check(*call, seed))
        except Exception as error:
            raise AssertionError(f"{described}\n{type(error).__name__}: {error}") from error

    try:
        search()
    except BaseException as error:
        return "\n\n".join(map(str, getattr(error, "exceptions", [error])))
    return "no gradient but 0 was compared" if has_gradient and not any(compared) else None


def main(last: str) -> None:
    faulthandler.enable()
    warnings.simplefilter("ignore", RuntimeWarning)  # of what falls back to the reference
    torch.set_num_threads(1)
    print(json.dumps({name: problem_of(name, Path(last)) for name in STRATEGIES}))


if __name__ == "__main__":
    main(*sys.argv[1:])
