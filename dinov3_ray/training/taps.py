"""A student's intermediate features: :class:`FeatureTap` takes the outputs of named layers of any model."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dinov3_ray.errors import ConfigError, InputError, describe
from dinov3_ray.training.learning import LearningWatch

__all__ = ["FeatureTap", "Select", "layer_names", "named_layers"]

Select = int | str | Callable[[Any], Tensor]
"""Which tensor of an output that is not one: a place in a tuple, a key of a dict, or a function of the output."""

_WRAPPING_ATTRIBUTES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names that torch.compile, FSDP and activation checkpointing put between a module and its layers."""


class FeatureTap:
    """Takes the outputs of named layers of a model while it is attached, and leaves the model as it found it.

    ::

        with FeatureTap(student, "model.15") as tap:
            for batch, targets in ...:
                predictions = student(batch["img"])
                loss = detection_loss(predictions, batch) + distill(tap.take(), targets)

    A layer's output is kept, with its graph, until ``take()``, ``clear()`` or the layer's next call. The hooks are
    removed at the end of the ``with`` block in any case. Outputs that were not taken stay readable after it, unless an
    exception left the block.

    Wrapped models: names are those of the model inside DistributedDataParallel, DataParallel, torch.compile, FSDP and
    activation checkpointing. Attach *before* a compiled model's first call: torch.compile ignores hooks that are added
    later (``torch._dynamo.config.skip_nnmodule_hook_guards``), and the layer then counts as not run. Copies of a model
    (an EMA made by ``deepcopy``, a pickle) have no tap; a copy of a tap has the copy of its model, and is not attached.

    It warns once if the model is in training, and an output that is read takes no gradient.

    Several threads must not use it at once, as DataParallel's replicas would.

    Args:
        module: the model.
        layers: the name of one layer, or several; see :func:`layer_names`.
        select: needed where the output is not a tensor; see :data:`Select`. One for all layers, or a mapping of some.

    Raises:
        ConfigError: for a name that the model does not have; it lists near ones.
    """

    def __init__(
        self, module: nn.Module, layers: str | Sequence[str], *, select: Select | Mapping[str, Select] | None = None
    ) -> None:
        names = (layers,) if isinstance(layers, str) else tuple(layers)
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"layers must name at least one layer, each once; got {layers!r}")
        known = dict(named_layers(module))
        self._layers = {name: _find(name, known) for name in names}
        if isinstance(select, Mapping):
            strange = sorted(set(select) - set(names))
            if strange:
                raise ConfigError(f"select must name layers of the tap ({', '.join(names)}); got {', '.join(strange)}")
            self._select = dict(select)
        else:
            self._select = {} if select is None else dict.fromkeys(names, select)
        self._module = module
        self._watch = LearningWatch()
        self._outputs: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._layers)

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def attach(self) -> FeatureTap:
        """Add the hooks, where a ``with`` block does not fit. :meth:`close` removes them."""
        if self._handles:
            raise ConfigError(f"a FeatureTap can be attached once at a time; {self!r} is")
        for name, layer in self._layers.items():
            hook = _Hook(name, self._select.get(name), self._outputs)
            self._handles.append(layer.register_forward_hook(hook))
        return self

    def close(self) -> None:
        """Remove the hooks. Outputs that were not taken stay readable. A second call does nothing."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> FeatureTap:
        return self.attach()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        if exc_type is not None:
            self.clear()

    def __getitem__(self, name: str) -> Tensor:
        """The output of the layer's last call.

        Raises:
            ConfigError: for a layer that this tap does not have.
            InputError: if the layer has not run since the last ``take()`` or ``clear()``.
        """
        if name not in self._layers:
            raise ConfigError(f"layer must be one of the tap's ({', '.join(self._layers)}); got {name!r}")
        if name not in self._outputs:
            raise InputError(
                f"layer {name!r} must have run before its output is read; it has not since the tap was attached or "
                "last emptied (run the model first; attach before the first call of a compiled model)"
            )
        output = self._outputs[name]
        if self._module.training:
            self._watch.gradient(
                output,
                f"the output of layer {name!r} takes no gradient, so that the student learns nothing from it: what "
                "leads to it is frozen, or ran under no_grad or in a reentrant checkpoint (unfreeze it, tap one that "
                "learns, or checkpoint with use_reentrant=False)",
            )
        return output

    def take(self) -> Tensor:
        """The output of the tap's one layer. The tap forgets it, so that no later step reads it by mistake.

        Raises:
            ConfigError: if the tap has several layers.
            InputError: as for ``tap[name]``.
        """
        if len(self._layers) != 1:
            raise ConfigError(f"take() is for a tap of one layer; this has {', '.join(self._layers)} (use take_all())")
        return next(iter(self.take_all().values()))

    def take_all(self) -> dict[str, Tensor]:
        """The outputs of all layers by name, in the order of ``names``. The tap forgets them.

        Raises:
            InputError: as for ``tap[name]``; the tap then forgets nothing.
        """
        outputs = {name: self[name] for name in self._layers}
        self.clear()
        return outputs

    def clear(self) -> None:
        """Forget all outputs, and with them their graphs."""
        self._outputs.clear()

    def __getstate__(self) -> dict[str, Any]:
        # Without outputs: tensors with a graph cannot be copied. And as a state, which is set when the copy of the
        # module may still be without its layers: a module may hold a tap of itself.
        return {**vars(self), "_outputs": {}, "_handles": []}

    def __repr__(self) -> str:
        state = "attached" if self.attached else "not attached"
        return f"FeatureTap({', '.join(self._layers)}; {state}, holds {', '.join(self._outputs) or 'nothing'})"


class _Hook:
    """A forward hook that stores one layer's output.

    When its model is copied or pickled, the copy has a hook that does nothing: no tap reads the copy's outputs, and
    tensors with a graph cannot be copied.
    """

    def __init__(self, name: str, select: Select | None, outputs: dict[str, Tensor]) -> None:
        self._name, self._select, self._outputs = name, select, outputs

    def __call__(self, _module: nn.Module, _args: object, output: object) -> None:
        self._outputs[self._name] = _selected(output, self._select, self._name)

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return _Inert, ()


class _Inert:
    """The hook of a copied model."""

    def __call__(self, *_: object) -> None:
        """Leave the output as it is."""


def _selected(output: Any, select: Select | None, name: str) -> Tensor:
    if callable(select):
        chosen = select(output)
    elif select is None:
        chosen = output
    else:
        try:
            chosen = output[select]
        except (LookupError, TypeError) as error:
            raise InputError(
                f"select={select!r} must be found in the output of layer {name!r}, which is {describe(output)}"
            ) from error
    if not isinstance(chosen, Tensor):
        raise InputError(
            f"the output of layer {name!r} must be a tensor; with select={select!r} it is {describe(chosen)} "
            "(select takes an index, a key or a function)"
        )
    return chosen


def layer_names(module: nn.Module) -> list[str]:
    """Names that a :class:`FeatureTap` on ``module`` takes, in the order of ``named_modules()``, without wrappers."""
    return [name for name, _ in named_layers(module) if name]


def named_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All layers with their names without wrappers, in the order of ``named_modules()``; the model's name is empty."""
    inside = _unwrapped(module)
    # The outermost of a layer's wrappers is the one that is called, and whose hooks run.
    yield prefix, module if prefix else inside
    for name, child in inside.named_children():
        yield from named_layers(child, f"{prefix}.{name}" if prefix else name)


def _unwrapped(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module = module.module
            continue
        inner = next((getattr(module, each) for each in _WRAPPING_ATTRIBUTES if each in module._modules), None)
        if inner is None:
            return module
        module = inner


def _find(name: str, known: Mapping[str, nn.Module]) -> nn.Module:
    found = known.get(name) if name else None
    if found is None:
        names = [each for each in known if each]
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
        raise ConfigError(
            f"layers must name layers of the model; it has no {name!r}. Near it: {', '.join(near) or 'none at all'} "
            "(layer_names(model) lists all)"
        )
    return found
