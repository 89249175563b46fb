"""The weight of a loss over the course of a training: :class:`WeightSchedule`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from dinov3_ray.errors import ConfigError

__all__ = ["WeightSchedule", "is_number"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSchedule:
    """A warm-up, a decay and an end, in steps or in epochs. Pure: what counts them keeps their number.

    The factor grows evenly during ``warmup``, from 1 / warmup in the first unit to 1 in the last. It stays there until
    ``decay_from``, falls along half a cosine to ``floor`` at ``until``, and is 0 from then on.

    Args:
        unit: ``step``: a call in training, that is one batch, also where gradients are accumulated; or ``epoch``.
        warmup: units of the warm-up; 1 or 0 is none.
        decay_from: units until it begins to fall; None: it does not fall.
        until: units until the loss ends, at least ``warmup``; None: it does not end.
        floor: the factor that the decay ends at; it needs ``decay_from``.

    Raises:
        ConfigError: names the option, the rule and the value.
    """

    unit: Literal["step", "epoch"] = "step"
    warmup: float = 0
    decay_from: float | None = None
    until: float | None = None
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.unit not in ("step", "epoch"):
            raise ConfigError(f"unit must be 'step' or 'epoch'; got {self.unit!r}")
        for name in ("warmup", "decay_from", "until", "floor"):
            value = getattr(self, name)
            if not is_number(value) and not (value is None and name in ("decay_from", "until")):
                raise ConfigError(f"{name} must be a number; got {value!r}")
        if not 0 <= self.warmup < math.inf:
            raise ConfigError(f"warmup must be at least 0; got {self.warmup}")
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"floor must lie in 0..1; got {self.floor}")
        if self.until is not None and not self.until > 0:
            raise ConfigError(f"until must be more than 0; got {self.until}")
        if self.until is not None and self.until < self.warmup:
            raise ConfigError(f"until must be at least warmup; got until={self.until}, warmup={self.warmup}")
        if self.floor and self.decay_from is None:
            raise ConfigError(f"floor must be 0 where nothing decays; got {self.floor} (give decay_from and until)")
        if self.decay_from is not None and (self.until is None or not self.warmup <= self.decay_from < self.until):
            raise ConfigError(
                "decay_from must be at least warmup and less than until; "
                f"got decay_from={self.decay_from}, warmup={self.warmup}, until={self.until}"
            )

    def factor(self, done: float) -> float:
        """The factor of the loss, 0..1, after ``done`` units."""
        if self.until is not None and done >= self.until:
            return 0.0
        if done < self.warmup:
            return min((done + 1) / self.warmup, 1.0)
        if self.decay_from is None or self.until is None or done <= self.decay_from:
            return 1.0
        fallen = (done - self.decay_from) / (self.until - self.decay_from)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * fallen)) / 2


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)
