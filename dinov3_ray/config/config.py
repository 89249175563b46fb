"""DinoV3Config: a model directory in transformers' layout, read and checked, and the options to run it with."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, StrictBool

from dinov3_ray.config.architecture import Architecture, Family
from dinov3_ray.config.directory import CONFIG_FILE, convert_command
from dinov3_ray.config.files import PositiveInt, read_architecture, read_preprocessing
from dinov3_ray.config.preprocessing import Preprocessing, Size
from dinov3_ray.errors import ConfigError
from dinov3_ray.validation import CheckedModel, check, from_list, rule

__all__ = ["CompileChoice", "CompileMode", "ComputeDtype", "DinoV3Config", "ModelOptions"]

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16", "float8"]
"""The dtype that the model computes in; ``auto`` is bfloat16 where the device has it in hardware, else float32.
``float8`` is bfloat16 with the products of linear layers in float8 (see :mod:`dinov3_ray.model.float8`)."""

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
"""A mode of ``torch.compile``. On a CUDA device, ``reduce-overhead`` and ``max-autotune`` record CUDA graphs."""

CompileChoice = bool | Literal["auto"] | CompileMode
"""Whether the model is compiled, and in which mode; True is the default mode."""

_AUTO_COMPILES_ON = ("cuda",)  # types of device


class ModelOptions(CheckedModel):
    """The options of a :class:`DinoV3Config`, of ``dinov3-ray up`` and of a pool's file; here they are documented."""

    dtype: Annotated[ComputeDtype, rule(f"must be one of {', '.join(get_args(ComputeDtype))}")] = "auto"
    """The dtype that the model computes in. auto: bfloat16 where the device has it in hardware, else float32. float8:
    bfloat16 with the products of linear layers in float8."""
    image_size: Annotated[
        PositiveInt | Annotated[tuple[PositiveInt, PositiveInt], Field(strict=True), from_list] | None,
        rule("must be None, an integer >= 1 or a pair (h, w) of them"),
    ] = None
    """The model's input in pixels, one integer or [height, width], in place of preprocessor_config.json's."""
    compile: Annotated[
        StrictBool | Literal["auto"] | CompileMode,
        rule(f"must be auto, True, False or a mode of torch.compile ({', '.join(get_args(CompileMode))})"),
    ] = "auto"
    """Compile the model's blocks with torch.compile. auto: on a CUDA device, if all images come to the model in one
    size; where that fails, the model computes without, and a warning gives the reason. true, or the name of a mode of
    torch.compile: on any device; where that fails, it is an error. reduce-overhead and max-autotune record CUDA graphs
    on a CUDA device."""
    attention: Annotated[
        str, Field(strict=True, min_length=1), rule("must be the name of an implementation, such as 'sdpa'")
    ] = "auto"
    """The attention implementation of transformers, such as sdpa, eager or flash_attention_2. auto is sdpa with a
    kernel chosen for the device (cuDNN's on Hopper), which torch's global flags do not change. A ConvNeXt, which has no
    attention, ignores it."""


@dataclass(frozen=True, init=False, repr=False)
class DinoV3Config:
    """A model directory and the options under which to run it.

    ``root`` is read and checked on construction, so that a wrong file shows before a pool starts. That needs no weights
    unless config.json lacks keys that only they can complete; they are checked when they are loaded. A pickled object
    contains what was read, and looks for the weights at ``root`` again.

    Args:
        root: a directory with config.json, preprocessor_config.json and model.safetensors, or
            model.safetensors.index.json and its shards.
        dtype, image_size, compile, attention: see :class:`ModelOptions`; ``image_size`` is one int, or
            (h, w), and :meth:`Preprocessing.resized_to` says what becomes of the file's rule.

    Attributes:
        image_size: (h, w) of the model's input: the option, or else what the file says.
        architecture: what config.json (completed by the weights' shapes) describes.
        preprocessing: what preprocessor_config.json describes, at ``image_size``.

    Raises:
        ConfigError: names the file or option, the rule and the value; all complaints about one file at once.
        CheckpointError: config.json is incomplete, and the weights that could complete it are damaged.
    """

    root: Path
    dtype: ComputeDtype
    image_size: Size
    compile: CompileChoice
    attention: str
    architecture: Architecture = field(init=False)
    preprocessing: Preprocessing = field(init=False)

    # Written out, since the option `image_size` is wider than the attribute that it settles. `dataclasses.replace`
    # passes the settled size back in, which `resized_to` takes for no change.
    def __init__(
        self,
        root: str | PathLike[str],
        *,
        dtype: ComputeDtype = "auto",
        image_size: int | Size | None = None,
        compile: CompileChoice = "auto",
        attention: str = "auto",
    ) -> None:
        given = {
            "dtype": dtype,
            "image_size": image_size,
            "compile": compile,
            "attention": attention,
        }
        options = check(ModelOptions, given)
        # Absolute, since a relative path means another place in a worker's folder.
        path = _check_root(root)
        architecture = read_architecture(path)
        preprocessing = read_preprocessing(path, architecture)
        if options.image_size is not None:
            size = options.image_size
            preprocessing = preprocessing.resized_to((size, size) if isinstance(size, int) else size)
        if min(preprocessing.image_size) < architecture.patch_size:
            raise ConfigError(
                f"image_size must be at least one patch ({architecture.patch_size} px) high and wide; "
                f"got {list(preprocessing.image_size)}"
            )
        settled = given | {
            "root": path,
            "image_size": preprocessing.image_size,
            "architecture": architecture,
            "preprocessing": preprocessing,
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, config: DinoV3Config | str | PathLike[str]) -> DinoV3Config:
        """``config`` itself, or the configuration of the directory that it names."""
        return config if isinstance(config, DinoV3Config) else cls(config)

    @property
    def family(self) -> Family:
        """``vit`` or ``convnext``."""
        return self.architecture.family

    @property
    def hidden_size(self) -> int:
        """D, the channels of the CLS token and of the feature map."""
        return self.architecture.hidden_size

    @property
    def num_layers(self) -> int:
        """How many layers a FeatureSpec can name: blocks of a ViT, stages of a ConvNeXt."""
        return self.architecture.num_layers

    @property
    def num_register_tokens(self) -> int:
        """R; 0 for a ConvNeXt."""
        return self.architecture.num_register_tokens

    @property
    def patch_size(self) -> int:
        """Pixels per cell of the feature map, each way; for a ConvNeXt, its total stride."""
        return self.architecture.patch_size

    @property
    def grid_size(self) -> Size:
        """(h, w) of the feature map at ``image_size``; what the patch size does not divide is dropped."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    def compile_mode(self, device_type: str) -> CompileMode | None:
        """The mode of torch.compile in which blocks are compiled on devices of a type, such as ``cuda``; None if they
        are not.

        ``auto`` does not compile a model whose input varies in size: each new size would make it compile while images
        wait.
        """
        if self.compile == "auto":
            return "default" if device_type in _AUTO_COMPILES_ON and self.preprocessing.has_fixed_size else None
        if isinstance(self.compile, bool):
            return "default" if self.compile else None
        return self.compile

    def __repr__(self) -> str:
        size = "x".join(map(str, self.image_size))
        return (
            f"DinoV3Config({str(self.root)!r}, {self.family}, D={self.hidden_size}, layers={self.num_layers}, "
            f"registers={self.num_register_tokens}, patch={self.patch_size}, image={size}, dtype={self.dtype}, "
            f"attention={self.attention}, compile={self.compile})"
        )


def _check_root(root: object) -> Path:
    if not isinstance(root, (str, PathLike)):
        raise ConfigError(f"root must be the path of a model directory; got {root!r}")
    path = Path(root).expanduser().absolute()
    if not path.is_dir():
        what = "missing"
        if path.exists():
            what = f"a file: {'name its folder' if (path.parent / CONFIG_FILE).is_file() else convert_command(path)}"
        raise ConfigError(f"root must be a model directory with {CONFIG_FILE} and weights; {path} is {what}")
    return path
