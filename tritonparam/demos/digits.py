"""scikit-learn's handwritten digits, for the demos that read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tritonparam.demos.options import missing, require

CLASSES = 10
N_TEST = 360


@dataclass(frozen=True)
class Digits:
    """Images as rows of 64 pixels, float32 in [0, 1], and their classes."""

    train_pixels: Tensor
    train_labels: Tensor
    test_pixels: Tensor
    test_labels: Tensor

    def require_batch(self, batch: int) -> None:
        """Raise BadOption where a batch has more images than there are."""
        n = len(self.train_labels)
        require(batch <= n, "batch", f"at most the {n} training images", batch)

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Training images and their classes, drawn with replacement."""
        chosen = torch.randint(len(self.train_labels), (n,), generator=generator)
        chosen = chosen.to(self.train_labels.device)
        return self.train_pixels[chosen], self.train_labels[chosen]

    def accuracy(self, logits: Tensor) -> float:
        """Of guesses for the test images, [360, 10]."""
        return (logits.argmax(-1) == self.test_labels).float().mean().item()


def load(seed: int, device: torch.device) -> Digits:
    """1797 digits of 8×8 pixels, split by the seed: 1437 to train on, 360 to test.

    Raises MissingPackage where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise missing("scikit-learn", error) from None
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    pixels, labels = pixels[order].to(device), labels[order].to(device)
    return Digits(pixels[N_TEST:], labels[N_TEST:], pixels[:N_TEST], labels[:N_TEST])
