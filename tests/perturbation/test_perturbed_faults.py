"""`mf.perturbed` whatever happens: exceptions, interrupts, NaN, misuse."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tied_model import TOKENS, Model, loss, moved, snapshot, unchanged

import mmer_fast as mf
from mmer_fast.perturbation import handle


class Boom(BaseException):
    pass


def fails_in_the_forward(model: Model) -> None:
    model.hidden[2].register_forward_hook(lambda *_: (_ for _ in ()).throw(Boom()))
    loss(model)


def fails_in_the_backward(model: Model) -> None:
    out = model(TOKENS)
    out.register_hook(lambda _: (_ for _ in ()).throw(Boom()))
    out.sum().backward()


def is_interrupted(model: Model) -> None:
    raise KeyboardInterrupt


def exits(model: Model) -> None:
    raise SystemExit(3)


@pytest.mark.parametrize("fault", [fails_in_the_forward, fails_in_the_backward, is_interrupted, exits])
def test_weights_come_back_after(fault: Callable[[Model], None], model: Model) -> None:
    before = snapshot(model)

    def run() -> None:
        with mf.perturbed(model, 0.3):
            assert not unchanged(model, before)
            fault(model)

    with pytest.raises((Boom, KeyboardInterrupt, SystemExit)):
        run()
    assert unchanged(model, before)
    with mf.perturbed(model, 0.3):  # nothing is left that would hinder the next one
        assert not unchanged(model, before)


def test_a_loss_that_is_nan_inside_leaves_the_weights(model: Model) -> None:
    before = snapshot(model)
    with mf.perturbed(model, 0.3):
        (loss(model) * float("nan")).backward()
    assert unchanged(model, before)
    with mf.perturbed(model, 0.3) as info:  # from those gradients nothing moves
        assert unchanged(model, before)
    assert info.skipped.item() is True
    assert info.factor.item() == 0.0
    assert not info.norm.isfinite()
    assert unchanged(model, before)


def test_an_interrupt_anywhere_leaves_the_weights_as_they_were(model: Model) -> None:
    """Python looks for interrupts when a function begins and when a call ends; here one comes at each of these."""
    before = snapshot(model)
    versions = [p._version for p in model.parameters()]
    for place in itertools.count():
        reached = run_interrupted(model, place)
        assert unchanged(model, before), f"at place {place}"
        assert versions == [p._version for p in model.parameters()], f"at place {place}"
        assert not any(module._state_dict_hooks for module in model.modules()), f"at place {place}"
        if not reached:
            break
    assert place > 100
    with mf.perturbed(model, 0.3):  # nothing is left that would hinder the next one
        assert not unchanged(model, before)


def run_interrupted(model: Model, place: int) -> bool:
    """Runs a block that is interrupted at one place within mmer_fast.perturbation; whether there are so many."""
    folder = os.path.dirname(mf.perturbation.__file__)
    count = itertools.count()
    reached = False

    def profile(frame: types.FrameType, event: str, _: object) -> None:
        nonlocal reached
        inside = frame.f_code.co_filename.startswith(folder) and frame.f_code.co_name != "__del__"
        if inside and event in ("call", "return", "c_return") and next(count) == place:
            reached = True
            raise KeyboardInterrupt

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of a handle that nobody could restore
        sys.setprofile(profile)
        try:
            with mf.perturbed(model, 0.3, select="hidden.*"):
                pass
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
    return reached


def test_nested_and_repeated_use_is_refused(model: Model) -> None:
    before = snapshot(model)

    def nested() -> None:
        with mf.perturbed(model, 0.3), mf.perturbed([model.out.bias], 0.3):
            pass

    with pytest.raises(RuntimeError, match=r"parameter '0' is perturbed already: perturbations do not nest"):
        nested()
    assert unchanged(model, before)

    handle = mf.perturb_(model, 0.3)
    with pytest.raises(RuntimeError, match=r"parameter 'empty' is perturbed already"):
        mf.perturb_(model, 0.3)
    with pytest.raises(RuntimeError, match="is perturbed already"):
        mf.release_stash(model)
    assert handle.active
    handle.restore_()
    assert not handle.active
    assert unchanged(model, before)
    with pytest.raises(RuntimeError, match="restored already: a perturbation is restored once"):
        handle.restore_()

    block = mf.perturbed(model, 0.3)
    with block:
        pass
    with pytest.raises(RuntimeError, match="entered already"), block:
        pass
    assert unchanged(model, before)


def test_different_parts_may_be_perturbed_at_once(model: Model) -> None:
    before = snapshot(model)
    with mf.perturbed(model.hidden, 0.3), mf.perturbed([model.out.bias], 0.1):
        assert moved(model, before) == ["hidden.0.weight", "hidden.1.weight", "hidden.1.bias", "out.bias"]
    assert unchanged(model, before)


def test_a_handle_is_copied_once_it_is_restored(model: Model) -> None:
    """A copy that goes away would restore the weights of the one that is in use."""
    loss(model).backward()
    before = snapshot(model)
    perturbation = mf.perturb_(model, radius=0.1)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"not restored cannot be copied or pickled: call its restore_\(\)"):
            copied(perturbation)
    perturbation.restore_()
    assert unchanged(model, before)
    assert not copy.copy(perturbation).active


def test_a_handle_that_goes_away_restores_and_says_so(model: Model) -> None:
    before = snapshot(model)
    with pytest.warns(ResourceWarning, match="keep what perturb_ returns"):
        mf.perturb_(model, 0.3)
    assert unchanged(model, before)


def test_the_split_form_restores_inside_a_block_early(model: Model) -> None:
    before = snapshot(model)
    handle = mf.perturb_(model, 0.3, select="hidden.*")
    assert handle.info.names == ("hidden.0.weight", "hidden.1.weight", "hidden.1.bias")
    assert not unchanged(model, before)
    handle.restore_()
    assert unchanged(model, before)


@pytest.mark.parametrize("fused", [False, True])  # torch's fused steps count no version
def test_a_modification_inside_is_lost_and_said(model: Model, fused: bool) -> None:
    before = snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)

    def misuse() -> None:
        with mf.perturbed(model, 0.3):
            optimizer.step()

    with pytest.raises(RuntimeError, match=r"was modified while perturbed.*optimizer.step\(\).*after the block"):
        misuse()
    assert unchanged(model, before)

    def misuse_and_fail() -> None:
        with mf.perturbed(model, 0.3):
            optimizer.step()
            raise Boom

    with pytest.raises(Boom):  # not hidden by the other error
        misuse_and_fail()
    assert unchanged(model, before)


def test_a_capture_that_fails_inside_leaves_the_weights_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a capture has run: to restore then would bring back what an earlier perturbation stashed."""
    with mf.perturbed(model, 0.3):
        pass
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # since then
    before, operator = snapshot(model), handle.operators.bare_operator
    norms = torch.zeros(1, dtype=torch.float64)

    def refused(*_: object) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")

    def recorded(kind: str, name: str) -> Any:
        return {"perturb_": lambda *_: (norms, norms), "restore_": refused}[kind]

    with monkeypatch.context() as patch:
        patch.setattr(handle, "_is_captured", lambda _: True)
        patch.setattr(handle.operators, "bare_operator", recorded)
        with pytest.raises(RuntimeError, match="previous error during capture"), mf.perturbed(model, 0.3):
            raise RuntimeError("not permitted when stream is capturing")
    assert handle.operators.bare_operator is operator
    assert unchanged(model, before)
    with mf.perturbed(model, 0.3):  # it is not taken for perturbed still
        assert not unchanged(model, before)
    assert unchanged(model, before)
