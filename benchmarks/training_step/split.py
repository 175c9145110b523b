"""What a training step spends its time on, by the kind of the operators that ran, from one step under the profiler."""

from __future__ import annotations

from typing import Any

from torch.profiler import ProfilerActivity, profile

from mmer_fast.bench.counters import quiet_profiler
from mmer_fast.bench.timing import Call

KINDS: dict[str, tuple[str, ...]] = {
    "matrix products": (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "mkldnn::_linear_pointwise",
        "aten::mkldnn_linear_backward_weights",
        "aten::to_mkldnn",
    ),
    "attention": (
        "mmer_fast::attention",
        "mmer_fast::self_attention",
        "aten::_scaled_dot_product",
        "aten::_softmax",
        "aten::softmax",
    ),
    "random numbers": ("aten::random_", "aten::bernoulli_", "aten::native_dropout", "aten::rand"),
    "dropout, norm, ReLU": (
        "mmer_fast::dropout",
        "mmer_fast::relu_dropout",
        "aten::native_layer_norm",
        "aten::relu",
        "aten::clamp_min",
        "aten::threshold_backward",
    ),
    "soft top-k": ("mmer_fast::soft_topk",),
    "perturbation": ("mmer_fast::perturb_", "mmer_fast::restore_", "mmer_fast::grad_norm"),
    "AdamW": ("aten::_fused_adamw_",),
}
"""Kind → how the names of its operators begin. Peers' elementwise parts of these, and copies, are in the rest."""
REST = "the rest"


def kind_of(operator: str) -> str:
    """The kind of an operator by its name, e.g. ``aten::addmm``."""
    for kind, beginnings in KINDS.items():
        if any(operator == each or operator.startswith(each + "_") for each in beginnings):
            return kind
    return REST


def split(call: Call, device: str) -> dict[str, float]:
    """Kind → its share of the time of a call, all kinds together 1.

    Args:
        call: warmed up.
        device: where its operators run; the time counts there, without the operators that an operator calls.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    quiet_profiler()
    with profile(activities=activities) as profiler:
        call()
    times = dict.fromkeys((*KINDS, REST), 0.0)
    for event in profiler.key_averages():
        times[kind_of(event.key)] += _self_time(event, device)
    total = sum(times.values())
    return {kind: time / total for kind, time in times.items()}


def _self_time(event: Any, device: str) -> float:
    return float(event.self_device_time_total if device == "cuda" else event.self_cpu_time_total)


def in_words(shares: dict[str, float]) -> str:
    """The kinds from 1 % on, the largest first."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in ordered if share >= 0.01)
