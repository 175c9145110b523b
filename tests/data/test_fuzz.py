"""Damaged files of every format are read or refused with a DataError, and nothing else ever comes out.

The damage is drawn by hypothesis, the same in every run; `make fuzz` draws more, and anew. HDF5 files are parsed by a
library in C, so theirs is limited to cuts and single bytes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzzing import examples
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from mmer_fast.data import FORMATS, DataError, load
from mmer_fast.data.needs import EVERYTHING, FEATURES

EXAMPLES = examples(60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
BYTES = st.one_of(st.sampled_from([0, 1, 127, 128, 255]), st.integers(0, 255))
PLACES = st.floats(0, 1, exclude_max=True)
HDF5 = ("csd", "mmin")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, emotional) -> dict[str, tuple[Path, dict[Path, bytes]]]:
    """Format -> its path, and what each of its files holds."""
    found = {}
    for name, format in FORMATS.items():
        path = tmp_path_factory.mktemp(name) / f"d{format.suffix}"
        format.write(emotional, path)
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        found[name] = path, {file: file.read_bytes() for file in files}
    return found


def _read_damaged(path: Path, file: Path, content: bytes, damaged: bytes) -> None:
    file.write_bytes(damaged)
    messages = []
    try:
        for needs in (EVERYTHING, FEATURES):
            try:
                load(path, needs=needs).check(needs)
            except DataError as error:
                messages.append(str(error))
    finally:
        file.write_bytes(content)
    assert all(message.strip() for message in messages)


@pytest.mark.parametrize("name", FORMATS)
@EXAMPLES
@given(where=PLACES, keep=PLACES)
def test_cut_files(whole, name, where, keep):
    path, contents = whole[name]
    file, content = list(contents.items())[int(where * len(contents))]
    _read_damaged(path, file, content, content[: int(keep * len(content))])


@pytest.mark.parametrize("name", FORMATS)
@EXAMPLES
@given(where=PLACES, early=st.booleans(), places=st.lists(st.tuples(PLACES, BYTES), min_size=1, max_size=8))
def test_garbled_files(whole, name, where, early, places):
    path, contents = whole[name]
    file, content = list(contents.items())[int(where * len(contents))]
    damaged = bytearray(content)
    for place, byte in places[: 1 if name in HDF5 else None]:
        damaged[int(place * min(len(content), 1000 if early else len(content)))] = byte
    _read_damaged(path, file, content, bytes(damaged))


@pytest.mark.parametrize("name", FORMATS)
def test_other_files_under_the_name_of_a_format(whole, name):
    path, contents = whole[name]
    for file, content in contents.items():
        for other in (
            b"",
            b"\x80",
            b"PK\x05\x06" + bytes(18),
            b"\x89HDF\r\n\x1a\n",
            b"\x93NUMPY\x01\x00",
            b"text\n" * 9,
        ):
            _read_damaged(path, file, content, other)
