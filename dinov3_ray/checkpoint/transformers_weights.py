"""Loads a vision model of transformers, with every weight accounted for.

transformers' ``from_pretrained`` knows the names that tensors have had, and gives them those of its present modules.
But it fills what is missing with random numbers, and skips what is unexpected, both with a warning; here they are
errors.

The vision tower of a two-tower model is loaded alone where transformers can do so, and else taken out of the whole.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov3_ray.checkpoint.tensors import mismatch, require_finite
from dinov3_ray.config.files import CONFIG_FILE
from dinov3_ray.config.transformers_model import TransformersConfig, read_transformers_config
from dinov3_ray.config.weights import FLOATS, WeightFiles
from dinov3_ray.errors import CheckpointError, ConfigError, first_line
from dinov3_ray.network.transformers_network import TransformersNetwork

__all__ = ["load_transformers"]

_one_at_a_time = threading.Lock()  # loading changes settings of the whole process for its time


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model as transformers loads it, in float32 on the CPU.

    Attributes:
        model: with random numbers in the place of what is missing or mismatched.
        missing: the names that no file has.
        mismatched: of tensors of another shape, the shapes expected and found.
        unexpected: the names in the files that the model does not have.
    """

    model: nn.Module
    missing: set[str]
    mismatched: dict[str, tuple[list[int], list[int]]]
    unexpected: set[str]

    @property
    def is_elsewhere(self) -> bool:
        """Whether the files have not one of its parameters."""
        return self.missing.issuperset(name for name, _ in self.model.named_parameters())

    def part(self, path: str) -> _Loaded:
        """Its module ``path``; what is unexpected remains the whole's."""
        prefix = f"{path}." if path else ""
        return _Loaded(
            self.model.get_submodule(path),
            {name.removeprefix(prefix) for name in self.missing if name.startswith(prefix)},
            {name.removeprefix(prefix): both for name, both in self.mismatched.items() if name.startswith(prefix)},
            self.unexpected,
        )


def load_transformers(config: TransformersConfig, device: torch.device, dtype: torch.dtype) -> TransformersNetwork:
    """The vision model of ``config`` on ``device``, in eval mode, without gradients.

    Raises:
        CheckpointError: weights are missing, damaged, not finite, or of another model.
        ConfigError: the model is not one whose tokens are patches, or cannot compute with the options.
    """
    root = config.place.with_weights()
    weights = WeightFiles.find(root, buffers=True)  # which says of damaged files what is wrong with them
    whole, vision = read_transformers_config(root)
    loaded = _load_vision(root, whole, vision)
    _refuse_whole_numbers(weights, loaded.model)
    if loaded.mismatched:
        shapes = sorted(loaded.mismatched.items())
        raise mismatch(str(root), [f"{name}: expected {expected}, found {found}" for name, (expected, found) in shapes])
    model, missing = loaded.model, loaded.missing
    if config.attention != "auto":
        try:
            model.set_attn_implementation(config.attention)  # type: ignore[operator]
        except (ValueError, ImportError) as error:
            raise ConfigError(f"attention {config.attention!r} cannot be used: {error}") from error
    needed = dict(model.to(device=device, dtype=dtype).named_parameters())
    for name, parameter in needed.items():
        if name not in missing:
            require_finite(root, name, parameter)
    any_size = config.preprocessing.follows is not None
    network = TransformersNetwork(
        model.requires_grad_(False).eval(), config.architecture, config.nominal_size, any_size=any_size
    )
    kept = {id(parameter) for parameter in network.parameters()}
    lacking = sorted(name for name in missing if name not in needed or id(needed[name]) in kept)
    if lacking:
        raise mismatch(str(root), [f"{name} is missing" for name in lacking])
    return network


def _load_vision(root: Path, whole: Any, vision: Any) -> _Loaded:
    """The vision model in ``root``; no tensor there is unexpected."""
    from transformers import MODEL_MAPPING, AutoModel  # here, since it takes seconds

    vision.output_hidden_states = vision.output_attentions = False
    if type(vision) in MODEL_MAPPING:
        loaded = _from_pretrained(AutoModel, root, vision)
        if vision is whole or not loaded.is_elsewhere:
            _refuse_strange(root, loaded, whole)
            return loaded
    kind = AutoModel if vision is not whole and type(whole) in MODEL_MAPPING else _named_class(whole)
    if kind is None:
        raise ConfigError(
            f"{root / CONFIG_FILE}: architectures must name the model's class in transformers, such as "
            f"['BlipVisionModel'], since AutoModel opens no {whole.model_type}; got {whole.architectures!r}"
        )
    loaded = _from_pretrained(kind, root, whole)
    for path, module in loaded.model.named_modules():
        takes = inspect.signature(module.forward).parameters
        own: Any = getattr(module, "config", None)
        if type(own) is type(vision) and "pixel_values" in takes:
            _refuse_strange(root, loaded, whole, path.partition(".")[0])
            return loaded.part(path)
    raise ConfigError(
        f"{root / CONFIG_FILE}: the model must have a vision model of its own, which takes pixel_values; got "
        f"{type(loaded.model).__name__}, in which no {vision.model_type} is one: take a checkpoint of the tower alone"
    )


def _from_pretrained(kind: Any, root: Path, config: Any) -> _Loaded:
    # float32, so that torch's default dtype, which other threads use, stays what it is.
    options = {"dtype": torch.float32, "trust_remote_code": False, "local_files_only": True, "use_safetensors": True}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with _one_at_a_time, _in_silence(), torch.random.fork_rng(devices=()):
        try:
            model, found = kind.from_pretrained(root, config=config, **options)
        except Exception as error:
            _refuse_config(kind, root, config)
            raise CheckpointError(
                f"the weights in {root} must be those of a {config.model_type} that transformers can load; it fails "
                f"with {first_line(error)}"
            ) from error
    mismatched = {name: (list(expected), list(given)) for name, given, expected in found["mismatched_keys"]}
    return _Loaded(model, set(found["missing_keys"]), mismatched, set(found["unexpected_keys"]))


def _refuse_config(kind: Any, root: Path, config: Any) -> None:
    """Raise, if not the weights but ``config`` is what transformers fails with."""
    build = getattr(kind, "from_config", None) or kind
    try:
        with torch.device("meta"):
            build(config)
    except Exception as error:
        path = root / CONFIG_FILE
        wrong = error.args[0] if isinstance(error, KeyError) and error.args else None
        parts: list[Any] = [config, *(getattr(config, name, None) for name in ("vision_config", "text_config"))]
        for part in parts if wrong is not None else ():
            for key, value in {} if part is None else part.to_dict().items():
                if value == wrong:
                    raise ConfigError(
                        f"{path}: {key} must be one that transformers knows for {part.model_type}; got {value!r}"
                    ) from error
        raise ConfigError(
            f"{path} must describe a {config.model_type} that transformers can build; it fails with {first_line(error)}"
        ) from error


def _refuse_whole_numbers(weights: WeightFiles, model: nn.Module) -> None:
    """Refuse parameters that are stored as a dtype which only buffers may have: transformers takes their numbers.

    The last part of a name tells a parameter from a buffer; transformers changes only the parts before it.
    """
    parameters = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    for stored in weights.tensors.values():
        if stored.dtype not in FLOATS and stored.key.rpartition(".")[2] in parameters:
            raise CheckpointError(
                f"{stored.file}: tensor {stored.key} must be one of {', '.join(FLOATS)}; found {stored.dtype}"
            )


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


def _refuse_strange(root: Path, loaded: _Loaded, whole: Any, child: str = "") -> None:
    """Refuse tensors that the architecture which config.json names does not have either, neither by their full name
    nor in a part outside of the vision model, such as a text tower or a classifier.

    Args:
        root, whole: the directory and its configuration.
        loaded: the vision model, or what it is in.
        child: which child of ``loaded`` the vision model is, or is in; empty if it is ``loaded`` itself.
    """
    names, model, architecture = loaded.unexpected, loaded.model, _named_class(whole)
    if names and architecture is not None and not issubclass(architecture, type(model)):
        with torch.device("meta"):
            full = architecture(whole)
        others = {
            name
            for name, part in (*full.named_children(), *full.named_parameters(recurse=False))
            if not isinstance(part, type(model)) and not hasattr(model, name)
        }
        if child:
            others |= {name for name, _ in model.named_children() if name != child}
        known = full.state_dict().keys()
        names = {name for name in names if name not in known and name.split(".")[0] not in others}
    if names:
        raise mismatch(str(root), [f"{name} is unexpected" for name in sorted(names)])


def _named_class(whole: Any) -> Any:
    """transformers' class that config.json names, if it is one of a model of that configuration."""
    import transformers

    named: Any = getattr(transformers, str((whole.architectures or [None])[0]), None)
    fits = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    return named if fits and named.config_class is type(whole) else None
