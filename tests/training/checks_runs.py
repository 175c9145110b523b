"""Whole trainings in several processes: the history of one process, resumption to the same bits and across worlds."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_training import MODEL, Silent, StopAt, run_config, small_data
from worlds import NO_DROPOUT, double, double_model, world_of

from mmer_fast.training import run as run_module
from mmer_fast.training import trainer as trainer_module
from mmer_fast.training.checkpoint import write_json
from mmer_fast.training.data_parallel import prepare
from mmer_fast.training.distributed import ALONE, World, WorldError
from mmer_fast.training.files import PREVIOUS_FILE, STATE_FILE
from mmer_fast.training.loader import training_batches
from mmer_fast.training.lock import locked
from mmer_fast.training.order import batches
from mmer_fast.training.run import RunConfig, RunError, describe_data, train_run
from mmer_fast.training.trainer import Trainer

CPU = torch.device("cpu")
NATURAL = {"rho": 0.0, "sigma": 0.0}
ACCUMULATED = {"batch_size": 20, "accumulation": 4}  # micro-batches of 5, which the ranks share unevenly


class Losses(Silent):
    """Keeps what it was told about each step."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[torch.Tensor] = []
        self.samples: list[int] = []

    def on_step(self, epoch: int, step: int, samples: int, result: Any) -> None:
        self.losses.append(result.losses)
        self.samples.append(samples)


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A new folder, the same on every rank."""
    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name)
    try:
        yield Path(str(name[0]))
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(str(name[0]))


def fit(
    world: World, folder: Path, *, padding_mask: bool = True, **changes: Any
) -> tuple[Losses, list[dict[str, Any]]]:
    """An epoch in float64."""
    data = small_data()
    config = run_config(data, epochs=1, checkpoint_every=0, **changes).train
    model = double_model(padding_mask=padding_mask)
    prepare(model, world)
    observer = Losses()
    trainer = Trainer(model, config, data, folder, {}, observer, world)
    trainer.fit()
    return observer, trainer.progress.history


def an_epoch_has_the_losses_of_one_process(rank: int, size: int) -> None:
    """Batches of 29 of 30 samples: uneven parts, and in the last batch a rank without a sample."""
    patch = pytest.MonkeyPatch()
    patch.setattr(
        trainer_module, "training_batches", lambda *given: (double(each) for each in training_batches(*given))
    )
    patch.setattr("mmer_fast.training.evaluate.batches", lambda *arguments: map(double, batches(*arguments)))
    with shared_folder() as folder, tempfile.TemporaryDirectory() as own:
        padding_counts = {"batch_size": 5, "padding_mask": False}
        uneven = {"batch_size": 29}
        for changes in ({**uneven, **NATURAL}, uneven, {"batch_size": 7}, padding_counts, ACCUMULATED):
            want, history = fit(ALONE, Path(own), **changes)
            for fsdp in (False, True):
                got, got_history = fit(world_of(rank, size, fsdp=fsdp), folder, **changes)
                assert got.samples == want.samples
                torch.testing.assert_close(torch.stack(got.losses), torch.stack(want.losses), rtol=1e-7, atol=1e-12)
                assert_same_record(got_history[0], history[0], 1e-6)
    patch.undo()


def assert_same_record(got: dict[str, Any], want: dict[str, Any], rtol: float) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        if value is None:
            assert got[key] is None, key
        else:
            torch.testing.assert_close(got[key], value, rtol=rtol, atol=1e-12)


def run(world: World, folder: Path, observer: Silent, dropout: bool = True) -> dict[str, Any] | None:
    """Results of a training in `folder`, or None where the observer interrupted it."""
    data = small_data()
    model = MODEL if dropout else dataclasses.replace(MODEL, **NO_DROPOUT)
    config = RunConfig(model, run_config(data).train, describe_data(data))
    folder.mkdir(exist_ok=True)
    try:
        return train_run(config, data, folder, CPU, observer, world)
    except KeyboardInterrupt:
        return None


def resumption_gives_the_same_bits(rank: int, size: int) -> None:
    """With dropout, which every rank draws for itself."""
    for fsdp in (False, True):
        world = world_of(rank, size, fsdp=fsdp)
        with shared_folder() as folder:
            whole = run(world, folder / "whole", Silent())
            assert torch.initial_seed() == 1_000_003 * rank  # what its dropout was drawn with
            assert run(world, folder / "stopped", StopAt(6)) is None
            observer = Silent()
            assert run(world, folder / "stopped", observer) == whole
            assert observer.steps == 3
            world.wait()
            for name in ("metrics.json", "model.safetensors", PREVIOUS_FILE, STATE_FILE):
                assert (folder / "stopped" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
            assert json.loads((folder / "whole" / "metrics.json").read_text()) == whole  # on every rank
            names = {"config.json", "metrics.json", "model.safetensors", PREVIOUS_FILE, STATE_FILE}
            assert {path.name for path in (folder / "whole").iterdir()} == names


def the_metrics_can_be_read_everywhere_when_training_returns(rank: int, size: int) -> None:
    """However long the first rank takes to write them."""

    def slowly(path: Path, value: Any) -> None:
        time.sleep(1)
        write_json(path, value)

    with pytest.MonkeyPatch.context() as patch, shared_folder() as folder:
        patch.setattr(run_module, "write_json", slowly)
        results = run(world_of(rank, size), folder / "run", Silent())
        assert json.loads((folder / "run" / "metrics.json").read_text()) == results


def a_directory_in_which_others_train_is_refused_by_all(rank: int, size: int) -> None:
    with shared_folder() as folder, locked(folder) if rank == 0 else nullcontext():
        with pytest.raises(RunError, match="another process trains there"):
            train_run(run_config(small_data()), small_data(), folder, CPU, Silent(), world_of(rank, size))
        assert not list(folder.iterdir())


def a_damaged_state_gives_way_to_the_one_before(rank: int, size: int) -> None:
    """All ranks go on from it, one says so, and none does where they read differently."""
    for fsdp in (False, True):
        world = world_of(rank, size, fsdp=fsdp)
        with shared_folder() as folder:
            whole = run(world, folder / "whole", Silent())
            assert run(world, folder / "stopped", StopAt(6)) is None
            world.wait()
            state = folder / "stopped" / STATE_FILE
            if rank == 0:
                state.write_bytes(state.read_bytes()[:-1] + b"?")
            world.wait()
            observer = Silent()
            with pytest.warns(UserWarning, match="going on from") if rank == 0 else nullcontext():
                assert run(world, folder / "stopped", observer) == whole
            assert observer.steps == 4
            world.wait()
            for name in ("metrics.json", "model.safetensors", PREVIOUS_FILE, STATE_FILE):
                assert (folder / "stopped" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
            own = folder / f"own{rank}"
            shutil.copytree(folder / "stopped", own)
            if rank == 1:
                (own / STATE_FILE).unlink()
            with pytest.raises(WorldError, match=rf"saved state: rank 0 has '{STATE_FILE}', rank 1 '{PREVIOUS_FILE}'"):
                run(world, own, Silent())


def resumption_across_worlds(rank: int, size: int) -> None:
    """Begun in one process, gone on with by all, replicated, then sharded, ended by one; as if one had done it all."""
    worlds = [world_of(rank, size), world_of(rank, size, fsdp=True)]
    with shared_folder() as folder:
        want = run(ALONE, folder / f"whole{rank}", Silent(), dropout=False)
        if rank == 0:
            run(ALONE, folder / "run", StopAt(2), dropout=False)
        dist.barrier()
        for world in worlds:
            assert run(world, folder / "run", StopAt(3), dropout=False) is None
            world.wait()
        if rank == 0:
            observer = Silent()
            got = run(ALONE, folder / "run", observer, dropout=False)
            assert observer.steps == 3
            assert want is not None
            assert got is not None
            for record, expected in zip(got["history"], want["history"], strict=True):
                assert_same_record(record, expected, 1e-4)
        dist.barrier()


def what_shards_cannot_is_refused(rank: int, size: int) -> None:
    data, world = small_data(), world_of(rank, size, fsdp=True)
    for changes, message in (
        ({"app_batch": "local"}, "app_batch must be 'global' with fsdp"),
        ({"compile": True}, "compile must be False with fsdp"),
    ):
        with pytest.raises(RunError, match=message):
            train_run(run_config(data, **changes), data, Path("not used"), CPU, Silent(), world)
