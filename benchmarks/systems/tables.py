"""The rows of the tables in docs/systems, as the files of `record` have them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from benchmarks.systems import record

MINUS = "\N{MINUS SIGN}"
PARTS = ("part/0/", "part/1/", "part/2/")
CONDITIONS = ("audio", "video", "text", "video+audio", "text+audio", "text+video", "average", "text+video+audio")


class Results:
    """A study's file."""

    def __init__(self, study: str) -> None:
        self.document: Mapping[str, Any] = record.read(study)
        self.rows = {row["slug"]: row for row in self.document["rows"]}

    def values(self, slug: str, name: str) -> list[float]:
        """A value of a row, seed by seed."""
        return [run["values"][name] for run in self.rows[slug]["runs"]]

    def mean(self, slug: str, name: str) -> str:
        return number(statistics.fmean(self.values(slug, name)))

    def spread(self, slug: str, name: str) -> str:
        """Mean and sample standard deviation over the seeds."""
        return _spread(self.values(slug, name))

    def difference(self, slug: str, base: str, name: str) -> str:
        """Of two rows, seed by seed: mean with its sign, and deviation."""
        pairs = zip(self.values(slug, name), self.values(base, name), strict=True)
        return _spread([ours - theirs for ours, theirs in pairs], sign="+")

    def pair(self, slug: str, prefix: str, first: str, second: str) -> str:
        """Means of two metrics."""
        return f"{self.mean(slug, prefix + first)} / {self.mean(slug, prefix + second)}"

    def constant(self, count: int, name: str) -> str:
        """Of who always says the `count` most frequent labels."""
        return number(self.document["constant"][str(count)][name])


results = cache(Results)


def number(value: float, sign: str = "") -> str:
    """Three digits without the 0 before the point; 0 has no minus."""
    value = round(value, 3) + 0.0
    return f"{value:{sign}.3f}".replace("0.", ".", 1 if abs(value) < 1 else 0).replace("-", MINUS)


def _spread(values: Sequence[float], sign: str = "") -> str:
    return f"{number(statistics.fmean(values), sign)} ± {number(statistics.stdev(values))}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def pages() -> dict[str, list[str]]:
    """Page of docs/systems → the rows of its tables of ours."""
    return {
        "adaptation.md": adaptation(),
        "baselines.md": baselines(),
        "m3er.md": m3er(),
        "mmgcn.md": mmgcn(),
        "mmin.md": mmin(),
        "univa.md": contrast() + univa(),
    }


def m3er() -> list[str]:
    default, correlated = results("m3er-default"), results("m3er-correlated")
    names = {
        "m3er": "M3ER",
        "no-proxies": "without proxies",
        "no-check-no-proxies": "without check and proxies",
        "original-fusion": "original fusion",
        "through-weights": "modified as printed, through the weights",
        "no-weights": "plain cross-entropies, β = 0",
    }

    def both(found: Results, slug: str, prefixes: Sequence[str]) -> list[str]:
        return [found.pair(slug, prefix, "micro_f1", "macro_f1") for prefix in prefixes]

    def constant(found: Results, prefixes: Sequence[str]) -> str:
        cells = [f"{found.constant(1, p + 'micro_f1')} / {found.constant(1, p + 'macro_f1')}" for p in prefixes]
        return _line("always the most frequent emotion", *cells)

    lines = [constant(default, ("", *PARTS))]
    lines += [_line(name, *both(default, slug, ("", *PARTS))) for slug, name in names.items()]
    lines += [constant(correlated, PARTS)]
    lines += [_line(name, *both(correlated, slug, PARTS)) for slug, name in names.items()]
    for slug in ("m3er", "no-proxies", "no-check-no-proxies"):
        lines.append(_line(names[slug], *(default.spread(slug, f"buried/{code}") for code in (0, 1, 2))))
    for setting in ("compact", "authors"):
        errors = (
            f"{statistics.fmean(correlated.values('m3er', f'proxy/{setting}/{name}')):.3g}"
            for name in ("text", "video", "audio")
        )
        lines.append(_line(f"`{setting}`", *errors))
    return lines


def mmin() -> list[str]:
    found = results("mmin")
    names = {
        "full-modality-baseline": "full-modality baseline",
        "augmented-baseline": "augmented baseline",
        "mmin-ae": "MMIN-AE",
        "mmin-nocycle": "MMIN-NoCycle",
        "mmin": "MMIN",
        "mmin-talk": "MMIN, the talk's weights and norms",
    }
    metrics = ("overall_accuracy", "unweighted_accuracy")
    return [
        _line(name, *(found.pair(slug, f"condition/{condition}/", *metrics) for condition in CONDITIONS))
        for slug, name in names.items()
    ]


def mmgcn() -> list[str]:
    metrics = ("weighted_f1", "unweighted_accuracy")

    def percent(value: float) -> str:
        return f"{100 * value:.1f}"

    def row(name: str, study: str, slug: str) -> str:
        f1, accuracy = (results(study).values(slug, metric) for metric in metrics)
        spread = f"{percent(statistics.fmean(f1))} ({percent(min(f1))} to {percent(max(f1))})"
        return _line(name, spread, percent(statistics.fmean(accuracy)))

    constant = results("mmgcn").document["constant"]["1"]
    return [
        _line(
            "always the most frequent class", *(percent(constant[m]) for m in ("weighted_f1", "unweighted_accuracy"))
        ),
        row("MMGCN", "mmgcn", "mmgcn"),
        row("`fusion=early`", "mmgcn", "early"),
        row("`fusion=late`", "mmgcn", "late"),
        *(row(name, f"mmgcn-{name}", name) for name in ("audio", "video", "text")),
        row("audio, text", "mmgcn", "no-video"),
        row("video, text", "mmgcn", "no-audio"),
        row("audio, video", "mmgcn", "no-text"),
        row("1 layer", "mmgcn-depth", "layers-1"),
        *(row(f"{layers} layers", "mmgcn-depth", f"layers-{layers}") for layers in (2, 4, 8, 16, 32, 64)),
        row("`gamma=1`", "mmgcn", "no-gamma"),
        row("`speaker_modalities=none`", "mmgcn", "no-speakers"),
    ]


def univa() -> list[str]:
    found = results("univa")
    names = {
        "univa": "UniVA",
        "no-va-cl": "w/o VA-CL",
        "no-va-ecp": "w/o VA-ECP",
        "neither": "w/o VA-CL, VA-ECP",
        "no-video": "w/o vision",
        "no-audio": "w/o audio",
        "no-text": "w/o text",
    }
    metrics = ("accuracy", "hamming_loss", "micro_f1", "macro_f1")

    def difference(slug: str) -> str:
        return "" if slug == "univa" else found.difference(slug, "univa", "micro_f1")

    lines = [_line(name, *(found.spread(slug, m) for m in metrics), difference(slug)) for slug, name in names.items()]
    for count, name in ((1, "always the one most frequent emotion"), (2, "always the two most frequent")):
        lines.append(_line(name, *(found.constant(count, metric) for metric in metrics), ""))
    return lines


def contrast() -> list[str]:
    """Of `benchmarks.va_contrast`: peak memory and time of the forms of the contrastive loss, by samples."""
    names = {
        "blocks": "blocks",
        "all pairs": "matrices (B, B) of all pairs",
        "all products": "products (B, B, D) of all pairs",
    }
    rows = {(row["form"], row["samples"]): row for row in record.read("va_contrast")["rows"]}

    def cells(form: str, text: Callable[[Mapping[str, Any]], str]) -> list[str]:
        return [text(rows[form, samples]) if (form, samples) in rows else "not run" for samples in (1024, 4096)]

    return [
        _line(
            name,
            *cells(form, lambda row: f"{row['peak_bytes'] / 2**20:.0f} MiB"),
            *cells(form, lambda row: f"{row['seconds'] * 1e3:.3g} ms"),
        )
        for form, name in names.items()
    ]


def adaptation() -> list[str]:
    return _cultures() + _matching()


def _cultures() -> list[str]:
    names = {
        "watches": r"$\alpha = 0$, it only watches",
        "tenth": r"$\alpha = 0.1$ (default)",
        "third": r"$\alpha = 0.3$",
        "one": r"$\alpha = 1$",
    }
    return _spreads("cross-culture", names, ("overall_accuracy", "unweighted_accuracy", "culture"))


def _matching() -> list[str]:
    names = {
        "labels": "labels only (both weights 0)",
        "reconstruction": "with reconstruction",
        "mmd-tenth": 'and "mmd", weight 0.1 (default)',
        "mmd-one": 'and "mmd", weight 1',
        "moments-tenth": 'and "moments", weight 0.1',
    }
    return _spreads("semi-supervised", names, ("overall_accuracy", "unweighted_accuracy", "distance"))


def baselines() -> list[str]:
    names = {
        "br": "BR",
        "cc": "CC",
        "lp": "LP",
        "lstm": "LSTM",
        "mult": "MulT",
        "hhmpn": "HHMPN",
        "tailor": "TAILOR",
        "robmmr": "RobMMR",
    }
    metrics = ("accuracy", "hamming_loss", "micro_f1", "macro_f1", *(part + "micro_f1" for part in PARTS))
    constant = _line("every label at its prevalence", *(results("baselines").constant(1, m) for m in metrics))
    return [constant, *_spreads("baselines", names, metrics)]


def _spreads(study: str, names: Mapping[str, str], metrics: Sequence[str]) -> list[str]:
    found = results(study)
    return [_line(name, *(found.spread(slug, metric) for metric in metrics)) for slug, name in names.items()]
