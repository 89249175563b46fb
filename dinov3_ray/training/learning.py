"""What keeps a student from learning: seen without a wait for an accelerator, and said once with the remedy.

Nothing is said during validation, which has gradients turned off, or its modules in eval mode.
"""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import Tensor, nn

__all__ = ["LearningWatch"]

_PATIENCE = 100
"""Training batches after which nothing is expected to change any more; gradients may be accumulated over some."""

# Those without a gradient that were seen; a loss need not repeat what was said of a tap.
_seen: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


class LearningWatch:
    """Looks at what passes through a tap or a loss in training. Each of its warnings comes once.

    Inside compiled code it does not look.
    """

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._initial: list[tuple[Tensor, int]] = []
        self._batches = 0
        self._without_objects = 0

    def __reduce__(self) -> tuple[type[LearningWatch], tuple[()]]:
        return LearningWatch, ()  # a copy starts anew: it has other weights

    def gradient(self, tensor: Tensor, message: str) -> None:
        """Warn if gradients are on, and ``tensor`` takes none."""
        if tensor.requires_grad or not _is_training():
            return
        seen = _seen.get(id(tensor)) is tensor
        _seen[id(tensor)] = tensor
        if not seen:
            self._say(message)

    def projector(self, projector: nn.Module) -> None:
        """Warn if the weights of ``projector`` have not changed for many batches."""
        if self._batches > _PATIENCE or not _is_training():
            return
        weights = [weight for weight in projector.parameters() if weight.requires_grad]
        if not self._batches:
            self._initial = [(weight.detach().clone(), weight._version) for weight in weights]
        self._batches += 1
        now = [weight._version for weight in weights]
        if now == [version for _, version in self._initial]:
            if self._batches <= _PATIENCE:
                return
            # Some optimizers write past the counter of writes. This is the only look at values, and the last.
            initial = [weight for weight, _ in self._initial]
            if weights and all(map(torch.equal, weights, initial)):
                self._say(
                    f"the projector's weights have not changed in {_PATIENCE} training batches: give "
                    "distill.parameters() to the optimizer, and add the loss to what backward() is called on"
                )
        self._batches, self._initial = _PATIENCE + 1, []

    def objects(self, count: int) -> None:
        """Warn if ``count`` was 0 for many batches in a row, in a loss where only objects have a weight."""
        if not _is_training():
            return
        self._without_objects = 0 if count else self._without_objects + 1
        if self._without_objects >= _PATIENCE:
            self._say(
                f"no box was in {_PATIENCE} batches in a row, and with background_weight=0 the loss is 0 without one: "
                "look at how boxes are made from a batch, or give the background a weight"
            )

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, UserWarning, stacklevel=4)


def _is_training() -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()
