"""Layout, encoders, GCNII and losses of MMGCN, each alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small_conversations import gcnii

from mmer_fast.models.pooling import padded_means
from mmer_fast.systems.mmgcn import (
    GCNII,
    DialogueLayout,
    UtteranceEncoder,
    authors_focal_loss,
    class_weights,
    dialogue_graph,
    focal_loss,
    parameter_penalty,
)

DIALOGUE = torch.tensor([7, 7, 3, 7, 3, 9])  # interleaved, and numbered at will


def test_layout_puts_dialogues_side_by_side_and_back():
    layout = DialogueLayout.of(DIALOGUE)
    padded = layout.pad(torch.arange(1, 7)[:, None])
    assert padded.squeeze(-1).tolist() == [[3, 5, 0], [1, 2, 4], [6, 0, 0]]
    assert layout.flatten(padded).squeeze(-1).tolist() == [1, 2, 3, 4, 5, 6]
    assert layout.dialogues == 3


def test_layout_of_what_a_modality_has():
    index, spans = DialogueLayout.of(DIALOGUE).encoded(torch.tensor([True, False, False, True, False, True]))
    assert index.tolist() == [0, 3, 5]
    assert spans.lengths.tolist() == [0, 2, 1]


@pytest.mark.parametrize("dialogue", [torch.zeros(0, dtype=torch.long), torch.zeros(2, 2).long(), torch.zeros(3)])
def test_layout_needs_numbers(dialogue):
    with pytest.raises(ValueError, match="dialogue must be integers of shape"):
        DialogueLayout.of(dialogue)


def test_means_skip_padding_of_any_content():
    x_btf = torch.tensor([[[1.0], [3.0], [math.nan]], [[math.nan], [math.inf], [math.nan]]])
    assert padded_means(x_btf, torch.tensor([2, 0])).tolist() == [[2.0], [0.0]]


@pytest.mark.parametrize("layers", [0, 2])
def test_an_encoder_reads_each_dialogue_alone_and_skips_what_is_missing(layers):
    encoder = UtteranceEncoder(4, 6, layers).double()
    x_bf = torch.randn(6, 4, dtype=torch.float64)
    present_b = torch.tensor([True, False, True, True, True, False])
    out_bd = encoder(x_bf, present_b, DialogueLayout.of(DIALOGUE))
    for rows in ([0, 3], [2, 4]):
        hidden = encoder.linear(x_bf[rows])
        expected = encoder.lstm.lstm(hidden)[0] if layers else hidden
        torch.testing.assert_close(out_bd[rows], expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(out_bd[[1, 5]], torch.zeros(2, 6, dtype=torch.float64))


@pytest.mark.parametrize("variant", [True, False])
@pytest.mark.parametrize(("layers", "alpha", "decay"), [(1, 0.1, 0.5), (64, 0.1, 0.5), (3, 0.0, 1.5), (3, 1.0, 0.5)])
def test_gcnii_is_its_equations(variant, layers, alpha, decay):
    network = GCNII(4, 5, layers, alpha=alpha, decay=decay, variant=variant).double()
    x_gmlf = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    present_gml = torch.ones(1, 2, 3, dtype=torch.bool)
    graph = dialogue_graph(torch.randn(1, 2, 3, 6, dtype=torch.float64), present_gml)
    out = network(x_gmlf, present_gml, graph).flatten(0, 2)
    expected = gcnii(x_gmlf.flatten(0, 2), graph.dense()[0], network, alpha, decay, variant)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-13)
    probe = torch.randn_like(out)
    wanted = [x_gmlf, *network.parameters()]
    gradients = [torch.autograd.grad((probe * y).sum(), wanted, allow_unused=True) for y in (out, expected)]
    for got, right in zip(*gradients, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if right is None else right, rtol=1e-9, atol=1e-12)


def test_dropout_acts_before_each_layer_and_on_the_result():
    network, seen = GCNII(5, 4, 3, dropout=0.5), []
    network.dropout.register_forward_hook(lambda module, inputs, result: seen.append(result))
    network.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    present = torch.ones(1, 2, 6, dtype=torch.bool)
    x = torch.randn(1, 2, 6, 5)
    result = network(x, present, dialogue_graph(x, present))
    assert len(seen) == 3 + 1 + 1
    assert seen[0] is seen[1]
    assert seen[-1] is result


def test_gcnii_keeps_absent_nodes_at_zero():
    network = GCNII(4, 5, 2)
    present_gml = torch.tensor([[[True, False, True]]])
    x_gmlf = torch.randn(1, 1, 3, 4)
    out = network(x_gmlf, present_gml, dialogue_graph(x_gmlf, present_gml))
    assert torch.equal(out[0, 0, 1], torch.zeros(5))
    assert (out[0, 0, 0] != 0).any()


def test_64_layers_do_not_smooth_all_nodes_into_one():
    x_gmlf = torch.randn(1, 1, 10, 16)
    present_gml = torch.ones(1, 1, 10, dtype=torch.bool)
    graph = dialogue_graph(x_gmlf, present_gml)
    spread = {}
    for alpha in (0.1, 0.0):
        torch.manual_seed(0)
        h_ld = GCNII(16, 16, 64, alpha=alpha, variant=False)(x_gmlf, present_gml, graph)[0, 0]
        spread[alpha] = ((h_ld - h_ld.mean(dim=0)).norm() / h_ld.norm()).item()
    assert spread[0.1] > 0.1
    assert spread[0.0] < 0.03


def test_focal_losses_against_their_sums():
    logits, classes = torch.randn(7, 4, dtype=torch.float64, requires_grad=True), torch.randint(0, 4, (7,))
    p = logits.softmax(dim=1)
    focal, authors = 0.0, 0.0
    for b in range(7):
        right = p[b, classes[b]].item()
        focal -= (1 - right) ** 2.5 * math.log(right) / 7
        for k in range(4):
            weight = (1 - math.log(right)) ** 2.5 if k == classes[b] else 1.0
            authors -= weight * math.log(p[b, k].item()) / 28
    assert focal_loss(logits, classes, 2.5).item() == pytest.approx(focal, rel=1e-12)
    assert authors_focal_loss(logits, classes, 2.5).item() == pytest.approx(authors, rel=1e-12)
    assert focal_loss(logits, classes, 0.0).item() == pytest.approx(F.cross_entropy(logits, classes).item(), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, classes, 2.5), logits)


def test_focal_loss_of_a_certain_prediction_has_a_gradient():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    for gamma in (0.0, 0.5, 1.0, 2.5):
        (gradient,) = torch.autograd.grad(focal_loss(logits, torch.tensor([0]), gamma), logits)
        assert gradient.isfinite().all()


def test_class_weights_are_one_over_the_share():
    labels = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.uint8)
    torch.testing.assert_close(class_weights(labels), torch.tensor([4 / 3, 0.0, 4.0]))


def test_parameter_penalty():
    parameters = [torch.tensor([3.0], requires_grad=True), torch.tensor([[4.0]], requires_grad=True)]
    assert parameter_penalty(parameters, "norm") == 5
    squared = parameter_penalty(parameters, "squared")
    assert squared == 12.5
    assert torch.autograd.grad(squared, parameters) == (parameters[0], parameters[1])
    zero = torch.zeros(2, requires_grad=True)
    (gradient,) = torch.autograd.grad(parameter_penalty([zero], "norm"), zero)
    assert torch.equal(gradient, torch.zeros(2))
