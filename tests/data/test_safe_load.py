from __future__ import annotations

import pickle
from argparse import Namespace
from collections import OrderedDict, deque
from pathlib import Path

import numpy as np
import pytest
import torch

from mmer_fast.data import DataError
from mmer_fast.data.safe_load import load_plain


class TouchesFile:
    """What a hostile pickle does: unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class CallsEval:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


WRITERS = {
    "zip": lambda value, file: torch.save(value, file),
    "zip, protocol 4": lambda value, file: torch.save(value, file, pickle_protocol=4),
    "legacy": lambda value, file: torch.save(value, file, _use_new_zipfile_serialization=False),
    "pickle, protocol 2": lambda value, file: pickle.dump(value, file, protocol=2),
    "pickle, protocol 5": lambda value, file: pickle.dump(value, file, protocol=5),
}


def _write(path: Path, value, writer) -> Path:
    with path.open("wb") as file:
        writer(value, file)
    return path


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize(("hostile", "named"), [(TouchesFile, "pathlib"), (CallsEval, "eval")])
def test_code_in_a_file_is_named_and_not_run(tmp_path, writer, hostile, named):
    trap = tmp_path / "executed"
    path = _write(tmp_path / "d.pt", {"train": [np.zeros(2), hostile(trap)]}, writer)
    with pytest.raises(DataError, match=f"asks for .*{named}"):
        load_plain(path)
    assert not trap.exists()
    hostile(trap).__reduce__()[0](*hostile(trap).__reduce__()[1])  # the trap itself works
    assert trap.exists()


@pytest.mark.parametrize("writer", [WRITERS["zip"], WRITERS["legacy"]], ids=["zip", "legacy"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", ">f4", "i8", "u1", "?"])
def test_arrays_come_back_as_they_were(tmp_path, writer, dtype, order):
    array = np.asarray(np.arange(12).reshape(3, 4) % 5, dtype=dtype, order=order)
    back = load_plain(_write(tmp_path / "d.pt", {"x": [array, array[0, 1]]}, writer))["x"]
    assert np.array_equal(back[0], array)
    assert back[0].dtype == array.dtype
    assert back[1] == array[0, 1]


@pytest.mark.parametrize(("old", "new"), [("numpy._core", "numpy.core"), ("numpy.core", "numpy._core")])
def test_names_of_both_numpy_generations_are_known(tmp_path, old, new):
    array = np.arange(3.0)
    path = tmp_path / "d.pt"
    torch.save([array, array[2]], path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(f"c{old}.multiarray".encode(), f"c{new}.multiarray".encode()))
    back, scalar = load_plain(path)
    assert back.tolist() == [0, 1, 2]
    assert scalar == 2


def test_tensors_and_containers_become_arrays_and_builtins(tmp_path):
    value = OrderedDict(a=(torch.arange(3), None), b=[torch.ones(2, dtype=torch.bfloat16), "s", 1.5, True])
    back = load_plain(_write(tmp_path / "d.pt", value, WRITERS["zip"]))
    assert type(back) is dict
    assert back["a"][0].tolist() == [0, 1, 2]
    assert back["b"][0].dtype == np.float32
    assert back["b"][1:] == ["s", 1.5, True]


def test_strings_objects_and_settings_become_builtins(tmp_path):
    value = {"id": np.array(["a", "bc"]), "words": np.array(["x", 3, [1.0]], object), "settings": Namespace(lr=0.1)}
    back = load_plain(_write(tmp_path / "d.pt", value, WRITERS["zip"]))
    assert back["id"].tolist() == ["a", "bc"]
    assert back["words"] == ["x", 3, [1.0]]
    assert back["settings"] == {"lr": 0.1}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array(["2026-01-01"], dtype="M8[D]"), "dtype 'M8' are refused"),
        (np.ones(2, complex), "dtype 'c16' are refused"),
        (np.zeros(1, dtype=[("a", "f4")]), "refused"),
        (torch.device("cpu"), r"asks for torch\.device"),
        (torch.eye(2).to_sparse(), r"asks for torch\._utils\._rebuild_sparse_tensor"),
    ],
)
def test_other_values_are_refused(tmp_path, value, message):
    with pytest.raises(DataError, match=message):
        load_plain(_write(tmp_path / "d.pt", value, WRITERS["zip"]))


def test_a_class_of_the_users_is_named(tmp_path):
    path = _write(tmp_path / "d.pt", deque([1]), WRITERS["zip"])
    with pytest.raises(DataError, match=r"asks for collections\.deque; expected only tensors and plain arrays"):
        load_plain(path)


@pytest.mark.parametrize("writer", [WRITERS["zip"], WRITERS["legacy"]], ids=["zip", "legacy"])
def test_damaged_files(tmp_path, writer):
    whole = _write(tmp_path / "d.pt", {"x": [torch.ones(50), np.ones(50)]}, writer).read_bytes()
    for keep in (0, 1, 10, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.pt").write_bytes(whole[:keep])
        with pytest.raises(DataError, match=r"cut\.pt: not a readable torch\.save file") as caught:
            load_plain(tmp_path / "cut.pt")
        assert "weights_only=False" not in str(caught.value)


def test_the_allow_list_ends_with_the_call(tmp_path):
    before = set(map(str, torch.serialization.get_safe_globals()))  # torch keeps them in a set
    load_plain(_write(tmp_path / "d.pt", np.ones(2), WRITERS["zip"]))
    assert set(map(str, torch.serialization.get_safe_globals())) == before
