"""UniVA's recognition loss: the labels as a distribution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def softmax_label_kl(logits_bk: Tensor, labels_bk: Tensor) -> Tensor:
    """KL divergence of the softmax of the *labels* from that of the logits, over both B and K (published code):

        1/(B K) Σ_i Σ_k t_ik (log t_ik − log softmax(z_i)_k),    t_i = softmax(y_i)

    Where n of K labels are present, one of them has t = e/(n e + K − n), an absent one 1/e of that. At K = 6 the
    threshold .18 lies between both for n from 1 to 5, and above both at n = 0 and n = 6, where all are 1/6.

    Args:
        logits_bk: (B, K) floating.
        labels_bk: (B, K) in {0, 1}, same dtype.

    Returns:
        (), without the published factor of 1000.
    """
    return F.kl_div(logits_bk.log_softmax(dim=1), labels_bk.softmax(dim=1), reduction="none").mean()
