"""The memory fusion network of M3ER: an LSTM a modality, attention over their consecutive outputs, one memory.

At each step t the outputs h of all LSTMs before and after the step are weighted by attention, and the result updates a
memory u, which starts at 0 and goes back into the LSTMs' inputs (after the delta-memory attention and multi-view gated
memory of Zadeh et al. 2018, whose networks are single linear layers here):

    h_i^t = LSTM_i([x_i^t, u^{t−1}], h_i^{t−1})             d = [h_1^{t−1}, …, h_M^{t−1}, h_1^t, …, h_M^t]
    d̂ = d ⊙ softmax(W_a d)                                  û = tanh(W_u d̂)
    γ_1, γ_2 = σ(W_γ [d̂, u^{t−1}])                          u^t = γ_1 ⊙ u^{t−1} + γ_2 ⊙ û

for t up to the longest of a sample's modalities. A modality that has ended keeps its state; a missing one stays at 0.

Shape suffixes: m modalities, b samples, t time steps, d features, h hidden width, g = 4 h gates, u memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmer_fast.ops.lengths import length_mask
from mmer_fast.systems.m3er.vectors import without_padding


class ParallelLSTM(nn.Module):
    """One step of the LSTMs of all modalities at once, in one matrix product; the gates as in `torch.nn.LSTMCell`.

    Args:
        modalities: modality → features D.
        hidden: width h of each LSTM.
        feedback: width of a vector that every LSTM reads beside its features; 0: none.
    """

    def __init__(self, modalities: Mapping[str, int], hidden: int, feedback: int) -> None:
        super().__init__()
        gates = 4 * hidden
        self.inputs = nn.ModuleDict({name: nn.Linear(size, gates) for name, size in modalities.items()})
        self.recurrent = nn.Parameter(torch.empty(len(modalities), hidden, gates))
        self.feedback = nn.Linear(feedback, len(modalities) * gates, bias=False) if feedback else None
        bound = hidden**-0.5
        for parameter in self.parameters():  # as torch.nn.LSTM does
            nn.init.uniform_(parameter, -bound, bound)
        for layer in self.inputs.values():  # forget little at the start, so that early steps reach the end
            assert isinstance(layer, nn.Linear)
            nn.init.constant_(layer.bias[hidden : 2 * hidden], 2.0)

    def read(self, features: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> Tensor:
        """What the gates get of the features (B, T, D) at each step; (T, M, B, G), T of the longest modality."""
        steps = max(features[name].shape[1] for name in self.inputs)
        gates = []
        for name, layer in self.inputs.items():
            x_btg = layer(without_padding(features[name], lengths[name]))
            gates.append(nn.functional.pad(x_btg, (0, 0, 0, steps - x_btg.shape[1])))
        return torch.stack(gates).permute(2, 0, 1, 3).contiguous()

    def forward(self, x_mbg: Tensor, h_mbh: Tensor, c_mbh: Tensor, fed_back_bu: Tensor) -> tuple[Tensor, Tensor]:
        """The next h and c (M, B, H) of one step's `read`."""
        gates_mbg = torch.baddbmm(x_mbg, h_mbh, self.recurrent)
        if self.feedback is not None:
            gates_mbg = gates_mbg + self.feedback(fed_back_bu).unflatten(1, (len(x_mbg), -1)).transpose(0, 1)
        i_mbh, f_mbh, g_mbh, o_mbh = gates_mbg.chunk(4, dim=2)
        c_mbh = f_mbh.sigmoid() * c_mbh + i_mbh.sigmoid() * g_mbh.tanh()
        return o_mbh.sigmoid() * c_mbh.tanh(), c_mbh


class MemoryFusionNetwork(nn.Module):
    """From sequences to each modality's last output and the memory.

    Args:
        modalities: modality → features D.
        hidden: width h of each LSTM.
        memory: width of u.
        feedback: whether u goes into the LSTMs' inputs.
    """

    def __init__(self, modalities: Mapping[str, int], hidden: int, memory: int, feedback: bool = True) -> None:
        super().__init__()
        self.memory = memory
        self.hidden = hidden
        self.lstm = ParallelLSTM(modalities, hidden, memory if feedback else 0)
        states = 2 * hidden * len(modalities)
        self.attention = nn.Linear(states, states)
        self.candidate = nn.Linear(states, memory)
        self.gates = nn.Linear(states + memory, 2 * memory)

    def forward(self, features: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Read (B, T, D) features up to their lengths (B,); T may differ between modalities.

        Returns:
            h (M, B, H) and u (B, U) after each sample's last step; 0 for a missing modality and for a sample without
            any. Padding has no influence, whatever it holds.
        """
        x_tmbg = self.lstm.read(features, lengths)
        lengths_mb = torch.stack([lengths[name] for name in self.lstm.inputs])
        valid_tmb = length_mask(lengths_mb, len(x_tmbg)).permute(2, 0, 1)
        h_mbh = x_tmbg.new_zeros(*lengths_mb.shape, self.hidden)
        c_mbh, u_bu = h_mbh, x_tmbg.new_zeros(lengths_mb.shape[1], self.memory)
        for x_mbg, valid_mb in zip(x_tmbg, valid_tmb, strict=True):
            valid_mb1 = valid_mb[..., None]
            next_h_mbh, c_mbh = self.lstm(x_mbg, h_mbh, c_mbh, u_bu)  # after a sequence's end nothing reads c
            next_h_mbh = torch.where(valid_mb1, next_h_mbh, h_mbh)
            u_bu = torch.where(valid_mb1.any(dim=0), self.update(h_mbh, next_h_mbh, u_bu), u_bu)
            h_mbh = next_h_mbh
        return h_mbh, u_bu

    def update(self, before_mbh: Tensor, after_mbh: Tensor, u_bu: Tensor) -> Tensor:
        """The next memory (B, U), from the outputs (M, B, H) of the LSTMs before and after a step."""
        states_bs = torch.cat([before_mbh, after_mbh]).transpose(0, 1).flatten(1)
        attended_bs = states_bs * self.attention(states_bs).softmax(dim=1)
        keep_bu, write_bu = self.gates(torch.cat([attended_bs, u_bu], dim=1)).sigmoid().chunk(2, dim=1)
        return keep_bu * u_bu + write_bu * self.candidate(attended_bs).tanh()


def multiplicative_fusion(h_mbh: Tensor) -> Tensor:
    """Π_i (1 + h_i) − 1 (B, H), of outputs (M, B, H) within (−1, 1): every product of some of them, summed.

    0 is neutral, so a missing modality changes nothing (a plain product would make all of them 0).
    """
    return (1 + h_mbh).prod(dim=0) - 1
