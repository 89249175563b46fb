"""A model directory in transformers' layout, read and checked, and the options to run it with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import Field, StrictBool

from dinov3_ray.config.architecture import Architecture, TransformersArchitecture
from dinov3_ray.config.files import PositiveInt, read_architecture, read_preprocessing
from dinov3_ray.config.hub import ModelPlace, resolve
from dinov3_ray.config.license import license_text
from dinov3_ray.config.preprocessing import Preprocessing, Size, ViewSize
from dinov3_ray.config.weights import WeightFiles
from dinov3_ray.errors import ConfigError
from dinov3_ray.validation import CheckedModel, check, from_list, rule

__all__ = ["Backend", "CompileChoice", "CompileMode", "ComputeDtype", "DinoV3Config", "ModelConfig", "ModelOptions"]

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16", "float8"]
"""The dtype that the model computes in; ``auto`` is bfloat16 where the device has it in hardware, else float32.
``float8`` is bfloat16 with the products of linear layers in float8 (see :mod:`dinov3_ray.model.float8`)."""

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
"""A mode of ``torch.compile``. On a CUDA device, ``reduce-overhead`` and ``max-autotune`` record CUDA graphs."""

CompileChoice = bool | Literal["auto"] | CompileMode
"""Whether the model is compiled, and in which mode; True is the default mode."""

Backend = Literal["auto", "torch", "openvino"]
"""What computes a model on a CPU; ``auto`` is OpenVINO in bfloat16, where it is installed."""

_AUTO_COMPILES_ON = ("cuda",)  # types of device


class ModelOptions(CheckedModel):
    """The options of a :class:`ModelConfig`, of ``dinov3-ray up`` and of a pool's file; here they are documented."""

    dtype: Annotated[ComputeDtype, rule(f"must be one of {', '.join(get_args(ComputeDtype))}")] = "auto"
    """The dtype that the model computes in. auto: bfloat16 where the device has it in hardware, else float32. float8:
    bfloat16 with the products of linear layers in float8."""
    image_size: Annotated[
        PositiveInt | Annotated[tuple[PositiveInt, PositiveInt], Field(strict=True), from_list] | ViewSize | None,
        rule("must be None, an integer >= 1, a pair (h, w) of them, 'input' or 'input/2'"),
    ] = None
    """The model's input in pixels, one integer or [height, width], in place of preprocessor_config.json's. input: each
    batch at its own size, without a resize or crop; what the patch does not divide is cut off at the right and below.
    input/2: each batch resized to half its size, rounded down to whole patches. All images of a batch must then come to
    one size. The file's own size serves what needs one without images: the golden check, the warm-up, the compilation.
    """
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
    backend: Annotated[Backend, rule(f"must be one of {', '.join(get_args(Backend))}")] = "auto"
    """What computes. auto: OpenVINO for a DINOv3 in bfloat16 on a CPU, where it is installed (the extra openvino); else
    torch. openvino: in float32 too; where it cannot compute, it is an error."""


@dataclass(frozen=True, init=False, repr=False)
class ModelConfig(ABC):
    """A model directory, or a model of the Hugging Face Hub, and the options under which to run it: what a
    :class:`DinoV3Config` and a :class:`~dinov3_ray.config.transformers_model.TransformersConfig` have in common.

    ``root`` is read and checked on construction, so that a wrong file shows before a pool starts. That needs no weights
    unless config.json lacks keys that only they can complete; they are checked when they are loaded, and those of a
    model of the hub are downloaded then. A pickled object contains what was read, and looks for the weights again where
    it is unpickled: at ``root``, or for the same commit of the hub's model.

    Args:
        root: a directory with config.json, preprocessor_config.json and model.safetensors, or
            model.safetensors.index.json and its shards; or the id of a model on the hub, such as
            ``facebook/dinov3-vits16-pretrain-lvd1689m``, that has them. A directory goes before an id of the same
            spelling, as in transformers.
        revision: with an id: a branch, a tag or a commit; by default ``main``. It is resolved to a commit here.
        dtype, image_size, compile, attention, backend: see :class:`ModelOptions`; ``image_size`` is one int, (h, w),
            or a :data:`~dinov3_ray.config.preprocessing.ViewSize`; :meth:`Preprocessing.resized_to` and
            :meth:`Preprocessing.following` say what becomes of the file's rule.

    Attributes:
        root: the model directory, on the machine that made this configuration; of a model of the hub, in its cache.
        place: where the model is, also on other machines.
        image_size: (h, w) of the model's input: the option, or else what the file says. ``input`` or ``input/2`` where
            it follows the images; :attr:`nominal_size` is (h, w) in any case.
        architecture: what config.json (completed by the weights' shapes) describes.
        preprocessing: what preprocessor_config.json describes, at ``image_size``.
        license: what the directory says of its weights' licence, in words.

    Raises:
        ConfigError: names the file or option, the rule and the value; all complaints about one file at once.
        CheckpointError: config.json is incomplete, and the weights that could complete it are damaged; or the hub
            does not give the model: says why.
    """

    root: Path
    dtype: ComputeDtype
    image_size: Size | ViewSize
    compile: CompileChoice
    attention: str
    backend: Backend
    architecture: Architecture | TransformersArchitecture = field(init=False)
    preprocessing: Preprocessing = field(init=False)
    place: ModelPlace = field(init=False)
    license: str = field(init=False, compare=False)

    # Written out, since the option `image_size` is wider than the attribute that it settles. `dataclasses.replace`
    # passes the settled size back in, which `resized_to` takes for no change, and the hub's snapshot as `root`, which
    # is taken for what it is.
    def __init__(
        self,
        root: str | PathLike[str],
        *,
        revision: str | None = None,
        dtype: ComputeDtype = "auto",
        image_size: int | Size | ViewSize | None = None,
        compile: CompileChoice = "auto",
        attention: str = "auto",
        backend: Backend = "auto",
    ) -> None:
        given = {
            "dtype": dtype,
            "image_size": image_size,
            "compile": compile,
            "attention": attention,
            "backend": backend,
        }
        options = check(ModelOptions, given)
        # Its directory is absolute, since a relative path means another place in a worker's folder.
        place = resolve(root, revision)
        architecture, preprocessing = self._read(place)
        size = options.image_size
        if isinstance(size, str):
            preprocessing = preprocessing.following(size, architecture.patch_size)
        elif size is not None:
            preprocessing = preprocessing.resized_to((size, size) if isinstance(size, int) else size)
        if min(preprocessing.image_size) < architecture.patch_size:
            raise ConfigError(
                f"image_size must be at least one patch ({architecture.patch_size} px) high and wide; "
                f"got {list(preprocessing.image_size)}"
            )
        settled = given | {
            "root": place.directory,
            "place": place,
            "image_size": preprocessing.follows or preprocessing.image_size,
            "architecture": architecture,
            "preprocessing": preprocessing,
            "license": license_text(place.directory, dinov3=not isinstance(architecture, TransformersArchitecture)),
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    @staticmethod
    @abstractmethod
    def _read(place: ModelPlace) -> tuple[Any, Preprocessing]:
        """The architecture and the preprocessing that the files in ``place`` describe."""

    @classmethod
    def of(cls, config: Self | str | PathLike[str], **options: Any) -> Self:
        """``config``, or the configuration of the directory that it names, with ``options`` in place of its own."""
        if isinstance(config, cls):
            return replace(config, **options) if options else config
        return cls(cast("str | PathLike[str]", config), **options)

    @property
    def hub_id(self) -> str | None:
        """``owner/name`` of a model of the hub; None for a directory of one's own."""
        return self.place.hub_id

    @property
    def revision(self) -> str | None:
        """The commit of a model of the hub, whatever branch or tag was asked for; None for a directory of one's own."""
        return self.place.commit

    @property
    def family(self) -> str:
        """Of a DINOv3 model, ``vit`` or ``convnext``; of others, transformers' ``model_type``."""
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
        """R; 0 for a ConvNeXt, and for other models without registers."""
        return self.architecture.num_register_tokens

    @property
    def patch_size(self) -> int:
        """Pixels per cell of the feature map, each way; for a ConvNeXt, its total stride."""
        return self.architecture.patch_size

    @property
    def nominal_size(self) -> Size:
        """(h, w) of the model's input; where it follows the images, that of the file, for what needs one without any:
        the golden check, the warm-up, the compilation and :attr:`grid_size`."""
        return self.preprocessing.image_size

    @property
    def grid_size(self) -> Size:
        """(h, w) of the feature map at :attr:`nominal_size`; what the patch size does not divide is dropped."""
        height, width = self.nominal_size
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
        size = self.preprocessing.follows or "x".join(map(str, self.nominal_size))
        where = repr(self.hub_id or str(self.root)) + (f", revision={self.revision!r}" if self.revision else "")
        return (
            f"{type(self).__name__}({where}, {self.family}, D={self.hidden_size}, layers={self.num_layers}, "
            f"registers={self.num_register_tokens}, patch={self.patch_size}, image={size}, dtype={self.dtype}, "
            f"attention={self.attention}, compile={self.compile}, backend={self.backend})"
        )


class DinoV3Config(ModelConfig):
    """A DINOv3, and the options under which to run it; see :class:`ModelConfig`."""

    architecture: Architecture

    @staticmethod
    def _read(place: ModelPlace) -> tuple[Architecture, Preprocessing]:
        architecture = read_architecture(place.directory, lambda: WeightFiles.find(place.with_weights()).shapes)
        return architecture, read_preprocessing(place.directory, architecture)
