"""Parameters that an optimizer trains, and whose state its ``state_dict`` leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer

__all__ = ["SideState"]

State = dict[str, Any]


class SideState:
    """Keeps the last parameters of an optimizer's last group out of its ``state_dict``, and their state apart.

    The ``state_dict`` is the one that the optimizer would have without them, so that any trainer of the same model can
    load a checkpoint. Loading such a state leaves theirs as it is.

    Args:
        optimizer: has ``parameters`` as the last ones of its last group, and must keep them there.
        parameters: may be none.
        own_group: whether they are the whole group, which the ``state_dict`` then leaves out, too.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Parameter], *, own_group: bool = False) -> None:
        self._optimizer, self._parameters, self._own_group = optimizer, list(parameters), own_group
        if self._parameters:
            optimizer.register_state_dict_post_hook(self._without)
            optimizer.register_load_state_dict_pre_hook(self._completed)

    @classmethod
    def in_own_group(cls, optimizer: Optimizer, parameters: Sequence[Parameter], name: str) -> SideState:
        """Add ``parameters``, at least one, to ``optimizer`` as a group that its ``state_dict`` leaves out.

        The group's options are those of the group with the least weight decay, then the least rate.

        Args:
            name: the group's ``param_group``, by which Ultralytics tells groups apart.
        """
        like = min(optimizer.param_groups, key=lambda group: (group["weight_decay"], group["lr"]))
        optimizer.add_param_group({**like, "params": list(parameters), "weight_decay": 0.0, "param_group": name})
        return cls(optimizer, parameters, own_group=True)

    def state(self) -> list[State]:
        """The optimizer's state of each parameter; empty before the first step."""
        return [self._optimizer.state.get(parameter, {}) for parameter in self._parameters]

    def load(self, states: Sequence[State]) -> None:
        """Take over what :meth:`state` gave, on the parameters' devices."""
        if self._parameters:
            self._optimizer.load_state_dict(self._joined(self._optimizer.state_dict(), states))

    def _without(self, _: Optimizer, state: State) -> State:
        *groups, last = state["param_groups"]
        kept = last["params"][: -len(self._parameters)]
        own = last["params"][len(kept) :]
        left = {number: each for number, each in state["state"].items() if number not in own}
        if not self._own_group:
            groups.append({**last, "params": kept})
        return {**state, "state": left, "param_groups": groups}

    def _completed(self, optimizer: Optimizer, state: State) -> State | None:
        if _count(state["param_groups"]) == _count(optimizer.param_groups):
            return None  # it has them
        return self._joined(state, self.state())

    def _joined(self, state: State, states: Sequence[State]) -> State:
        groups, first = list(state["param_groups"]), _count(state["param_groups"])
        numbers = list(range(first, first + len(self._parameters)))
        if self._own_group:
            groups.append({**self._optimizer.param_groups[-1], "params": numbers})
        else:
            groups[-1] = {**groups[-1], "params": [*groups[-1]["params"], *numbers]}
        own = {number: each for number, each in zip(numbers, states, strict=True) if each}
        return {**state, "state": {**state["state"], **own}, "param_groups": groups}


def _count(groups: Sequence[State]) -> int:
    return sum(len(group["params"]) for group in groups)
