"""A parameter group that an optimizer trains, and that its ``state_dict`` leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer

__all__ = ["SideGroup"]

State = dict[str, Any]


class SideGroup:
    """Parameters that are trained with an optimizer's others, but are kept elsewhere.

    The optimizer's ``state_dict`` is the one that it would have without them, so that a checkpoint can be loaded where
    they do not exist. Loading such a state leaves theirs as it is. They must stay the optimizer's last group.

    Args:
        optimizer: gets the group. Its options are those of the group with the least weight decay, then the least rate.
        parameters: at least one.
        name: the group's ``param_group``, by which Ultralytics tells groups apart.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Parameter], name: str) -> None:
        self._optimizer, self._parameters = optimizer, list(parameters)
        like = min(optimizer.param_groups, key=lambda group: (group["weight_decay"], group["lr"]))
        optimizer.add_param_group({**like, "params": self._parameters, "weight_decay": 0.0, "param_group": name})
        optimizer.register_state_dict_post_hook(_without_last)
        optimizer.register_load_state_dict_pre_hook(self._completed)

    def state(self) -> list[State]:
        """The optimizer's state of each parameter; empty before the first step."""
        return [self._optimizer.state.get(parameter, {}) for parameter in self._parameters]

    def load(self, states: Sequence[State]) -> None:
        """Take over what :meth:`state` gave, on the parameters' devices."""
        self._optimizer.load_state_dict(self._joined(self._optimizer.state_dict(), states))

    def _completed(self, optimizer: Optimizer, state: State) -> State | None:
        if len(state["param_groups"]) == len(optimizer.param_groups):
            return None  # it has the group
        return self._joined(state, self.state())

    def _joined(self, state: State, states: Sequence[State]) -> State:
        first = sum(len(group["params"]) for group in state["param_groups"])
        group = {**self._optimizer.param_groups[-1], "params": list(range(first, first + len(self._parameters)))}
        own = {index: each for index, each in zip(group["params"], states, strict=True) if each}
        return {
            **state,
            "state": {**state["state"], **own},
            "param_groups": [*state["param_groups"], group],
        }


def _without_last(_optimizer: Optimizer, state: State) -> State:
    *groups, own = state["param_groups"]
    left = {index: each for index, each in state["state"].items() if index not in own["params"]}
    return {**state, "state": left, "param_groups": groups}
