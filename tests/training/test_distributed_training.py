"""Training in two gloo processes must be the training of one, replicated or sharded, to its end or to its failure."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import process_group
import pytest
import torch
import torch.distributed as dist
from failing_ranks import (
    IMPORTS,
    PATIENCE,
    die,
    fail,
    fail_to_write,
    fill,
    fill_in_validation,
    go_on,
    hang,
    warn,
    write_slowly,
)
from failing_ranks import train as train_processes
from small_training import small_data

from mmer_fast.data.npz import write_npz
from mmer_fast.training import Run, train
from mmer_fast.training.checkpoint import read_tensors
from mmer_fast.training.distributed import ALONE, World, WorldError, joined, launched
from mmer_fast.training.files import FAILED_FILE, STATE_FILE

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)

SETTINGS = {"dim": 16, "ffn_dim": 24, "heads": 2, "unimodal_blocks": 1, "multimodal_blocks": 1, "batch_size": 8}
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
    "runs:an_epoch_has_the_losses_of_one_process",
    "runs:resumption_gives_the_same_bits",
    "runs:the_metrics_can_be_read_everywhere_when_training_returns",
    "runs:a_directory_in_which_others_train_is_refused_by_all",
    "runs:a_damaged_state_gives_way_to_the_one_before",
    "runs:resumption_across_worlds",
    "runs:what_shards_cannot_is_refused",
]


@pytest.fixture(scope="module")
def verdict(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> process_group.Verdict:
    return process_group.verdicts(request, tmp_path_factory, IMPORTS)


@pytest.mark.parametrize(("world", "check"), [(2, check) for check in CHECKS])
def test_in_processes(world: int, check: str, verdict: process_group.Verdict) -> None:
    trouble = verdict(world, check)
    if trouble:
        pytest.fail(trouble, pytrace=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "small.npz"
    write_npz(small_data(), path)
    return path


def options(data: Path, out: Path, *more: str) -> list[str]:
    settings = [f"--set={name}={value}" for name, value in SETTINGS.items()]
    return ["train", "--data", str(data), "--out", str(out), "--epochs", "2", "--device", "cpu", *settings, *more]


def test_torchrun_trains_on_the_command_line(data: Path, tmp_path: Path) -> None:
    """As one process does; one of the processes speaks and writes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "-m", "mmer_fast", *options(data, tmp_path / "two", "--fsdp")]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("epoch 2/2") == 1
    assert ended.stdout.count("written to") == 1
    assert "Warning" not in ended.stderr
    one = train(data, tmp_path / "one", show=False, device="cpu", epochs=2, **SETTINGS)
    two = Run(tmp_path / "two")
    for record, expected in zip(two.metrics["history"], one.metrics["history"], strict=True):
        torch.testing.assert_close(record["train"], expected["train"], rtol=1e-4, atol=1e-6)
    assert {path.name for path in two.directory.iterdir()} == {path.name for path in one.directory.iterdir()}
    report = (two.directory / "report.html").read_text(encoding="utf-8")
    assert "was not measured: the model was sharded over 2 processes" in report


def test_an_exception_on_one_rank_ends_all(data: Path, tmp_path: Path) -> None:
    codes, errors = train_processes(options(data, tmp_path / "run", "--fsdp"), [go_on, fail], tmp_path)
    assert codes == [1, 1]
    assert errors[1].splitlines()[-1] == "ValueError: a test wants it"
    assert errors[0] == ""


def test_memory_that_runs_out_on_one_rank_ends_all(data: Path, tmp_path: Path) -> None:
    """That rank says so for its part of the batch; nothing is written that all would have to come together for."""
    codes, errors = train_processes(options(data, tmp_path / "run"), [go_on, fill], tmp_path)
    assert codes == [1, 1]
    line = "mmer-fast: error: memory ran out in epoch 1, step 4: CUDA out of memory. Tried to allocate 2.00 GiB; "
    assert errors[1].startswith(f"{line}the step has 3 sample(s); ")
    assert len(errors[1].splitlines()) == 1
    assert errors[0] == ""
    assert not (tmp_path / "run" / FAILED_FILE).exists()


def test_memory_that_runs_out_in_the_validation_of_one_rank_ends_all(data: Path, tmp_path: Path) -> None:
    arguments = options(data, tmp_path / "run", "--checkpoint-every", "3")
    codes, errors = train_processes(arguments, [go_on, fill_in_validation], tmp_path)
    assert codes == [1, 1]
    assert errors[1].startswith("mmer-fast: error: memory ran out in the validation after epoch 1: CUDA out of memory")
    assert "; the state saved before is whole: --resume goes on; it needs less with --set evaluation_" in errors[1]
    assert len(errors[1].splitlines()) == 1
    assert errors[0] == ""
    assert read_tensors(tmp_path / "run" / STATE_FILE)[1]["step"] == 3


def test_a_rank_that_hangs_ends_all(data: Path, tmp_path: Path) -> None:
    """The one that waits for it says so after the timeout; the other, when it goes on, finds it gone and ends."""
    arguments = options(data, tmp_path / "run", "--checkpoint-every", "1", "--timeout", str(PATIENCE))
    codes, errors = train_processes(arguments, [go_on, hang], tmp_path)
    assert codes == [1, 1]
    line = f"mmer-fast: error: waited {PATIENCE} s (--timeout) for another process of this training in vain ("
    assert errors[0].startswith(line)
    assert errors[0].endswith("; what was saved is whole, and the training can be resumed\n")
    assert len(errors[0].splitlines()) == 1
    assert errors[1] == ""
    assert read_tensors(tmp_path / "run" / STATE_FILE)[1]["step"] == 3


def test_a_report_that_takes_longer_than_the_timeout_fails_nobody(data: Path, tmp_path: Path) -> None:
    arguments = options(data, tmp_path / "run", "--timeout", str(PATIENCE))
    codes, errors = train_processes(arguments, [write_slowly, go_on], tmp_path)
    assert (codes, errors) == ([0, 0], ["", ""])
    assert {"metrics.json", "curves.png", "report.html"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_a_report_that_fails_is_an_error_of_the_process_that_writes_it(data: Path, tmp_path: Path) -> None:
    codes, errors = train_processes(options(data, tmp_path / "run"), [fail_to_write, go_on], tmp_path)
    assert codes == [1, 0]
    assert errors[0].splitlines()[-1] == "ValueError: a test wants it"
    assert errors[1] == ""
    assert (tmp_path / "run" / "metrics.json").exists()


def test_a_killed_rank_ends_all_and_the_training_resumes(data: Path, tmp_path: Path) -> None:
    arguments = options(data, tmp_path / "run", "--checkpoint-every", "1")
    codes, errors = train_processes(arguments, [go_on, die], tmp_path)
    assert codes == [1, -9]
    assert errors[0].startswith("mmer-fast: error: lost contact with another process of this training")
    assert len(errors[0].splitlines()) == 1
    assert read_tensors(tmp_path / "run" / STATE_FILE)[1]["step"] == 3
    codes, errors = train_processes([*arguments, "--resume"], [go_on, go_on], tmp_path)
    assert codes == [0, 0], errors
    assert len(json.loads((tmp_path / "run" / "metrics.json").read_text())["history"]) == 2


def test_sigterm_on_one_rank_saves_the_state_of_all(data: Path, tmp_path: Path) -> None:
    """At the next step at which the ranks wait for each other: `log_every`."""
    arguments = options(data, tmp_path / "run", "--checkpoint-every", "0", "--set=log_every=3")
    codes, errors = train_processes(arguments, [go_on, warn], tmp_path)
    assert codes == [143, 143]
    assert errors == [f"terminated by SIGTERM; go on with: mmer-fast train --out {tmp_path / 'run'} --resume\n", ""]
    assert read_tensors(tmp_path / "run" / STATE_FILE)[1]["step"] == 4  # the fourth is the first measured after it


DIVERGE = ["--set=learning_rate=1e30", "--set=clip_norm=null", "--set=warmup=0"]


@pytest.mark.parametrize(("more", "code", "message"), [(DIVERGE, 1, "not finite"), (["--resume"], 2, "no run")])
def test_what_ends_all_ranks_is_said_once(data: Path, tmp_path: Path, more: list[str], code: int, message: str) -> None:
    codes, errors = train_processes(options(data, tmp_path / "run", *more), [go_on, go_on], tmp_path)
    assert sorted(codes) == [1, code]  # 1 is that of the process that only heard of it
    assert message in "".join(errors)
    assert len("".join(errors).splitlines()) == 1


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_whose_others_never_come_says_so(rank: str, data: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "mmer_fast", *options(data, tmp_path / "run", "--timeout", "3")]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **world}, timeout=120)
    assert ended.returncode == 1, ended.stderr
    assert "did not come together within 3 s (--timeout)" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_process_by_itself_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert not launched()
    with joined(lambda: torch.device("cpu")) as world:
        assert world == ALONE
    with pytest.raises(WorldError, match="start them with torchrun"), joined(lambda: torch.device("cpu"), fsdp=True):
        pass


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_parts_make_up_the_batch(size: int) -> None:
    batch = torch.tensor([5, 3, 8, 1, 9])
    worlds = [World(rank, size) for rank in range(size)]
    assert sum(world.weight(batch) for world in worlds) == pytest.approx(size)
    counted = [world.part(batch) for world in worlds if world.weight(batch) > 0]
    assert sorted(torch.cat(counted).tolist()) == [1, 3, 5, 8, 9]
    assert all(len(world.part(batch)) > 0 for world in worlds)
    turns = [world.turns(list(batch.split(1))) for world in worlds]
    assert len({len(own) for own, _ in turns}) == 1
    assert sorted(int(b) for own, n in turns for b in own[:n]) == [1, 3, 5, 8, 9]
