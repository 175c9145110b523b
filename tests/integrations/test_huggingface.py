"""Small models of transformers with random weights, on our attention and on theirs."""

from __future__ import annotations

import builtins
import copy
import inspect
import warnings

import pytest
import torch
from torch import Tensor

import mmer_fast as mf
from mmer_fast.integrations import huggingface

with warnings.catch_warnings():  # what it deprecates in itself is not ours
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

IDS = torch.arange(3, 24).reshape(3, 7)
LENGTHS = torch.tensor([7, 4, 2])
RIGHT = torch.arange(7) < LENGTHS[:, None]
LEFT = RIGHT.flip(1)
# The argument by which a model takes its cache has this name since transformers 5.24.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
# float32, logits of size 10; against a computation in the same precision.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True, scope="module")
def _registered():
    huggingface.register_attention()
    with mf.use_backend("reference"):
        yield


def decoder(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaConfig(
        vocab_size=50, num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, **sizes, **changes
    )


def encoder(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertConfig(vocab_size=50, initializer_range=0.3, **sizes, **changes)


def pair(auto, config, theirs, dtype=torch.float32):
    """The same model twice: with our attention and with theirs."""
    models = [
        auto.from_config(copy.deepcopy(config), attn_implementation=name).to(dtype).eval()
        for name in ("mmer_fast", theirs)
    ]
    models[0].load_state_dict(models[1].state_dict())
    return models


def logits(model, mask: Tensor | None) -> Tensor:
    out = model(IDS, attention_mask=None if mask is None else mask.long())
    return out.logits if "logits" in out else out.last_hidden_state


@pytest.mark.parametrize("theirs", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", [None, RIGHT, LEFT], ids=["no padding", "right", "left"])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
class TestModels:
    def models(self, kind, theirs):
        if kind == "decoder":
            return pair(transformers.AutoModelForCausalLM, decoder(), theirs)
        return pair(transformers.AutoModelForMaskedLM, encoder(), theirs)

    def test_logits_of_tokens(self, kind, mask, theirs):
        ours, other = (logits(model, mask) for model in self.models(kind, theirs))
        tokens = torch.ones_like(RIGHT) if mask is None else mask
        assert ours[tokens].abs().max() > 1
        torch.testing.assert_close(ours[tokens], other[tokens], **TOLERANCE)

    def test_gradients(self, kind, mask, theirs):
        models = self.models(kind, theirs)
        tokens = torch.ones_like(RIGHT) if mask is None else mask
        for model in models:
            torch.nn.functional.cross_entropy(logits(model, mask)[tokens], IDS[tokens]).backward()
        for (name, ours), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert ours.grad.isfinite().all(), name
            torch.testing.assert_close(ours.grad, other.grad, msg=lambda m, name=name: f"{name}: {m}", **TOLERANCE)


def test_our_attention_is_what_runs(monkeypatch):
    shapes = []

    def spy(module, query, key, value, attention_mask, **options):
        shapes.append((tuple(query.shape), None if attention_mask is None else tuple(attention_mask.shape)))
        return huggingface.attention_forward(module, query, key, value, attention_mask, **options)

    transformers.AttentionInterface.register("spied", spy)
    transformers.AttentionMaskInterface.register("spied", huggingface.attention_mask)
    model = transformers.AutoModelForCausalLM.from_config(decoder(), attn_implementation="spied").eval()
    model(IDS, attention_mask=LEFT.long())
    model(IDS)
    model = transformers.AutoModel.from_config(encoder(), attn_implementation="spied").eval()
    model(IDS, attention_mask=LEFT.long())
    seen = [(3, 7), None, (3, 1, 1, 7)]
    assert shapes == [((3, 4, 7, 8), mask) for mask in seen for _ in range(2)]


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("theirs", ["eager", "sdpa"])
def test_generation(theirs, cache):
    ours, other = pair(transformers.AutoModelForCausalLM, decoder(), theirs)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    tokens = [m.generate(IDS, attention_mask=LEFT.long(), **options).tolist() for m in (ours, other)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("mask", [None, LEFT], ids=["no padding", "left"])
@pytest.mark.parametrize("part", [1, 3], ids=["one token", "several"])
def test_a_prompt_in_parts_equals_the_whole(mask, part):
    """Queries behind cached keys: the causal rule counts from the bottom right."""
    model, _ = pair(transformers.AutoModelForCausalLM, decoder(), "eager")
    tokens = torch.ones_like(RIGHT) if mask is None else mask
    positions = (tokens.cumsum(1) - 1).clamp(min=0)
    arguments = {"position_ids": positions, "attention_mask": None if mask is None else mask.long()}
    whole = model(IDS, **arguments).logits
    past, parts = None, []
    for start in range(0, 7, part):
        stop = start + part
        seen = None if mask is None else mask[:, :stop].long()
        out = model(
            IDS[:, start:stop], position_ids=positions[:, start:stop], attention_mask=seen, use_cache=True,
            **{CACHE: past},
        )  # fmt: skip
        past = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1)[tokens], whole[tokens], **TOLERANCE)


def test_packed_sequences_and_windows():
    """Masks that are neither causal nor free come in full."""
    ours, other = pair(transformers.AutoModelForCausalLM, decoder(), "sdpa")
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1]]).expand(3, -1)
    torch.testing.assert_close(
        ours(IDS, position_ids=positions).logits, other(IDS, position_ids=positions).logits, **TOLERANCE
    )
    config = transformers.MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=3, initializer_range=0.3,
    )  # fmt: skip
    ours, other = pair(transformers.AutoModelForCausalLM, config, "sdpa")
    torch.testing.assert_close(logits(ours, LEFT)[LEFT], logits(other, LEFT)[LEFT], **TOLERANCE)


def test_a_mask_of_the_caller():
    ours, other = pair(transformers.AutoModel, encoder(), "sdpa")
    mask = torch.rand(3, 1, 7, 7) > 0.4
    mask[..., 0] = True
    torch.testing.assert_close(ours(IDS, attention_mask=mask)[0], other(IDS, attention_mask=mask)[0], **TOLERANCE)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_key_weights_reach_every_layer(kind):
    auto, config = {
        "decoder": (transformers.AutoModelForCausalLM, decoder()),
        "encoder": (transformers.AutoModelForMaskedLM, encoder()),
    }[kind]
    model, _ = pair(auto, config, "eager")
    kept = RIGHT.clone()
    kept[0, 2] = False
    weights = kept.float().requires_grad_()
    positions = {"position_ids": torch.arange(7).expand(3, -1)}
    weighted = model(IDS, attention_mask=RIGHT.long(), key_weights=weights, **positions).logits
    masked = model(IDS, attention_mask=kept.long(), **positions).logits
    torch.testing.assert_close(weighted[kept], masked[kept], **TOLERANCE)
    weighted[kept].square().sum().backward()
    assert torch.equal(weights.grad[kept] != 0, torch.ones(int(kept.sum()), dtype=torch.bool))


def test_dropout_follows_the_seed():
    model, _ = pair(transformers.AutoModelForCausalLM, decoder(attention_dropout=0.5), "eager")
    model.train()
    out = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out.append(logits(model, RIGHT))
    assert torch.equal(out[0], out[1])
    assert not torch.equal(out[0], out[2])


class TestFunction:
    def call(self, mask=None, **options):
        q, k, v = (torch.randn(2, heads, 3, width) for heads, width in ((4, 8), (2, 8), (2, 6)))
        module = torch.nn.Module()
        out, weights = huggingface.attention_forward(module, q, k, v, mask, **options)
        assert weights is None
        assert out.is_contiguous()
        return out, (q, k, v)

    def test_widths_and_heads(self):
        out, (q, k, v) = self.call(is_causal=False, scaling=0.3)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(out, expected.transpose(1, 2))

    @pytest.mark.parametrize("causal", [False, True])
    def test_position_bias(self, causal):
        added, mask = torch.randn(1, 4, 3, 3), torch.tensor([[[[True, False, True]]]])
        for given in (None, mask):
            out, (q, k, v) = self.call(given, is_causal=causal, position_bias=added)
            allowed = torch.ones(3, 3, dtype=torch.bool)
            if given is not None:
                allowed = allowed & given
            elif causal:
                allowed = allowed.tril()
            expected = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=added.masked_fill(~allowed, -torch.inf), enable_gqa=True
            )
            torch.testing.assert_close(out, expected.transpose(1, 2))

    def test_padded_queries_behind_the_last_token_are_skipped(self):
        mask = torch.tensor([[True, True, False], [False, True, True]])
        out, (q, k, v) = self.call(mask)
        allowed = mask[:, None, None] & torch.ones(3, 3, dtype=torch.bool).tril()
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, allowed, enable_gqa=True).transpose(1, 2)
        assert not out[0, 2].any()
        assert not out[1, 0].any()
        torch.testing.assert_close(out[mask], expected[mask])

    def test_key_weights_of_each_head(self):
        weights = torch.rand(2, 4, 3)
        out, (q, k, v) = self.call(is_causal=False, key_weights=weights)
        added = weights.log()[:, :, None].expand(-1, -1, 3, -1)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, added, enable_gqa=True)
        torch.testing.assert_close(out, expected.transpose(1, 2))

    @pytest.mark.parametrize("name", ["softcap", "s_aux", "cache"])
    def test_what_is_not_served(self, name):
        with pytest.raises(ValueError, match=f"{name} is not served by mmer_fast"):
            self.call(**{name: 1.0})


def test_without_transformers(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError("No module named 'transformers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'transformers>=5\.4'"):
        huggingface.register_attention("unused")


def test_old_transformers(monkeypatch):
    monkeypatch.setattr(transformers.masking_utils, "sdpa_mask", lambda batch_size, cache_position: None)
    with pytest.raises(ImportError, match=r"5\.4 or newer"):
        huggingface.register_attention("unused")
