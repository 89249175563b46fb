"""TransformersConfig: a directory with a vision model of transformers that is not a DINOv3, such as DINOv2 or SigLIP2.

Its config.json leaves out what equals the defaults of its class, which are transformers' own: that is imported when
such a directory is read, and not before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from dinov3_ray.config.architecture import TransformersArchitecture
from dinov3_ray.config.config import DinoV3Config, ModelConfig
from dinov3_ray.config.directory import PROCESSOR_FILE
from dinov3_ray.config.files import CONFIG_FILE, PREPROCESSOR_FILE, PreprocessorFile, read_json
from dinov3_ray.config.hub import ModelPlace, resolve
from dinov3_ray.config.preprocessing import Preprocessing, Resample, Size
from dinov3_ray.errors import ConfigError
from dinov3_ray.validation import check, rule, whole_numbers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["TransformersConfig", "open_config", "read_transformers_config"]

# What says nothing of what is computed from an image: it may differ between two copies of one model.
_WITHOUT_EFFECT = re.compile(
    r"_|transformers_version$|dtype$|torch_dtype$|architectures$|auto_map$|id2label$|label2id$|problem_type$|return_dict$|"
    r"output_|initializer_|chunk_size_feed_forward$|is_encoder_decoder$|use_cache$|model_type$|.*dropout|drop_path_rate$"
)


class TransformersConfig(ModelConfig):
    """A directory with a vision model of transformers, and the options under which to run it; see
    :class:`~dinov3_ray.config.config.ModelConfig`.

    The model is any that transformers can load and whose last hidden state holds the patches of an image as
    tokens, or the vision tower in a larger model. Code that comes with a model is never run.
    """

    architecture: TransformersArchitecture

    @staticmethod
    def _read(place: ModelPlace) -> tuple[TransformersArchitecture, Preprocessing]:
        root = place.directory
        vision = read_transformers_config(root)[1]
        if vision.model_type.startswith("dinov3"):
            raise ConfigError(
                f"{root / CONFIG_FILE}: model_type must be of another model than {vision.model_type!r}, which "
                "DinoV3Config(root) and DinoV3Teacher(root) take"
            )
        return _architecture(vision, root / CONFIG_FILE), _read_image_processor(root, vision.model_type)


def open_config(root: ModelConfig | str | PathLike[str], *, revision: str | None = None, **options: Any) -> ModelConfig:
    """The configuration of the model ``root``: a DinoV3Config where config.json says that it is a DINOv3, else a
    TransformersConfig.

    Args:
        root: the model's directory or hub id; or a configuration, to which ``options`` are applied.
        revision: with a hub id; see :class:`~dinov3_ray.config.config.ModelConfig`.
        options: those of :class:`~dinov3_ray.config.config.ModelOptions`.

    Raises:
        ConfigError, CheckpointError: see :class:`~dinov3_ray.config.config.ModelConfig`.
    """
    if isinstance(root, ModelConfig):
        return type(root).of(root, **options)
    place = resolve(root, revision)
    path = place.directory / CONFIG_FILE
    # Where there is no file, DinoV3Config says so.
    named = read_json(path, remedy="").get("model_type") if path.is_file() else None
    other = isinstance(named, str) and not named.startswith("dinov3")
    return TransformersConfig(place, **options) if other else DinoV3Config(place, **options)


def read_transformers_config(root: Path) -> tuple[PretrainedConfig, PretrainedConfig]:
    """The whole configuration in ``root``, and that of the vision model in it, which may be the same.

    Raises:
        ConfigError: config.json is missing or wrong, or transformers cannot read it without code of the model's own.
    """
    from transformers import CONFIG_MAPPING, AutoConfig  # here, since it takes seconds

    path = root / CONFIG_FILE
    values = read_json(path, remedy="root must be a model directory in transformers' layout")
    name = values.get("model_type")
    if name not in CONFIG_MAPPING:
        own = " (its auto_map names code of the model's own, which is never run here)" if "auto_map" in values else ""
        raise ConfigError(f"{path}: model_type must be one that the installed transformers knows; got {name!r}{own}")
    try:
        whole = AutoConfig.from_pretrained(root, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ConfigError(f"{path} cannot be read by transformers: {type(error).__name__}: {error}") from error
    return whole, getattr(whole, "vision_config", None) or whole


def _architecture(vision: PretrainedConfig, path: Path) -> TransformersArchitecture:
    wanted = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")
    plain = _plain(vision)  # to which config.json adds any key that it has, whether the model has such a thing or not
    missing = [name for name in wanted if not hasattr(plain, name) or getattr(vision, name, None) is None]
    if missing:
        hint = (
            "; siglip2 is NaFlex: take a checkpoint of a fixed size" if vision.model_type.startswith("siglip2") else ""
        )
        raise ConfigError(
            f"{path}: it must be a vision model whose tokens are the patches of the image; got model_type "
            f"{vision.model_type!r}, whose configuration has no "
            f"{', '.join(missing)}{hint}"
        )
    if getattr(vision, "num_channels", 3) != 3:
        raise ConfigError(f"{path}: num_channels must be 3 (RGB); got {vision.num_channels!r}")
    patch = _pair_of("patch_size", vision.patch_size, path)
    if patch[0] != patch[1]:
        raise ConfigError(f"{path}: patch_size must be one integer, or two equal ones; got {vision.patch_size!r}")
    return TransformersArchitecture(
        model_type=vision.model_type,
        hidden_size=_count("hidden_size", vision.hidden_size, path),
        num_layers=_count("num_hidden_layers", vision.num_hidden_layers, path),
        patch_size=patch[0],
        num_register_tokens=getattr(vision, "num_register_tokens", 0) or 0,
        native_size=_pair_of("image_size", vision.image_size, path),
        settings=json.dumps(_settings(vision), sort_keys=True, default=str),
    )


def _count(name: str, value: object, path: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{path}: {name} must be an integer >= 1; got {value!r}")
    return value


def _pair_of(name: str, value: object, path: Path) -> Size:
    if isinstance(value, dict):
        value = [value.get("height"), value.get("width")]
    sides = list(value) if isinstance(value, Sequence) and len(value) == 2 else [value, value]
    return _count(name, sides[0], path), _count(name, sides[1], path)


def _settings(vision: PretrainedConfig) -> dict[str, object]:
    """What differs from the defaults of the class: the same however much of it config.json spells out."""
    plain = _plain(vision)
    defaults, absent = {} if plain is vision else plain.to_dict(), object()
    return {
        name: value
        for name, value in vision.to_dict().items()
        if not _WITHOUT_EFFECT.match(name) and defaults.get(name, absent) != value
    }


def _plain(vision: PretrainedConfig) -> PretrainedConfig:
    """A configuration of the same class with its defaults; ``vision`` itself if the class has none."""
    try:
        return type(vision)()
    except (TypeError, ValueError):
        return vision


# What transformers' image processors have where the file says nothing: class attributes there. Those that are not named
# here have an arithmetic of their own.
_DEFAULTS: dict[str, dict[str, object]] = {
    "Beit": {"resample": 3},
    "Bit": {"resample": 3, "do_center_crop": True, "default_to_square": False},
    "Blip": {"resample": 3},
    "CLIP": {"resample": 3, "do_center_crop": True, "default_to_square": False},
    "ChineseCLIP": {"resample": 3, "do_center_crop": True, "default_to_square": False},
    "DeiT": {"resample": 3, "do_center_crop": True},
    "OwlViT": {"resample": 3},
    "Siglip": {"resample": 3, "default_to_square": False},
    "ViT": {"resample": 2},
}
_PROCESSOR_OF = {  # by the beginning of model_type; the first that fits
    "beit": "Beit",
    "blip": "Blip",
    "chinese_clip": "ChineseCLIP",
    "clipseg": "ViT",
    "clip": "CLIP",
    "deit": "DeiT",
    "dinov2": "Bit",
    "metaclip": "CLIP",
    "siglip": "Siglip",
    "vit": "ViT",
}
_RESAMPLES: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}


class ImageProcessorFile(PreprocessorFile):
    """preprocessor_config.json of a model other than DINOv3, by transformers' general image processor.

    Keys that the file leaves out have the defaults of the image processor that it names, except for ``size``,
    ``crop_size``, ``image_mean`` and ``image_std``.
    """

    image_processor_type: Annotated[
        Literal["Beit", "Bit", "Blip", "CLIP", "ChineseCLIP", "DeiT", "OwlViT", "Siglip", "ViT"],
        rule(
            "must be one whose arithmetic is transformers' general one "
            f"({', '.join(f'{name}ImageProcessor' for name in _DEFAULTS)}, or the same as FeatureExtractor); if the "
            "model's own does nothing else than resize, crop and normalize, name one of these and spell out all keys"
        ),
    ]
    resample: Annotated[Literal[2, 3], whole_numbers, rule("must be 2 (bilinear) or 3 (bicubic)")] = Field()  # type: ignore[assignment]

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: dict[str, object]) -> dict[str, object]:
        name = values.get("image_processor_type")
        return _DEFAULTS.get(name, {}) | values if isinstance(name, str) else values

    @field_validator("patch_size", "num_register_tokens")
    @classmethod
    def _check_repeated(cls, value: int | None, info: ValidationInfo) -> int | None:  # noqa: ARG003 - pydantic's signature
        return value

    def preprocessing(self) -> Preprocessing:
        return replace(super().preprocessing(), resample=_RESAMPLES[self.resample], rescales_first=False)


def _read_image_processor(root: Path, model_type: str) -> Preprocessing:
    """The rule that preprocessor_config.json states, or the image processor in processor_config.json.

    Raises:
        ConfigError: the file is missing or wrong; names all its problems.
    """
    path, both = root / PREPROCESSOR_FILE, root / PROCESSOR_FILE
    nested = read_json(both, remedy="").get("image_processor") if both.is_file() and not path.is_file() else None
    if isinstance(nested, dict):
        path, values = both, nested
    else:
        values = read_json(path, remedy="copy it from the model's release; its mean, std and size cannot be guessed")
    named = values.get("image_processor_type") or values.get("feature_extractor_type")
    if named is None:
        named = next((name for prefix, name in _PROCESSOR_OF.items() if model_type.startswith(prefix)), None)
    if isinstance(named, str):
        short = re.sub(r"(FeatureExtractor|ImageProcessor)(Fast|Pil)?$", "", named)
        named = short if short in _DEFAULTS else named
    return check(ImageProcessorFile, values | {"image_processor_type": named}, path=path).preprocessing()
