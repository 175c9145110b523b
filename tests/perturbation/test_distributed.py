"""Weight perturbation under FSDP2, tensor parallelism and DDP: 2 and 4 processes must do what one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
        "fsdp:exception_in_forward",
        "fsdp:flat_parameters_are_refused",
        "meshes:tensor_parallel",
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
Verdict = Callable[[int, str], str]


@pytest.fixture(scope="module")
def verdict(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Verdict:
    """What went wrong in a check. The first question for a number of processes runs all checks that were selected."""
    selected = [item.callspec.params for item in request.session.items if item.path == Path(request.path)]
    found: dict[int, dict[str, str]] = {}

    def of(world: int, check: str) -> str:
        if world not in found:
            checks = [params["check"] for params in selected if params["world"] == world]
            folder = tmp_path_factory.mktemp(f"{world}_processes")
            found[world] = process_group.run([f"checks_{check}" for check in checks], world, folder)
        return found[world][f"checks_{check}"]

    return of


@pytest.mark.parametrize(("world", "check"), [(world, check) for world, checks in CHECKS.items() for check in checks])
def test_in_processes(world: int, check: str, verdict: Verdict) -> None:
    trouble = verdict(world, check)
    if trouble:
        pytest.fail(trouble, pytrace=False)
