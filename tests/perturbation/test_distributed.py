"""Weight perturbation under FSDP2, tensor parallelism and DDP: 2 and 4 processes must do what one does."""

from __future__ import annotations

import process_group
import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)

CHECKS = {
    2: [
        "fsdp:equals_one_process",
        "fsdp:float32",
        "fsdp:bfloat16_compute",
        "fsdp:compiled",
        "fsdp:state_dicts_are_clean",
        "fsdp:gathers_anew_at_both_ends",
        "fsdp:kept_gathered_after_backward",
        "fsdp:converted_later",
        "fsdp:exception_in_forward",
        "fsdp:flat_parameters_are_refused",
        "meshes:tensor_parallel",
        "meshes:converted_inside",
        "ddp:mean_gradient",
        "ddp:local_gradient",
        "ddp:average_over",
        "ddp:inner_pass_without_sync",
        "ddp:parameters_that_a_rank_did_not_use",
        "ddp:average_over_refuses",
        "ddp:compiled",
        "sam:over_fsdp",
        "sam:over_ddp",
        "sam:averages_itself",
        "sam:averages_what_a_rank_did_not_use",
        "sam:resumes_from_a_distributed_checkpoint",
    ],
    4: [
        "fsdp:equals_one_process",
        "meshes:hsdp",
        "meshes:tensor_parallel",
        "meshes:fsdp_of_tensor_parallel",
        "meshes:not_finite_on_one_rank",
        "meshes:exception_on_one_rank",
        "meshes:extreme_norms",
        "meshes:gradients_laid_out_otherwise",
        "meshes:several_meshes",
        "meshes:errors",
        "ddp:average_of_half_types",
        "ddp:average_not_finite_on_one_rank",
    ],
}


@pytest.fixture(scope="module")
def verdict(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> process_group.Verdict:
    return process_group.verdicts(request, tmp_path_factory)


@pytest.mark.parametrize(("world", "check"), [(world, check) for world, checks in CHECKS.items() for check in checks])
def test_in_processes(world: int, check: str, verdict: process_group.Verdict) -> None:
    trouble = verdict(world, check)
    if trouble:
        pytest.fail(trouble, pytrace=False)
