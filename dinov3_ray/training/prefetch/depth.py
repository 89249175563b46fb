"""How many batches to keep ahead of a training loop."""

from __future__ import annotations

from typing import Literal

from dinov3_ray.errors import ConfigError

__all__ = ["Depth"]

_LEAST = 2
_WAITED_SECONDS = 1e-3  # a wait counts if it is longer than this,
_WAITED_SHARE = 0.01  # and longer than this share of its step
_CALM_STEPS = 50  # steps without a wait, after which one batch less is tried
_CALM_STEPS_MOST = 3200


class Depth:
    """The depth of a prefetch: fixed, or found from how long the loop waits. Pure: it has no clock.

    It begins with what keeps the teacher busy. It grows by one after a step that waited, and shrinks by one after
    enough steps that did not, so that memory is held only while it helps. If the loop waits after the depth has
    shrunk, the next attempt needs twice as many steps. The depth never exceeds twice what the teacher can have in
    flight: if the loop waits then, the teacher is slower than the student, and more depth would not help.

    Args:
        fixed: a number of batches, or ``auto``.

    Raises:
        ConfigError: it is neither.
    """

    def __init__(self, fixed: int | Literal["auto"]) -> None:
        if fixed != "auto" and (isinstance(fixed, bool) or not isinstance(fixed, int) or fixed < 1):
            raise ConfigError(f'depth must be "auto" or a whole number >= 1; got {fixed!r}')
        self._fixed = fixed != "auto"
        self.batches = _LEAST if fixed == "auto" else fixed
        self._calm = 0
        self._calm_needed = _CALM_STEPS
        self._gave_back = False
        self._begun = False

    def begin(self, parallelism: int) -> None:
        """A pass begins. The depth found in earlier passes is kept."""
        if not self._fixed and not self._begun:
            self.batches = max(_LEAST, parallelism)
        self._begun = True

    def learn(self, waited: float, step_seconds: float, parallelism: int) -> None:
        """A step took ``step_seconds``, of which the loop waited ``waited`` for the teacher.

        Args:
            parallelism: batches that the teacher can usefully have in flight now; a pool may have grown or shrunk.
        """
        if self._fixed:
            return
        if waited > max(_WAITED_SECONDS, _WAITED_SHARE * step_seconds):
            if self._gave_back:
                self._calm_needed = min(2 * self._calm_needed, _CALM_STEPS_MOST)
                self._gave_back = False
            self._calm = 0
            self.batches += 1
        else:
            self._calm += 1
            if self._calm >= self._calm_needed:
                self._calm = 0
                self._gave_back = True
                self.batches -= 1
        self.batches = min(max(self.batches, _LEAST), max(_LEAST, 2 * parallelism))
