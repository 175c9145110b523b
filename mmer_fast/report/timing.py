"""Where a training step's time goes, by measuring steps at the end.

The step is measured whole and with parts left out: L_r alone, with L_m, with L_p as well. What a part adds is its cost,
however the step shares work between its parts. Forward is the time inside the model's parts; the rest of what a part
adds is its backward pass, losses and masks. Perturbation and optimizer are measured by themselves. All are medians
over rounds in which the variants take turns; a device is waited for only here, never in the training itself.

Where the batch is cut up, for `TrainConfig.accumulation` or over processes, what is measured is what one process
computes at a time, its part of the micro-batch whose length is nearest the average. A step is then so many of them and
one turn of the optimizer; adding up their gradients and the exchange between processes are left out. A run that is
opened later (`mmer-fast report`) does not say how many processes it had: one is assumed. Compiled training
(`TrainConfig.compile`) is measured uncompiled: to compile again would take longer than the rest of the report. One that
replays CUDA graphs is measured without: their parts cannot be told apart.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

import mmer_fast as mf
from mmer_fast.data import Batch, Split
from mmer_fast.models import RobMMR
from mmer_fast.report.page import Content, Html, join, table, tag
from mmer_fast.report.theme import run_colour
from mmer_fast.training.accumulation import micro_batches_of
from mmer_fast.training.algorithm1 import Algorithm1
from mmer_fast.training.config import TrainConfig
from mmer_fast.training.distributed import ALONE, World, padded_as_whole
from mmer_fast.training.order import batches, epoch_batches
from mmer_fast.training.steps import algorithm1_step

PERTURB, OPTIMIZER = "weights perturbed and restored", "optimizer"
PARTS = (
    "L_r forward",
    "L_r backward",
    "L_m forward",
    "L_m backward",
    PERTURB,
    "L_p forward",
    "L_p backward",
    OPTIMIZER,
)
BUDGET_SECONDS = 4.0
MOST_ROUNDS = 5

STYLE = """
.stack{display:flex;height:20px;border-radius:4px;overflow:hidden;max-width:640px;margin:4px 0 8px}
.stack i{flex:var(--v) 1 0;min-width:0;background:var(--c)}
"""


@dataclasses.dataclass(frozen=True)
class StepTiming:
    """Where the time of a step goes.

    Attributes:
        parts: some of `PARTS` → seconds, in the order of the step; their sum is near `total`.
        total: seconds of a whole step, optimizer included.
        samples: in the micro-batch of one process, which was measured.
        rounds: how often it was measured.
        device: where.
        micro_batches: that a step has.
        processes: that share a step.
        without: what the training used and this does not: "torch.compile", "CUDA graphs" or "".
    """

    parts: dict[str, float]
    total: float
    samples: int
    rounds: int
    device: str
    micro_batches: int = 1
    processes: int = 1
    without: str = ""


class _Clock:
    """Seconds inside the parts of a model since `reset`; waits for the device at both ends of each."""

    def __init__(self, model: RobMMR) -> None:
        self.device = next(model.parameters()).device
        self.forward = self.started = 0.0
        self.parts: list[nn.Module] = [*model.embeddings.values(), *model.unimodal_encoders.values()]
        single = (model.multimodal_encoder, model.decoder, model.classifier)
        self.parts += [*model.mask_networks.values(), *(part for part in single if part is not None)]

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = [part.register_forward_pre_hook(self._enter) for part in self.parts]
        handles += [part.register_forward_hook(self._leave) for part in self.parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, *_: object) -> None:
        self.started = self.now()

    def _leave(self, *_: object) -> None:
        self.forward += self.now() - self.started

    def measure(self, action: Callable[[], object]) -> tuple[float, float]:
        """Seconds of `action`, and of them inside the parts."""
        self.forward = 0.0
        start = self.now()
        action()
        return self.now() - start, self.forward


def measure_step(
    model: RobMMR, config: TrainConfig, split: Split, world: World = ALONE, *, budget: float = BUDGET_SECONDS
) -> StepTiming:
    """Measure a training step; leaves the weights and torch's random generators as they are.

    Args:
        model: on the device to measure on; ends in eval mode, without gradients.
        config: how the run trains.
        split: gives a batch of its first epoch.
        world: the processes that share it; nothing is exchanged with the others, which need not be there.
        budget: seconds after which no new round begins. The first round of all warms up; where it takes more than
            that by itself, it is the measurement.
    """
    device = next(model.parameters()).device
    micro_batches = _micro_batches(config, split, world)
    measured = dataclasses.replace(config, cuda_graph=False)
    devices = [device] if device.type == "cuda" else []
    model.train()
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            timing = _measure(model, measured, _typical(micro_batches).to(device), len(micro_batches), budget)
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()
    without = "torch.compile" if config.compile else "CUDA graphs" if config.cuda_graph else ""
    return dataclasses.replace(timing, processes=world.size, without=without)


def _micro_batches(config: TrainConfig, split: Split, world: World) -> list[Batch]:
    """This process's parts of the micro-batches of the first step, on the CPU, padded as in the training."""
    indices_b = epoch_batches(split, config, 0)[0]
    own = [world.part(part) for part in micro_batches_of(indices_b, config)]
    batch = next(batches(split, [torch.cat(own)], torch.device("cpu")))
    if world.group is not None:
        batch = padded_as_whole(batch, split, indices_b)
    return batch.split([len(part) for part in own])


def _typical(micro_batches: list[Batch]) -> Batch:
    """The one whose units are nearest their average: a batch that is sorted by length is cut from short to long."""
    units = [sum(int(lengths_b.sum()) for lengths_b in batch.lengths.values()) for batch in micro_batches]
    average = statistics.fmean(units)
    return min(zip(units, micro_batches, strict=True), key=lambda pair: abs(pair[0] - average))[1]


Times = dict[str, tuple[float, float]]
"""Variant of a step, or `PERTURB` or `OPTIMIZER` → seconds, and those of them inside the model's parts."""


def _measure(model: RobMMR, config: TrainConfig, batch: Batch, micro_batches: int, budget: float) -> StepTiming:
    """The timing of a step that has so many micro-batches such as `batch`."""
    clock = _Clock(model)
    variants = {"L_r": dataclasses.replace(config, rho=0.0, sigma=0.0)}
    if config.rho > 0:
        variants["L_m"] = dataclasses.replace(config, sigma=0.0)
    if config.sigma > 0:
        variants["L_p"] = config
    actions = _actions(model, config, batch, variants)
    rounds: list[Times] = []
    begun = clock.now()
    with clock.attached():
        while not rounds or (clock.now() - begun < budget and len(rounds) <= MOST_ROUNDS):
            rounds.append({name: clock.measure(action) for name, action in actions.items()})
    measured = rounds[1:] or rounds
    medians: Times = {}
    for name in actions:
        whole, forward = zip(*(times[name] for times in measured), strict=True)
        often = 1 if name == OPTIMIZER else micro_batches
        medians[name] = often * statistics.median(whole), often * statistics.median(forward)
    total = medians[list(variants)[-1]][0] + medians[OPTIMIZER][0]
    parts = _parts(list(variants), medians)
    return StepTiming(parts, total, len(batch), len(measured), str(clock.device), micro_batches)


def _actions(
    model: RobMMR, config: TrainConfig, batch: Batch, variants: dict[str, TrainConfig]
) -> dict[str, Callable[[], object]]:
    """What to time, in the order of a step: every variant after the gradients were cleared."""
    fused = batch.labels.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=fused)
    steps = {name: algorithm1_step(model, variant) for name, variant in variants.items()}

    def run(step: Algorithm1) -> None:
        optimizer.zero_grad()
        step.accumulate_gradients(batch)

    def perturb() -> None:
        with mf.perturbed(steps["L_p"].perturbed, config.gamma, scope=config.perturbation_norm):
            pass

    actions: dict[str, Callable[[], object]] = {name: partial(run, step) for name, step in steps.items()}
    if config.sigma > 0 and config.perturbation in ("gradient", "random"):
        actions[PERTURB] = perturb
    return {**actions, OPTIMIZER: optimizer.step}


def _parts(variants: Sequence[str], medians: Times) -> dict[str, float]:
    """What each variant adds to the one before, forward and backward."""
    parts: dict[str, float] = {}
    before = (0.0, 0.0)
    for name in variants:
        whole, forward = (max(now - then, 0.0) for now, then in zip(medians[name], before, strict=True))
        forward = min(forward, whole)
        if name == "L_p" and PERTURB in medians:
            parts[PERTURB] = min(medians[PERTURB][0], whole - forward)
            whole -= parts[PERTURB]
        parts[f"{name} forward"], parts[f"{name} backward"] = forward, whole - forward
        before = medians[name]
    return {**parts, OPTIMIZER: medians[OPTIMIZER][0]}


def timing_block(runs: list[tuple[str, StepTiming]]) -> Html:
    """Measured steps as bars and tables.

    Args:
        runs: name and measurement of each.
    """
    return tag("div", join(_one(*run, alone=len(runs) == 1) for run in runs), class_="columns")


def _one(name: str, timing: StepTiming, alone: bool) -> Html:
    colours = {part: run_colour(i) for i, part in enumerate(PARTS)}
    whole = sum(timing.parts.values()) or 1.0
    stack = [
        tag("i", style=f"--v:{seconds / whole:.4f};--c:{colours[part]}", title=f"{part}: {1e3 * seconds:.1f} ms")
        for part, seconds in timing.parts.items()
    ]
    rows: list[list[Content]] = [
        [tag("span", part, class_="key", style=f"--c:{colours[part]}"), _ms(seconds), f"{100 * seconds / whole:.0f} %"]
        for part, seconds in timing.parts.items()
    ]
    samples = timing.samples * timing.micro_batches
    rows.append([tag("b", "step"), tag("b", _ms(timing.total)), f"{samples / timing.total:.0f} samples/s"])
    return tag(
        "div",
        None if alone else tag("h3", name),
        tag("p", _what_was_measured(timing), class_="note"),
        tag("div", join(stack), class_="stack"),
        table(("part", "ms", "share"), rows),
    )


def _what_was_measured(timing: StepTiming) -> str:
    often, samples = timing.micro_batches, f"{timing.samples} samples"
    pieces = [
        f"{samples} a step" if often == 1 else f"a step of {often} micro-batches of {samples}, one of them measured"
    ]
    if timing.processes > 1:
        pieces.append(f"in one of {timing.processes} processes without what they exchange")
    if timing.without:
        pieces.append(f"without {timing.without}, which the training used")
    return ", ".join(
        [*pieces, f"on {timing.device}", f"median of {timing.rounds} rounds" if timing.rounds > 1 else "measured once"]
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"
