"""MMGCN (J. Hu, Y. Liu, J. Zhao, Q. Jin, ACL 2021): emotion recognition in conversation with a deep graph network.

Every utterance of a dialogue is a node in each modality. A GCN as deep as wanted passes what nodes hold along the edges
of the graph (`mmer_fast.systems.mmgcn.graph`), so that an utterance learns from its context and its modalities from
each other, and the classifier reads an utterance's nodes before (h') and after (g):

    n_i^m = [h_i^m, S_i]    e_i = [h'_i^a, h'_i^v, h'_i^t, g_i^a, g_i^v, g_i^t]    P_i = softmax(W ReLU(e_i) + b)

Shape suffixes: b utterances of a batch, m streams (modalities, or all of them joined), g dialogues, l utterances of the
longest dialogue, f features, d width of the nodes, k classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmer_fast.data import Batch, DataError, MultiModalData, Split
from mmer_fast.models.dropout import Dropout
from mmer_fast.models.outputs import CLASSES, Outputs
from mmer_fast.models.pooling import padded_means
from mmer_fast.models.robmmr import check_outline
from mmer_fast.models.standardization import Standardization, fit_standardization
from mmer_fast.systems.interface import Objective, SystemModel
from mmer_fast.systems.mmgcn.config import NONE, MMGCNConfig, chosen
from mmer_fast.systems.mmgcn.encoders import UtteranceEncoder
from mmer_fast.systems.mmgcn.gcnii import GCNII
from mmer_fast.systems.mmgcn.graph import DialogueGraph, dialogue_graph
from mmer_fast.systems.mmgcn.layout import DialogueLayout
from mmer_fast.systems.mmgcn.losses import authors_focal_loss, class_weights, focal_loss, parameter_penalty
from mmer_fast.systems.mmgcn.presets import PRESETS

JOINED = "joined"
_SOURCES = 'expected conversations with one class an utterance, such as "dialogues" or a pickle of MMGCN'


class MMGCN(SystemModel):
    """Graph network on the utterances of whole dialogues.

    Args:
        modalities: name → feature size; features of several steps are averaged over those that count.
        labels: number of classes K.
        config: sizes and switches.

    Raises:
        ValueError: no modality, a name that cannot name a submodule, a feature size or the number of classes below 1.
    """

    config_class = MMGCNConfig
    presets = PRESETS
    loss_names = ("recognition", "l2")
    input_extras: ClassVar[tuple[str, ...]] = ("dialogue", "speaker")
    group = "dialogue"

    class_weight: Tensor

    def __init__(self, modalities: Mapping[str, int], labels: int, config: MMGCNConfig) -> None:
        check_outline(modalities, labels)
        super().__init__(modalities, labels, config)
        early = config.fusion == "early"
        streams = {JOINED: sum(modalities.values())} if early else self.modalities
        recurrent, spoken = (
            list(streams) if early and chosen(names, modalities) else chosen(names, streams)
            for names in (config.recurrent_modalities, config.speaker_modalities)
        )
        self.standardizations = nn.ModuleDict({name: Standardization(size) for name, size in modalities.items()})
        self.encoders = nn.ModuleDict(
            {
                name: UtteranceEncoder(
                    size, config.dim, config.recurrent_layers if name in recurrent else 0, config.dropout
                )
                for name, size in streams.items()
            }
        )
        concatenated = bool(spoken) and config.speaker_join == "concatenate"
        speaker_width = config.speaker_dim if concatenated else config.dim
        self.speaker_embedding = nn.Embedding(config.speakers, speaker_width) if spoken else None
        self.register_buffer("spoken", torch.tensor([name in spoken for name in streams])[:, None], persistent=False)
        width = config.dim + speaker_width if concatenated else config.dim
        self.networks = nn.ModuleList(
            GCNII(
                width,
                config.graph_dim,
                config.layers,
                alpha=config.alpha,
                decay=config.decay,
                variant=config.variant,
                dropout=config.dropout,
            )
            for _ in range(len(streams) if config.fusion == "late" else 1)
        )
        self.dropout = Dropout(config.dropout)
        self.classifier = nn.Linear(len(streams) * (width + config.graph_dim), labels)
        self.register_buffer("class_weight", torch.ones(labels))

    @property
    def outputs(self) -> Outputs:
        return CLASSES

    @classmethod
    def check_inputs(cls, data: MultiModalData, config: MMGCNConfig) -> None:
        """Refuse data without dialogues, without speakers or with more than `config.speakers`.

        Raises:
            DataError: naming what is missing, and data that have it.
        """
        for name, split in data.splits.items():
            for extra in cls.input_extras:
                values = split.extras.get(extra)
                if values is None or values.ndim != 1 or values.dtype.kind not in "iu":
                    got = "none" if values is None else f"{values.dtype} of shape {values.shape}"
                    raise DataError(
                        f"{name} extras {extra}: expected an integer for each utterance; got {got}: {_SOURCES}"
                    )
            speakers = split.extras["speaker"]
            if config.speaker_modalities != NONE and not (speakers.min() >= 0 and speakers.max() < config.speakers):
                raise DataError(
                    f"{name} extras speaker: expected numbers in [0, speakers={config.speakers}); "
                    f"got {speakers.min()} to {speakers.max()}: set MMGCNConfig.speakers"
                )

    @classmethod
    def check_data(cls, data: MultiModalData, config: MMGCNConfig) -> None:
        """Refuse what `check_inputs` does, and data with several classes.

        Raises:
            DataError: naming what is missing, and data that have it.
        """
        cls.check_inputs(data, config)
        for name, split in data.splits.items():
            classes = split.labels.sum(axis=1)
            if (classes != 1).any():
                i = int(np.flatnonzero(classes != 1)[0])
                raise DataError(f"{name} labels: expected one class; got {classes[i]} in sample {i}: {_SOURCES}")

    def fit(self, split: Split) -> None:
        """Take the weights of the classes and, if asked for, the statistics of the features."""
        self.class_weight.copy_(class_weights(torch.from_numpy(split.labels)))
        if self.config.standardize:
            fit_standardization(self.standardizations, split)

    def nodes(self, batch: Batch, layout: DialogueLayout) -> tuple[Tensor, Tensor]:
        """n of every utterance and stream, (G, M, L, D), 0 where there is none, and where one is, (G, M, L) bool."""
        means, there = {}, {}
        for name in self.modalities:
            there[name] = batch.lengths[name] > 0
            mean_bf = self.standardizations[name](padded_means(batch.features[name], batch.lengths[name]))
            means[name] = torch.where(there[name][:, None], mean_bf, 0.0)
        if self.config.fusion == "early":
            means = {JOINED: torch.cat(list(means.values()), dim=1)}
            there = {JOINED: torch.stack(list(there.values())).any(dim=0)}
        hidden = [encode(means[name], there[name], layout) for name, encode in self.encoders.items()]
        present_bm = torch.stack(list(there.values()), dim=1)
        x_bmd = self._with_speakers(torch.stack(hidden, dim=1), batch.extras["speaker"]) * present_bm[..., None]
        return layout.pad(x_bmd).transpose(1, 2).contiguous(), layout.pad(present_bm).transpose(1, 2)

    def _with_speakers(self, h_bmd: Tensor, speaker_b: Tensor) -> Tensor:
        if self.speaker_embedding is None:
            return h_bmd
        embedded_b1s = self.speaker_embedding(speaker_b)[:, None]
        if self.config.speaker_join == "concatenate":
            return torch.cat([h_bmd, embedded_b1s.expand(-1, h_bmd.shape[1], -1).to(h_bmd.dtype)], dim=2)
        return h_bmd + self.spoken * embedded_b1s

    def graph(self, batch: Batch) -> DialogueGraph:
        """The graph of a batch, for who wants to look at it; the edges between streams are 0 with fusion="late"."""
        return self._graph(*self.nodes(batch, DialogueLayout.of(batch.extras["dialogue"])))

    def _graph(self, x_gmld: Tensor, present_gml: Tensor) -> DialogueGraph:
        return dialogue_graph(x_gmld, present_gml, 0.0 if self.config.fusion == "late" else self.config.gamma)

    def logits(self, batch: Batch) -> Tensor:
        layout = DialogueLayout.of(batch.extras["dialogue"])
        x_gmld, present_gml = self.nodes(batch, layout)
        graph, x_gmld = self._graph(x_gmld, present_gml), self.dropout(x_gmld)
        if self.config.fusion == "late":
            streams = [
                network(x_gmld[:, m : m + 1], present_gml[:, m : m + 1], graph.stream(m))
                for m, network in enumerate(self.networks)
            ]
            hidden_gmld = torch.cat(streams, dim=1)
        else:
            hidden_gmld = self.networks[0](x_gmld, present_gml, graph)
        before_and_after_gmld = torch.cat([x_gmld, hidden_gmld], dim=-1)
        e_bd = layout.flatten(before_and_after_gmld.transpose(1, 2).flatten(2))
        logits_bk: Tensor = self.classifier(self.dropout(e_bd).relu())
        return logits_bk

    def objective(self, batch: Batch) -> Objective:
        logits_bk = self.logits(batch)
        recognition = self._recognition(logits_bk, batch.labels.argmax(dim=1))
        penalty = torch.zeros_like(recognition)
        if self.config.l2 > 0:
            penalty = parameter_penalty(self.parameters(), self.config.l2_form)
        total = recognition + self.config.l2 * penalty
        return Objective(total, torch.stack([recognition, penalty]).detach(), logits_bk.detach())

    def _recognition(self, logits_bk: Tensor, class_b: Tensor) -> Tensor:
        if self.config.loss == "focal":
            return focal_loss(logits_bk, class_b, self.config.focal_gamma)
        if self.config.loss == "authors_focal":
            return authors_focal_loss(logits_bk, class_b, self.config.focal_gamma)
        weight_k = self.class_weight.to(logits_bk.dtype) if self.config.loss == "weighted_nll" else None
        return F.cross_entropy(logits_bk, class_b, weight=weight_k)
