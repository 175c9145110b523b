"""Packed batches against loops over samples."""

from __future__ import annotations

import math

import pytest
import torch

import mmer_fast as mf

LENGTHS = [torch.tensor([2, 0, 4, 1]), torch.tensor([3, 1, 0, 5], dtype=torch.int32)]
PADDED = (4, 6)


def batches(dtype=torch.float64):
    return [torch.randn(4, steps, 3, dtype=dtype) for steps in PADDED]


def one_by_one(x):
    rows = [batch[b, : lengths[b]] for b in range(4) for batch, lengths in zip(x, LENGTHS, strict=True)]
    return torch.cat(rows)


def test_layout():
    layout = mf.packed_layout(*LENGTHS)
    assert layout.cu_seqlens.tolist() == [0, 5, 6, 10, 16]
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.lengths.tolist() == [5, 1, 4, 6]
    assert (layout.max_seqlen, layout.total, layout.modalities) == (6, 16, 2)


def test_one_modality():
    x = batches()[0]
    layout = mf.packed_layout(LENGTHS[0])
    packed = mf.pack(x, layout)
    assert torch.equal(packed, torch.cat([x[b, : LENGTHS[0][b]] for b in range(4)]))
    valid = torch.arange(4) < LENGTHS[0][:, None]
    assert torch.equal(mf.unpack(packed, layout), x.masked_fill(~valid[..., None], 0.0))


def test_several_modalities_stand_one_after_the_other():
    x = batches()
    layout = mf.packed_layout(*LENGTHS)
    packed = mf.pack(x, layout)
    assert torch.equal(packed, one_by_one(x))
    for again, batch, lengths in zip(mf.unpack(packed, layout, PADDED), x, LENGTHS, strict=True):
        valid = torch.arange(batch.shape[1]) < lengths[:, None]
        assert torch.equal(again, batch.masked_fill(~valid[..., None], 0.0))


def test_unpack_pads_to_the_longest_unless_told():
    layout = mf.packed_layout(*LENGTHS)
    packed = torch.randn(layout.total, 2)
    assert [tuple(x.shape) for x in mf.unpack(packed, layout)] == [(4, 4, 2), (4, 5, 2)]
    assert [tuple(x.shape) for x in mf.unpack(packed, layout, [7, None])] == [(4, 7, 2), (4, 5, 2)]


def test_tokens_of_any_shape_and_dtype():
    layout = mf.packed_layout(LENGTHS[0])
    x = torch.arange(4 * 5).reshape(4, 5)
    assert mf.pack(x, layout).tolist() == [0, 1, 10, 11, 12, 13, 15]
    x = torch.randn(4, 5, 2, 3)[:, ::1].transpose(2, 3)
    assert mf.unpack(mf.pack(x, layout), layout, 5).shape == (4, 5, 3, 2)


def test_nothing_at_all():
    layout = mf.packed_layout(torch.zeros(2, dtype=torch.int64))
    assert (layout.total, layout.max_seqlen) == (0, 0)
    packed = mf.pack(torch.randn(2, 3, 4), layout)
    assert packed.shape == (0, 4)
    assert torch.equal(mf.unpack(packed, layout, 3), torch.zeros(2, 3, 4))


def test_padding_may_hold_nan_and_gets_no_gradient():
    x = batches()
    x[0][1] = math.nan
    x[1][2] = math.nan
    leaves = [batch.requires_grad_() for batch in x]
    layout = mf.packed_layout(*LENGTHS)
    packed = mf.pack(leaves, layout)
    assert packed.isfinite().all()
    for g, lengths in zip(torch.autograd.grad(packed.sum(), leaves), LENGTHS, strict=True):
        valid = torch.arange(g.shape[1]) < lengths[:, None]
        assert torch.equal(g, valid[..., None].expand_as(g).double())


def test_gradients():
    layout = mf.packed_layout(*LENGTHS)
    x = [batch.requires_grad_() for batch in batches()]
    assert torch.autograd.gradcheck(lambda *x: mf.pack(x, layout), x)
    packed = torch.randn(layout.total, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: mf.unpack(p, layout), packed)


def test_compiles_without_a_graph_break():
    layout = mf.packed_layout(*LENGTHS)

    def there_and_back(*x):
        return mf.unpack(mf.pack(x, layout), layout, PADDED)

    x = batches(torch.float32)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*x), there_and_back(*x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("error", "message", "lengths"),
    [
        (ValueError, "at least one modality", []),
        (TypeError, r"lengths\[0\] must be an integer tensor, got torch.float32", [torch.ones(2)]),
        (TypeError, r"lengths\[1\] must be an integer tensor, got list", [torch.tensor([1]), [1]]),
        (ValueError, r"lengths\[0\] must have shape \(B,\) with B >= 1, got \(0,\)", [torch.tensor([]).long()]),
        (ValueError, r"lengths\[0\] must have shape \(B,\)", [torch.ones(2, 2).long()]),
        (ValueError, r"lengths\[1\] must agree with lengths\[0\], \(1,\)", [torch.tensor([1]), torch.tensor([1, 2])]),
        (ValueError, r"lengths\[1\] must be >= 0, got -2 in row 1", [torch.tensor([1, 1]), torch.tensor([0, -2])]),
    ],
)
def test_bad_lengths(error, message, lengths):
    with pytest.raises(error, match=message):
        mf.packed_layout(*lengths)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("x must be 2 tensors, one for each modality, got 1", lambda x, y: x),
        (r"x\[0\] must have shape \(4, T, ...\) with T >= 4 .* got \(4, 3, 3\)", lambda x, y: [x[:, :3], y]),
        (r"x\[1\] must have shape \(4, T, ...\) .* got \(3, 6, 3\)", lambda x, y: [x, y[:3]]),
        (r"x\[1\] must have the dtype .* of x\[0\], torch.float64 \(3,\)", lambda x, y: [x, y.float()]),
        (r"x\[1\] must have the dtype .* got torch.float64 \(2,\)", lambda x, y: [x, y[..., :2]]),
        (r"x\[0\] must be on the layout's device \(cpu\), got meta", lambda x, y: [x.to("meta"), y]),
    ],
)
def test_bad_batches(message, change):
    with pytest.raises(ValueError, match=message):
        mf.pack(change(*batches()), mf.packed_layout(*LENGTHS))


def test_bad_packed():
    layout = mf.packed_layout(*LENGTHS)
    with pytest.raises(ValueError, match=r"packed must have shape \(16, ...\) as its layout says, got \(15, 2\)"):
        mf.unpack(torch.zeros(15, 2), layout)
    with pytest.raises(TypeError, match=r"packed must be a torch\.Tensor, got list"):
        mf.unpack([torch.zeros(16, 2)], layout)
    with pytest.raises(ValueError, match=r"padded_lengths\[1\] must be >= 5, the longest sample, got 4"):
        mf.unpack(torch.zeros(16, 2), layout, 4)
    with pytest.raises(ValueError, match=r"padded_lengths must have 2 entries, got 1"):
        mf.unpack(torch.zeros(16, 2), layout, [9])


@pytest.mark.parametrize("call", [mf.pack, mf.unpack])
def test_lengths_are_no_layout(call):
    with pytest.raises(TypeError, match="layout must be a PackedLayout, which packed_layout makes, got Tensor"):
        call(torch.zeros(2, 3, 4), torch.tensor([3, 1]))


def test_join_interleaves_the_modalities_of_each_sample():
    first, second = torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])
    layout = mf.packed_layout(first, second)
    padded = [torch.arange(9.0).reshape(3, 3) + 10 * i for i in range(2)]
    tokens = [mf.pack(x, mf.packed_layout(n)) for x, n in zip(padded, (first, second), strict=True)]
    joined = layout.join(tokens)
    assert joined.tolist() == [0, 1, 10, 13, 14, 6]
    assert layout.time.tolist() == [0, 1, 0, 0, 1, 0]
    assert torch.equal(joined, mf.pack(padded, layout))
    with pytest.raises(ValueError, match=r"tokens must have \[3, 3\] tokens, one tensor a modality, got \[3\]"):
        layout.join(tokens[:1])


def test_separate_is_the_inverse_of_join():
    layout = mf.packed_layout(torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0]), torch.tensor([0, 0, 0]))
    tokens = [torch.randn(count, 4, requires_grad=True) for count in (3, 3, 0)]
    parts = layout.separate(layout.join(tokens))
    assert all(torch.equal(part, one) for part, one in zip(parts, tokens, strict=True))
    (parts[1] * torch.arange(3)[:, None]).sum().backward()
    assert torch.equal(tokens[1].grad, torch.arange(3.0)[:, None].expand(3, 4))
    assert not tokens[0].grad.any()
    with pytest.raises(ValueError, match=r"packed must have shape \(6, \.\.\.\), got \(5, 4\)"):
        layout.separate(torch.randn(5, 4))


def test_a_layout_on_another_device_needs_no_values():
    layout = mf.packed_layout(*LENGTHS)
    moved = layout.to("meta")
    assert moved.cu_seqlens.device.type == moved.lengths.device.type == "meta"
    assert (moved.max_seqlen, moved.total, moved.modalities) == (6, 16, 2)
    assert mf.pack([x.to("meta") for x in batches()], moved).shape == (16, 3)
    assert mf.pack(batches(), layout.to("cpu")).shape == (16, 3)


def test_bounds_in_place_of_the_longest_samples():
    layout = mf.packed_layout(*LENGTHS).bounded(7, 9)
    assert (layout.max_seqlen, layout.total) == (16, 16)
    x = [torch.randn(4, steps, 3) for steps in (7, 9)]
    packed = mf.pack(x, layout)
    assert torch.equal(packed, one_by_one(x))
    assert [tuple(y.shape) for y in mf.unpack(packed, layout)] == [(4, 7, 3), (4, 9, 3)]
    for bounds in ((7,), (3, 9), (4, 4)):
        with pytest.raises(ValueError, match=r"longest must be at least \[4, 5\], one for each modality, got "):
            mf.packed_layout(*LENGTHS).bounded(*bounds)


def test_a_layout_takes_the_places_of_another_one():
    others = [torch.tensor([1, 4, 0, 2]), torch.tensor([0, 0, 9, 0])]
    layout, other = mf.packed_layout(*LENGTHS).bounded(4, 9), mf.packed_layout(*others)
    x = [torch.randn(4, steps, 3) for steps in (4, 9)]
    expected, addresses = mf.pack(x, other), layout.cu_seqlens.data_ptr()
    assert layout.copy_(other) is layout
    assert layout.cu_seqlens.data_ptr() == addresses
    assert layout.cu_seqlens.tolist() == other.cu_seqlens.tolist()
    assert torch.equal(layout.time, other.time)
    assert torch.equal(mf.pack(x, layout), expected)
    assert torch.equal(layout.join(layout.separate(expected)), expected)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([[2, 0, 4, 2], [3, 1, 0, 5]], r"other must have \[4, 7, 9\] samples and tokens .*, got \[4, 8, 9\]"),
        ([[2, 0, 5], [3, 1, 5]], r"other must have \[4, 7, 9\] samples and tokens .*, got \[3, 7, 9\]"),
        ([[0, 0, 0, 7], [3, 1, 0, 5]], r"other must have max_seqlen <= 6, got 12"),
        ([[5, 0, 2, 0], [0, 0, 0, 9]], r"other must have max_seqlen <= 6, got 9"),
        ([[2, 0, 0, 5], [4, 4, 1, 0]], r"longest must be at least \[5, 4\]"),
        ([[2, 1, 4, 0], [3, 1, 5, 0]], r"other must have max_seqlen <= 6, got 9"),
    ],
)
def test_a_layout_that_does_not_fit_is_not_taken(others, message):
    layout = mf.packed_layout(*LENGTHS)
    with pytest.raises(ValueError, match=message):
        layout.copy_(mf.packed_layout(*map(torch.tensor, others)))
    assert layout.cu_seqlens.tolist() == [0, 5, 6, 10, 16]
