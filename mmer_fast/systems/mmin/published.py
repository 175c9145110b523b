"""Published results of MMIN, from the talk: context, never our own results.

The data sets are not freely available, so nothing here was repeated. Averages are those that the talk prints; they are
not always the means of its columns (up to .004 off on IEMOCAP, .017 on MSP-IMPROV).
"""

from __future__ import annotations

CONDITIONS = ("a", "v", "t", "a,v", "a,t", "v,t", "average", "a,v,t")
"""Columns: the modalities available (acoustic, visual, textual), and the average of the six missing conditions."""
IEMOCAP: dict[str, dict[str, tuple[float | None, ...]]] = {
    "full-modality baseline": {
        "WA": (0.4190, 0.4574, 0.5646, 0.5488, 0.7018, 0.6217, 0.5522, 0.7651),
        "UA": (0.4719, 0.3966, 0.5549, 0.5762, 0.7257, 0.5971, 0.5537, 0.7779),
    },
    "augmented baseline": {
        "WA": (0.5303, 0.4864, 0.6564, 0.6395, 0.7251, 0.7082, 0.6243, 0.7617),
        "UA": (0.5440, 0.4598, 0.6691, 0.6434, 0.7435, 0.7162, 0.6293, 0.7767),
    },
    "MCTN": {
        "WA": (0.4975, 0.4892, 0.6242, 0.5634, 0.6834, 0.6784, 0.5894, None),
        "UA": (0.5162, 0.4573, 0.6378, 0.5584, 0.6946, 0.6834, 0.5913, None),
    },
    "MMIN-AE": {
        "WA": (0.5404, 0.5025, 0.6588, 0.6115, 0.7203, 0.7125, 0.6244, 0.7619),
        "UA": (0.5625, 0.4836, 0.6689, 0.6246, 0.7374, 0.7187, 0.6368, 0.7677),
    },
    "MMIN-NoCycle": {
        "WA": (0.5503, 0.5116, 0.6577, 0.6239, 0.7185, 0.7202, 0.6304, 0.7498),
        "UA": (0.5821, 0.5006, 0.6705, 0.6454, 0.7438, 0.7301, 0.6454, 0.7709),
    },
    "MMIN": {
        "WA": (0.5658, 0.5252, 0.6657, 0.6399, 0.7294, 0.7267, 0.6410, 0.7650),
        "UA": (0.5900, 0.5160, 0.6802, 0.6543, 0.7514, 0.7361, 0.6524, 0.7812),
    },
}
"""Method → metric → values of `CONDITIONS`, on IEMOCAP with four classes; None where a method cannot be used."""
MSP_IMPROV: dict[str, dict[str, tuple[float, ...]]] = {
    "full-modality baseline": {"F1": (0.2824, 0.3295, 0.4576, 0.4721, 0.5655, 0.5368, 0.4543, 0.6523)},
    "augmented baseline": {"F1": (0.4278, 0.4185, 0.5544, 0.5396, 0.6038, 0.6295, 0.5455, 0.6663)},
    "MMIN": {"F1": (0.4647, 0.4471, 0.5573, 0.5740, 0.6188, 0.6411, 0.5649, 0.6855)},
}
"""The same on MSP-IMPROV."""
