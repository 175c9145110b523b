"""Data that memory need not hold: arrays in files, for every way that readers make large ones."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from mmer_fast.data import (
    DataError,
    MultiModalData,
    large_arrays,
    load,
    make_dialogues,
    make_synthetic,
    npz,
    safetensors_file,
)
from mmer_fast.data.formats import Format
from mmer_fast.data.loading import FORMATS


@pytest.fixture
def in_files(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No memory is left and every array is large: the sizes of arrays that go to files from now on."""
    sizes: list[int] = []
    reserve = os.posix_fallocate
    monkeypatch.setattr(large_arrays, "available_memory", lambda: 0.0)
    monkeypatch.setattr(large_arrays, "LARGE", 1)
    monkeypatch.setattr(npz, "MAP_FROM", 1)
    monkeypatch.setattr(safetensors_file, "LARGE", 1)
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, start, size: sizes.append(size) or reserve(fd, start, size))
    return sizes


def small() -> MultiModalData:
    return make_synthetic(0, n_train=6, n_valid=3, n_test=4, max_length=8)


def assert_same(got: MultiModalData, expected: MultiModalData) -> None:
    for name, split in expected.splits.items():
        for modality in expected.modalities:
            np.testing.assert_array_equal(got.splits[name].features[modality], split.features[modality])
            np.testing.assert_array_equal(got.splits[name].lengths[modality], split.lengths[modality])
        np.testing.assert_array_equal(got.splits[name].labels, split.labels)


def test_an_array_in_a_file_is_an_array(in_files: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    values = large_arrays.zeros((3, 4), np.float64)
    assert in_files == [96]
    assert values.shape == (3, 4)
    assert not values.any()
    values[1] = np.arange(4)
    copy = large_arrays.copied(values, np.float16)
    values[:] = -1
    assert copy.dtype == np.float16
    np.testing.assert_array_equal(copy[1], [0, 1, 2, 3])
    assert list(tmp_path.iterdir()) == []  # it has no name


def test_small_arrays_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", None)
    monkeypatch.setattr(large_arrays, "LARGE", 1)
    monkeypatch.setattr(large_arrays, "available_memory", lambda: 4000.0)
    assert large_arrays.zeros((250,)).nbytes == 1000
    with pytest.raises(TypeError):
        large_arrays.zeros((251,))


def test_float32_is_not_copied() -> None:
    values = np.ones((2, 3), np.float32)
    assert large_arrays.in_float32(values) is values
    assert large_arrays.in_float32(values.astype(">f4")).dtype == np.float32
    assert np.isposinf(large_arrays.in_float32(np.full(2, 1e300))).all()


def test_no_room_is_said_before_anything_is_written(in_files: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"an array of 4\.0 GB needs as much room in .*No space left .*TMPDIR names"):
        large_arrays.zeros((10**9,))
    monkeypatch.setattr(large_arrays, "available_memory", lambda: 100.0)
    assert large_arrays.zeros((20,)).nbytes == 80  # there is room enough, if not much


@pytest.mark.parametrize(("limit", "available"), [("1000", 1000 - 600 + 150), ("max", np.inf), ("100", 0.0)])
def test_the_limit_of_a_container_counts(limit: str, available: float, tmp_path: Path) -> None:
    used = 600 if limit == "1000" else 700
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 100\nactive_file 50\n")
    assert large_arrays._of_container(tmp_path) == available
    assert large_arrays._of_container(tmp_path / "absent") == np.inf
    assert 0 < large_arrays.available_memory() < 2**60


@pytest.mark.parametrize("name", ["npz", "safetensors"])
def test_an_empty_split_is_named(name: str, in_files: list[int], tmp_path: Path) -> None:
    arrays = {f"{split}_{key}": np.ones((0 if split == "valid" else 2, *shape), np.float32)
              for split in ("train", "valid", "test") for key, shape in (("a", (3, 2)), ("labels", (1,)))}  # fmt: skip
    path = tmp_path / f"data.{name}"
    if name == "npz":
        np.savez(path, **arrays)
    else:
        from safetensors.numpy import save_file

        save_file(arrays, path)
    with pytest.raises(DataError, match="valid labels: expected at least one sample"):
        load(path)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_the_same(name: str, in_files: list[int], tmp_path: Path) -> None:
    chosen: Format = FORMATS[name]
    path = tmp_path / f"data{chosen.suffix}"
    of_dialogues = name in ("mmgcn", "mmin")
    data = make_dialogues(0, n_train=4, n_valid=2, n_test=2) if of_dialogues else small()
    chosen.write(data, path)
    from_files = load(path, format=name)
    if name in ("npz", "safetensors", "csd", "mmin"):
        assert in_files
    in_files.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_arrays, "available_memory", lambda: np.inf)
        expected = load(path, format=name)
    assert in_files == []
    assert_same(from_files, expected)


@pytest.mark.parametrize("compress", [True, False])
def test_an_npz_is_unpacked_into_files_or_mapped(compress: bool, in_files: list[int], tmp_path: Path) -> None:
    data, path = small(), tmp_path / "data.npz"
    npz.write_npz(data, path, compress=compress)
    assert_same(load(path), data)
    features = [s.features[m].nbytes for s in data.splits.values() for m in data.modalities]
    assert set(features) <= set(in_files) if compress else not set(features) & set(in_files)


def test_damage_in_a_compressed_array_is_found(in_files: list[int], tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    npz.write_npz(small(), path)
    content = bytearray(path.read_bytes())
    start = content.index(b"train_audio.npy") + 200
    content[start] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="key train_audio cannot be read"):
        load(path)


SCRIPT = """
import resource, sys
from mmer_fast.data import load
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]),) * 2)
from mmer_fast.data import large_arrays
large_arrays.available_memory = lambda: 4e7
split = load(sys.argv[1]).splits["train"]
print(split.features["a"].shape, float(split.features["a"][-1, 0, 0]))
"""


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_data_larger_than_the_memory_of_the_process(suffix: str, tmp_path: Path) -> None:
    """400 MB of features, where 300 MB of private memory are allowed beside those of the imports."""
    path = tmp_path / f"data{suffix}"
    n = 1000
    arrays = {f"{split}_{key}": x for split, rows in (("train", n), ("valid", 2), ("test", 2)) for key, x in {
        "a": np.ones((rows, 100, 1000), np.float32), "a_lengths": np.full(rows, 100),
        "labels": np.ones((rows, 1), np.uint8)}.items()}  # fmt: skip
    arrays["train_a"][-1, 0, 0] = 7
    if suffix == ".npz":
        np.savez_compressed(path, **arrays)
    else:
        from safetensors.numpy import save_file

        save_file(arrays, path)
    del arrays
    usual = _private_bytes()
    command = [sys.executable, "-c", SCRIPT, str(path), str(usual + 300_000_000)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["(1000,", "100,", "1000)", "7.0"]


def _private_bytes() -> int:
    """What a process has that has imported the package."""
    code = "import mmer_fast.data; print(*[x.split()[1] for x in open('/proc/self/status') if x.startswith('VmData')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return 1024 * int(found)
