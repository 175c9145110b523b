"""In-place adversarial weight perturbation over lists of tensors: two launches to perturb, one to restore.

    stash = w,   w <- w + gamma g/|g|_2        (RobMMR Eq. 14; SAM, ASAM and AWP are neighbours)

Subtracting the step again would not give w back (in float32 it leaves a few per cent of the entries changed, and more
each time), so the kernel that moves the weights also writes their old bits to a stash. These are the bare operators,
for those who keep their own lists; `mmer_fast.perturbed` is what a training loop wants: it finds parameters and
gradients, keeps the stash, restores after exceptions and understands sharded parameters.

The way of a call: `perturb_` validates and chooses a backend; the dispatcher's operator is csrc/perturbation.cpp (CPU,
CUDA), kernels/triton/perturbation.py or ops/perturbation_reference.py. No operator here has a derivative: the
perturbation is a constant of the loss that is computed with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmer_fast.ops import _backends, _validate
from mmer_fast.ops import perturbation_reference as reference
from mmer_fast.ops._library import LIBRARY, define, implement, operator_of, qualified

SCOPES = {"global": reference.GLOBAL, "tensor": reference.TENSOR, "awp": reference.AWP}
_SCHEMAS = {
    "grad_norm": "(Tensor[] grads, Tensor[] params, int scope, bool adaptive) -> (Tensor norms, Tensor weight_norms)",
    "perturb_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] stash, Tensor? norms, Tensor? weight_norms, float radius, "
        "int scope, bool adaptive) -> (Tensor norms, Tensor factors)"
    ),
    "restore_": "(Tensor(a!)[] params, Tensor[] stash) -> ()",
}
_PLAIN = (Tensor, torch.nn.Parameter)
_T = TypeVar("_T")
# Operators of one schema each; "" is the compiled one, whose kernel the dispatcher picks by device.
_SUFFIX = {"cpu": "", "cuda": "", "triton": "_triton", "reference": "_reference"}


def grad_norm(
    grads: Sequence[Tensor],
    *,
    scope: str = "global",
    params: Sequence[Tensor] | None = None,
    adaptive: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The L2 norm of gradients: one over all tensors, or one for each.

    Accumulates so widely that neither float16 gradients of norm 128000 nor float32 gradients of 1e-30 overflow or
    underflow. Not finite where a gradient is not. Not differentiable.

    Args:
        grads: tensors of any shapes and strides; float64, float32, bfloat16 or float16, mixed; one device.
        scope: ``"global"`` (one norm over all of them), ``"tensor"`` or ``"awp"`` (one each).
        params: the weights; only with `adaptive`, same shapes.
        adaptive: the norm of ``|w| g`` instead of ``g`` (ASAM, Kwon et al. 2021).
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None chooses.

    Returns:
        float64, ``()`` with scope ``"global"``, else ``(len(grads),)``.

    Raises:
        TypeError: something is not a dense floating-point tensor.
        ValueError: an unknown scope, no tensor, shapes or devices that do not fit.
    """
    number = scope_number(scope, adaptive)
    grads = _some("grads", grads)
    if adaptive and params is None:
        raise ValueError("params must be given with adaptive=True: the norm is that of |w| g")
    weights = _validate.tensors("params", params) if adaptive else []
    number = reference.TENSOR if number == reference.AWP else number
    name = _backends.select("perturbation", grads[0].device.type, backend)
    run = partial(run_grad_norm, name, grads, weights, number, adaptive)
    norms = explained(name, partial(_check_norm, grads, weights), run)[0]
    return norms.reshape(()) if number == reference.GLOBAL else norms


def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    stash: Sequence[Tensor],
    radius: float,
    *,
    scope: str = "global",
    adaptive: bool = False,
    norms: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Keeps the bits of `params` in `stash` and moves them up the gradients, in place: ``w += factor g``.

    | scope  | factor                              | of                                       |
    |--------|-------------------------------------|------------------------------------------|
    | global | radius / norm of all gradients      | RobMMR Eq. 14; SAM (Foret et al. 2021)   |
    | tensor | radius / norm of g, of each tensor  | the code published with RobMMR           |
    | awp    | radius norm of w / norm of g, each  | AWP (Wu et al. 2020)                     |

    With `adaptive` the step is ``factor w^2 g`` and the norm that of ``|w| g`` (ASAM, Kwon et al. 2021).

    A norm that is 0 or not finite gives factor 0, and those weights keep their bits; that is decided on the device,
    without waiting for it. The same inputs give the same bits. On CUDA this is two kernel launches for up to
    hundreds of tensors, made to be captured in a CUDA graph (compiled, not yet run on a GPU).

    Args:
        params: w, tensors of any shapes and strides; float64, float32, bfloat16 or float16, mixed. No two may share
            memory. They are modified as by ``torch.no_grad()``.
        grads: g, the shapes of `params`, any dtypes and strides.
        stash: receives the bits of `params`: same shapes and dtypes, for instance ``torch.empty_like`` of each.
        radius: gamma, the length of the step, >= 0.
        scope, adaptive: see above; ``adaptive`` goes with ``"global"`` and ``"tensor"``.
        norms: float64, as `grad_norm` returns them, where they are known already; not with scope ``"awp"``.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None chooses.

    Returns:
        The norms and the factors, both float64 and ``()`` with scope ``"global"``, else ``(len(params),)``.

    Raises:
        TypeError: something is not a dense floating-point tensor, or not a number.
        ValueError: an unknown scope, lists, shapes, dtypes or devices that do not fit, tensors that share memory, a
            radius that is negative or not finite. Nothing has been written then.
    """
    number = scope_number(scope, adaptive)
    params, grads, stash = (
        _some("params", params), _validate.tensors("grads", grads), _validate.tensors("stash", stash)
    )  # fmt: skip
    check_radius(radius)
    if norms is not None:
        norms = given_norms("norms", norms, number, params)
    name = _backends.select("perturbation", params[0].device.type, backend)
    run = partial(run_perturb_, name, params, grads, stash, norms, None, radius, number, adaptive)
    got, factors = explained(name, partial(_check_perturb, params, grads, stash), run)
    _bump_versions(params, stash)
    return (got.reshape(()), factors.reshape(())) if number == reference.GLOBAL else (got, factors)


def restore_(params: Sequence[Tensor], stash: Sequence[Tensor], *, backend: str | None = None) -> None:
    """Copies the bits of `stash` back into `params`, in place, in one launch.

    Args:
        params, stash: as given to `perturb_`.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None chooses.

    Raises:
        TypeError: something is not a dense floating-point tensor.
        ValueError: lists, shapes, dtypes or devices that do not fit.
    """
    params, stash = _some("params", params), _validate.tensors("stash", stash)
    name = _backends.select("perturbation", params[0].device.type, backend)
    explained(name, partial(_check_restore, params, stash), partial(run_restore_, name, params, stash))
    _bump_versions(params)


def explained(backend: str, check: Callable[[], object], run: Callable[[], _T]) -> _T:
    """Runs an operator; tensors that it cannot take are refused in the words of `check`.

    The compiled operators look at every tensor in any case, and refuse before they write anything. Looking at them from
    Python first would take longer than moving small ones; so `check` is for the backends in Python, and finds out what
    to say about what a compiled one has refused.
    """
    if backend not in ("cpu", "cuda") or torch.compiler.is_compiling():
        check()
        return run()
    try:
        return run()
    except Exception as error:
        refusal = error
    check()
    raise refusal


def run_perturb_(
    name: str,
    params: list[Tensor],
    grads: list[Tensor],
    stash: list[Tensor],
    norms: Tensor | None,
    weight_norms: Tensor | None,
    radius: float,
    scope: int,
    adaptive: bool,
) -> tuple[Tensor, Tensor]:
    """The operator on backend `name`, on checked arguments; leaves the version counters alone in eager mode."""
    with torch.no_grad():
        return _call("perturb_", name, params, grads, stash, norms, weight_norms, radius, scope, adaptive)


def run_restore_(name: str, params: list[Tensor], stash: list[Tensor]) -> None:
    """The operator on backend `name`, on checked arguments; leaves the version counters alone in eager mode."""
    with torch.no_grad():
        _call("restore_", name, params, stash)


def run_grad_norm(
    name: str, grads: list[Tensor], params: list[Tensor], scope: int, adaptive: bool
) -> tuple[Tensor, Tensor]:
    """The operator on backend `name`, on checked arguments: norms of the groups, and of the weights with scope awp."""
    with torch.no_grad():
        return _call("grad_norm", name, grads, params, scope, adaptive)


def bare_operator(kind: str, name: str) -> Any:
    """The C function behind an operator: no Python runs between its return and the caller's use of the result."""
    operator = _OPERATORS[kind, _SUFFIX[name]]
    return getattr(operator, "_op", operator)


def _call(kind: str, name: str, *arguments: Any) -> Any:
    operator = _OPERATORS[kind, _SUFFIX[name]]
    if torch.compiler.is_compiling():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return operator(*arguments)


def _bump_versions(*lists: list[Tensor]) -> None:
    if not torch.compiler.is_compiling():  # functionalization counts by itself
        torch.clear_autocast_cache()  # casts of the weights, which autocast keeps by their addresses
        torch.autograd.graph.increment_version([t for tensors in lists for t in tensors if not t.is_inference()])


def check_radius(radius: object) -> float:
    """`radius` as a float.

    Raises:
        TypeError, ValueError: it is not a number >= 0 and finite.
    """
    value = _validate.number("radius", radius)
    if not 0 <= value < float("inf"):
        raise ValueError(f"radius must be finite and >= 0, got {value:g}")
    return value


def scope_number(scope: str, adaptive: bool) -> int:
    """`scope` as the schemas have it.

    Raises:
        ValueError: an unknown scope, or one that does not go with `adaptive`.
    """
    _validate.flag("adaptive", adaptive)
    if not isinstance(scope, str) or scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(map(repr, SCOPES))}, got {scope!r}")
    if adaptive and scope == "awp":
        raise ValueError("adaptive goes with scope 'global' or 'tensor', got 'awp', which scales by |w| already")
    return SCOPES[scope]


def _some(name: str, value: Sequence[Tensor]) -> list[Tensor]:
    tensors = _validate.tensors(name, value)
    if not tensors:
        raise ValueError(f"{name} must hold at least one tensor, got none")
    return tensors


def _check_norm(grads: list[Tensor], params: list[Tensor]) -> None:
    _dense("grads", grads)
    if params:
        _fit("params", params, "grads", grads, dtype=False)


def _check_perturb(params: list[Tensor], grads: list[Tensor], stash: list[Tensor]) -> None:
    _dense("params", params)
    _fit("grads", grads, "params", params, dtype=False)
    _fit("stash", stash, "params", params, dtype=True)
    check_distinct({"params": params, "stash": stash})


def _check_restore(params: list[Tensor], stash: list[Tensor]) -> None:
    _dense("params", params)
    _fit("stash", stash, "params", params, dtype=True)
    check_distinct({"params": params, "stash": stash})


def _dense(name: str, tensors: list[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        _validate.floating_tensor(f"{name}[{i}]", tensor)
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}[{i}] must be dense, got {tensor.layout}")
        if tensor.device != tensors[0].device:
            expected = tensors[0].device
            raise ValueError(f"{name}[{i}] must be on the device of {name}[0] ({expected}), got {tensor.device}")


def _fit(name: str, tensors: list[Tensor], other: str, others: list[Tensor], *, dtype: bool) -> None:
    if len(tensors) != len(others):
        raise ValueError(f"{name} must hold a tensor for each of the {len(others)} {other}, got {len(tensors)}")
    _dense(name, tensors)
    _validate.same_device(f"{name}[0]", tensors[0], others[0], other)
    for i, (tensor, like) in enumerate(zip(tensors, others, strict=True)):
        if tensor.shape != like.shape:
            raise ValueError(
                f"{name}[{i}] must have the shape {tuple(like.shape)} of {other}[{i}], got {tuple(tensor.shape)}"
            )
        if dtype and tensor.dtype != like.dtype:
            raise ValueError(f"{name}[{i}] must have the dtype {like.dtype} of {other}[{i}], got {tensor.dtype}")


def check_distinct(lists: dict[str, list[Tensor]], names: Sequence[str] | None = None) -> None:
    """Checks that no two tensors share memory, and that none is expanded: each entry is written once.

    Args:
        names: what to call the tensors of a single list; without, they are ``list[index]``.

    Raises:
        ValueError: naming the tensors.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return
    spans = []
    for name, tensors in lists.items():
        for i, t in enumerate(tensors):
            if type(t) in _PLAIN and (size := t.nbytes) and (start := t.data_ptr()):  # not empty, and not on meta
                if not t.is_contiguous():
                    size = _reach(t, f"{name}[{i}]" if names is None else f"parameter {names[i]!r}")
                spans.append((start, start + size, name, i))
    spans.sort()
    for place, ((_, end, name, i), (start, *_)) in enumerate(pairwise(spans), 1):
        if start >= end:
            continue
        for start, _, other, j in spans[place:]:
            if start >= end:
                break
            if _share_memory(lists[name][i], lists[other][j]):
                pair = (f"{name}[{i}]", f"{other}[{j}]") if names is None else (repr(names[i]), repr(names[j]))
                raise ValueError(
                    f"{pair[0]} and {pair[1]} share memory: a tied tensor must be given once, with one gradient"
                )


def _reach(tensor: Tensor, name: str) -> int:
    """Bytes from a tensor's first entry to the end of its last."""
    extents = [(size - 1, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    if any(stride == 0 for _, stride in extents):
        raise ValueError(f"{name} must have memory of its own for every entry, got an expanded tensor")
    return (1 + sum(steps * stride for steps, stride in extents)) * tensor.element_size()


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether a byte belongs to both: columns of one matrix lie between each other without.

    A byte of a tensor is its address plus steps along its strides. Those of `b` are counted from its last byte, so
    that all steps go one way: both meet where steps of either add up to the way from there to the start of `a`.
    """
    most: Counter[int] = Counter()  # steps of each stride, in bytes
    for tensor in (a, b):
        most[1] += tensor.element_size() - 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            most[stride * tensor.element_size()] += size - 1
    last = b.data_ptr() + _reach(b, "b") - 1
    return _is_sum(last - a.data_ptr(), sorted(most.items(), reverse=True))


def _is_sum(total: int, most: list[tuple[int, int]]) -> bool:
    """Whether `total` is a sum of strides, each taken up to so many times; the longest strides come first."""
    if not most:
        return total == 0
    (stride, times), *shorter = most
    rest = sum(length * n for length, n in shorter)
    fewest = max(0, -((rest - total) // stride))
    return any(_is_sum(total - n * stride, shorter) for n in range(fewest, min(times, total // stride) + 1))


def given_norms(name: str, norms: object, scope: int, params: list[Tensor]) -> Tensor:
    """Norms that a caller knows already, as the operators take them: (groups,)."""
    if scope == reference.AWP:
        raise ValueError(f"{name} cannot be given with scope 'awp', which needs those of the weights as well")
    if not isinstance(norms, Tensor) or norms.dtype != torch.float64:
        got = norms.dtype if isinstance(norms, Tensor) else type(norms).__name__
        raise TypeError(f"{name} must be a float64 tensor, got {got}")
    shape = () if scope == reference.GLOBAL else (len(params),)
    if norms.shape != shape:
        raise ValueError(f"{name} must have the shape {shape} of what grad_norm returns, got {tuple(norms.shape)}")
    _validate.same_device(name, norms, params[0], "params")
    return norms.reshape(-1).contiguous()


def _fake_norm(grads: Sequence[Tensor], params: Sequence[Tensor], scope: int, adaptive: bool) -> tuple[Tensor, Tensor]:
    _check_norm(list(grads), list(params))
    norms = grads[0].new_empty(1 if scope == reference.GLOBAL else len(grads), dtype=torch.float64)
    return norms, grads[0].new_empty(len(grads) if scope == reference.AWP else 0, dtype=torch.float64)


def _fake_perturb_(
    params: Sequence[Tensor], grads: Sequence[Tensor], stash: Any, norms: Any, weight_norms: Any, radius: float,
    scope: int, adaptive: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_perturb(list(params), list(grads), list(stash))
    groups = params[0].new_empty(1 if scope == reference.GLOBAL else len(params), dtype=torch.float64)
    return groups, torch.empty_like(groups)


def _fake_restore_(params: Sequence[Tensor], stash: Sequence[Tensor]) -> None:
    _check_restore(list(params), list(stash))


def _triton(name: str) -> Any:
    def kernel(*arguments: Any) -> Any:
        from mmer_fast.triton import perturbation

        return getattr(perturbation, name)(*arguments)

    return kernel


def _count_versions(name: str, mutated: tuple[int, ...]) -> None:
    """Whoever calls the dispatcher's operator bumps the version counters of what it writes, as torch's own do."""
    operator = operator_of(name)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        _bump_versions(*(list(arguments[i]) for i in mutated))
        with torch._C._AutoDispatchBelowADInplaceOrView():  # what a kernel in Python writes is counted here
            return operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)

    LIBRARY.impl(name, kernel, "ADInplaceOrView", with_keyset=True)


_FAKES: dict[str, Callable[..., Any]] = {
    "grad_norm": _fake_norm,
    "perturb_": _fake_perturb_,
    "restore_": _fake_restore_,
}
_MUTATED: dict[str, tuple[int, ...]] = {"grad_norm": (), "perturb_": (0, 2), "restore_": (0,)}
_OPERATORS: dict[tuple[str, str], Any] = {}
for _kind, _schema in _SCHEMAS.items():
    for _suffix in ("", "_triton", "_reference"):
        # An in-place operator's name ends in an underscore.
        _name = f"{_kind.removesuffix('_')}{_suffix}{'_' if _kind.endswith('_') else ''}"
        define(_name, _schema)
        if _suffix:
            implement(_name, _triton(_kind) if _suffix == "_triton" else getattr(reference, _kind))
        torch.library.register_fake(qualified(_name), _FAKES[_kind])
        if _MUTATED[_kind]:
            _count_versions(_name, _MUTATED[_kind])
        _OPERATORS[_kind, _suffix] = operator_of(_name)
