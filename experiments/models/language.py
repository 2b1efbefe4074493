"""Training of a language model on bytes: nothing here knows of compression."""

import math

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fitsmall.experiments.models.scheduled import Scheduled

__all__ = ["LanguageModel"]


class LanguageModel(Scheduled):
    """Minimise the cross-entropy of the next byte; log ``train/loss``, ``val/bits_per_byte``,
    ``test/bits_per_byte``.

    Batches are texts ``(texts, length + 1)``: the last byte is only predicted, the first only read.
    """

    def forward(self, text: Tensor) -> Tensor:
        logits: Tensor = self.net(text)
        return logits

    def training_step(self, text: Tensor, index: int) -> Tensor:
        loss = self._loss(text)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(text))
        return loss

    def validation_step(self, text: Tensor, index: int) -> None:
        self._measure("val/bits_per_byte", text)

    def test_step(self, text: Tensor, index: int) -> None:
        self._measure("test/bits_per_byte", text)

    def _measure(self, name: str, text: Tensor) -> None:
        bits = self._loss(text) / math.log(2)
        self.log(name, bits, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(text))

    def _loss(self, text: Tensor) -> Tensor:
        return F.cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
