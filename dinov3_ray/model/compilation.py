"""Compiles a model's blocks, and finds out whether that works before any result depends on it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dinov3_ray.config import ModelConfig
from dinov3_ray.errors import ConfigError

__all__ = ["compile_blocks", "is_compiled"]

logger = logging.getLogger("dinov3_ray")


def is_compiled(blocks: nn.ModuleList) -> bool:
    """Whether :func:`compile_blocks` has left ``blocks`` compiled."""
    return blocks[0]._compiled_call_impl is not None


def compile_blocks(
    blocks: nn.ModuleList, config: ModelConfig, device: torch.device, trial: Callable[[], object]
) -> None:
    """Compile ``blocks`` as ``config`` says for ``device``; with ``compile="auto"``, leave them plain where that fails.

    Block by block: blocks of one shape share the compiled code, so that compiling takes seconds, and another choice of
    layers compiles nothing. Fusion across blocks would not gain: they pass one tensor each.

    Args:
        trial: runs the blocks on all the code that batches of the config's nominal size need. torch compiles in the
            first call. A failure in a later one would change a teacher's bits between two batches.

    Raises:
        ConfigError: ``config.compile`` asks for what torch cannot do here.
        torch.OutOfMemoryError: the trial found too little memory.
        Exception: the trial fails without compiled code too.
    """
    _leave_plain(blocks)
    mode = config.compile_mode(device.type)
    if mode is None:
        return
    # By default, torch compiles the first size that a process meets for that size alone, and the next one for any size:
    # a teacher's bits would depend on what the process has compiled before. A part that torch cannot compile, or one
    # size too many for it, would be computed without compiled code, and nobody would hear of it: `fullgraph` raises.
    for block in blocks:
        block.compile(mode=mode, dynamic=not config.preprocessing.has_fixed_size, fullgraph=True, **_room())
    try:
        trial()
    except Exception as error:  # noqa: BLE001 - torch, Triton and C compilers raise errors of many kinds
        failure = error
    else:
        return
    _leave_plain(blocks)
    if isinstance(_root_of(failure), torch.OutOfMemoryError):
        raise failure  # it says nothing of compiling
    trial()  # if it raises again, compiling is not to blame
    reason = _reason_of(failure)
    if config.compile != "auto":
        raise ConfigError(
            f"compile must be False where torch.compile does not work; got {config.compile!r}, and on {device} "
            f"{reason} (install what is missing, such as Triton or a C compiler; compile='auto' does without)"
        ) from failure
    logger.warning(
        "compile='auto' leaves the model on %s as it is, which is slower, since torch.compile fails there: %s. Install "
        "what is missing: Triton, which comes with torch for CUDA, and a C compiler such as gcc. "
        "%s(compile=False) does not try.",
        device,
        reason,
        type(config).__name__,
    )


def _room() -> dict[str, Any]:
    """Room for the code of several teachers in one process: the four stages of one ConvNeXt fill torch's limit of 8."""
    known = inspect.signature(torch.compile).parameters  # older releases have only the limit of the whole process
    return {"recompile_limit": 64} if "recompile_limit" in known else {}


def _leave_plain(blocks: nn.ModuleList) -> None:
    for block in blocks:
        compiled: Any = None  # torch has no public way back
        block._compiled_call_impl = compiled


def _root_of(error: Exception) -> Exception:
    """What went wrong, without torch's wrapping."""
    while isinstance(inner := getattr(error, "inner_exception", None), Exception):
        error = inner
    return error


def _reason_of(error: Exception) -> str:
    """The first line of what went wrong."""
    error = _root_of(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
