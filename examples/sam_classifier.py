"""SAM beside SGD on images with wrong labels, with autocast and GradScaler: python examples/sam_classifier.py"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmer_fast.optim import SAM, frozen_batch_statistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.bfloat16
CLASSES = 10


def make_images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy copies, shifted sideways, of one blurred random pattern a class: (count, 1, 12, 12), and their classes."""
    patterns = torch.randn(CLASSES, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    patterns = 3 * F.avg_pool2d(patterns, 3, stride=1, padding=1)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    shifts = torch.randint(-3, 4, (count,), generator=generator).tolist()
    images = torch.stack([patterns[k].roll(s, dims=-1) for k, s in zip(labels.tolist(), shifts, strict=True)])
    return (images + torch.randn(images.shape, generator=generator)).to(DEVICE), labels.to(DEVICE)


def make_model() -> nn.Module:
    layers = [nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, CLASSES)).to(DEVICE)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(DEVICE, dtype=DTYPE):
        return F.cross_entropy(model(x), y)


def train(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, rho: float | None) -> None:
    """Plain SGD where `rho` is None, else SAM around it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sam = None if rho is None else SAM.around(optimizer, rho)
    scaler = torch.amp.GradScaler(DEVICE, enabled=DTYPE is torch.float16)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sam or optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(data[0]), device=DEVICE).split(50):
            x, y = data[0][batch], data[1][batch]
            scaler.scale(loss_of(model, x, y)).backward()
            if sam is None:
                scaler.step(optimizer)
            else:
                sam.first_step(zero_grad=True)
                with frozen_batch_statistics(model):
                    scaler.scale(loss_of(model, x, y)).backward()
                sam.second_step(scaler=scaler)
            scaler.update()
            optimizer.zero_grad()
        scheduler.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def main(samples: int = 600, epochs: int = 15, wrong: float = 0.4, rho: float = 0.1) -> dict[str, float]:
    """Test accuracy of each method. SGD gets twice the epochs: a step of SAM is two forward and backward passes."""
    generator = torch.Generator().manual_seed(1)
    images, labels = make_images(samples, generator)
    random = torch.randint(CLASSES, (samples,), generator=generator).to(DEVICE)
    noisy = torch.where(torch.rand(samples, generator=generator).to(DEVICE) < wrong, random, labels)
    test, result = make_images(2000, generator), {}
    for name, its_epochs, its_rho in (("SGD", 2 * epochs, None), ("SAM", epochs, rho)):
        torch.manual_seed(0)
        model = make_model()
        train(model, (images, noisy), its_epochs, its_rho)
        result[name] = accuracy(model, *test)
        print(f"{name}: {its_epochs:3d} epochs, test accuracy {result[name]:.1%}")
    return result


if __name__ == "__main__":
    main()
