"""What a process holds, by the kernel's own account (Linux)."""

from __future__ import annotations

import re
from pathlib import Path


def status_bytes(key: str) -> int:
    """A figure of the process itself: ``VmRSS``, what it holds; ``VmHWM``, the most it ever held."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
