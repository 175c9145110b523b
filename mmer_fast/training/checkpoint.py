"""Files that survive a crash: safetensors and JSON, replaced atomically, read without executing anything.

A training state is *one* safetensors file: the tensors of model, optimiser, random generators and running
sums, and everything else as JSON in its header. One file, one rename: a reader sees the old state or the new
one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmer_fast._files import write_atomically
from mmer_fast.training.distributed import ALONE, World


class CheckpointError(ValueError):
    """A file is not the checkpoint that it should be; the message names the file and what is wrong."""


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinities are an error.

    Raises:
        WriteError: the file cannot be written.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        CheckpointError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable JSON file: {error}") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Any) -> None:
    """Write tensors with a JSON header to a safetensors file, atomically.

    Raises:
        WriteError: the file cannot be written.
    """
    stored = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    metadata = {"header": json.dumps(header, allow_nan=False)}  # one entry: safetensors shuffles several

    def write(partial: Path) -> None:
        try:
            save_file(stored, partial, metadata=metadata)
        except SafetensorError as error:  # what the operating system said is in the text alone
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise OSError(str(error)) from error
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error

    write_atomically(path, write)


def read_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], Any]:
    """Read what `write_tensors` wrote.

    Raises:
        CheckpointError: the file is missing, damaged, or has no header of ours.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = json.loads((file.metadata() or {})["header"])
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint of mmer_fast: {error}") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """State of an optimiser over `model.parameters()` as `<parameter name>/<state key>` → tensor."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`.

    Raises:
        KeyError: a parameter is unknown, or lacks a part of the state that others have.
    """
    state: dict[int, dict[str, Tensor]] = {}
    index = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("/", 1)
        state.setdefault(index[name], {})[key] = tensor
    keys = {key for values in state.values() for key in values}
    for name, i in index.items():
        missing = keys - state[i].keys() if i in state else set()
        if missing:
            raise KeyError(f"{name}/{min(missing)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_states(world: World = ALONE) -> dict[str, Tensor]:
    """States of torch's random generators (the only ones that training draws from), `cpu` and `cuda/<index>`.

    Of several processes, those of every one: of the first `cpu` and `cuda/0`, its device, as if it were alone; of the
    others the same under `ranks/<rank>/`. Each has to call this.
    """
    if world.group is None:
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states |= {f"cuda/{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        return states
    own = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        own["cuda/0"] = torch.cuda.get_rng_state(world.device)
    return {_of_rank(rank) + name: state for name, mine in own.items() for rank, state in enumerate(world.gather(mine))}


def restore_random_states(states: Mapping[str, Tensor], world: World = ALONE) -> None:
    """The inverse of `random_states`; generators of ranks or devices without a state are left alone."""
    cpu = _of_rank(world.rank) + "cpu"
    if cpu in states or world.first:
        torch.set_rng_state(states[cpu])
    if world.group is None:
        devices = {f"cuda/{i}": torch.device("cuda", i) for i in range(torch.cuda.device_count())}
    else:
        devices = {_of_rank(world.rank) + "cuda/0": world.device} if world.device.type == "cuda" else {}
    for name, device in devices.items():
        if name in states:
            torch.cuda.set_rng_state(states[name], device)


def _of_rank(rank: int) -> str:
    return f"ranks/{rank}/" if rank else ""


def section(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under `prefix/`, without the prefix."""
    return {name.removeprefix(prefix + "/"): t for name, t in tensors.items() if name.startswith(prefix + "/")}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `section`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}
