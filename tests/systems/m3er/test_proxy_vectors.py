"""Proxy feature vectors: exact on linear data, and the equations written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_world import SIZES, all_present, linear_world

from mmer_fast.systems.m3er import ProxyVectors, proxy_vectors
from mmer_fast.systems.m3er.proxy import coefficients

NAMES = list(SIZES)


def test_proxies_are_the_originals_on_linear_data() -> None:
    world = linear_world(factors=6)
    proxies = ProxyVectors(SIZES).double()
    proxies.fit(world.draw(100), all_present(100))
    drawn = world.draw(20)
    for m, name in enumerate(NAMES):
        effective = all_present(20)
        effective[:, m] = False
        got, available = proxies({**drawn, name: torch.full_like(drawn[name], 7.0)}, effective)
        torch.testing.assert_close(got[name], drawn[name], rtol=1e-8, atol=1e-8)
        assert torch.equal(available, ~effective)
        assert all(not got[other].any() for other in NAMES if other != name)


@pytest.mark.parametrize(("neighbours", "ridge"), [(5, 0.0), (30, 0.0), (5, 0.2), (30, 0.2), (1000, 0.2)])
def test_the_equations_written_out(neighbours: int, ridge: float) -> None:
    world = linear_world(factors=9, noise=0.5)
    training, drawn = world.draw(60), world.draw(4)
    got = proxy_vectors(drawn["text"], training["text"], training["audio"], neighbours, ridge)
    for b in range(4):
        f = drawn["text"][b].numpy()
        distances = [np.sqrt(((f - v) ** 2).sum()) for v in training["text"].numpy()]
        nearest = np.argsort(distances)[:neighbours]
        v, w = training["text"].numpy()[nearest], training["audio"].numpy()[nearest]
        scale = ridge * np.mean([row @ row for row in v])
        rows = np.concatenate([v.T, np.sqrt(scale) * np.eye(len(v))])
        a = np.linalg.lstsq(rows, np.concatenate([f, np.zeros(len(v))]), rcond=None)[0]
        np.testing.assert_allclose(got[b].numpy(), sum(a[j] * w[j] for j in range(len(v))), rtol=1e-7, atol=1e-9)


def test_proxies_of_several_effective_modalities_are_averaged() -> None:
    world = linear_world(factors=9, noise=0.5)
    training, drawn = world.draw(60), world.draw(3)
    proxies = ProxyVectors(SIZES, neighbours=20, ridge=0.1).double()
    proxies.fit(training, all_present(60))
    effective = torch.tensor([[False, True, True], [False, False, True], [False, False, False]])
    got, available = proxies(drawn, effective)
    from_video, from_audio = (
        proxy_vectors(drawn[name], training[name], training["text"], 20, 0.1) for name in ("video", "audio")
    )
    torch.testing.assert_close(got["text"][0], (from_video[0] + from_audio[0]) / 2)
    torch.testing.assert_close(got["text"][1], from_audio[1])
    torch.testing.assert_close(
        got["video"][1], proxy_vectors(drawn["audio"], training["audio"], training["video"], 20, 0.1)[1]
    )
    assert not any(got[name][2].any() for name in NAMES)
    assert available.tolist() == [[True, False, False], [True, True, False], [False, False, False]]


def test_only_training_samples_with_both_effective_are_used() -> None:
    world = linear_world()
    training, drawn = world.draw(80), world.draw(5)
    effective_training = all_present(80)
    effective_training[40:, 0] = False
    training["text"][40:] = 1e6
    proxies = ProxyVectors(SIZES).double()
    proxies.fit(training, effective_training)
    effective = all_present(5)
    effective[:, 0] = False
    got, _ = proxies(drawn, effective)
    torch.testing.assert_close(got["text"], drawn["text"], rtol=1e-8, atol=1e-8)


def test_without_such_training_samples_there_is_no_proxy() -> None:
    proxies = ProxyVectors(SIZES).double()
    effective = all_present(2)
    effective[:, 0] = False
    got, available = proxies(linear_world().draw(2), effective)
    assert not available.any()
    assert not got["text"].any()
    never_together = all_present(10)
    never_together[:5, 0], never_together[5:, 1:] = False, False
    proxies.fit(linear_world().draw(10), never_together)
    assert not proxies(linear_world().draw(2), effective)[1].any()


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    world = linear_world(factors=9, noise=0.5)
    proxies = ProxyVectors(SIZES, neighbours=20, ridge=0.1).double()
    proxies.fit(world.draw(60), all_present(60))
    drawn, effective = world.draw(11), all_present(11)
    effective[::2, 1] = False
    whole, _ = proxies(drawn, effective)
    monkeypatch.setattr(ProxyVectors, "CHUNK", 2)
    torch.testing.assert_close(proxies(drawn, effective)[0]["video"], whole["video"])


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_neighbours_at_the_origin_give_coefficients_of_zero(ridge: float) -> None:
    assert torch.equal(coefficients(torch.randn(2, 4), torch.zeros(2, 3, 4), ridge), torch.zeros(2, 3))


def test_an_empty_batch() -> None:
    v, w = torch.randn(9, 4), torch.randn(9, 3)
    assert proxy_vectors(torch.empty(0, 4), v, w, 5, 0.1).shape == (0, 3)


def test_a_checkpoint_has_the_training_vectors() -> None:
    world = linear_world()
    proxies, fresh = ProxyVectors(SIZES).double(), ProxyVectors(SIZES).double()
    proxies.fit(world.draw(50), all_present(50))
    fresh.load_state_dict(proxies.state_dict())
    effective = all_present(3)
    effective[:, 2] = False
    drawn = world.draw(3)
    torch.testing.assert_close(fresh(drawn, effective)[0], proxies(drawn, effective)[0])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4), (9, 4), (8, 3)), r"v and w must be \(N >= 1, D\) and \(N, E\), got \(9, 4\) and \(8, 3\)"),
        (((2, 4), (0, 4), (0, 3)), r"v and w must be"),
        (((2, 5), (9, 4), (9, 3)), r"f must have shape \(B, 4\), got \(2, 5\)"),
    ],
)
def test_bad_shapes_are_named(shapes: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        proxy_vectors(*(torch.randn(shape) for shape in shapes), 3)
