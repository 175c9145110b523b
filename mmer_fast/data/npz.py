"""Plain ``.npz`` data sets: the format to convert everything else to. The keys are those of `flat`, and

    label_names                   (K,) strings, optional

Nothing in such a file can execute: arrays of Python objects are refused (``allow_pickle=False``). A large
array that is stored without compression is mapped from the file, read-only, and a compressed one is unpacked by and
by, so a data set may be larger than memory; checksums are verified all the same.
"""

from __future__ import annotations

import math
import mmap
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from mmer_fast._files import write_atomically
from mmer_fast.data.containers import MultiModalData
from mmer_fast.data.errors import DataError
from mmer_fast.data.flat import assemble, flatten
from mmer_fast.data.formats import Format, Source
from mmer_fast.data.large_arrays import LARGE, zeros
from mmer_fast.data.needs import FEATURES

MAP_FROM = LARGE  # bytes; smaller arrays are read into memory
_ALIGNMENT = 64
_PADDING_FIELD = 0xD935  # the extra field of a zip entry that says: these bytes only align what follows


def read_npz(path: str | Path) -> MultiModalData:
    """Read a ``.npz`` data set with arrays named ``{split}_{modality}``, as `write_npz` names them.

    Raises:
        DataError: naming the key, what was expected and what came.
    """
    return _read(Source(path)).check()


def write_npz(data: MultiModalData, path: str | Path, *, compress: bool = True) -> None:
    """Write a data set so that a reader sees either the old file or the whole new one.

    Args:
        data: any of the splits; one without labels is written without.
        path: of the file.
        compress: False stores the arrays as they are: larger, quicker to read, and mapped instead of loaded.

    Raises:
        DataError: ``data`` is inconsistent, or ``path`` does not end in ``.npz``.
        OSError: the file cannot be written; nothing is left of it.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz":
        raise DataError(f"{path}: expected suffix .npz; got {path.suffix or 'none'!r}")
    data.check(FEATURES)
    names = {"label_names": np.array(data.label_names, dtype=np.str_)} if data.label_names else {}
    arrays = {**names, **flatten(data)}

    def write(partial: Path) -> None:
        with zipfile.ZipFile(partial, "w", allowZip64=True) as archive:
            for key, values in arrays.items():
                _write_array(archive, f"{key}.npy", values, compress)

    write_atomically(path, write)


def _write_array(archive: zipfile.ZipFile, name: str, values: np.ndarray, compress: bool) -> None:
    entry = zipfile.ZipInfo(name)  # dated 1980: the same data give the same bytes
    entry.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    if not compress:
        assert archive.fp is not None
        header = 30 + len(name.encode()) + 20  # of the entry, with the sizes of zip64
        gap = -(archive.fp.tell() + header + 4) % _ALIGNMENT
        entry.extra = _PADDING_FIELD.to_bytes(2, "little") + gap.to_bytes(2, "little") + bytes(gap)
    with archive.open(entry, "w", force_zip64=True) as file:
        np.lib.format.write_array(file, np.ascontiguousarray(values), allow_pickle=False)


def _read(source: Source) -> MultiModalData:
    arrays = _read_arrays(source.path)
    return assemble(source.path, arrays, _label_names(source.path, arrays), source.needs)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    arrays = {}
    with path.open("rb") as file:  # NumPy leaves a file open that it opened itself and could not read
        try:
            archive = np.load(file, allow_pickle=False)
        except Exception as error:  # a damaged file can raise anything
            # NumPy takes what is not an archive for a pickle, and its message says how to load that unsafely.
            reason = "it is no zip archive" if "allow_pickle" in str(error) else str(error)[:200]
            raise DataError(f"{path}: not a readable .npz file ({reason})") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"{path}: expected an .npz archive; got a single array")
        for key in archive.files:
            try:
                values = _large(file, archive, key)
                arrays[key] = archive[key] if values is None else values
            except Exception as error:
                if "allow_pickle" in str(error):
                    raise DataError(
                        f"{path}: key {key}: expected numbers or strings; got Python objects, which are not read "
                        "(rows of different lengths: pad them to one, and say how many steps count)"
                    ) from error
                raise DataError(f"{path}: key {key} cannot be read ({str(error)[:200]})") from error
            if not isinstance(arrays[key], np.ndarray):
                raise DataError(f"{path}: {key}: expected an array (.npy); got another kind of file")
    return arrays


def _large(file: IO[bytes], archive: np.lib.npyio.NpzFile, key: str) -> np.ndarray | None:
    """An array that memory need not hold; None where it is small or of a rare kind."""
    if archive.zip is None or f"{key}.npy" not in archive.zip.namelist():
        return None
    entry = archive.zip.getinfo(f"{key}.npy")
    if entry.file_size < MAP_FROM:
        return None
    stored = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
    values = _mapped(file, entry) if stored else None
    return _unpacked(archive.zip, entry) if values is None else values


def _mapped(file: IO[bytes], entry: zipfile.ZipInfo) -> np.ndarray | None:
    """A stored array as a read-only map of the file; None where it is of a rare kind."""
    file.seek(entry.header_offset)
    header = file.read(30)
    start = file.tell() + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    file.seek(start)
    found = _array_header(file)
    if header[:4] != b"PK\x03\x04" or found is None:
        return None
    shape, fortran_order, dtype = found
    if start + entry.file_size > file.seek(0, 2):
        raise EOFError("the file ends before the array does")
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    file.seek(start)
    _check_sum(file, entry)
    file.seek(start)
    _array_header(file)
    _check_size(shape, dtype, start + entry.file_size - file.tell())
    return np.ndarray(shape, dtype, buffer=mapped, offset=file.tell(), order="F" if fortran_order else "C")


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray | None:
    """A compressed array, piece by piece, in one that memory need not hold; None where it is of a rare kind.

    The zip reader holds what comes out to the entry's checksum at its end.
    """
    with archive.open(entry) as file:
        found = _array_header(file)
        if found is None or found[1]:
            return None
        shape, _, dtype = found
        _check_size(shape, dtype, entry.file_size - file.tell())
        values = zeros(shape, dtype)
        flat, done = values.reshape(-1).view(np.uint8), 0
        while chunk := file.read(4 << 20):
            flat[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
            done += len(chunk)
        if done != len(flat):
            raise EOFError("the file ends before the array does")
    return values


def _check_size(shape: tuple[int, ...], dtype: np.dtype, size: int) -> None:
    if math.prod(shape) * dtype.itemsize != size:
        raise ValueError("the array's size does not fit its shape")


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype] | None:
    """Shape, Fortran order and dtype of the array that begins here; None for one of a rare kind."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        return None
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    return None if dtype.hasobject else (shape, fortran_order, dtype)  # objects are refused by NumPy


def _check_sum(file: IO[bytes], entry: zipfile.ZipInfo) -> None:
    """Hold the bytes at the file's position to the entry's checksum."""
    value, left = 0, entry.file_size
    while left:
        chunk = file.read(min(left, 4 << 20))
        value, left = zlib.crc32(chunk, value), left - len(chunk)
    if value != entry.CRC:
        raise zipfile.BadZipFile(f"Bad CRC-32 for file {entry.filename!r}")


def _label_names(path: Path, arrays: dict[str, np.ndarray]) -> list[str] | None:
    names = arrays.pop("label_names", None)
    if names is None:
        return None
    if names.ndim != 1 or names.dtype.kind != "U":
        raise DataError(f"{path}: key label_names: expected (K,) strings; got {names.dtype} of shape {names.shape}")
    return [str(name) for name in names]


FORMAT = Format(
    name="npz",
    title="a .npz data set",
    detect=lambda source: source.suffix == ".npz",
    read=_read,
    write=lambda data, path: write_npz(data, path),
    suffix=".npz",
)
