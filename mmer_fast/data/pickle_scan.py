"""Looking at a pickle without loading it: the names it asks for, and whether its memo is what a pickler writes."""

from __future__ import annotations

import pickletools
import re
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from typing import IO

from mmer_fast.data.errors import DataError
from mmer_fast.data.plain_values import ALLOWED_NAMES

MEMO_WRITES = ("BINPUT", "LONG_BINPUT", "PUT")
# What every file of tensors and arrays names: left out of the names in an error, without any say in loading.
_ORDINARY = re.compile(
    r"torch\._utils\._rebuild_tensor\w*|torch\.\w+Storage|torch\.storage\._load_from_bytes|"
    r"collections\.(OrderedDict|defaultdict)|_codecs\.encode|"
    r"(builtins|__builtin__)\.(set|frozenset|bytearray|list|dict|int|float)|"
    + "|".join(re.escape(name) for _, name in ALLOWED_NAMES)
)


def refused_names(names: Iterable[str], most: int = 5) -> list[str]:
    """The first few of the names that are not those of plain data, each once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pickletools warns of odd escapes in damaged strings
        refused = list(dict.fromkeys(name for name in names if not _ORDINARY.fullmatch(name)))
    return refused[:most] + ([f"{len(refused) - most} more"] if len(refused) > most else [])


def names_in_pickles(file: IO[bytes]) -> Iterator[str]:
    """The dotted names in consecutive pickles (torch's legacy format has several), up to the first non-opcode."""
    strings: deque[str] = deque(maxlen=2)
    memo: dict[int, str] = {}
    while True:
        try:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    yield str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    yield ".".join(strings)
                elif "UNICODE" in opcode.name:
                    strings.append(str(argument)[:200])
                elif opcode.name == "MEMOIZE":
                    memo[len(memo)] = strings[-1] if strings else ""
                elif opcode.name in MEMO_WRITES:
                    memo[int(str(argument))] = strings[-1] if strings else ""
                elif opcode.name in ("BINGET", "LONG_BINGET", "GET"):
                    strings.append(memo.get(int(str(argument)), ""))
        except (ValueError, IndexError, OverflowError, MemoryError):
            return


def check_memo(file: IO[bytes]) -> None:
    """Hold a pickle's memo to indices that a pickler can have written: fewer than its opcodes so far.

    The unpickler allocates its memo up to the largest index, so that a few damaged bytes could fill the memory.

    Raises:
        DataError: an index is too large.
        ValueError, MemoryError, OverflowError: the pickle is damaged in another way.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if opcode.name in MEMO_WRITES and not 0 <= int(str(argument)) <= count + 1:
                raise DataError(f"memo index {argument} after {count} opcodes is refused")
