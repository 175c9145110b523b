"""The modality check: correlated, noisy and missing modalities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_world import SIZES, LinearWorld, all_present, linear_world
from torch import Tensor

from mmer_fast.systems.m3er import ModalityCheck, canonical_correlations, component_correlation

NAMES = list(SIZES)


def fitted_check(world: LinearWorld, **options) -> ModalityCheck:
    check = ModalityCheck(SIZES, components=options.pop("components", 6), **options).double()
    check.fit(world.draw(400), all_present(400))
    return check


def noisy(vectors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: 20 * torch.randn_like(v) if name in names else v for name, v in vectors.items()}


def test_rho_is_pearsons_over_components() -> None:
    a, b = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    expected = [np.corrcoef(a[i].numpy(), b[i].numpy())[0, 1] for i in range(5)]
    np.testing.assert_allclose(component_correlation(a, b).numpy(), expected, rtol=1e-12)


def test_rho_of_one_component_or_of_equal_ones_is_not_defined() -> None:
    assert component_correlation(torch.randn(3, 1), torch.randn(3, 1)).isnan().all()
    assert component_correlation(torch.ones(3, 4), torch.randn(3, 4)).isnan().all()


def test_projections_are_those_of_the_pair() -> None:
    world = linear_world(noise=0.5)
    training, drawn = world.draw(400), world.draw(5)
    check = ModalityCheck(SIZES, components=4, ridge=0.1).double()
    check.fit(training, all_present(400))
    rho = check.correlations(drawn, all_present(5))
    assert rho.shape == (5, 3)
    for k, (i, j) in enumerate(((0, 1), (0, 2), (1, 2))):
        x, y = NAMES[i], NAMES[j]
        fit = canonical_correlations(training[x], training[y], 4, ridge=0.1)
        for sample in range(5):
            a = fit.x_map @ (drawn[x][sample] - fit.x_mean)
            b = fit.y_map @ (drawn[y][sample] - fit.y_mean)
            np.testing.assert_allclose(rho[sample, k].item(), np.corrcoef(a.numpy(), b.numpy())[0, 1], rtol=1e-9)


def test_correlated_modalities_are_effective_and_a_noisy_one_is_found() -> None:
    world = linear_world(noise=0.3)
    check = fitted_check(world)
    clean = check(world.draw(300), all_present(300))
    assert clean.double().mean() > 0.97
    for m, name in enumerate(NAMES):
        effective = check(noisy(world.draw(300), name), all_present(300))
        others = [k for k in range(3) if k != m]
        assert (~effective[:, m]).double().mean() > 0.8
        assert effective[:, others].double().mean() > 0.9


def test_any_pair_condemns_the_partners_of_a_noisy_modality() -> None:
    """So none would be effective, and what is there counts as effective: the noise is not found."""
    world = linear_world(noise=0.3)
    drawn = noisy(world.draw(300), "video")
    by_any = fitted_check(world, rule="any", tau=0.8)
    low = by_any.correlations(drawn, all_present(300))[:, [0, 2]].lt(0.8).all(dim=1)
    assert low.double().mean() > 0.9
    assert by_any(drawn, all_present(300))[low].all()


def test_a_missing_modality_is_ineffectual_and_condemns_no_other() -> None:
    world = linear_world(noise=0.3)
    drawn, present = world.draw(100), all_present(100)
    present[:, 0] = False
    drawn["text"] = torch.zeros_like(drawn["text"])
    check = fitted_check(world)
    rho = check.correlations(drawn, present)
    assert rho[:, :2].isnan().all()
    assert rho[:, 2].isfinite().all()
    effective = check(drawn, present)
    assert not effective[:, 0].any()
    assert effective[:, 1:].double().mean() > 0.9


def test_where_none_would_be_effective_those_present_are() -> None:
    world = linear_world(noise=0.3)
    check = fitted_check(world, tau=1.0)  # nothing correlates so well
    present = torch.tensor([[True, True, True], [True, True, False], [False, True, False], [False, False, False]])
    assert torch.equal(check(world.draw(4), present), present)


def test_tau_is_compared_as_it_stands() -> None:
    world = linear_world(noise=1.0)
    drawn = noisy(world.draw(50), "audio")
    check = fitted_check(world, tau=0.4)
    rho = check.correlations(drawn, all_present(50))
    effective = check(drawn, all_present(50))
    for b in range(50):
        low = {pair: rho[b, k].item() < 0.4 for k, pair in enumerate(check.pairs)}
        expected = [not all(is_low for pair, is_low in low.items() if m in pair) for m in range(3)]
        assert effective[b].tolist() == (expected if any(expected) else [True] * 3)


def test_a_correlation_of_tau_is_not_below_it() -> None:
    world = linear_world(noise=0.3)
    check, drawn = fitted_check(world), noisy(world.draw(1), "text")
    with_video, with_audio, others = check.correlations(drawn, all_present(1))[0]
    assert others > max(with_video, with_audio)
    check.tau.fill_(max(with_video, with_audio))
    assert check(drawn, all_present(1)).all()
    check.tau.nextafter_(torch.ones_like(check.tau))
    assert check(drawn, all_present(1)).tolist() == [[False, True, True]]


def test_a_noisy_modality_is_found_beside_a_missing_one() -> None:
    """Its correlation with what is missing is not defined; those with all that is there are low."""
    mixing = {name: torch.randn(6, 8, dtype=torch.float64) for name in "abcd"}

    def drawn(n: int) -> dict[str, Tensor]:
        latent = torch.randn(n, 6, dtype=torch.float64)
        return {name: latent @ m + 0.3 * torch.randn(n, 8, dtype=torch.float64) for name, m in mixing.items()}

    check = ModalityCheck(dict.fromkeys("abcd", 8), components=6).double()
    check.fit(drawn(400), torch.ones(400, 4, dtype=torch.bool))
    present = torch.tensor([True, True, True, False]).expand(200, 4)
    effective = check(noisy(drawn(200), "a"), present).double().mean(dim=0)
    assert effective[0] < 0.2
    assert effective[1:3].min() > 0.9
    assert effective[3] == 0


def test_a_fitted_tau_has_its_share_of_new_samples_below_it() -> None:
    world = linear_world(noise=1.0)
    check = ModalityCheck(SIZES, components=6, false_alarms=0.2).double()
    check.fit(world.draw(2000), all_present(2000))
    rho = check.correlations(world.draw(2000), all_present(2000))
    assert torch.allclose((rho < check.tau).double().mean(dim=0), torch.tensor(0.2, dtype=torch.float64), atol=0.05)


def test_a_fitted_tau_is_not_that_of_the_samples_that_the_projections_fit() -> None:
    """With few samples these correlate far better than new ones."""
    world = linear_world(noise=1.0)
    training, new = world.draw(80), world.draw(2000)
    check = ModalityCheck(SIZES, components=6, false_alarms=0.2).double()
    check.fit(training, all_present(80))
    rho = check.correlations(new, all_present(2000))
    of_the_fit = check.correlations(training, all_present(80)).quantile(0.2, dim=0)
    assert (rho < check.tau).double().mean() < 0.27 < (rho < of_the_fit).double().mean()


def test_where_modalities_have_nothing_in_common_hardly_any_is_condemned() -> None:
    training = {name: torch.randn(600, size, dtype=torch.float64) for name, size in SIZES.items()}
    check = ModalityCheck(SIZES, components=6).double()
    check.fit(training, all_present(600))
    drawn = {name: torch.randn(600, size, dtype=torch.float64) for name, size in SIZES.items()}
    assert check(drawn, all_present(600)).double().mean() > 0.97


@pytest.mark.parametrize("samples", [0, 1, 2, 3])
def test_pairs_without_training_samples_are_not_checked(samples: int) -> None:
    world = linear_world()
    check = ModalityCheck(SIZES).double()
    check.fit(world.draw(samples), all_present(samples))
    assert check(noisy(world.draw(5), "text"), all_present(5)).all() or samples == 3
    assert check(world.draw(0), all_present(0)).shape == (0, 3)


def test_one_modality_has_no_partner() -> None:
    check = ModalityCheck({"text": 3})
    check.fit({"text": torch.randn(9, 3)}, torch.ones(9, 1, dtype=torch.bool))
    present = torch.tensor([[True], [False]])
    assert torch.equal(check({"text": torch.randn(2, 3)}, present), present)


def test_a_checkpoint_has_what_was_fitted() -> None:
    world = linear_world(noise=0.3)
    check, fresh = fitted_check(world), ModalityCheck(SIZES, components=6).double()
    fresh.load_state_dict(check.state_dict())
    drawn = world.draw(20)
    torch.testing.assert_close(fresh.correlations(drawn, all_present(20)), check.correlations(drawn, all_present(20)))
    assert torch.equal(fresh.tau, check.tau)
    other = ModalityCheck({**SIZES, "text": 11}, components=6).double()
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(check.state_dict())
