"""Arguments of what moves weights: the operators over lists of tensors, `mf.perturbed` and SAM.

The weights of a call that is refused keep their bits, and so do those of one that is not, once they are restored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from drawn_tensors import BACKENDS, FLOATS, Arguments, Call, any_shape, bits_kept, disturbed, flat, maybe, tensors
from hypothesis import strategies as st
from torch import Tensor, nn

import mmer_fast as mf
from mmer_fast import ops

SCALES = st.sampled_from([None, 0.5, torch.tensor(0.25)])


@st.composite
def perturbation(draw: Any, function: Callable[..., Any]) -> Call:
    shapes = draw(st.lists(any_shape, min_size=1, max_size=3))
    dtype = draw(st.sampled_from(FLOATS))
    params = [draw(tensors(shape, dtype)) for shape in shapes]
    lists = {
        "params": params,
        "grads": [draw(tensors(shape, draw(st.sampled_from(FLOATS)))) for shape in shapes],
        "stash": [torch.empty(w.shape, dtype=w.dtype) for w in params],
    }
    options = {"scope": draw(st.sampled_from(["global", "tensor", "awp"])), "adaptive": draw(st.booleans())}
    arguments: Arguments = {"backend": draw(BACKENDS)}
    if function is ops.restore_:
        arguments |= {name: lists[name] for name in ("params", "stash")}
    elif function is ops.grad_norm:
        arguments |= {name: lists[name] for name in ("params", "grads")} | options
    else:
        arguments |= lists | options | {"radius": draw(st.sampled_from([0, 0.5, 1e3]))}
    return function, draw(disturbed(arguments))


def perturbed_(module_or_params: Any, radius: Any, **options: Any) -> list[Tensor]:
    """What `mf.perturbed` says, and the weights inside of it."""
    is_module = isinstance(module_or_params, nn.Module)
    weights = list(flat(list(module_or_params.parameters()) if is_module else module_or_params))
    with bits_kept(weights), mf.perturbed(module_or_params, radius, **options) as info:
        return [info.norm, info.factor, *(w.detach().clone() for w in weights)]


perturbed_.__signature__ = inspect.signature(mf.perturbed)  # type: ignore[attr-defined]


@st.composite
def perturbed(draw: Any) -> Call:
    """Weights in a list, in a list with their names, or in a module; gradients in their order, or by name."""
    _, arguments = draw(perturbation(ops.perturb_))
    weights, grads = arguments.pop("params"), arguments["grads"]
    del arguments["stash"]
    arguments |= {"select": None, "average_over": None, "inv_scale": draw(SCALES), "norm": None}
    if isinstance(weights, list) and all(isinstance(w, Tensor) for w in weights):
        weights = [w.detach().requires_grad_(w.is_floating_point()) for w in weights]
        names = [str(i) for i in range(len(weights))]
        kind = draw(st.sampled_from(["list", "names", "module"]))
        if kind == "names":
            names = [f"weight {name}" for name in names]
            weights = list(zip(names, weights, strict=True))
        elif kind == "module" and all(w.requires_grad for w in weights):
            weights = nn.ParameterList([nn.Parameter(w.detach()) for w in weights])
            arguments["select"] = draw(st.sampled_from([None, None, "*", ["0"], nn.ParameterList]))
        if isinstance(grads, list) and len(grads) == len(names) and draw(st.booleans()):
            arguments["grads"] = dict(zip(names, grads, strict=True))
        shape = (len(names),) if arguments["scope"] == "tensor" else ()
        arguments["norm"] = draw(maybe(st.sampled_from([0.5, 2.0]).map(lambda n: torch.full(shape, n).double())))
    arguments["module_or_params"] = weights
    return perturbed_, draw(disturbed(arguments))


def sam_(params: Any, base_optimizer: Any, rho: Any, inv_scale: Any, **options: Any) -> list[Tensor]:
    """Both steps of SAM with the gradients at hand: what the first says, and the weights behind it."""
    weights = list(flat(params))
    with bits_kept(weights):
        optimizer = mf.optim.SAM(params, base_optimizer, rho, lr=0.5, **options)
        optimizer.first_step(inv_scale=inv_scale)
        said = [x for info in optimizer.last_info for x in (info.norm, info.factor)]
        moved = [w.detach().clone() for w in weights]
        optimizer.restore_()
    optimizer.second_step()
    return said + moved


sam_.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *list(inspect.signature(mf.optim.SAM).parameters.values())[:-1],
        inspect.Parameter("inv_scale", inspect.Parameter.KEYWORD_ONLY),
    ]
)


@st.composite
def sam(draw: Any) -> Call:
    """Weights most of which have a gradient, in one group or in two of which the second has a radius of its own."""
    dtype = draw(st.sampled_from([*FLOATS, *FLOATS, torch.complex64, torch.float8_e4m3fn]))
    params = []
    for shape in draw(st.lists(any_shape, min_size=1, max_size=3)):
        w = draw(tensors(shape, dtype)).detach().requires_grad_()
        if draw(st.sampled_from([True, True, False])):
            w.grad = draw(tensors(shape, dtype))
        params.append(w)
    in_groups = len(params) > 1 and draw(st.booleans())
    arguments = {
        "params": [{"params": params[:1]}, {"params": params[1:], "rho": 0.25}] if in_groups else params,
        "base_optimizer": torch.optim.SGD,
        "rho": draw(st.sampled_from([0, 0.5, 1e3])),
        "adaptive": draw(st.booleans()),
        "scope": draw(st.sampled_from(["global", "tensor", "awp"])),
        "average_over": None,
        "inv_scale": draw(SCALES),
        "backend": draw(BACKENDS),
    }
    return sam_, draw(disturbed(arguments))


ALSO_NAMED = {perturbed_: {"parameter", "gradient"}, sam_: {"parameter", "gradient", "grads"}}
"""What errors may name in the place of an argument: one of those in it."""

WEIGHT_STRATEGIES: dict[str, st.SearchStrategy[Call]] = {
    "perturbed": perturbed(),
    "SAM": sam(),
    **{f.__name__: perturbation(f) for f in (ops.grad_norm, ops.perturb_, ops.restore_)},
}
