"""The local teacher: a frozen model on one device.

Shapes: B images, D channels, h × w patches, R register tokens.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from dinov3_ray.checkpoint import fingerprint, load_model, load_reference
from dinov3_ray.config import ComputeDtype, ModelConfig
from dinov3_ray.config.preprocessing import Preprocessing, Size, ViewSize
from dinov3_ray.errors import ConfigError, FrozenError, SpecError
from dinov3_ray.features import Features, FeatureSpec, deliver
from dinov3_ray.images import ImageBatch, Images
from dinov3_ray.model.attention import choose_attention
from dinov3_ray.model.backbone import Network, run_backbone
from dinov3_ray.model.compilation import compile_blocks, is_compiled
from dinov3_ray.model.device import Stopwatch, as_device, choose_dtype, computing_on, empty_cache, full_float32
from dinov3_ray.model.float8 import check_float8, multiply_in_float8
from dinov3_ray.model.golden import agreement, golden_images
from dinov3_ray.model.openvino_blocks import OpenVinoBlocks, open_openvino
from dinov3_ray.model.preprocess import preprocess
from dinov3_ray.model.seal import SealedModel
from dinov3_ray.model.upload import Upload
from dinov3_ray.network.vit import ViT
from dinov3_ray.teacher import TeacherMixin, least_side
from dinov3_ray.watch import TeacherWatch

__all__ = ["FrozenTeacher"]

logger = logging.getLogger("dinov3_ray")

_GRAPH_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile: those that record CUDA graphs
_RECORD_PASSES = 3  # torch.compile runs a new shape once as it is, records it, and replays it from then on
# torch counts steps per process, not per thread: another teacher's step would end this one before it is done.
_graph_step = threading.Lock()


class FrozenTeacher(TeacherMixin[Images | ImageBatch]):
    """A frozen model that turns images into features; see :mod:`dinov3_ray.model.local_teachers` for which.

    It stays as it was loaded. It is not an ``nn.Module``: a student may have it as an attribute, and it is then in none
    of the student's ``modules()``, ``parameters()`` and ``state_dict()``, so that nothing that is called on the student
    changes it. For the same reason, ``student.to(device)`` does not move it: give it its device when it is made, or
    call its own ``to()``. ``train()`` and ``requires_grad_()`` leave it as it is.

    If somebody changes the weights in :attr:`model`, it refuses to compute, because its fingerprint would name another
    model. See :class:`~dinov3_ray.model.seal.SealedModel` for what that notices, and what it cannot.

    Every forward pass runs under ``no_grad``, and outside the caller's autocast. It gives ordinary tensors, which a
    student's loss may save for backward; maps are in channels_last memory order (see
    :class:`~dinov3_ray.features.Features`).

    A copy or a pickle has the configuration and not the weights. It loads them from the checkpoint when it is first
    used, so that a student's EMA copies and checkpoints stay small.

    Args:
        config: what to load and how.
        device: where to compute, as a torch.device or its name.

    Attributes:
        config: as given.
        device: where it computes.
        dtype: what it computes in.
        preprocess_watch: times the preprocessing of each batch.

    Raises:
        ConfigError: the configuration, or ``device``, is wrong.
        CheckpointError: the weights are missing, damaged, or not what the configuration says.
    """

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu") -> None:
        self._settle(config, as_device(device))
        if self.config.dtype == "auto":
            # A warning and not an info: results differ from float32's in the third digit, and the caller did not ask.
            logger.warning(
                "dtype='auto' computes in %s on %s: %s. %s(dtype=...) chooses another.",
                str(self.dtype).removeprefix("torch."),
                self.device,
                choose_dtype("auto", self.device)[1],
                type(self.config).__name__,
            )
        self._sealed = self._load()

    def _settle(self, config: ModelConfig, device: torch.device) -> None:
        """Become the teacher of ``config``, which loads its weights when they are needed."""
        self.__dict__.clear()
        self.config = config
        self.device = device
        self.dtype = choose_dtype(config.dtype, device)[0]
        self.preprocess_watch = Stopwatch()
        self._upload = Upload(device)
        self._openvino: OpenVinoBlocks | None = None
        self._watch = TeacherWatch()

    @cached_property
    def _sealed(self) -> SealedModel:
        return self._load()

    @property
    def _is_loaded(self) -> bool:
        return "_sealed" in self.__dict__

    def _load(self) -> SealedModel:
        device = as_device(self.device)  # after unpickling, it may be missing here
        # Weights loaded inside a caller's inference_mode could not be used outside it.
        with self._frozen_pass():
            model = load_model(self.config, device, self.dtype)
            if self.config.dtype == "float8":
                multiply_in_float8(model.blocks)
            return self._fitted(model)

    def _fitted(self, model: Network) -> SealedModel:
        """``model``, which is on :attr:`device`, made to compute as that can."""
        blocks = model.blocks
        float8 = self.config.dtype == "float8"
        if float8:
            check_float8(blocks, self.device)
        if isinstance(model, ViT):
            choose_attention(model, self.config.attention, self.device, self.dtype)
        self._openvino = open_openvino(self.config, self.device, self.dtype)
        compile_blocks(blocks, self.config, self.device, trial=functools.partial(self._try_out, model))
        if float8 and self.device.type == "cuda" and not is_compiled(blocks):
            logger.warning(
                "dtype='float8' is slower than bfloat16 on %s while the model is not compiled: to make float8 of a "
                "layer's input then takes several passes over memory, which cost more than the product saves. Use "
                "compile='auto', or dtype='bfloat16'.",
                self.device,
            )
        return SealedModel(model)

    def _try_out(self, model: Network) -> None:
        """Run ``model`` on the batch sizes that compiled code tells apart, 1 and all others, at the nominal size."""
        for size in (2, 1):
            pixels_B3HW = torch.zeros(size, 3, *self.config.nominal_size, device=self.device, dtype=self.dtype)
            self._run(model, pixels_B3HW, FeatureSpec(feature_map=True))

    @property
    def model(self) -> Network:
        """The torch module, to look at; the teacher refuses to compute once its weights were changed."""
        return self._sealed.model

    def extract(self, images: Images | ImageBatch, spec: FeatureSpec) -> Features:
        """All outputs that ``spec`` asks for, from one forward pass, on the teacher's device.

        It warns once if the first images are not in the convention that it expects. Results on a CUDA device are looked
        at without a wait: if they are not finite, a later call raises NumericsError.

        Args:
            images: see :data:`dinov3_ray.images.Images`; on any device. They may be changed once this returns.
            spec: what to give. ``native`` results have the teacher's :attr:`dtype`. A ConvNeXt's layers are its stages.

        Raises:
            InputError: the images break a rule; nothing was computed. Or they are not finite.
            SpecError: the spec asks for nothing, or for what this model does not have; nothing was computed.
            NumericsError: the results are not finite, as where float16 overflows.
            CheckpointError: the weights were changed since they were loaded.
        """
        self._check(spec)
        batch = ImageBatch.of(images, min_side=least_side(self))
        self._watch.images(batch)
        features = Features(self._compute(batch, spec), fingerprint=self.fingerprint)
        self._watch.results(features, batch)
        return features

    __call__ = extract

    def _compute(self, batch: ImageBatch, spec: FeatureSpec) -> Features:
        self._sealed.settle()
        with self._frozen_pass():
            with self.preprocess_watch.measure(self.device):
                pixels_B3HW = preprocess(self._upload(batch), self.config.preprocessing, self.device)
            return deliver(self._run(self.model, pixels_B3HW, spec.native()), spec)

    def _run(self, model: Network, pixels_B3HW: Tensor, spec: FeatureSpec) -> Features:
        compiled = is_compiled(model.blocks)
        run = functools.partial(run_backbone, model, pixels_B3HW, spec, compiled=compiled, openvino=self._openvino)
        if not self._records_graphs:
            return run()
        with _graph_step:
            # A pass is one step of torch's CUDA graphs: the next step may overwrite the memory of its tensors.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            # Results are copied out of that memory in the stream, so that the next pass may begin while they are read.
            return run().map(lambda _, tensor: tensor.clone())

    @property
    def _records_graphs(self) -> bool:
        return self.device.type == "cuda" and self.config.compile in _GRAPH_MODES

    def prove(self, minimum: float = 0.999, *, rows: int = 2) -> float:
        """Show that this teacher, as it stands, computes what its checkpoint says; see :mod:`dinov3_ray.model.golden`.

        Two fixed images go through the teacher as it is (its dtype, attention and compiled code), and through the
        checkpoint once more: in float32 without TF32, not compiled, with eager attention (sdpa if the teacher's is
        eager). The model's input has the configuration's nominal size. The weights for that are read block by block, so
        that the device needs room for one block in float32 besides the teacher. (A model that is not a DINOv3 does it
        on the CPU instead.)

        Args:
            minimum: the least mean cosine between the two, over images and outputs.
            rows: a batch of so many images, the two again and again, is compared too: kernels depend on the batch.

        Returns:
            That least mean cosine.

        Raises:
            ConfigError: an argument is wrong.
            NumericsError: the cosine is below ``minimum``, a single token strays far, or a value is not finite.
        """
        if not isinstance(minimum, (int, float)) or not -1 <= minimum < 1:
            raise ConfigError(f"minimum must be a cosine from -1 to below 1; got {minimum!r}")
        if not isinstance(rows, int) or rows < 1:
            raise ConfigError(f"rows must be an integer >= 1; got {rows!r}")
        spec = FeatureSpec(cls=self.has_cls, feature_map=True, registers=self.num_register_tokens > 0)
        own = getattr(self.model, "attention", None)
        attention = "" if own is None else f", attention {own}"
        path = f"{self.computed_in}{attention}, {'compiled' if self.compiled else 'not compiled'}"
        images_23HW = golden_images(*self.preprocessing.nominal_view)
        reference = self._reference(images_23HW, spec, attention="sdpa" if own == "eager" else "eager")
        least = 1.0
        for size in sorted({2, rows}):
            images_B3HW = images_23HW.repeat(-(-size // 2), 1, 1, 1)[:size]
            fast = self._compute(ImageBatch.of(images_B3HW), spec)
            # In pairs, since the comparison takes memory too.
            for start in range(0, size, 2):
                pair = fast.rows(start, min(start + 2, size))
                found = agreement(pair, reference.rows(0, len(pair)), minimum, f"{path}, {size} images at once")
                least = min(least, found)
        return least

    def _reference(self, images_23HW: Tensor, spec: FeatureSpec, *, attention: str) -> Features:
        """What the checkpoint gives for ``images_23HW`` in plain float32, on the teacher's device."""
        with self._frozen_pass(), full_float32():
            config = replace(self.config, dtype="float32", compile=False, attention=attention)
            model, device = load_reference(config, self.device)
            if isinstance(model, ViT):
                choose_attention(model, attention, device, torch.float32)
            pixels_B3HW = preprocess(ImageBatch.of(images_23HW.to(device)), config.preprocessing, device)
            with torch.autocast(device.type, enabled=False):  # it may be the CPU, and not the teacher's device
                features = run_backbone(model, pixels_B3HW, spec).to(self.device)
        empty_cache()
        return features

    def warm_up_passes(self, rows: int) -> Iterator[tuple[Images, FeatureSpec]]:
        """What would delay the first passes on a CUDA device, to be computed before: it allocates the memory of the
        largest batch, which then suffices for all, chooses its kernels and records its graphs. Compiled code is there
        since the model was loaded. If the input's size follows the images, this is for the nominal size, and larger
        images find their memory when they come.
        """
        if self.device.type == "cuda":
            images_B3HW = golden_images(*self.preprocessing.nominal_view)[:1].repeat(rows, 1, 1, 1)
            for _ in range(_RECORD_PASSES if self._records_graphs else 1):
                yield images_B3HW, FeatureSpec(cls=self.has_cls, feature_map=True)

    @property
    def fingerprint(self) -> str:
        """Identifies the weights, the architecture and the preprocessing; the first use reads the weights.

        Raises:
            CheckpointError: the weights were changed since they were loaded.
        """
        self._sealed.check()
        return self._fingerprint

    @property
    def origin(self) -> str:
        """What it was loaded from: ``owner/name@commit`` of the hub, or a directory."""
        return self.config.place.origin

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.config)

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become the model's input."""
        return self.config.preprocessing

    @property
    def license(self) -> str:
        """What the model directory says of its weights' licence, in words."""
        return self.config.license

    @property
    def preprocess_seconds(self) -> float:
        """Duration of the last batch's preprocessing, upload included; 0 while a GPU has not finished it."""
        return self.preprocess_watch.seconds

    @property
    def computed_in(self) -> str:
        """The dtype's name, ``float8`` where the matrix products are in it; and ``by OpenVINO`` where that computes."""
        return self._dtype_name + (" by OpenVINO" if self.by_openvino else "")

    @property
    def _dtype_name(self) -> str:
        return "float8" if self.config.dtype == "float8" else str(self.dtype).removeprefix("torch.")

    @property
    def by_openvino(self) -> bool:
        """Whether OpenVINO computes the blocks; with ``backend="auto"``, that depends on what is installed."""
        return bool(self.model) and self._openvino is not None

    @property
    def compiled(self) -> bool:
        """Whether it computes with compiled code; with ``compile="auto"``, that may have failed."""
        return is_compiled(self.model.blocks)

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.config.hidden_size

    @property
    def depth(self) -> int:
        """Number of layers that a FeatureSpec can name."""
        return self.config.num_layers

    @property
    def patch_size(self) -> int:
        """Pixels per cell of the feature map."""
        return self.config.patch_size

    @property
    def has_cls(self) -> bool:
        """Whether the model has a CLS token; a ConvNeXt's is its normed global average."""
        return self.model.has_cls

    @property
    def num_register_tokens(self) -> int:
        """R."""
        return self.config.num_register_tokens

    @property
    def image_size(self) -> Size | ViewSize:
        """(h, w) of the model's input; or how it follows that of the images."""
        return self.config.image_size

    @property
    def grid_size(self) -> Size:
        """(h, w) of the feature map at the model's nominal size."""
        return self.config.grid_size

    # What trainers call on a module --------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002 - the signature is nn.Module's
        """Itself, in eval mode for any ``mode``: dropout or RoPE's augmentation would change the targets."""
        return self

    def eval(self) -> Self:
        """Itself: it is always in eval mode."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:  # noqa: ARG002 - the signature is nn.Module's
        """Itself, without gradients for any ``requires_grad``."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Compute on another device, or in another dtype; the arguments are those of ``nn.Module.to``.

        For another dtype it loads the checkpoint again: rounded weights must not be widened.

        Raises:
            ConfigError: this process does not have the device, or the teacher cannot compute in the dtype.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        place = self.device if device is None else as_device(device)
        if dtype is not None and dtype != self.dtype:
            self._settle(replace(self.config, dtype=cast(ComputeDtype, str(dtype).removeprefix("torch."))), place)
        elif place != self.device:
            sealed = self.__dict__.pop("_sealed", None)
            if sealed is not None:
                sealed.check()
            self.device, self._upload = place, Upload(place)
            if sealed is not None:
                with self._frozen_pass():
                    self._sealed = self._fitted(sealed.model.to(place))
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights; none gets a gradient."""
        return iter(self.model.parameters())

    def modules(self) -> Iterator[nn.Module]:
        """:attr:`model` and all modules in it."""
        return iter(self.model.modules())

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if hasattr(nn.Module, name):
                raise FrozenError(
                    f"{type(self).__name__} has no {name}(), and is not an nn.Module: it is frozen, and no part of the "
                    "module that holds it (it has to(), eval(), parameters() and modules(); teacher.model is the "
                    "module)"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        if self._is_loaded:
            self._sealed.check()
        # What auto has chosen is settled: a copy computes in the same dtype.
        chosen = cast(ComputeDtype, self._dtype_name)
        config = replace(self.config, dtype=chosen) if self.config.dtype == "auto" else self.config
        return {"config": config, "device": self.device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._settle(**state)

    def __repr__(self) -> str:
        size = self.preprocessing.follows or "x".join(map(str, self.config.nominal_size))
        return (
            f"{type(self).__name__}({self.config.family}, D={self.hidden_size}, layers={self.depth}, image={size}, "
            f"device={self.device}, dtype={self.computed_in})"
        )

    def _check(self, spec: FeatureSpec) -> None:
        spec.require_outputs()
        spec.blocks(self.depth)
        if spec.cls and not self.has_cls:
            raise SpecError("FeatureSpec.cls must be False for this model: it has no CLS token")
        if spec.registers and self.num_register_tokens == 0:
            raise SpecError("FeatureSpec.registers must be False for this model: it has 0 register tokens")

    @contextmanager
    def _frozen_pass(self) -> Iterator[None]:
        """No gradients, yet ordinary tensors; no autocast of the caller's; the teacher's device is the current one."""
        device = self.device
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False, cache_enabled=True),  # compiled code is bound to both
            computing_on(device),
        ):
            yield
