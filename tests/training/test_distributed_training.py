"""Training in two gloo processes must be the training of one, replicated or sharded, to its end or to its failure."""

from __future__ import annotations

import process_group
import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)

CHECKS = [
    "steps:replicated_equals_one_process",
    "steps:sharded_equals_one_process",
    "steps:parameters_come_from_the_first_rank",
    "steps:clipping_sees_all_shards",
    "steps:a_local_g_perturbs_each_copy_its_own_way",
    "steps:random_directions_are_one_perturbation",
    "steps:evaluation_in_turns_has_the_bits_of_one_process",
    "steps:training_goes_on_after_evaluation",
    "steps:differing_ranks_are_refused",
    "steps:presets_step_on_shards",
]


@pytest.fixture(scope="module")
def verdict(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> process_group.Verdict:
    return process_group.verdicts(request, tmp_path_factory)


@pytest.mark.parametrize(("world", "check"), [(2, check) for check in CHECKS])
def test_in_processes(world: int, check: str, verdict: process_group.Verdict) -> None:
    trouble = verdict(world, check)
    if trouble:
        pytest.fail(trouble, pytrace=False)
