"""A weight that adapts itself: :class:`GradientShare` holds a loss's share of the gradient."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov3_ray.errors import ConfigError

__all__ = ["GradientShare", "SplitGradient", "share_to_odds"]

_MOST_AT_ONCE = 10.0  # factor of a change of the weight, as RT-DETRv4's code bounds it
_PATIENCE = 20
"""Batches of which one should have counted; a GradScaler's first steps may all overflow."""


class GradientShare(nn.Module):
    """The weight with which the distillation has a given share of the gradient at the student's tapped tensors.

    With the norms g_d and g_t of the distillation's and of the task's gradient there, the share is g_d / (g_d + g_t).
    Both are measured in the backward pass of the training itself: no pass is added, and nothing waits for an
    accelerator. From the mean of log(g_t / g_d), with g_d as it is at weight 1, follows the next step's weight::

        w = s / (1 - s) · exp(mean), at most 10 times the weight before, and at least a tenth of it

    The distillation gets an alias of the tapped tensor (:meth:`watch`), whose gradient is its own; what reaches the
    tensor beyond that is the task's. Factors on the whole loss (GradScaler, accumulation) cancel. A step counts if both
    norms are finite and more than 0: steps without distillation, without a task, or with an overflow change nothing; if
    the two have backward passes of their own, the task's must be the first. In a process group, norms are summed over
    all ranks at the end of each backward pass, so that all have the same weight; all ranks must then have the
    distillation in the same steps. It warns once if none of 20 batches counted.

    What counts twice: each pass that brings the task's gradient to a tapped tensor before the distillation's pass ends
    counts as a part of its own, and the squares of the parts are added. So ``autograd.grad(task, retain_graph=True)``
    before ``backward()`` makes the task's norm too large by √2, and two backward passes, of two parts of the task,
    count as if their gradients were at right angles. Measure such things on a forward pass of their own, and add the
    parts of the task before ``backward()``.

    Weight, mean and count are buffers: a training that is resumed goes on as if it had not been interrupted.

    Args:
        target: s, the distillation's share: 0.1 is a tenth of the gradient.
        weight: the weight of the first step.
        memory: batches over which the mean goes: it is the mean of all until there are so many, and then forgets.

    Raises:
        ConfigError: names the option, the rule and the value.

    Source: RT-DETRv4's adaptive weight (GAM, arXiv 2510.25257; ``engine/solver/det_solver.py`` of the repository
    RT-DETRs/RT-DETRv4): the same odds and the same bounds. There, the share is that of the encoder's parameters in the
    L1 norm of all gradients, and the weight changes between epochs, and only if the share is off by more than a
    tolerance. Here, it is the distillation's at the tensor that it enters, and the weight follows at each step.
    """

    weight: Tensor
    log_ratio: Tensor
    counted: Tensor

    def __init__(self, target: float = 0.1, *, weight: float = 1.0, memory: int = 100) -> None:
        super().__init__()
        if not 0 < target < 1:
            raise ConfigError(f"target must lie between 0 and 1, a share of the gradient; got {target}")
        if not 0 < weight < float("inf"):
            raise ConfigError(f"weight must be more than 0; got {weight}")
        if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
            raise ConfigError(f"memory must be an integer of at least 1; got {memory!r}")
        self.target, self.memory = float(target), memory
        self.register_buffer("weight", torch.tensor(float(weight)))
        self.register_buffer("log_ratio", torch.zeros(()))
        self.register_buffer("counted", torch.zeros(()))
        self._squares: Tensor | None = None  # of the task and of the distillation, of the batch that is computed
        self._ends = False  # whether the backward pass that runs will end with a new weight
        self._expected = 0  # batches that should have counted, until it was looked whether one has
        self._counted_first: float | None = None

    def measured(self) -> Tensor:
        """The share that the present weight has by the mean so far, 0-dim; NaN before the first step that counts."""
        share = self.weight / (self.weight + self.log_ratio.exp())
        return torch.where(self.counted > 0, share, torch.nan)

    def begin(self) -> None:
        """A batch's loss is computed: what an interrupted backward pass left is dropped."""
        self._squares, self._ends = None, False

    def expect(self) -> None:
        """The batch that is computed should count; it is said once if none of the first does."""
        if self._counted_first is None:
            self._counted_first = float(self.counted)  # on an accelerator, a wait, in the first batch
        if self._expected == _PATIENCE and float(self.counted) == self._counted_first:
            warnings.warn(
                f"none of {_PATIENCE} batches counted for the gradient share, so that the weight stays at "
                f"{float(self.weight):g}: the task's gradient must arrive at the tapped tensor, in the same backward "
                "pass as the distillation's, or in one before, but behind the call of the distiller (add "
                "distiller(targets) to the task's loss, and call backward() once; name a layer that the task's loss "
                "depends on; where there is no task, give the recipe share=None)",
                UserWarning,
                stacklevel=5,
            )
        self._expected += self._expected <= _PATIENCE

    def watch(self, tensor: Tensor, factor: Tensor) -> Tensor:
        """An alias of ``tensor`` for the distillation's loss, whose gradient distinguishes it from the task's.

        Args:
            tensor: what the student computes with, too.
            factor: what the distillation's loss will be multiplied with, 0-dim.
        """
        split = SplitGradient(self)
        split.factor = factor.detach()
        return split.alias(tensor)

    def add(self, task: Tensor, distillation: Tensor) -> None:
        """Squared norms at one of the tensors; the backward pass that runs ends with a new weight."""
        squares = torch.stack([task, distillation])
        self._squares = squares if self._squares is None else self._squares + squares.to(self._squares.device)
        if not self._ends:
            self._ends = True
            torch.autograd.Variable._execution_engine.queue_callback(self._learn)

    @torch.no_grad()
    def _learn(self) -> None:
        squares = self._squares
        self.begin()
        assert squares is not None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(squares)  # behind the gradients of DistributedDataParallel, in the same order on all ranks
        squares = squares.to(self.weight.device)
        found = (squares[0].log() - squares[1].log()) / 2  # not finite if either is 0 or not finite
        valid = found.isfinite()
        counted = self.counted + valid
        step = torch.where(valid, found - self.log_ratio, 0.0) / counted.clamp(1, self.memory)
        self.log_ratio.add_(step)
        self.counted.copy_(counted)
        wanted = share_to_odds(self.target) * self.log_ratio.exp()
        new = torch.minimum(torch.maximum(wanted, self.weight / _MOST_AT_ONCE), self.weight * _MOST_AT_ONCE)
        self.weight.copy_(torch.where(valid, new, self.weight))

    def extra_repr(self) -> str:
        return f"target={self.target}, memory={self.memory}"


def share_to_odds(share: float) -> float:
    """s / (1 - s): the ratio of the two norms at which the one has the share s of their sum."""
    return share / (1 - share)


class SplitGradient:
    """The gradient of one tensor in one batch, in its two parts.

    Attributes:
        factor: what the distillation's loss is multiplied with, 0-dim; while it is None, nothing counts.
        own: the distillation's gradient, until the whole has arrived.
    """

    def __init__(self, share: GradientShare) -> None:
        self._share = share
        self._task: Tensor | None = None  # squared, of backward passes of the task alone
        self.factor: Tensor | None = None
        self.own: Tensor | None = None

    def alias(self, tensor: Tensor) -> Tensor:
        """An alias of ``tensor`` for the distillation; or itself, if it takes no gradient."""
        if not (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor
        tensor.register_hook(self.arrived)  # type: ignore[no-untyped-call]
        alias: Tensor = _Branch.apply(tensor, self)  # type: ignore[no-untyped-call]
        return alias

    def arrived(self, whole: Tensor) -> None:
        """The hook of the tensor: the sum of all gradients, once in a backward pass."""
        own, self.own = self.own, None
        if self.factor is None:
            return
        whole = whole.detach().float()
        if own is None:  # of the task alone; the distillation's may come behind it, or never, where it has no part here
            task = _square(whole)
            self._task = task if self._task is None else self._task + task
            return
        own = own.detach().float()
        task = _square(whole - own)
        if self._task is not None:
            task, self._task = task + self._task, None
        self._share.add(task, _square(own) / self.factor.to(own.device).square())


class _Branch(torch.autograd.Function):
    """The identity, which hands its gradient to ``parts`` too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, parts: SplitGradient) -> Tensor:
        ctx.parts = parts
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.parts.own = gradient
        return gradient, None


def _square(gradient: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gradient)
    return norm.square()
