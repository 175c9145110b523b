"""Published results on CMU-MOSEI, in the form of our metrics: context, never our own results.

The data set is not freely available, so nothing here was repeated; the numbers are those that the papers print.
"""

from __future__ import annotations

from mmer_fast.report.page import Html, escape, number, table, tag

WARNING = "Published, on CMU-MOSEI, not comparable with your data"
METRICS = ("accuracy", "hamming_loss", "micro_f1", "macro_f1")
RESULTS = {
    "RobMMR": (0.484, 0.185, 0.569, 0.417),
    "same network, natural training": (0.455, 0.210, 0.521, 0.355),
    "UniVA-RoBERTa": (0.513, 0.182, 0.605, 0.444),
    "UniVA-GloVe": (0.492, 0.205, 0.572, 0.372),
    "HHMPN": (0.459, 0.189, 0.556, 0.430),
    "MulT": (0.445, 0.190, 0.531, 0.344),
    "TAILOR": (0.437, 0.206, 0.497, 0.371),
    "M3ER": (0.409, 0.195, 0.519, 0.349),
}
"""Method → values of `METRICS`; the papers print all but the Hamming loss as percentages."""


def published_table() -> Html:
    """The results as a table under the warning."""
    rows = [(escape(name), *map(number, values)) for name, values in RESULTS.items()]
    return tag(
        "div",
        tag("p", WARNING, class_="warn"),
        table(("method", "Acc", "HL", "miF1", "maF1"), rows),
    )
