"""config.json and preprocessor_config.json as pydantic models: what each key may hold, and what follows from it.

Keys that no model here names are ignored: transformers writes many. null means "not set", as it does there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from dinov3_ray.config.architecture import (
    Architecture,
    ConvNextArchitecture,
    Family,
    Shapes,
    ViTArchitecture,
    heads_for,
    infer_convnext,
    infer_vit,
)
from dinov3_ray.config.directory import CONFIG_FILE, PREPROCESSOR_FILE, convert_hint
from dinov3_ray.config.filetype import file_type
from dinov3_ray.config.preprocessing import Preprocessing, Size
from dinov3_ray.config.timm import is_timm, read_timm, timm_architecture
from dinov3_ray.errors import CheckpointError, ConfigError
from dinov3_ray.validation import broken_rule, check, from_list, rule, whole_numbers

__all__ = [
    "CONFIG_FILE",
    "PREPROCESSOR_FILE",
    "ConvNextFile",
    "PositiveInt",
    "PreprocessorFile",
    "ViTFile",
    "read_architecture",
    "read_json",
    "read_preprocessing",
]

PositiveInt = Annotated[int, Field(strict=True, ge=1)]
_Count = Annotated[PositiveInt, whole_numbers, rule("must be an integer >= 1")]
_CountOrZero = Annotated[int, Field(strict=True, ge=0), whole_numbers, rule("must be an integer >= 0")]
_Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), rule("must be a positive finite number")]
_Flag = Annotated[bool, Field(strict=True), rule("must be true or false")]
_Text = Annotated[str, Field(strict=True, min_length=1), rule("must be a non-empty string")]
_Counts = Annotated[
    tuple[PositiveInt, ...], Field(strict=True, min_length=1), from_list, rule("must be a list of integers >= 1")
]


def _first_of_two(value: object) -> object:
    if isinstance(value, list):
        if len(value) != 2 or value[0] != value[1]:
            raise broken_rule("must be one integer, or two equal ones")
        return value[0]
    return value


#: transformers 5 writes a pair of equal integers.
_PatchSize = Annotated[_Count, BeforeValidator(_first_of_two)]


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: dict[str, object]) -> dict[str, object]:
        return {key: value for key, value in values.items() if value is not None}


class _ConfigFile(_File):
    model_type: str = ""
    num_channels: Annotated[Literal[3], whole_numbers, rule("must be 3 (RGB)")] = 3


class ViTFile(_ConfigFile):
    """config.json of a ViT, with every key that decides the tensors' shapes; attributes are a ViTArchitecture's."""

    hidden_size: _Count
    num_layers: _Count = Field(alias="num_hidden_layers")
    num_heads: _Count | None = Field(None, alias="num_attention_heads", validate_default=True)
    intermediate_size: _Count
    gated_mlp: _Flag = Field(alias="use_gated_mlp")
    num_register_tokens: _CountOrZero | None = None
    num_registers: _CountOrZero | None = None
    patch_size: _PatchSize
    hidden_act: _Text | None = Field(None, validate_default=True)
    layer_norm_eps: _Positive = 1e-5
    rope_theta: _Positive = 100.0
    query_bias: _Flag
    key_bias: _Flag
    value_bias: _Flag
    proj_bias: _Flag
    mlp_bias: _Flag

    @field_validator("num_heads")
    @classmethod
    def _check_heads(cls, heads: int | None, info: ValidationInfo) -> int | None:
        hidden_size = info.data.get("hidden_size")
        if hidden_size is None:  # it is wrong itself
            return heads
        heads = heads or heads_for(hidden_size)
        if not heads:
            raise broken_rule(f"must be given, since no published model has hidden_size {hidden_size}")
        if hidden_size % (4 * heads):
            rule = f"must divide hidden_size ({hidden_size}) into heads whose size is a multiple of 4 (for RoPE)"
            raise broken_rule(rule)
        return heads

    @field_validator("num_registers")
    @classmethod
    def _check_registers(cls, registers: int | None, info: ValidationInfo) -> int | None:
        tokens = info.data.get("num_register_tokens")
        if None not in (tokens, registers) and registers != tokens:
            raise broken_rule(f"must equal num_register_tokens ({tokens})")
        return registers

    @field_validator("hidden_act")
    @classmethod
    def _choose_activation(cls, name: str | None, info: ValidationInfo) -> str:
        # A file that names its model_type was written by transformers, whose default is gelu, gated or not.
        return name or ("silu" if info.data.get("gated_mlp") and not info.data.get("model_type") else "gelu")

    def architecture(self) -> ViTArchitecture:
        values = self.model_dump(exclude={"model_type", "num_channels", "num_registers"})
        if self.num_register_tokens is None:
            values["num_register_tokens"] = self.num_registers
        return ViTArchitecture(**values)


class ConvNextFile(_ConfigFile):
    """config.json of a ConvNeXt; attributes are a ConvNextArchitecture's."""

    hidden_sizes: _Counts
    depths: _Counts
    hidden_act: _Text = "gelu"
    layer_norm_eps: _Positive = 1e-6

    @field_validator("depths")
    @classmethod
    def _check_depths(cls, depths: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        widths = info.data.get("hidden_sizes", depths)
        if len(depths) != len(widths):
            raise broken_rule(f"must have one entry for each of hidden_sizes {list(widths)}")
        return depths

    def architecture(self) -> ConvNextArchitecture:
        return ConvNextArchitecture(**self.model_dump(exclude={"model_type", "num_channels"}))


def read_architecture(root: Path, shapes: Callable[[], Shapes]) -> Architecture:
    """What config.json says; what it leaves out (timm's: all numbers) is inferred from the shapes of the weights.

    Args:
        root: the model directory.
        shapes: gives those of the weights, by transformers' names; called only where they are needed.

    Raises:
        ConfigError: the file is missing or wrong; names all its problems.
        CheckpointError: keys are missing, and the weights that would complete it are missing or damaged.
    """
    path = root / CONFIG_FILE
    layout = "root must be a model directory in transformers' layout"
    values = read_json(path, remedy="" if path.exists() else convert_hint(root) or layout)
    if is_timm(values):
        return timm_architecture(root, read_timm(values, path), shapes)
    family = _family_of(values, path)
    model: type[ViTFile | ConvNextFile] = ViTFile if family == "vit" else ConvNextFile
    required = {field.alias or name: name for name, field in model.model_fields.items() if field.is_required()}
    if family == "vit" and values.get("num_registers") is None:
        required["num_register_tokens"] = "num_register_tokens"
    missing = [key for key in required if values.get(key) is None]
    if missing:
        inferred = _infer(root, shapes, family, missing)
        values = values | {key: getattr(inferred, required[key]) for key in missing}
    return check(model, values, path=path).architecture()


def _family_of(values: dict[str, Any], path: Path) -> Family:
    model_type = values.get("model_type")
    if model_type is None:
        names = values.get("architectures")
        named = any("convnext" in str(name).lower() for name in names) if isinstance(names, list) else False
        convnext = named or any(values.get(key) is not None for key in ("hidden_sizes", "depths"))
        return "convnext" if convnext else "vit"
    families: dict[str, Family] = {"dinov3_vit": "vit", "dinov3_convnext": "convnext"}
    if not isinstance(model_type, str) or model_type not in families:
        # Alone, since the rules for the other keys are the family's.
        raise ConfigError(
            f"{path}: model_type must be dinov3_vit or dinov3_convnext; got {model_type!r} (for other vision models of "
            "transformers use TransformersTeacher; open_teacher and --root find out which of the two it is)"
        )
    return families[model_type]


def _infer(root: Path, shapes: Callable[[], Shapes], family: Family, missing: list[str]) -> Architecture:
    """The architecture by the weights' headers, for keys ``missing`` from config.json."""
    what = f"{root / CONFIG_FILE} lacks {', '.join(missing)}"
    try:
        found = shapes()
    except CheckpointError as error:
        raise CheckpointError(f"{what}, and the weights cannot tell: {error}") from error
    inferred = infer_convnext(found) if family == "convnext" else infer_vit(found)
    if inferred is None:
        raise ConfigError(f"{what}, and the weights in {root} are not those of a DINOv3 {family}")
    return inferred


class _HeightAndWidth(BaseModel):
    model_config = ConfigDict(extra="forbid")
    height: PositiveInt
    width: PositiveInt


class _ShortestEdge(BaseModel):
    model_config = ConfigDict(extra="forbid")
    shortest_edge: PositiveInt


_without_nulls = BeforeValidator(
    lambda value: {key: side for key, side in value.items() if side is not None} if isinstance(value, dict) else value
)
_Size = Annotated[
    PositiveInt | _HeightAndWidth | _ShortestEdge,
    _without_nulls,
    rule("must be an integer, or an object of {height, width} or {shortest_edge}, all >= 1"),
]
_CropSize = Annotated[
    PositiveInt | _HeightAndWidth,
    _without_nulls,
    rule("must be an integer, or an object of {height, width}, all >= 1"),
]
_Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Channels = Annotated[
    tuple[_Finite, _Finite, _Finite],
    Field(strict=True),
    from_list,
    rule("must be three finite numbers, one per channel"),
]


class PreprocessorFile(_File):
    """preprocessor_config.json.

    Keys that the file leaves out have transformers' defaults (bilinear, factor 1/255, all steps but the crop on),
    except for ``size``, ``image_mean`` and ``image_std``: a guess there would silently spoil every feature.
    """

    resample: Annotated[Literal[2], whole_numbers, rule("must be 2 (bilinear)")] = 2
    do_pad: _Flag = False
    do_resize: _Flag = True
    default_to_square: _Flag = True
    do_center_crop: _Flag = False
    size: _Size | None = Field(None, validate_default=True)
    crop_size: _CropSize | None = Field(None, validate_default=True)
    do_rescale: _Flag = True
    rescale_factor: _Positive = 1 / 255
    do_normalize: _Flag = True
    image_mean: _Channels = Field(None, validate_default=True)
    image_std: _Channels = Field(None, validate_default=True)
    # Some writers repeat what config.json says; where they differ, one of the files belongs to another model.
    patch_size: _PatchSize | None = None
    num_register_tokens: _CountOrZero | None = None

    @model_validator(mode="before")
    @classmethod
    def _switch_off(cls, values: dict[str, object]) -> dict[str, object]:
        """What a step that is off would need is not looked at."""
        off: dict[str, object] = {}
        if values.get("do_rescale") is False:
            off |= {"rescale_factor": 1.0}
        if values.get("do_normalize") is False:
            off |= {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
        if values.get("do_center_crop") is not True:
            off |= {"crop_size": None}
        return values | off

    @field_validator("do_pad")
    @classmethod
    def _refuse_padding(cls, pad: bool) -> bool:
        if pad:
            raise broken_rule("must be false: padding is not supported")
        return pad

    @field_validator("size")
    @classmethod
    def _settle_size(cls, size: Any, info: ValidationInfo) -> Size | _ShortestEdge | None:
        if size is None and info.data.get("do_resize"):
            raise broken_rule("must be given")
        if size is None and not info.data.get("do_center_crop"):
            raise broken_rule("must be given, as the nominal input size, even where do_resize is false")
        if isinstance(size, int) and not info.data.get("default_to_square", True):
            return _ShortestEdge(shortest_edge=size)
        return size if isinstance(size, _ShortestEdge) else _pair(size)

    @field_validator("crop_size")
    @classmethod
    def _settle_crop(cls, crop: Any, info: ValidationInfo) -> Size | None:
        if crop is None and info.data.get("do_center_crop"):
            raise broken_rule("must be given where do_center_crop is true")
        size, resized = _pair(crop), info.data.get("size") if info.data.get("do_resize") else None
        bound = _nominal(resized)
        if size and bound and (size[0] > bound[0] or size[1] > bound[1]):
            raise broken_rule(f"must fit into the resized image {list(bound)}")
        return size

    @field_validator("image_std")
    @classmethod
    def _check_std(cls, std: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(std) <= 0:
            raise broken_rule("must be positive: images are divided by it")
        return std

    @field_validator("patch_size", "num_register_tokens")
    @classmethod
    def _check_repeated(cls, value: int | None, info: ValidationInfo) -> int | None:
        expected = getattr(info.context, info.field_name or "", value)
        if value != expected:
            raise broken_rule(f"must equal {CONFIG_FILE}'s ({expected})")
        return value

    def preprocessing(self) -> Preprocessing:
        size, crop_size = cast("Size | _ShortestEdge | None", self.size), cast("Size | None", self.crop_size)
        image_size = crop_size or _nominal(size)
        assert image_size is not None
        if not self.do_resize:
            size = None
        return Preprocessing(
            size=None if isinstance(size, _ShortestEdge) else size,
            shortest_edge=size.shortest_edge if isinstance(size, _ShortestEdge) else None,
            crop_size=crop_size,
            rescale_factor=self.rescale_factor,
            mean=self.image_mean,
            std=self.image_std,
            image_size=image_size,
        )


def _pair(value: int | _HeightAndWidth | None) -> Size | None:
    if isinstance(value, _HeightAndWidth):
        return value.height, value.width
    return None if value is None else (value, value)


def _nominal(size: Size | _ShortestEdge | None) -> Size | None:
    """The size of a square image after the resize."""
    return (size.shortest_edge, size.shortest_edge) if isinstance(size, _ShortestEdge) else size


def read_preprocessing(root: Path, architecture: Architecture) -> Preprocessing:
    """The rule that preprocessor_config.json states, or else timm's config.json.

    Raises:
        ConfigError: the file is missing or wrong, or contradicts ``architecture``; names all its problems.
    """
    path = root / PREPROCESSOR_FILE
    if not path.exists() and is_timm(values := read_json(root / CONFIG_FILE, remedy="")):
        return read_timm(values, root / CONFIG_FILE).preprocessing(None, architecture.patch_size)
    remedy = "copy it from the model's release; its mean, std and size cannot be guessed"
    return check(PreprocessorFile, read_json(path, remedy=remedy), path=path, context=architecture).preprocessing()


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: the file is missing (then with ``remedy``), is another thing, or holds another value.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        found = file_type(path)
        what = f"; it is {found}" if found.substitute else ""
        raise ConfigError(f"{path} is not valid JSON: {error}{what}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object; got a {type(values).__name__}")
    return values
