"""What every launch asks of Triton's compiler."""

from __future__ import annotations


def launch_options(warps: int, stages: int | None = None) -> dict[str, int | bool]:
    """Warps of a program, stages of its software pipeline where they are chosen.

    Products and sums are fused: Triton 3.10 would no longer do so unasked, and 3.9 warns of that.
    """
    options: dict[str, int | bool] = {"num_warps": warps, "enable_fp_fusion": True}
    return options if stages is None else {**options, "num_stages": stages}
