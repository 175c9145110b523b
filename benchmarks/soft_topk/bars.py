"""What soft top-k promises on the CPU."""

from __future__ import annotations

from benchmarks.bars import Bar
from mmer_fast.bench.harness import FORWARD, FORWARD_BACKWARD

CPU_BARS = (
    Bar("100x faster than Sinkhorn-200", "64x500", FORWARD_BACKWARD, ("Sinkhorn-200 log, autograd",), 100.0),
    Bar("2x faster than compiled Newton", "64x500", FORWARD_BACKWARD, ("Newton, torch.compile",), 2.0),
    Bar("faster than torch.topk", "64x500", FORWARD, ("torch.topk",), 1.0),
    Bar("at most 4x torch.sigmoid", "64x500", FORWARD, ("torch.sigmoid",), 1 / 4),
    Bar("at most 3x torch.sigmoid", "4096x512", FORWARD, ("torch.sigmoid",), 1 / 3),
)
