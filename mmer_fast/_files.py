"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PARTIAL = ".partial-"
SAFETENSORS_PARTIAL = ".tmp" + "[0-9A-Za-z]" * 6
"""What safetensors calls a file that it is still writing, before it moves it to the path that it was given."""


class WriteError(OSError):
    """A file cannot be written; the message names it and the cause. What was there before still is."""

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path beside `path`, flush it to disk and move it there in one step.

    The file has the permissions of any file that the user makes. Where `write` fails nothing is left of it.

    Raises:
        WriteError: in place of any OSError.
    """
    partial = path.with_name(f"{PARTIAL}{path.name}")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        os.chmod(partial, mode)  # some writers make their files private
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):  # there may be no directory any more
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise WriteError(error.errno, error.strerror or str(error), str(path)) from error
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically; what of it is no text (a file may be called so) as in "\\udce9".

    Raises:
        WriteError: the file cannot be written.
    """

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")

    write_atomically(path, write)


def remove_partial_files(directory: Path) -> None:
    """Remove what a process that was killed in `write_atomically` has left in a directory."""
    for pattern in (f"{PARTIAL}*", SAFETENSORS_PARTIAL):
        for partial in directory.glob(pattern):
            if partial.is_file():
                with suppress(OSError):  # what is in the way of the next write is reported there
                    partial.unlink()


def write_folder_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a new folder beside `path` and move it there in one step, once its files are on disk.

    Where `write` fails nothing is left of it.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already")
    partial = path.with_name(f"{PARTIAL}{path.name}")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir()
        write(partial)
        for file in partial.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
