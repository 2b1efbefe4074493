"""Training of a language model on bytes. Nothing here knows about compression."""

import math

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fitsmall.experiments.models.scheduled import ScheduledModule

__all__ = ["LanguageModel"]


class LanguageModel(ScheduledModule):
    """Minimise the cross-entropy of the next byte.

    It logs ``train/loss``, ``val/bits_per_byte`` and ``test/bits_per_byte``. Batches have the shape
    ``(texts, length + 1)``: all bytes but the last are inputs, all but the first are targets.
    """

    def forward(self, text: Tensor) -> Tensor:
        logits: Tensor = self.net(text)
        return logits

    def training_step(self, text: Tensor, index: int) -> Tensor:
        loss = self._loss(text)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(text))
        return loss

    def validation_step(self, text: Tensor, index: int) -> None:
        self._log_bits("val/bits_per_byte", text)

    def test_step(self, text: Tensor, index: int) -> None:
        self._log_bits("test/bits_per_byte", text)

    def _log_bits(self, name: str, text: Tensor) -> None:
        bits = self._loss(text) / math.log(2)
        self.log(name, bits, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(text))

    def _loss(self, text: Tensor) -> Tensor:
        return F.cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
