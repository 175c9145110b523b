"""How long the fuzz tests search: the same examples in every run, or with MMER_FUZZ=n n times as many, drawn anew."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

TIMES = int(os.environ.get("MMER_FUZZ", "0"))


def examples(count: int, **options: Any) -> settings:
    """Settings of hypothesis for a test of `count` examples."""
    return settings(max_examples=count * max(TIMES, 1), derandomize=TIMES == 0, deadline=None, database=None, **options)
