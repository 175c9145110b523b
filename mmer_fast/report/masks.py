"""An explained sample in a page: its labels' probabilities as bars, and a strip of bars a modality, one a unit.

The height of a bar is the score of the mask network (all alike where there is none), its colour how much of the unit
ATM would mask. A mark below a bar says that the unit is known to carry a label (synthetic data).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmer_fast.report.explanation import Explanation, ModalityUnits
from mmer_fast.report.page import Html, join, number, tag

MOST_BARS = 150
"""Longer sequences are drawn with several units a bar."""

STYLE = """
.sample{border-top:1px solid var(--grid);padding-top:4px;margin-top:14px}
.sample .columns{grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr))}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.875rem;color:var(--soft);margin:6px 0}
.strip{display:flex;align-items:flex-end;gap:1px;height:62px;padding-bottom:8px;max-width:min(540px,calc(var(--n)*37px));
background:var(--page) content-box}
.strip i{flex:1 1 0;min-width:0;height:max(2px,calc(var(--s)*100%));background:var(--kept);position:relative}
.strip i::before{content:"";position:absolute;inset:0;background:var(--masked);opacity:var(--m)}
.strip i.pad{background:var(--padding)}
.strip i.true::after{content:"";position:absolute;left:0;right:0;bottom:-7px;height:5px;background:var(--truth);
border-radius:1px;max-width:14px;margin:auto}
.units{margin:10px 0}
.units p{margin:0 0 3px;font-size:.875rem}
.labels{display:grid;grid-template-columns:minmax(5em,auto) minmax(60px,1fr) 3em 3.6em;gap:4px 10px;align-items:center;
font-size:.9375rem;font-variant-numeric:tabular-nums;max-width:480px}
.labels .head{color:var(--soft);font-size:.75rem}
.labels .num{text-align:right}
.labels .no{color:var(--soft)}
.bar{position:relative;height:12px;background:var(--grid);border-radius:3px}
.bar i{position:absolute;inset:0 auto 0 0;width:calc(var(--p)*100%);background:var(--run0);border-radius:3px}
.bar i.hidden{inset:auto auto -3px 0;height:3px;background:var(--masked);border-radius:0}
.bar b{position:absolute;top:-2px;bottom:-2px;left:calc(var(--p)*100%);border-left:2px solid var(--text)}
"""


def legend(explanations: Sequence[Explanation]) -> Html:
    """What the colours mean, of those that occur."""
    units = [unit for explanation in explanations for unit in explanation.modalities.values()]
    keys: list[tuple[str, str | None]] = [("kept", "--kept"), ("masked by ATM", "--masked")]
    if any(unit.scores is not None for unit in units):
        keys.insert(0, ("height: mask score", None))
    if any(unit.planted is not None for unit in units):
        keys.append(("below: planted unit (the truth)", "--truth"))
    if any(len(unit.masked) > unit.length for unit in units):
        keys.append(("padding, which this model counts", "--padding"))
    return tag(
        "div",
        *(
            tag("span", text, class_=variable and "key", style=variable and f"--c:var({variable})")
            for text, variable in keys
        ),
        class_="legend",
    )


def sample_block(explanation: Explanation, part: str | None = None) -> Html:
    """One sample.

    Args:
        explanation: of it.
        part: what is special about the part of the data that it belongs to.
    """
    title = f"Sample {explanation.index} of {explanation.split}"
    added = ", ".join(text for text in (explanation.identifier, explanation.title, part) if text)
    strips = join(_modality(name, units) for name, units in explanation.modalities.items())
    return tag(
        "div",
        tag("h3", f"{title}: {added}" if added else title),
        tag("div", tag("div", _labels(explanation)), tag("div", strips), class_="columns"),
        class_="sample",
    )


def _labels(explanation: Explanation) -> Html:
    headings = (("label", "head"), ("probability", "head"), ("", "head"), ("masked", "head num"))
    cells = [tag("span", text, class_=kind) for text, kind in headings]
    known = explanation.truth
    for name, true, p, masked in zip(
        explanation.labels,
        [False] * len(explanation.labels) if known is None else known,
        explanation.probabilities.tolist(),
        explanation.without_masked.tolist(),
        strict=True,
    ):
        cells += [
            tag("span", f"✓ {name}", title="in the data") if true else tag("span", name, class_="no"),
            _probability_bar(name, p, masked, explanation.threshold),
            tag("span", number(p, 2), class_="num best" if p > explanation.threshold else "num"),
            tag("span", number(masked, 2), class_="num no"),
        ]
    table = tag("div", join(cells), class_="labels")
    return table if known is not None else join((table, tag("p", "The true labels are not known.", class_="note")))


def _probability_bar(name: str, p: float, masked: float, threshold: float) -> Html:
    return tag(
        "div",
        tag("i", style=f"--p:{p:.4f}"),
        tag("i", class_="hidden", style=f"--p:{masked:.4f}"),
        tag("b", style=f"--p:{threshold:.4f}"),
        class_="bar",
        title=f"{name}: {p:.3f}, from what ATM leaves {masked:.3f}, threshold {threshold:g}",
    )


def _modality(name: str, units: ModalityUnits) -> Html:
    text = units.summary
    if units.length > 0 and units.planted is not None:
        text += f", {int(units.planted.sum())} planted"
    heading = tag("p", tag("b", name), f": {text}")
    if len(units.masked) == 0:
        return tag("div", heading, class_="units")
    count = len(units.masked)
    per_bar = -(-count // MOST_BARS)
    if per_bar > 1:
        shown = "mean mask" if units.scores is None else "highest score and mean mask"
        heading = join((heading, tag("p", f"{per_bar} units a bar: their {shown}", class_="note")))
    members = np.split(np.arange(count), range(per_bar, count, per_bar))
    bars = join(_bar(units, some) for some in members)
    return tag("div", heading, tag("div", bars, class_="strip", style=f"--n:{len(members)}"), class_="units")


def _bar(units: ModalityUnits, members: np.ndarray) -> Html:
    masked = float(units.masked[members].mean())
    score = 1.0 if units.scores is None else float(units.scores[members].max())
    planted = units.planted is not None and bool(units.planted[members].any())
    padding = members[0] >= units.length
    names = f"unit {members[0]}" if len(members) == 1 else f"units {members[0]} to {members[-1]}"
    scored = "" if units.scores is None else f"score {score:.2f}, "
    text = f"{names}: {scored}{100 * masked:.0f} % masked" + (", planted" if planted else "")
    classes = " ".join(word for word, holds in (("true", planted), ("pad", padding)) if holds)
    return tag("i", class_=classes or None, style=f"--s:{score:.3f};--m:{masked:.3f}", title=text)
