"""The modes of the local teacher and of its peer that ``bench teacher`` compares; all do the same work.

The peer is transformers, used as its documentation shows: the image processor, then ``AutoModel``. The processor needs
torchvision. Without it, this package's preprocessing takes its place, which gives the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_ray.config import Backend, CompileChoice, ComputeDtype, DinoV3Config
from dinov3_ray.config.preprocessing import Size
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import ImageBatch
from dinov3_ray.model import DinoV3Teacher
from dinov3_ray.model.device import choose_dtype
from dinov3_ray.model.golden import golden_images
from dinov3_ray.model.openvino_blocks import graph_of, openvino_core, properties_for
from dinov3_ray.model.preprocess import preprocess
from dinov3_ray.pool.replica.device_pipeline import pipeline_for

__all__ = [
    "TEACHER_SPEC",
    "TeacherMode",
    "TeacherWork",
    "load_ours",
    "modes_for",
    "through_pipeline",
    "without_emulation",
]

TEACHER_SPEC = FeatureSpec(cls=True, feature_map=True)

Extract = Callable[[Tensor], Features]
"""Takes images, uint8 [B,3,H,W] in the host's memory, and returns CLS tokens and maps on the device."""


@dataclass(frozen=True, slots=True)
class TeacherWork:
    """Batches of ``batch`` images of the size ``view``: by default a fifth larger each way than the model's input, so
    that all must be resized."""

    config: DinoV3Config
    device: torch.device
    batch: int
    view: Size | None = None

    @property
    def input_size(self) -> Size:
        """(h, w) of the model's input."""
        return self.config.preprocessing.input_size(self._view)

    @property
    def grid_size(self) -> Size:
        """(h, w) of the feature map."""
        height, width = self.input_size
        return height // self.config.patch_size, width // self.config.patch_size

    @property
    def _view(self) -> Size:
        height, width = self.config.nominal_size
        return self.view or (height * 6 // 5, width * 6 // 5)

    def golden(self) -> Tensor:
        """The images of the golden check, uint8 [2,3,H,W], of the input's size; of the view's, if the input follows."""
        return golden_images(*(self._view if self.config.preprocessing.follows else self.config.nominal_size))

    def images(self) -> Tensor:
        """One batch, uint8 [B,3,H,W]."""
        height, width = self._view
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (self.batch, 3, height, width), dtype=torch.uint8, generator=generator)


@dataclass(frozen=True, slots=True)
class TeacherMode:
    """One way to do the work.

    Attributes:
        name: as the table shows it.
        dtype: of the matrix products.
        ours: True for this package, False for its peer.
        make: loads the model.
        missing: why it is not measured here; empty if it is.
    """

    name: str
    dtype: torch.dtype
    ours: bool
    make: Callable[[TeacherWork], Extract]
    missing: str = ""


def modes_for(device: torch.device, *, quick: bool) -> list[TeacherMode]:
    """The modes to measure on ``device``; the first is the peer's default, with which all others are compared."""
    modes = [
        _peer("transformers float32 (its default)", torch.float32),
        _peer("transformers float32 eager", torch.float32, attention="eager"),
        _peer("transformers bfloat16", torch.bfloat16),
        _ours("float32", "float32"),
        _ours("bfloat16", "bfloat16"),
    ]
    if find_spec("torchvision") is not None:  # without it, the peer's other modes do without the processor too
        modes.insert(3, _peer("transformers bfloat16 without its processor", torch.bfloat16, processor=False))
    if not quick:
        modes.append(_ours("bfloat16 compiled", "bfloat16", compile=True))
    if device.type == "cpu" and find_spec("openvino") is not None:
        multiplied = choose_dtype("auto", device)[0]
        modes.append(_peer_by_openvino("float32", torch.float32))
        if multiplied == torch.bfloat16:
            modes.append(_peer_by_openvino("bfloat16", torch.bfloat16))
        # With AVX2 alone, OpenVINO computes in float32 what it is asked for in bfloat16.
        modes.append(replace(_ours("bfloat16 by OpenVINO", "bfloat16", backend="openvino"), dtype=multiplied))
    if device.type == "cuda" and not quick:
        modes += [
            _ours("bfloat16 compiled, CUDA graphs", "bfloat16", compile="reduce-overhead"),
            _ours("float8 compiled", "float8", compile=True),
        ]
    return modes


def without_emulation(modes: Sequence[TeacherMode], device: torch.device) -> list[TeacherMode]:
    """``modes``, of which those in bfloat16 are marked as missing on a CPU where torch emulates it.

    ViT-S takes 6 times as long then as in float32. A batch of ConvNeXt-T, whose convolutions use one thread, takes
    minutes.
    """
    if device.type != "cpu" or choose_dtype("auto", device)[0] == torch.bfloat16:
        return list(modes)
    why = "torch emulates bfloat16 on this CPU"
    return [replace(mode, missing=why) if mode.dtype == torch.bfloat16 else mode for mode in modes]


_MATMUL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}


def _ours(name: str, dtype: ComputeDtype, *, compile: CompileChoice = False, backend: Backend = "torch") -> TeacherMode:
    make = functools.partial(load_ours, dtype=dtype, compile=compile, backend=backend)
    return TeacherMode(name, _MATMUL_DTYPES[dtype], True, make)


def _peer(name: str, dtype: torch.dtype, attention: str | None = None, *, processor: bool = True) -> TeacherMode:
    make = functools.partial(Peer, dtype=dtype, attention=attention, processor=processor)
    return TeacherMode(name, dtype, False, make)


def _peer_by_openvino(name: str, dtype: torch.dtype) -> TeacherMode:
    return TeacherMode(f"transformers {name} by OpenVINO", dtype, False, functools.partial(OpenVinoPeer, dtype=dtype))


def load_ours(
    work: TeacherWork, dtype: ComputeDtype, *, compile: CompileChoice = False, backend: Backend = "torch"
) -> Extract:
    """Load this package's teacher in one of its modes."""
    root, size, attention = work.config.root, work.config.image_size, work.config.attention
    config = DinoV3Config(root, dtype=dtype, image_size=size, compile=compile, attention=attention, backend=backend)
    if compile:
        torch.compiler.reset()  # torch keeps code up to a limit, which all modes and sizes together may reach
    teacher = DinoV3Teacher(config, work.device)
    for images, spec in teacher.warm_up_passes(work.batch):
        teacher.extract(images, spec)
    return lambda images: teacher.extract(images, TEACHER_SPEC)


class Peer:
    """The model and the processor of transformers."""

    def __init__(
        self, work: TeacherWork, dtype: torch.dtype, attention: str | None = None, *, processor: bool = True
    ) -> None:
        from transformers import AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        options = {} if attention is None else {"attn_implementation": attention}
        self._task = work
        root = work.config.place.with_weights()
        self._processor = _load_processor(root) if processor else None
        self._model: Any = AutoModel.from_pretrained(root, dtype=dtype, **options).to(work.device).eval()

    def __call__(self, images: Tensor) -> Features:
        work = self._task
        if self._processor is None:
            pixels = preprocess(ImageBatch.of(images), work.config.preprocessing, work.device)
        else:
            height, width = work.input_size
            if work.config.preprocessing.follows == "input":
                images = images[..., :height, :width]
            size = {"height": height, "width": width}
            inputs = self._processor(images=list(images), size=size, return_tensors="pt")
            pixels = inputs["pixel_values"].to(work.device)
        with torch.inference_mode():
            tokens_BND, pooled_BD = self._outputs(pixels)
        prefix = 1 + work.config.num_register_tokens
        map_BDhw = tokens_BND[:, prefix:].transpose(1, 2).unflatten(2, work.grid_size)
        return Features(cls=pooled_BD, feature_map=map_BDhw)

    def _outputs(self, pixels: Tensor) -> tuple[Any, Any]:
        """All tokens of the last layer, and the model's summary of each image."""
        outputs = self._model(pixels)
        return outputs.last_hidden_state, outputs.pooler_output


class OpenVinoPeer(Peer):
    """The same, with the model converted to OpenVINO."""

    def __init__(self, work: TeacherWork, dtype: torch.dtype) -> None:
        super().__init__(work, torch.float32)
        pixels = preprocess(ImageBatch.of(work.images()), work.config.preprocessing, work.device)
        graph = graph_of(_TokensAndSummary(self._model), (pixels,))
        self._compiled = openvino_core().compile_model(graph, "CPU", properties_for(dtype))

    def _outputs(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens, pooled = self._compiled([pixels.numpy()]).values()
        return torch.from_numpy(tokens), torch.from_numpy(pooled)


class _TokensAndSummary(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(pixels_B3HW)
        return outputs.last_hidden_state, outputs.pooler_output


def _load_processor(root: Path) -> Any:
    """The image processor; None without torchvision."""
    if find_spec("torchvision") is None:
        return None
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(root)


def through_pipeline(extract: Extract, work: TeacherWork, batches: int) -> Callable[[], None]:
    """A call that takes ``batches`` batches through a replica's pipeline, to packed results in the host's memory."""

    class ExtractAsTeacher:
        device = work.device

        def extract(self, images: Any, spec: FeatureSpec) -> Features:  # noqa: ARG002 - it is TEACHER_SPEC
            return extract(images)

    pipeline = pipeline_for(ExtractAsTeacher())
    batch = ImageBatch.of(work.images())

    def once() -> None:
        in_flight = []
        for _ in range(batches):
            in_flight.append(pipeline.begin(batch, len(batch), TEACHER_SPEC))
            if len(in_flight) == pipeline.depth:
                in_flight.pop(0).result()
        for one in in_flight:
            one.result()

    return once
