"""A vision transformer that reads the k patches it chooses by soft top-k: python examples/topk_vision_transformer.py

Training weighs all patches (the gradient of `soft_topk` teaches the scores); evaluation computes on the k best alone.
Copy `SelectiveTransformer.forward`, and the falling epsilon of `train`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmer_fast as mf

CLASSES, PATCHES, PIXELS, KEPT = 4, 36, 16, 3


class SelectiveTransformer(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Linear(PIXELS, width)
        self.position = nn.Parameter(0.02 * torch.randn(PATCHES, width))
        self.score = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        layer = mf.nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = mf.nn.TransformerEncoder(layer, 2)  # torch.nn's, with weights for the keys
        self.head = nn.Linear(width, CLASSES)

    def forward(self, patches: Tensor, epsilon: float | None) -> tuple[Tensor, Tensor]:
        """(B, N, pixels) -> (B, classes) logits and (B, N) weights of the patches; without epsilon a hard choice."""
        tokens = self.embedding(patches) + self.position
        scores = self.score(tokens).squeeze(-1)
        if epsilon is None:
            chosen = scores.topk(KEPT).indices
            tokens = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))
            return self.head(self.encoder(tokens).mean(1)), torch.zeros_like(scores).scatter(1, chosen, 1.0)
        weights = mf.soft_topk(scores, KEPT, epsilon=epsilon)
        hidden = self.encoder(tokens, key_weights=weights)
        return self.head((weights[..., None] * hidden).sum(1) / KEPT), weights


def make_images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Patches of noise, a few of which show the pattern of the class: (count, N, pixels), classes, which they are."""
    patterns = torch.randn(CLASSES, PIXELS, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    important = torch.rand(count, PATCHES, generator=generator).argsort(1) < KEPT
    images = torch.randn(count, PATCHES, PIXELS, generator=generator)
    return torch.where(important[..., None], images + patterns[labels][:, None], images), labels, important


def train(model: SelectiveTransformer, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        images, labels, _ = make_images(64, generator)
        epsilon = 0.01 ** (step / steps)  # from a mean of many patches to nearly a choice
        F.cross_entropy(model(images, epsilon)[0], labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def main(steps: int = 300) -> dict[str, dict[str, float]]:
    """Accuracy on new images and the share of the important patches that is kept, with soft and with hard weights."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = SelectiveTransformer()
    train(model, steps, generator)
    images, labels, important = make_images(1000, generator)
    result = {}
    for name, epsilon in (("soft", 0.01), ("hard", None)):
        with torch.no_grad():
            logits, weights = model.eval()(images, epsilon)
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        kept = (weights * important).sum().item() / important.sum().item()
        result[name] = {"accuracy": accuracy, "kept": kept}
        print(f"{name} choice, {KEPT} of {PATCHES} patches: accuracy {accuracy:.1%}, {kept:.1%} of the important found")
    return result


if __name__ == "__main__":
    main()
