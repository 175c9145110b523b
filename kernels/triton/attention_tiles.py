"""Block sizes of the attention kernels by pass, type, width of a head and length of the longest sequence.

Chosen from occupancy, not yet measured on a GPU: tiles whose registers do not spill and whose shared memory fits every
architecture from sm_80 to sm_120 (tests/kernels/gpu_budget.json). Owners have 64 rows at most where sequences are
short, since a tile that is half empty costs as much as a full one: at 150 tokens tiles of 64 rows are 78 % full, tiles
of 128 are 59 %. A block is never longer than the next power of two of the sequence that it walks over.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .launch_options import launch_options

SMALLEST_BLOCK = 16  # of a tensor core's product


class Tile(NamedTuple):
    """Queries and keys of a block, warps of a program, stages of its software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        return launch_options(self.warps, self.stages)


HALF, SINGLE = "half", "single"
LONG = 10**9

# (pass, type, widest head) -> (longest sequence, tile), the first that is wide and long enough.
TILES: dict[tuple[str, str, int], tuple[tuple[int, Tile], ...]] = {
    ("forward", HALF, 64): ((LONG, Tile(64, 64, 4, 3)),),
    ("forward", HALF, 128): ((LONG, Tile(64, 32, 4, 3)),),
    ("forward", SINGLE, 64): ((LONG, Tile(64, 32, 8, 2)),),
    ("forward", SINGLE, 128): ((LONG, Tile(32, 32, 8, 2)),),
    ("queries", HALF, 64): ((LONG, Tile(64, 32, 4, 2)),),
    ("queries", HALF, 128): ((LONG, Tile(64, 32, 4, 2)),),
    ("queries", SINGLE, 64): ((LONG, Tile(32, 32, 4, 2)),),
    ("queries", SINGLE, 128): ((LONG, Tile(32, 16, 8, 1)),),
    ("keys", HALF, 64): ((256, Tile(32, 64, 4, 1)), (LONG, Tile(32, 128, 8, 2))),
    ("keys", HALF, 128): ((LONG, Tile(32, 32, 4, 2)),),
    ("keys", SINGLE, 64): ((LONG, Tile(32, 16, 4, 2)),),
    ("keys", SINGLE, 128): ((LONG, Tile(16, 16, 8, 2)),),
    ("bias", HALF, 64): ((LONG, Tile(64, 64, 4, 1)),),
    ("bias", HALF, 128): ((LONG, Tile(64, 32, 4, 1)),),
    ("bias", SINGLE, 64): ((LONG, Tile(32, 32, 4, 1)),),
    ("bias", SINGLE, 128): ((LONG, Tile(16, 32, 4, 1)),),
}


def tile_for(direction: str, dtype: torch.dtype, width: int, max_queries: int, max_keys: int) -> Tile:
    """The tile of a pass: "forward", or of the backward kernel that owns "queries", "keys" or the "bias"."""
    kind = SINGLE if dtype == torch.float32 else HALF
    rows = TILES[direction, kind, 64 if width <= 64 else 128]
    tile = next(tile for longest, tile in rows if max(max_queries, max_keys) <= longest)
    return tile._replace(queries=_shortened(tile.queries, max_queries), keys=_shortened(tile.keys, max_keys))


def _shortened(block: int, tokens: int) -> int:
    return min(block, max(SMALLEST_BLOCK, 1 << max(tokens - 1, 0).bit_length()))
