"""Files that survive a crash: safetensors and JSON, replaced atomically, read without executing anything.

A training state is *one* safetensors file: the tensors of model, optimiser, random generators and running
sums, and everything else as JSON in its header. One file, one rename: a reader sees the old state or the new
one.

A CRC-32 over header, names, dtypes, shapes and values finds what a disk or a copy has changed in a file: no protection
against deliberate changes, but at some 3 GB/s cheap enough for every write and read. The state before the last
one is kept, so that a damaged file costs a few steps and not the run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmer_fast._files import PARTIAL, WriteError, write_atomically, write_text_atomically

CHECKED_HEADER = "crc32 header"
"""Metadata entry of a tensor file: eight hexadecimal digits, a space, JSON. The only one: safetensors shuffles several.
Files from before there were checksums have the JSON alone, as "header".
"""
_ORIGIN = "; the directory of a finished training has one"


class CheckpointError(ValueError):
    """A file is not the checkpoint that it should be; the message names the file and what is wrong."""


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinities are an error.

    Raises:
        WriteError: the file cannot be written.
    """
    write_text_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        CheckpointError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file{_ORIGIN}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable JSON file: {error}") from None


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Any, *, keep_previous_as: Path | None = None
) -> None:
    """Write tensors with a JSON header and a checksum of both to a safetensors file, atomically.

    Args:
        path: of the file.
        tensors: of any shape, dtype and device.
        header: what JSON can express.
        keep_previous_as: where the file goes that was at `path`, if there was one.

    Raises:
        WriteError: a file cannot be written; what is at `path`, old or new, is whole.
    """
    stored = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    text = json.dumps(header, allow_nan=False)
    metadata = {CHECKED_HEADER: f"{_checksum(stored, text)} {text}"}

    def write(partial: Path) -> None:
        try:
            save_file(stored, partial, metadata=metadata)
        except SafetensorError as error:  # what the operating system said is in the text alone
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise OSError(str(error)) from error
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error

    with _keeping(path, keep_previous_as) if keep_previous_as is not None else nullcontext():
        write_atomically(path, write)


def _checksum(tensors: Mapping[str, Tensor], header: str) -> str:
    """CRC-32 of the header's text and of name, dtype, shape and values of every tensor, all contiguous, on the CPU."""
    value = zlib.crc32(header.encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


@contextmanager
def _keeping(path: Path, previous: Path) -> Iterator[None]:
    """Around a replacement of `path`: what was there goes to `previous`, unless the replacement fails.

    While the new file is written and moved to `path`, the old one has a second name; that is moved to `previous` last.
    So at any moment `path` is whole, the old file or the new one, and so is `previous`, an older one than `path`.

    Raises:
        WriteError: in place of any OSError.
    """
    held = previous.with_name(f"{PARTIAL}{previous.name}")
    try:
        held.unlink(missing_ok=True)
        if path.exists():
            _give_second_name(path, held)
        yield
        if held.exists():
            os.replace(held, previous)
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), str(previous)) from error
    finally:
        with suppress(OSError):  # there may be no directory any more
            held.unlink(missing_ok=True)


def _give_second_name(path: Path, name: Path) -> None:
    try:
        os.link(path, name)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())


def read_tensors(
    path: Path, device: torch.device | str = "cpu", *, advice: str = "restore a copy of it, or make it anew"
) -> tuple[dict[str, Tensor], Any]:
    """Read what `write_tensors` wrote, and check that nothing has changed it.

    Args:
        path: of the file. One without a checksum, as they were before, is read too.
        device: where the tensors go.
        advice: what the message says to do about a file that cannot be used; "": nothing.

    Raises:
        CheckpointError: the file is missing, damaged, or has no header of ours.
    """
    ending = f"; {advice}" if advice else ""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if CHECKED_HEADER in metadata:
            expected, text = metadata[CHECKED_HEADER].split(" ", 1)
            found = _checksum(tensors, text)
        else:
            expected = found = ""
            text = metadata["header"]
        if found == expected:
            return {name: tensor.to(device) for name, tensor in tensors.items()}, json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file{_ORIGIN}") from None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint of mmer_fast: {error}{ending}") from None
    raise CheckpointError(f"{path} is damaged: expected contents with the checksum {expected}, got {found}{ending}")


@dataclass(frozen=True)
class SavedState:
    """A state of training that was read.

    Attributes:
        path: of the file.
        tensors, header: what is in it.
        unusable: why the file is not the one that was asked for first; "" where it is.
    """

    path: Path
    tensors: dict[str, Tensor]
    header: Any
    unusable: str = ""


def read_last_state(path: Path, previous: Path) -> SavedState | None:
    """The state in `path`, or where that is damaged or missing the one in `previous`; None where there is neither.

    Raises:
        CheckpointError: neither can be read.
    """
    there = [each for each in (path, previous) if each.exists()]
    errors = [] if path in there else [f"{path} is missing"]
    for each in there:
        try:
            return SavedState(each, *read_tensors(each, advice=""), "; ".join(errors))
        except CheckpointError as error:
            errors.append(str(error))
    if not there:
        return None
    if previous not in there:
        errors.append(f"there is no {previous.name} to go on from instead")
    raise CheckpointError(
        f"{'; '.join(errors)}; restore a copy of {path.name}, or start a new run in another directory"
    )
