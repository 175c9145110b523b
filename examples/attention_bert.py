"""Our attention inside a Hugging Face model, on a padded batch: python examples/attention_bert.py

Two lines: `register_attention()`, and `attn_implementation="mmer_fast"` for `from_pretrained` or `from_config`. Beyond
what the others do, `key_weights` says how much each token counts as a key, and has a gradient.
"""

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, BertConfig, PreTrainedModel

from mmer_fast.integrations.huggingface import register_attention

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_model(attention: str) -> PreTrainedModel:
    """The same random weights for every implementation of attention."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, initializer_range=0.3, **SIZES)
    return AutoModelForMaskedLM.from_config(config, attn_implementation=attention).eval()


def make_batch(samples: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), and (B, T) True at the tokens, of which a sample has at least one."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, length + 1, (samples, 1), generator=generator)
    return torch.randint(50, (samples, length), generator=generator), torch.arange(length) < lengths


def main(samples: int = 8, length: int = 24) -> dict[str, float]:
    """Largest differences of the logits: from other implementations, and of key weights of 0 from padding."""
    register_attention()
    ids, tokens = make_batch(samples, length)
    ours, result = make_model("mmer_fast"), {}
    logits = ours(ids, attention_mask=tokens.long()).logits
    for name in ("eager", "sdpa"):
        theirs = make_model(name)(ids, attention_mask=tokens.long()).logits
        result[name] = (logits - theirs)[tokens].abs().max().item()
        print(f"logits up to {theirs.abs().max():.1f}, largest difference from {name}: {result[name]:.1e}")

    kept = tokens & (torch.arange(length) % 3 != 1)  # hide every third token as a key
    weights = kept.float().requires_grad_()
    weighted = ours(ids, attention_mask=tokens.long(), key_weights=weights).logits
    hidden = ours(ids, attention_mask=kept.long()).logits
    result["weight 0"] = (weighted - hidden)[kept].abs().max().item()
    weighted[tokens].logsumexp(-1).sum().backward()
    result["gradient"] = weights.grad.abs().max().item()
    print(f"key weights of 0 differ from padding by {result['weight 0']:.1e}; gradient up to {result['gradient']:.1f}")
    return result


if __name__ == "__main__":
    main()
