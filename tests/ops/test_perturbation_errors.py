"""What the perturbation operators refuse, in which words; nothing is written then."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from perturbation_cases import Lists, drawn

from mmer_fast import ops
from mmer_fast.ops.perturbation import explained


@pytest.fixture
def case(device: str) -> Lists:
    return drawn(device, shapes=[(2, 3), (4,)])


def refused(case: Lists, kind: type[Exception], text: str, **changes: object) -> None:
    arguments = {"params": case.params, "grads": case.grads, "stash": case.stash, "radius": 0.5} | changes
    with pytest.raises(kind, match=re.escape(text)):
        ops.perturb_(**arguments)
    assert case.restored()
    assert all(s.isnan().all() for s in case.stash)


def test_lists(backend: str, case: Lists) -> None:
    w, g = case.params, case.grads
    refused(case, ValueError, "params must hold at least one tensor, got none", params=[], grads=[], stash=[])
    refused(case, ValueError, "grads must hold a tensor for each of the 2 params, got 1", grads=g[:1])
    refused(case, ValueError, "stash must hold a tensor for each of the 2 params, got 1", stash=case.stash[:1])
    refused(case, TypeError, "params[1] must be a torch.Tensor, got NoneType", params=[w[0], None])
    refused(case, TypeError, "grads[0] must be float32, float64, bfloat16 or float16, got torch.int64",
            grads=[g[0].long(), g[1]])  # fmt: skip
    refused(case, TypeError, "grads[0] must be dense, got torch.sparse_coo", grads=[g[0].to_sparse(), g[1]])
    refused(case, ValueError, "grads[1] must have the shape (4,) of params[1], got (3,)", grads=[g[0], g[1][:3]])
    refused(case, ValueError, "stash[1] must have the dtype torch.float32 of params[1], got torch.float64",
            stash=[case.stash[0], case.stash[1].double()])  # fmt: skip
    meta = [x.to("meta") for x in g]
    refused(case, ValueError, "grads[0] must be on the device of params", grads=meta)
    refused(case, ValueError, "grads[1] must be on the device of grads[0]", grads=[g[0], meta[1]])


def test_numbers(backend: str, case: Lists) -> None:
    refused(case, ValueError, "radius must be finite and >= 0, got -1", radius=-1)
    refused(case, ValueError, "radius must be finite and >= 0, got nan", radius=float("nan"))
    refused(case, ValueError, "radius must be finite and >= 0, got inf", radius=float("inf"))
    refused(case, TypeError, "radius must be a number, got str", radius="1")
    refused(case, ValueError, "scope must be one of 'global', 'tensor', 'awp', got 'layer'", scope="layer")
    refused(case, ValueError, "adaptive goes with scope 'global' or 'tensor', got 'awp'", scope="awp", adaptive=True)
    norm = ops.grad_norm(case.grads)
    refused(case, ValueError, "norms cannot be given with scope 'awp'", scope="awp", norms=norm)
    refused(case, TypeError, "norms must be a float64 tensor, got torch.float32", norms=norm.float())
    refused(case, TypeError, "norms must be a float64 tensor, got float", norms=1.0)
    refused(case, ValueError, "norms must have the shape (2,) of what grad_norm returns, got ()",
            scope="tensor", norms=norm)  # fmt: skip


def test_shared_memory(backend: str, case: Lists) -> None:
    w, g, s = case.params, case.grads, case.stash
    refused(case, ValueError, "params[0] and params[1] share memory", params=[w[0], w[0]], grads=[g[0], g[0]],
            stash=[s[0], torch.empty_like(s[0])])  # fmt: skip
    refused(case, ValueError, "share memory", params=[w[1][:3], w[1][2:]], grads=[g[1][:3], g[1][:2]],
            stash=[s[1][:3].clone(), s[1][:2].clone()])  # fmt: skip
    refused(case, ValueError, "params[0] and stash[0] share memory", params=w[:1], grads=g[:1], stash=w[:1])
    # Columns that meet in one, and between them in memory some that do not; the first two of these are neighbours.
    matrix = torch.zeros(3, 12, device=w[0].device)
    columns = [matrix[:, :4], matrix[:, 4:9], matrix[:, 8:]]
    refused(case, ValueError, "params[1] and params[2] share memory", params=columns,
            grads=[torch.ones_like(x) for x in columns], stash=[torch.empty_like(x) for x in columns])  # fmt: skip
    expanded = w[1][:1].expand(4)
    refused(case, ValueError, "params[0] must have memory of its own for every entry", params=[expanded],
            grads=g[1:], stash=s[1:])  # fmt: skip


def test_grad_norm(backend: str, case: Lists) -> None:
    with pytest.raises(ValueError, match=r"params must be given with adaptive=True"):
        ops.grad_norm(case.grads, adaptive=True, backend=backend)
    with pytest.raises(ValueError, match=re.escape("params[0] must have the shape (2, 3) of grads[0], got (3, 2)")):
        ops.grad_norm(case.grads, adaptive=True, params=[case.params[0].t(), case.params[1]], backend=backend)
    with pytest.raises(ValueError, match=r"grads must hold at least one tensor"):
        ops.grad_norm([], backend=backend)


def test_restore(backend: str, case: Lists) -> None:
    with pytest.raises(ValueError, match=r"stash must hold a tensor for each of the 2 params, got 1"):
        ops.restore_(case.params, case.stash[:1], backend=backend)
    with pytest.raises(ValueError, match=r"share memory"):
        ops.restore_(case.params, case.params, backend=backend)
    assert case.restored()


@pytest.fixture
def compiled(case: Lists) -> Callable[..., None]:
    """The dispatcher's operator, with which one passes by the checks in Python; to be refused, with nothing written."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("mmer_fast::perturb_", "CPU") or case.params[0].is_cuda:
        pytest.skip("the compiled library is not there")

    def refused(text: str, params: object, grads: object, stash: object, *rest: object) -> None:
        with pytest.raises((RuntimeError, NotImplementedError), match=text):
            torch.ops.mmer_fast.perturb_(params, grads, stash, *(rest or (None, None, 0.5, 0, False)))
        assert case.restored()
        assert all(s.isnan().all() for s in case.stash)

    return refused


def test_the_compiled_operator_checks_for_itself(case: Lists, compiled: Callable[..., None]) -> None:
    w, g, s = case.params, case.grads, case.stash
    compiled("lists of one length", w, g[:1], s)
    compiled("several shapes", w, [g[1], g[0]], s)
    compiled("dtype of its parameter", w, g, [x.double() for x in s])
    compiled("scope must be", w, g, s, None, None, 0.5, 3, False)
    compiled("norms must be float64 of shape", w, g, s, torch.ones(2).double(), None, 0.5, 0, False)
    compiled("given together", w, g, s, None, torch.ones(2).double(), 0.5, 2, False)
    compiled("no tensor arguments", [], [], [])


def test_the_compiled_operator_notices_shared_memory(case: Lists, compiled: Callable[..., None]) -> None:
    (g, _), (s, _) = case.grads, case.stash
    w, apart = case.params[0], torch.full_like(s, torch.nan)
    compiled(r"params\[0\] and params\[1\] share memory", [w, w], [g, g], [s, apart])
    compiled(r"params\[0\] and params\[1\] share memory", [w, w[1:, 1:]], [g, g[1:, 1:]], [s, apart[1:, 1:]])
    compiled(r"params\[1\] and params\[0\] share memory", [w.t()[1:], w], [g.t()[1:], g], [apart.t()[1:], s])
    compiled(r"params\[0\] and stash\[0\] share memory", [w], [g], [w])
    compiled(r"stash\[0\] and stash\[1\] share memory", [w, w.clone()], [g, g], [s, s])
    compiled(r"stash\[0\] has several entries in one place", [w], [g], [s[:1].expand(2, 3)])
    halves = torch.stack([w, w])  # neighbours share nothing, nor do tensors without entries
    torch.ops.mmer_fast.perturb_(
        [*halves, w[:0]], [g, g, g[:0]], [*torch.empty_like(halves), w[:0]], None, None, 0.5, 0, False
    )
    assert torch.equal(*halves)
    assert not torch.equal(halves[0], w)


def test_what_no_check_explains_is_raised_as_it_came() -> None:
    def run() -> None:
        raise MemoryError("of the operator")

    for backend in ("cpu", "cuda"):
        with pytest.raises(MemoryError, match="of the operator"):
            explained(backend, lambda: None, run)
