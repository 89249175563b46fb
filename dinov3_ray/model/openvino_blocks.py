"""A network on a CPU by OpenVINO, from the pixels to what its blocks give.

OpenVINO fuses what surrounds the matrix products, and keeps the weights in the order in which the CPU multiplies them.
In bfloat16 on a CPU with AMX, a pass of ViT-S/16 took 82 ms, where torch took 133 ms, and 118 ms compiled (8 images of
224 px, 2 threads of a Xeon, medians of one run of 2026-11-26).
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_ray.checkpoint import load_model
from dinov3_ray.config import ModelConfig
from dinov3_ray.config.architecture import TransformersArchitecture
from dinov3_ray.errors import ConfigError
from dinov3_ray.network.convnext import ConvNext
from dinov3_ray.network.vit import ViT

__all__ = ["OpenVinoBlocks", "graph_of", "open_openvino", "openvino_core", "properties_for"]

logger = logging.getLogger("dinov3_ray")

_EXAMPLE = (2, 3, 64, 96)  # shows the front end what is computed; other sizes are computed as well
_INSTALL = "pip install 'dinov3-ray[openvino]'"
_cores: list[Any] = []
_core_lock = threading.Lock()


def open_openvino(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> OpenVinoBlocks | None:
    """What computes the blocks of ``config``'s model in torch's place, as its ``backend`` says; None for torch.

    ``auto`` is OpenVINO for a DINOv3 that computes in bfloat16 on a CPU, where OpenVINO is installed and nothing is to
    be compiled; where it fails, it is torch, and a warning gives the reason. It is never OpenVINO for float32, whose
    bits are those of transformers.

    Raises:
        ConfigError: ``backend="openvino"``, and OpenVINO is missing, or cannot compute this.
    """
    if config.backend == "torch" or (config.backend == "auto" and dtype != torch.bfloat16):
        return None
    reason = _hindrance(config, device)
    if reason is None:
        try:
            network = load_model(config, device, torch.float32)
            assert isinstance(network, (ViT, ConvNext))
            return OpenVinoBlocks(network, dtype)
        except (ImportError, RuntimeError) as error:  # of another release, or on another kind of CPU
            problem = str(error).strip().splitlines() or [type(error).__name__]
            reason = f"OpenVINO {version('openvino')} fails: {problem[0]} ({_INSTALL} takes a fitting release)"
            if config.backend == "auto":
                logger.warning("backend='auto' leaves the model to torch, which is slower, since %s", reason)
    if config.backend == "auto":
        return None
    raise ConfigError(f"backend must be 'auto' or 'torch' where OpenVINO cannot compute; got 'openvino', and {reason}")


def _hindrance(config: ModelConfig, device: torch.device) -> str | None:
    """Why OpenVINO is not to compute this; None if nothing speaks against it."""
    if find_spec("openvino") is None:
        return f"it is not installed ({_INSTALL})"
    if device.type != "cpu":
        return f"the device is {device} (OpenVINO computes on CPUs here)"
    if config.dtype not in ("auto", "float32", "bfloat16"):
        return f"dtype is {config.dtype!r} (it computes in float32 and bfloat16)"
    if config.compile_mode(device.type) is not None:
        return f"compile is {config.compile!r} (which is torch's: compile=False)"
    if isinstance(config.architecture, TransformersArchitecture):
        return f"the model is a {config.family} (it computes DINOv3's networks)"
    return None


class OpenVinoBlocks:
    """What a network's blocks give for pixels: what ``FeatureSpec.layers`` counts, before any norm.

    For each choice of blocks, OpenVINO compiles once, when it is first asked for: 1 s for a ViT-S, 2 s for a ViT-B.

    Args:
        network: in float32 on the CPU; it is copied.
        dtype: float32, or bfloat16, in which OpenVINO computes where the CPU can multiply it; elsewhere it computes in
            float32 too.
    """

    def __init__(self, network: ViT | ConvNext, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._turns: Callable[[Tensor], Sequence[Tensor]]
        self._turns = network.rope_embeddings if isinstance(network, ViT) else _no_turns
        pixels_23HW = torch.zeros(_EXAMPLE)
        self._graph = graph_of(_Chain(network), (pixels_23HW, *self._turns(pixels_23HW)))
        self._core = openvino_core()  # now: where it fails, torch computes instead
        self._properties = properties_for(dtype)
        self._requests: dict[tuple[int, ...], Any] = {}
        self._lock = threading.Lock()  # a request computes one batch at a time

    def __call__(self, pixels_B3HW: Tensor, blocks: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """The index and the output of each of ``blocks``, in the dtype: tokens [B,N,D] of a ViT, maps [B,D,h,w] of a
        ConvNeXt. ``blocks`` are in order.
        """
        pixels_B3HW = pixels_B3HW.float().contiguous()
        inputs = [tensor.numpy() for tensor in (pixels_B3HW, *self._turns(pixels_B3HW))]
        with self._lock:
            found = self._request(tuple(blocks)).infer(inputs, share_inputs=True)
        return iter([(index, torch.from_numpy(found[place]).to(self._dtype)) for place, index in enumerate(blocks)])

    def _request(self, blocks: tuple[int, ...]) -> Any:
        if blocks not in self._requests:
            outputs = [self._graph.outputs[index].get_node() for index in blocks]
            part = _import_openvino().Model(outputs, self._graph.get_parameters(), "blocks")
            self._requests[blocks] = self._core.compile_model(part, "CPU", self._properties).create_infer_request()
        return self._requests[blocks]


def properties_for(dtype: torch.dtype) -> dict[str, Any]:
    """How OpenVINO computes: in ``dtype`` where the CPU can, one batch after the other, with torch's threads."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,  # the replicas of a node would share the first cores, and leave the others idle
    }


def graph_of(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """``module`` as an ``openvino.Model``, for inputs of any sizes of as many dimensions as the examples ``inputs``."""
    _import_openvino()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated; torch.export takes four times as long
        traced = torch.jit.trace(module.eval(), inputs, check_trace=False)  # type: ignore[no-untyped-call]
    front_end = FrontEndManager().load_by_framework("pytorch")
    # The decoder must live until the end: the front end does not hold it. The weights are copied, since OpenVINO's own
    # threads would otherwise let go of Python's memory.
    decoder = TorchScriptPythonDecoder(traced, shared_memory=False)
    return front_end.convert(front_end.load(decoder))


def openvino_core() -> Any:
    """OpenVINO's Core: one for this process, and never let go.

    With a Core, OpenVINO maps an alternate signal stack for the thread that makes it, and unmaps it with the Core. If
    another thread lets go of that, as the garbage collector may, the next signal to the first one, such as Ctrl-C,
    ends the process by SIGSEGV (OpenVINO 2026.4.1).
    """
    with _core_lock:
        if not _cores:
            _cores.append(_import_openvino().Core())
    return _cores[0]


def _import_openvino() -> Any:
    """The module ``openvino``, imported so that it does not report its use to its makers over the network.

    Without the package ``openvino_telemetry``, which pip installs with it, it reports nothing.
    """
    absent = {} if "openvino" in sys.modules else {"openvino_telemetry": None}
    sys.modules |= absent  # type: ignore[arg-type] # None there makes its import fail
    try:
        import openvino
    finally:
        for name in absent:
            del sys.modules[name]
    return openvino


class _Chain(nn.Module):
    """Pixels to the outputs of all blocks."""

    def __init__(self, network: ViT | ConvNext) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels_B3HW: Tensor, *turns: Tensor) -> tuple[Tensor, ...]:
        network = self.network
        hidden = network.embeddings(pixels_B3HW) if isinstance(network, ViT) else pixels_B3HW
        outputs = []
        for block in network.blocks:
            hidden = block(hidden, turns) if turns else block(hidden)
            outputs.append(hidden)
        return tuple(outputs)


def _no_turns(_: Tensor) -> tuple[()]:
    return ()
