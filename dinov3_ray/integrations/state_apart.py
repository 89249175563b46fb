"""Parameters that an optimizer trains, and whose state is kept apart from its ``state_dict``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

__all__ = ["StateApart"]


class StateApart:
    """Keeps the last parameters of an optimizer's last group out of its ``state_dict()``, and their state apart.

    What is saved is then an optimizer without them, which any trainer of the same model can load.
    """

    def __init__(self, optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._optimizer = optimizer
        self._restored: Mapping[int, Any] | None = None
        if self._parameters:
            optimizer.register_state_dict_post_hook(self._without)
            optimizer.register_load_state_dict_pre_hook(self._with)

    def current(self) -> dict[int, Any]:
        """The state of each parameter by its place among them."""
        states = self._optimizer.state
        return {place: states[each] for place, each in enumerate(self._parameters) if each in states}

    def restore(self, state: Mapping[int, Any]) -> None:
        """Have the optimizer's next ``load_state_dict`` take this state for them."""
        self._restored = state

    def _without(self, _: object, saved: dict[str, Any]) -> dict[str, Any]:
        *groups, last = saved["param_groups"]
        kept = len(last["params"]) - len(self._parameters)
        own = set(last["params"][kept:])
        state = {number: each for number, each in saved["state"].items() if number not in own}
        return {**saved, "param_groups": [*groups, {**last, "params": last["params"][:kept]}], "state": state}

    def _with(self, _: object, saved: dict[str, Any]) -> dict[str, Any]:
        *groups, last = saved["param_groups"]
        first = sum(len(group["params"]) for group in saved["param_groups"])
        own = self.current() if self._restored is None else self._restored
        self._restored = None
        state = {**saved["state"], **{first + place: each for place, each in own.items()}}
        numbers = range(first, first + len(self._parameters))
        return {
            **saved,
            "param_groups": [*groups, {**last, "params": [*last["params"], *numbers]}],
            "state": state,
        }
