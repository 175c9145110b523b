from __future__ import annotations

import os
import pickle
import struct
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

from mmer_fast.data import DataError
from mmer_fast.data.safe_pickle import load_pickle


class Calls:
    """What a hostile pickle does: unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _load(tmp_path: Path, content, protocol: int = 4):
    path = tmp_path / "d.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return load_pickle(path)


@pytest.mark.parametrize("protocol", range(6))
def test_code_in_a_file_is_named_and_not_run(tmp_path, protocol):
    trap = tmp_path / "executed"
    hostile = [
        (Calls(os.system, f"touch {trap}"), "system"),
        (Calls(eval, f"open({str(trap)!r}, 'w')"), "eval"),
        (Calls(exec, f"open({str(trap)!r}, 'w')"), "exec"),
        (Calls(Path.touch, trap), "pathlib"),
        (Calls(getattr, trap, "touch"), "getattr"),
        (Calls(__import__, "antigravity"), "__import__"),
        (Calls(np.load, str(trap)), "numpy.*load"),
        (Calls(torch.load, str(trap)), "torch.*load"),
    ]
    for value, named in hostile:
        with pytest.raises(DataError, match=rf"refused, since it asks for .*{named}.*; expected only arrays"):
            _load(tmp_path, {"train": [np.zeros(2), value]}, protocol)
    assert not trap.exists()


@pytest.mark.parametrize("value", [Decimal(1), Counter("aa"), 1j, range(3), slice(2), object()])
def test_other_classes_are_named(tmp_path, value):
    with pytest.raises(DataError, match=rf"asks for .*{type(value).__name__}"):
        _load(tmp_path, [value])


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_come_back(tmp_path, protocol):
    value = {
        "arrays": [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(["é", "b"])],
        "bytes": np.array([b"ab", b"c"]),
        "objects": np.array([["a", 1], ["b", None]], object),
        "scalars": [np.float32(1.5), np.int64(-3), np.str_("s"), np.bool_(True)],
        "sets": [{1, 2}, frozenset({3})],
        "dicts": [OrderedDict(a=1), defaultdict(list, a=[1])],
        "settings": Namespace(lr=0.1) if protocol >= 2 else {"lr": 0.1},
        "rest": (1, "é", b"\x00\xff", bytearray(b"x"), 2.5, True, None),
    }
    back = _load(tmp_path, value, protocol)
    for got, expected in zip(back["arrays"], value["arrays"], strict=True):
        assert np.array_equal(got, expected)
    assert back["bytes"].tolist() == [b"ab", b"c"]
    assert back["objects"] == [["a", 1], ["b", None]]
    assert back["scalars"] == [1.5, -3, "s", True]
    assert back["sets"] == [{1, 2}, {3}]
    assert [dict(x) for x in back["dicts"]] == [{"a": 1}, {"a": [1]}]
    assert back["settings"] == {"lr": 0.1}
    assert back["rest"] == (1, "é", b"\x00\xff", b"x", 2.5, True, None)


def test_tensors_pickled_without_torch_save(tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    back = _load(tmp_path, [x, x.T, x[1], torch.ones(2, dtype=torch.bfloat16)])
    assert np.array_equal(back[0], x.numpy())
    assert np.array_equal(back[1], x.numpy().T)
    assert back[2].tolist() == [3, 4, 5]
    assert back[3].dtype == np.float32
    torch.save({"x": x}, tmp_path / "saved.pkl")
    assert np.array_equal(load_pickle(tmp_path / "saved.pkl")["x"], x.numpy())


def _python_2_array(values: np.ndarray) -> bytes:
    """How NumPy under Python 2 pickles a vector of float32, up to the array itself."""
    dtype = b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    data = values.astype("<f4").tobytes()
    state = b"(K\x01K" + bytes([len(values)]) + b"\x85" + dtype + b"\x89T" + struct.pack("<i", len(data)) + data + b"tb"
    return array + state


def test_pickles_of_python_2(tmp_path):
    values = np.array([1.5, -2, 1e9], np.float32)
    content = b"\x80\x02}(U\x01a" + _python_2_array(values) + b"U\x02\xe9sc__builtin__\nset\n](U\x01xU\x01ye\x85Ru."
    back = _load(tmp_path, content)
    assert np.array_equal(back["a"], values)
    assert back["és"] == {"x", "y"}


ATTACKS = {
    "a class changed": b"\x80\x02cnumpy\nndarray\n}U\x05valueK\x01sb.",
    "a function changed": b"\x80\x02cnumpy.core.multiarray\nscalar\nN}U\x0c__defaults__K\x01s\x86b.",
    "an instance without its array": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "another type of array": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85U\x01b\x87R.",
    "bytes of a number": b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "a memo of gigabytes": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a reference outside": b"\x80\x02U\x01aQ.",
    "an extension": b"\x80\x02\x82\x01.",
    "itself": b"\x80\x02]q\x00h\x00a.",
    "nothing": b"",
    "no pickle": b"train",
    "no end": b"\x80\x02]",
    "more bytes than there are": b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00x.",
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_bytes(tmp_path, attack):
    with pytest.raises(DataError, match=r"d\.pkl: "):
        _load(tmp_path, ATTACKS[attack])
    assert _load(tmp_path, [np.ones(1)])[0].tolist() == [1]  # and nothing was changed by it


def test_deep_and_shared_structures_cost_little(tmp_path):
    shared: list = [0]
    for _ in range(60):
        shared = [shared, shared]  # 2**60 leaves, 61 lists
    back = _load(tmp_path, shared)
    for _ in range(60):
        assert back[0] is back[1]
        back = back[0]
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    with pytest.raises(DataError, match="RecursionError"):
        _load(tmp_path, deep)


def test_an_unreadable_pickle_says_why(tmp_path):
    whole = pickle.dumps({"x": np.ones(100)})
    for keep in (1, 20, len(whole) // 2, len(whole) - 1):
        with pytest.raises(DataError, match=r"d\.pkl: not a readable pickle \("):
            _load(tmp_path, whole[:keep])
