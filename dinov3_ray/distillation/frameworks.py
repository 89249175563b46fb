"""Students of timm, transformers, Ultralytics and the user's own code: made and written as each does."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from dinov3_ray.distillation.student_backbone import IMAGENET, PLAIN, Statistics, StudentBackbone
from dinov3_ray.errors import ConfigError

__all__ = [
    "OpenedStudent",
    "is_installed",
    "near",
    "open_callable",
    "open_timm",
    "open_transformers",
    "open_ultralytics",
]

log = logging.getLogger("dinov3_ray")

Size = tuple[int, int]

_MOST_STAGES = 6  # of a hierarchy; more are the blocks of a plain transformer, whose maps are all of one resolution


@dataclass(frozen=True, slots=True, eq=False)
class OpenedStudent:
    """A student, and the way to write it.

    Attributes:
        backbone: what is trained.
        framework: timm, transformers, Ultralytics or torch.
        write: puts the weights into a folder that is there and empty, in the framework's own format.
        usage: how they are loaded, as a line of Python; ``{folder}`` stands for the folder.
    """

    backbone: StudentBackbone
    framework: str
    write: Callable[[Path], None]
    usage: str


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def near(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Names like ``name``, each behind ``prefix``, as the end of a message."""
    found = difflib.get_close_matches(name, list(known), n=5, cutoff=0.5)
    return f" Near it: {', '.join(prefix + each for each in found)}." if found else ""


def _imported(package: str, student: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"student {student!r} needs {package}, which cannot be imported here: {error} (pip install {package})"
        ) from error


def open_timm(name: str, *, pretrained: bool, statistics: Statistics | None, size: Size) -> OpenedStudent:
    """A model of timm's, with the classifier that it comes with, which distillation leaves as it is.

    Raises:
        ConfigError: timm is not there, does not know the name, or gives no maps of this model.
    """
    timm = _imported("timm", name)
    if not timm.is_model(name):
        raise ConfigError(
            f"student must be a model of timm {timm.__version__}; it has no {name!r}.{near(name, timm.list_models())}"
        )
    net = timm.create_model(name, pretrained=pretrained)
    run: Callable[[Tensor], Any] = net.forward_features
    sized = ""
    if hasattr(net, "forward_intermediates"):

        def run(pixels_B3HW: Tensor) -> Any:
            return net.forward_intermediates(pixels_B3HW, intermediates_only=True, output_fmt="NCHW", norm=True)

    own = net.pretrained_cfg.get("input_size", (3, *size))[-2:]
    if hasattr(net, "set_input_size") and tuple(own) != size:
        net.set_input_size(img_size=size)
        sized = f", img_size={size}"
    statistics = statistics or (tuple(net.pretrained_cfg["mean"]), tuple(net.pretrained_cfg["std"]))
    backbone = StudentBackbone(net, run, statistics=statistics, size=size)

    def write(folder: Path) -> None:
        state = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    usage = f'timm.create_model("{name}", checkpoint_path="{{folder}}/model.safetensors"{sized})'
    return OpenedStudent(backbone, "timm", write, usage)


def open_transformers(name: str, *, pretrained: bool, statistics: Statistics | None, size: Size) -> OpenedStudent:
    """A vision model of transformers: a backbone where it has one, with all stages of a hierarchy, else its base model.

    Args:
        name: a directory with config.json, a hub id, or a model type such as ``resnet``, with its default sizes.

    Raises:
        ConfigError: transformers does not know it, or ``pretrained`` is asked of a type.
    """
    import transformers  # here, since it takes seconds

    folder = Path(name)
    if folder.name == "config.json":
        folder = folder.parent
    if (folder / "config.json").is_file() or "/" in name:
        place = str(folder) if folder.exists() else name
        config = _read(transformers.AutoConfig, place, "student")
    elif name in transformers.CONFIG_MAPPING:
        if pretrained:
            raise ConfigError(
                f"pretrained needs weights, which the type {name!r} has none of (name a directory or hub id)"
            )
        place, config = None, transformers.CONFIG_MAPPING[name]()
    else:
        raise ConfigError(
            f"student must be a directory with config.json, a hub id or a model type of transformers; got {name!r}."
            f"{near(name, transformers.CONFIG_MAPPING)}"
        )
    has_backbone = type(config) in transformers.AutoBackbone._model_mapping
    stages = getattr(config, "stage_names", None) or []
    if has_backbone and len(getattr(config, "out_features", None) or []) == 1 and len(stages) <= _MOST_STAGES:
        config.out_features = stages[1:]
    auto = transformers.AutoBackbone if has_backbone else transformers.AutoModel
    # The class itself reads directories: AutoBackbone (of transformers 5.23) takes them for models of timm.
    kind = auto._model_mapping[type(config)] if has_backbone else auto
    net = _read(kind, place, "pretrained", config=config) if pretrained else auto.from_config(config)

    def run(pixels_B3HW: Tensor) -> Any:
        if has_backbone:
            return net(pixels_B3HW)
        output = net(pixels_B3HW, output_hidden_states=True)
        last = output.last_hidden_state
        return _patches(last, pixels_B3HW, config) if last.ndim == 3 else [*(output.hidden_states or ()), last]

    if statistics is None:
        statistics = IMAGENET
        described = None if place is None else Path(place) / "preprocessor_config.json"
        if described is not None and described.is_file():
            values = json.loads(described.read_text(encoding="utf-8"))
            if {"image_mean", "image_std"} <= values.keys():
                statistics = tuple(values["image_mean"]), tuple(values["image_std"])
    backbone = StudentBackbone(net, run, statistics=statistics, size=size)

    def write(folder: Path) -> None:
        net.save_pretrained(folder)

    return OpenedStudent(backbone, "transformers", write, f'{type(net).__name__}.from_pretrained("{{folder}}")')


def _read(auto: Any, place: str | None, parameter: str, **options: Any) -> Any:
    try:
        return auto.from_pretrained(place, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises whatever it stumbles over
        raise ConfigError(
            f"{parameter}: transformers cannot read {place!r}: {type(error).__name__}: {error}"
        ) from error


def _patches(tokens_BNC: Tensor, pixels_B3HW: Tensor, config: Any) -> Tensor | None:
    """The patch tokens of a plain transformer as a map; what stands before them is left out."""
    patch = getattr(config, "patch_size", None)
    if not isinstance(patch, int):
        return None
    height, width = (side // patch for side in pixels_B3HW.shape[-2:])
    if tokens_BNC.shape[1] < height * width:
        return None
    patches_BNC = tokens_BNC[:, tokens_BNC.shape[1] - height * width :]
    return patches_BNC.mT.reshape(len(patches_BNC), -1, height, width)


def open_ultralytics(name: str, *, pretrained: bool, statistics: Statistics | None, size: Size) -> OpenedStudent:
    """The backbone of a model that Ultralytics describes in a YAML file, or has in a ``.pt``; the rest stays as it is.

    Raises:
        ConfigError: Ultralytics is not there, or does not know it.
    """
    ultralytics = _imported("ultralytics", name)
    if pretrained and not name.endswith(".pt"):
        raise ConfigError(f"pretrained needs weights; name the .pt file instead of {name!r}")
    try:
        net = ultralytics.YOLO(name).model.float()
    except Exception as error:  # Ultralytics raises whatever it stumbles over
        raise ConfigError(
            f"student must be a model of Ultralytics {ultralytics.__version__}; {name!r} cannot be opened: {error}"
        ) from error
    layers = list(net.model[: len(net.yaml["backbone"])])

    def run(pixels_B3HW: Tensor) -> list[Any]:
        # As the model's own forward pass, up to the last layer of the backbone.
        outputs: list[Any] = []
        for layer in layers:
            before = [pixels_B3HW, *outputs]
            sources = layer.f if isinstance(layer.f, list) else [layer.f]
            taken = [before[-1] if source == -1 else before[source + 1] for source in sources]
            outputs.append(layer(taken if isinstance(layer.f, list) else taken[0]))
        return outputs

    backbone = StudentBackbone(net, run, statistics=statistics or PLAIN, size=size)

    def write(folder: Path) -> None:
        # The keys that Ultralytics' own checkpoints have; its own save() would round the weights to half precision.
        saved = {"epoch": -1, "best_fitness": None, "model": deepcopy(net).cpu(), "ema": None, "optimizer": None}
        torch.save({**saved, "train_args": {}, "version": ultralytics.__version__}, folder / "model.pt")

    return OpenedStudent(backbone, "Ultralytics", write, 'YOLO("{folder}/model.pt")')


def _reason(error: Exception) -> str:
    """The kind of error, and the first line of its message."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def open_callable(name: str, *, pretrained: bool, statistics: Statistics | None, size: Size) -> OpenedStudent:
    """What the user's ``module:function`` returns, called without arguments; modules of the working directory count.

    Raises:
        ConfigError: it cannot be imported or called, or returns no module.
    """
    if pretrained:
        raise ConfigError(f"pretrained is for students that are named; {name!r} loads its own weights")
    place, _, attribute = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(place)
    except Exception as error:  # the module's own code runs
        raise ConfigError(
            f"student must be module:function of a module that can be imported; {place!r} cannot: {_reason(error)}"
        ) from error
    make = getattr(module, attribute, None)
    if not callable(make):
        known = [each for each in vars(module) if not each.startswith("_")]
        raise ConfigError(f"student must name a function of {place}; it has no {attribute!r}.{near(attribute, known)}")
    try:
        net = make()
    except Exception as error:
        raise ConfigError(
            f"student must name a function that can be called without arguments; {name} raised {_reason(error)}"
        ) from error
    if not isinstance(net, nn.Module):
        raise ConfigError(
            f"student must name a function that returns an nn.Module; {name} returned {type(net).__name__}"
        )
    backbone = StudentBackbone(net, statistics=statistics or IMAGENET, size=size)

    def write(folder: Path) -> None:
        torch.save({key: value.detach().cpu() for key, value in net.state_dict().items()}, folder / "model.pt")
        save_model(net, str(folder / "model.safetensors"))

    usage = f'student = {attribute}(); student.load_state_dict(torch.load("{{folder}}/model.pt"))'
    return OpenedStudent(backbone, "torch", write, usage)
