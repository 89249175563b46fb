"""Loads a vision model of transformers, with every weight accounted for.

transformers' ``from_pretrained`` knows the names that tensors have had, and gives them those of its present modules.
But it fills what is missing with random numbers, and skips what is unexpected, both with a warning; here they are
errors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov3_ray.config.transformers_model import TransformersConfig, read_transformers_config
from dinov3_ray.config.weights import WeightFiles
from dinov3_ray.errors import CheckpointError, ConfigError
from dinov3_ray.network.transformers_network import TransformersNetwork

__all__ = ["load_transformers"]

_SHOWN = 12
_one_at_a_time = threading.Lock()  # loading changes settings of the whole process for its time


def load_transformers(config: TransformersConfig, device: torch.device, dtype: torch.dtype) -> TransformersNetwork:
    """The vision model of ``config`` on ``device``, in eval mode, without gradients.

    Raises:
        CheckpointError: weights are missing, damaged, not finite, or of another model.
        ConfigError: the model is not one whose tokens are patches, or cannot compute with the options.
    """
    root = config.place.with_weights()
    WeightFiles.find(root)  # which says of damaged files what is wrong with them
    whole, vision = read_transformers_config(root)
    model, missing, unexpected = _from_pretrained(root, vision, config.attention)
    strange = _of_no_part(unexpected, whole, model)
    if strange:
        raise _mismatch(root, [f"{name} is unexpected" for name in strange])
    needed = dict(model.to(device=device, dtype=dtype).named_parameters())
    for name, parameter in needed.items():
        if name not in missing and not torch.isfinite(parameter.sum(dtype=torch.float32)):
            bad = int((~torch.isfinite(parameter)).sum())
            if bad:
                raise CheckpointError(
                    f"{root}: tensor {name} must be finite; found {bad:,} NaN or infinite values of "
                    f"{parameter.numel():,} (as {dtype})"
                )
    network = TransformersNetwork(model.requires_grad_(False).eval(), config.architecture, config.image_size)
    kept = {id(parameter) for parameter in network.parameters()}
    lacking = sorted(name for name in missing if name not in needed or id(needed[name]) in kept)
    if lacking:
        raise _mismatch(root, [f"{name} is missing" for name in lacking])
    return network


def _from_pretrained(root: Path, vision: Any, attention: str) -> tuple[nn.Module, set[str], set[str]]:
    """The model in float32 on the CPU, and the names that are missing in the files, and those that it does not have."""
    from transformers import AutoModel  # here, since it takes seconds

    vision.output_hidden_states = vision.output_attentions = False
    # float32, so that torch's default dtype, which other threads use, stays what it is.
    options = {"dtype": torch.float32, "trust_remote_code": False, "local_files_only": True, "use_safetensors": True}
    with _one_at_a_time, _in_silence(), torch.random.fork_rng(devices=()):
        try:
            model, found = AutoModel.from_pretrained(root, config=vision, output_loading_info=True, **options)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(
                f"the weights in {root} must be those of a {vision.model_type} that transformers' AutoModel can "
                f"load; it fails with {type(error).__name__}: {reason}"
            ) from error
        if attention != "auto":
            try:
                model.set_attn_implementation(attention)
            except (ValueError, ImportError) as error:
                raise ConfigError(f"attention {attention!r} cannot be used: {error}") from error
    if found["mismatched_keys"]:
        raise _mismatch(root, [f"{entry} has the wrong shape" for entry in sorted(map(str, found["mismatched_keys"]))])
    return model, set(found["missing_keys"]), set(found["unexpected_keys"])


@contextmanager
def _in_silence() -> Iterator[None]:
    """transformers' own report of what is missing and unexpected, and its progress bar, are not shown."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _of_no_part(names: set[str], whole: Any, model: nn.Module) -> list[str]:
    """Those of the tensors ``names`` that the architecture which config.json names does not have outside of ``model``,
    such as in a text tower or a classifier."""
    import transformers

    architecture = getattr(transformers, str((whole.architectures or [None])[0]), None)
    if not names or architecture is None or issubclass(architecture, type(model)):
        return sorted(names)
    with torch.device("meta"):
        full = architecture(whole)
    others = {
        name
        for name, part in (*full.named_children(), *full.named_parameters(recurse=False))
        if not isinstance(part, type(model)) and not hasattr(model, name)
    }
    return sorted(name for name in names if name.split(".")[0] not in others)


def _mismatch(root: Path, problems: list[str]) -> CheckpointError:
    rest = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    lines = "".join(f"\n  - {problem}" for problem in problems[:_SHOWN])
    return CheckpointError(f"the weights in {root} are not what its configuration describes:{lines}{rest}")
