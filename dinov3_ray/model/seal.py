"""A loaded model with a note of its tensors, so that a change to them is noticed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from dinov3_ray.errors import CheckpointError
from dinov3_ray.model.backbone import Network

__all__ = ["SealedModel"]


class SealedModel:
    """A model that must stay as it was loaded.

    :meth:`check` notices tensors that were written to in place (``load_state_dict``, ``torch.nn.init``, an optimizer),
    that have another dtype or device (``half()``), or that were replaced, and modules that were replaced. It reads no
    weights, so it cannot notice writes that torch does not count, through ``parameter.data`` or NumPy, or hooks.

    Args:
        model: is in eval mode, without gradients.
    """

    def __init__(self, model: Network) -> None:
        self.model = model
        self._modules = list(model.modules())
        self._parts = [
            (f"{path}.{name}".lstrip("."), holder, name, part)
            for path, module in model.named_modules()
            for holder in (module._parameters, module._buffers, module._modules)
            for name, part in holder.items()
        ]
        self._tensors = [
            (path, part, part._version, part.data_ptr())
            for path, holder, _, part in self._parts
            if part is not None and not isinstance(part, nn.Module)
        ]

    def settle(self) -> None:
        """Put the model back in eval mode: dropout and RoPE's augmentation change results."""
        if any(module.training for module in self._modules):
            self.model.eval()

    def check(self) -> None:
        """Refuse to compute with a model whose weights were changed.

        Raises:
            CheckpointError: the model is not what was loaded; names a part that was changed.
        """
        changed = next(self._changed(), None)
        if changed is not None:
            raise CheckpointError(
                f"a teacher must stay as its checkpoint says, or its fingerprint would name another model; {changed} "
                "was changed since it was loaded (make a new teacher, and use copies of its modules elsewhere; "
                "weights of your own go into a checkpoint directory of their own)"
            )

    def _changed(self) -> Iterator[str]:
        for path, holder, name, part in self._parts:
            if holder.get(name) is not part:
                yield path
        for path, tensor, version, address in self._tensors:
            if tensor._version != version or tensor.data_ptr() != address:
                yield path
