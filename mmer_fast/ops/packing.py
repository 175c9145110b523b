"""Packed batches: the tokens of all samples end to end, without padding.

A padded batch (B, T, ...) with lengths becomes (total, ...): what works token by token (a linear layer, a LayerNorm)
then costs what the valid tokens cost, and attention finds its samples in `PackedLayout.cu_seqlens`. With several
modalities a sample's tokens stand one modality after the other, so that one attention sees all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmer_fast.ops import _validate
from mmer_fast.ops._transfer import overwrite, to_device
from mmer_fast.ops.attention_checks import MOST_TOKENS
from mmer_fast.ops.lengths import length_mask


@dataclass(frozen=True)
class _Segment:
    """Where the tokens of one modality are, each tensor (tokens,) int64: in the padded batch and in the packed one."""

    sample: Tensor
    time: Tensor
    position: Tensor
    longest: int


@dataclass(frozen=True)
class PackedLayout:
    """Where every token of a batch is; made by `packed_layout`.

    Attributes:
        cu_seqlens: (B + 1,) int32: sample b has the tokens from ``cu_seqlens[b]`` up to ``cu_seqlens[b + 1]``.
        lengths: (B,) int64, tokens of each sample, of all modalities.
        max_seqlen: the largest of them.
        total: tokens of the batch.
    """

    cu_seqlens: Tensor
    lengths: Tensor
    max_seqlen: int
    total: int
    _segments: tuple[_Segment, ...]
    _order: Tensor  # of the tokens of all modalities, one modality after the other, to their places

    @property
    def modalities(self) -> int:
        """How many modalities the layout has."""
        return len(self._segments)

    def to(self, device: torch.device | str) -> PackedLayout:
        """The same layout on another device; from the CPU to CUDA without waiting for it.

        So lengths that are known on the CPU cost no wait: ``packed_layout(lengths).to("cuda")``.
        """

        def moved(one: _Segment) -> _Segment:
            sample, time, position = (to_device(x, device) for x in (one.sample, one.time, one.position))
            return replace(one, sample=sample, time=time, position=position)

        return replace(
            self,
            cu_seqlens=to_device(self.cu_seqlens, device),
            lengths=to_device(self.lengths, device),
            _segments=tuple(map(moved, self._segments)),
            _order=to_device(self._order, device),
        )

    @property
    def time(self) -> Tensor:
        """(total,) int64: each token's place within its own sample and modality."""
        times = torch.cat([segment.time for segment in self._segments])
        return times if len(self._segments) == 1 else times.index_select(0, self._order)

    def bounded(self, *longest: int) -> PackedLayout:
        """The same tokens, with these numbers of each modality in place of the lengths of its longest sample.

        What has the shape of `max_seqlen` or of a padded batch then does not depend on the lengths, up to these.

        Raises:
            ValueError: not one number for each modality, or one below the longest sample.
        """
        needed = [segment.longest for segment in self._segments]
        if len(longest) != len(needed) or any(one < least for one, least in zip(longest, needed, strict=True)):
            raise ValueError(f"longest must be at least {needed}, one for each modality, got {list(longest)}")
        segments = tuple(replace(one, longest=most) for one, most in zip(self._segments, longest, strict=True))
        return replace(self, max_seqlen=sum(longest), _segments=segments)

    def copy_(self, other: PackedLayout) -> PackedLayout:
        """Overwrite the places by those of another layout with as many samples and tokens of each modality.

        Raises:
            ValueError: the numbers differ, or its samples are longer than this layout allows; nothing is written then.
        """
        shapes = [[len(layout.lengths), *(len(one.sample) for one in layout._segments)] for layout in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"other must have {shapes[0]} samples and tokens of each modality, got {shapes[1]}")
        if other.max_seqlen > self.max_seqlen:
            raise ValueError(f"other must have max_seqlen <= {self.max_seqlen}, got {other.max_seqlen}")
        other = other.bounded(*(segment.longest for segment in self._segments))
        for own, new in zip(self._tensors(), other._tensors(), strict=True):
            overwrite(own, new)
        return self

    def _tensors(self) -> list[Tensor]:
        places = [x for one in self._segments for x in (one.sample, one.time, one.position)]
        return [self.cu_seqlens, self.lengths, self._order, *places]

    def at(self, valid: Tensor) -> PackedLayout:
        """The layout of as many tokens that stand anywhere in their rows: where `valid` (B, T) bool is True."""
        sample, time = valid.nonzero(as_tuple=True)
        position = torch.arange(self.total, device=valid.device)
        segment = _Segment(sample, time, position, valid.shape[1])
        return replace(self, _segments=(segment,), _order=position)

    def join(self, tokens: Sequence[Tensor]) -> Tensor:
        """The packed tokens (tokens_i, ...) of each modality, packed by the layouts of their own, as one (total, ...).

        Raises:
            ValueError: not one tensor for each modality, or other numbers of tokens than the layout has.
        """
        counts = [segment.sample.shape[0] for segment in self._segments]
        if [x.shape[0] for x in tokens] != counts:
            raise ValueError(f"tokens must have {counts} tokens, one tensor a modality, got {[len(x) for x in tokens]}")
        return tokens[0] if len(counts) == 1 else torch.cat(list(tokens)).index_select(0, self._order)

    def separate(self, packed: Tensor) -> list[Tensor]:
        """The tokens (tokens_i, ...) of each modality, of packed ones (total, ...): the inverse of `join`.

        Raises:
            ValueError: another number of tokens than the layout has.
        """
        if packed.dim() == 0 or packed.shape[0] != self.total:
            raise ValueError(f"packed must have shape ({self.total}, ...), got {tuple(packed.shape)}")
        return [packed.index_select(0, segment.position) for segment in self._segments]


def packed_layout(*lengths: Tensor) -> PackedLayout:
    """The layout of a batch with these lengths; reads them, which on CUDA waits for the device.

    Args:
        *lengths: for each modality (B,) integers >= 0: how many tokens of a sample count.

    Returns:
        The layout, on the device of the lengths.

    Raises:
        TypeError: lengths that are no integer tensor.
        ValueError: no lengths, negative ones, 2³¹ tokens or more, or tensors whose shapes or devices differ.

    Examples:
        >>> layout = packed_layout(torch.tensor([2, 0, 3]))
        >>> layout.cu_seqlens.tolist(), layout.max_seqlen, layout.total
        ([0, 2, 2, 5], 3, 5)
    """
    if not lengths:
        raise ValueError("packed_layout needs the lengths of at least one modality, got none")
    for i, one in enumerate(lengths):
        _check_lengths(f"lengths[{i}]", one, lengths[0])
    per_modality = torch.stack([one.to(torch.int64) for one in lengths])  # (modalities, B)
    extremes = per_modality.amin(), per_modality.amax(1)
    if per_modality.shape[1] > 0 and int(extremes[0]) < 0:
        modality, row = (int(x) for x in (per_modality < 0).nonzero()[0])
        raise ValueError(f"lengths[{modality}] must be >= 0, got {int(per_modality[modality, row])} in row {row}")

    longest = extremes[1].tolist()
    if sum(longest) * per_modality.shape[1] > MOST_TOKENS and int(per_modality.sum()) > MOST_TOKENS:
        raise ValueError(f"lengths must sum to at most {MOST_TOKENS}, got {int(per_modality.sum())}")
    ends = per_modality.T.flatten().cumsum(0).reshape(-1, len(lengths)).T  # in the order of the packed tokens
    starts = ends - per_modality
    samples = per_modality.sum(0)
    cu_seqlens = torch.nn.functional.pad(samples.cumsum(0), (1, 0)).to(torch.int32)
    segments = []
    for one, start, steps in zip(per_modality, starts, longest, strict=True):
        sample, time = length_mask(one, steps).nonzero(as_tuple=True)
        segments.append(_Segment(sample, time, start[sample] + time, steps))
    order = torch.cat([segment.position for segment in segments]).argsort()
    return PackedLayout(cu_seqlens, samples, int(samples.max()), len(order), tuple(segments), order)


def pack(x: Tensor | Sequence[Tensor], layout: PackedLayout) -> Tensor:
    """The valid tokens of a padded batch, end to end. Padding may hold anything and gets gradient 0.

    Args:
        x: (B, T, ...), or a sequence of one such tensor for each modality of the layout, T its own, the rest equal.
        layout: of these samples.

    Returns:
        (total, ...).

    Raises:
        TypeError: `layout` is no `PackedLayout`.
        ValueError: not one tensor for each modality; a batch of another size than the layout's; fewer time steps than a
            sample is long; tensors that differ in dtype, device or the shape of a token.
    """
    batches = _as_batches(x, layout)
    tokens = [
        batch.flatten(0, 1).index_select(0, segment.sample * batch.shape[1] + segment.time)
        for batch, segment in zip(batches, layout._segments, strict=True)
    ]
    return layout.join(tokens)


def unpack(
    packed: Tensor, layout: PackedLayout, padded_lengths: int | Sequence[int | None] | None = None
) -> Tensor | tuple[Tensor, ...]:
    """The padded batch of packed tokens, 0 in the padding.

    Args:
        packed: (total, ...).
        layout: with which it was packed.
        padded_lengths: T of the result, one for each modality; None is that of the longest sample.

    Returns:
        (B, T, ...); a tuple of them, one for each modality, where the layout has several.

    Raises:
        TypeError: `packed` is no tensor, `layout` no `PackedLayout`, or a T no integer.
        ValueError: tokens that are not as many as the layout's; a T below the longest sample.
    """
    _check_layout(layout)
    if not isinstance(packed, Tensor):
        raise TypeError(f"packed must be a torch.Tensor, got {type(packed).__name__}")
    if packed.dim() == 0 or packed.shape[0] != layout.total:
        raise ValueError(f"packed must have shape ({layout.total}, ...) as its layout says, got {tuple(packed.shape)}")
    wanted_lengths = _padded_lengths(padded_lengths, layout.modalities)
    samples, token_shape = layout.lengths.shape[0], packed.shape[1:]
    batches = []
    for i, (segment, wanted) in enumerate(zip(layout._segments, wanted_lengths, strict=True)):
        steps = segment.longest if wanted is None else wanted
        if steps < segment.longest:
            raise ValueError(f"padded_lengths[{i}] must be >= {segment.longest}, the longest sample, got {steps}")
        tokens = packed.index_select(0, segment.position)
        flat = packed.new_zeros((samples * steps, *token_shape))
        batches.append(flat.index_copy(0, segment.sample * steps + segment.time, tokens).unflatten(0, (samples, steps)))
    return batches[0] if len(batches) == 1 else tuple(batches)


def _padded_lengths(value: int | Sequence[int | None] | None, modalities: int) -> list[int | None]:
    if value is None or isinstance(value, int):
        value = [value] * modalities
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"padded_lengths must be an int or a list of them, got {type(value).__name__}")
    for i, steps in enumerate(value):
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, (int, torch.SymInt))):
            raise TypeError(f"padded_lengths[{i}] must be an int or None, got {type(steps).__name__}")
        if steps is not None and steps >= 2**63:
            raise ValueError(f"padded_lengths[{i}] must be below 2^63, got {steps}")
    if len(value) != modalities:
        raise ValueError(f"padded_lengths must have {modalities} entries, got {len(value)}")
    return list(value)


def _check_lengths(name: str, value: object, first: Tensor) -> None:
    lengths = _validate.integer_tensor(name, value)
    if lengths.is_meta:
        raise ValueError(f"{name} must have values to read, got a tensor on the meta device")
    if lengths.dim() != 1 or lengths.shape[0] == 0:
        raise ValueError(f"{name} must have shape (B,) with B >= 1, got {tuple(lengths.shape)}")
    if lengths.shape != first.shape or lengths.device != first.device:
        raise ValueError(
            f"{name} must agree with lengths[0], {tuple(first.shape)} on {first.device}, "
            f"got {tuple(lengths.shape)} on {lengths.device}"
        )


def _check_layout(layout: object) -> None:
    if not isinstance(layout, PackedLayout):
        raise TypeError(f"layout must be a PackedLayout, which packed_layout makes, got {type(layout).__name__}")


def _as_batches(x: Tensor | Sequence[Tensor], layout: PackedLayout) -> list[Tensor]:
    _check_layout(layout)
    batches = [x] if isinstance(x, Tensor) else _validate.tensors("x", x)
    if len(batches) != layout.modalities:
        raise ValueError(f"x must be {layout.modalities} tensors, one for each modality, got {len(batches)}")
    samples, first = layout.lengths.shape[0], batches[0]
    for i, (batch, segment) in enumerate(zip(batches, layout._segments, strict=True)):
        name = "x" if isinstance(x, Tensor) else f"x[{i}]"
        if batch.dim() < 2 or batch.shape[0] != samples or batch.shape[1] < segment.longest:
            raise ValueError(
                f"{name} must have shape ({samples}, T, ...) with T >= {segment.longest} as its layout says, "
                f"got {tuple(batch.shape)}"
            )
        if batch.device != layout.lengths.device:
            raise ValueError(f"{name} must be on the layout's device ({layout.lengths.device}), got {batch.device}")
        if batch.dtype != first.dtype or batch.shape[2:] != first.shape[2:]:
            raise ValueError(
                f"{name} must have the dtype and token shape of x[0], {first.dtype} {tuple(first.shape[2:])}, "
                f"got {batch.dtype} {tuple(batch.shape[2:])}"
            )
    return batches
