"""One forward pass of a network, which keeps only what a FeatureSpec asks for.

The loop over the blocks ends at the last block that is needed, and cuts each map out when its block has run.

Query, key and value stay three products, as in transformers. One product for them gave the same bits and no speed on a
CPU (bfloat16, the attention of one ViT-S block, 8 images of 224 px: 247 ms and 249 ms of CPU time).

Shapes: B images, N = P + h × w tokens (P that come before the patches: of a DINOv3, CLS and R registers; patches row by
row), D channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from dinov3_ray.features import Features, FeatureSpec, in_channels_last, resample_map
from dinov3_ray.model.openvino_blocks import OpenVinoBlocks
from dinov3_ray.network.convnext import ConvNext
from dinov3_ray.network.transformers_network import TransformersNetwork
from dinov3_ray.network.vit import ViT

__all__ = ["Network", "run_backbone"]

Network = ViT | ConvNext | TransformersNetwork


def run_backbone(
    model: Network,
    pixels_B3HW: Tensor,
    spec: FeatureSpec,
    *,
    compiled: bool = False,
    openvino: OpenVinoBlocks | None = None,
) -> Features:
    """The outputs that ``spec`` asks for, each with memory of its own; maps at the spec's ``map_size``.

    They have the dtype of the weights. Maps are in channels_last order, in which their tokens (or a ConvNeXt's stages)
    are computed: nothing permutes them.

    A ConvNeXt's CLS is its normed global average. Its layers are its four stages, whose widths and strides differ. The
    final norm fits the last stage only and is not applied to the others, as in the official
    ``get_intermediate_layers``. ``compiled``: whether the blocks are. ``openvino`` computes them in their place.
    """
    depth = len(model.blocks)
    asked = spec.blocks(depth)
    needed = depth if _wants_final(spec) else max(asked) + 1
    if openvino is None:
        outputs = _blocks_outputs(model, pixels_B3HW, needed, compiled)
    else:
        outputs = openvino(pixels_B3HW, sorted({*asked, needed - 1}))
    kept: dict[int, Tensor] = {}
    for index, hidden in outputs:
        if index in asked:
            kept[index] = _layer(model, index, hidden, pixels_B3HW, spec)
    layers = {name: kept[index] for name, index in zip(spec.layers, asked, strict=True)}
    if not _wants_final(spec):
        return Features(layers=layers)
    if isinstance(model, ConvNext):
        return _finish(model, model.layer_norm(model.tokens(hidden)), hidden.shape[-2:], spec, layers)
    return _finish(model, model.norm(hidden), _grid(model, pixels_B3HW), spec, layers)


def _blocks_outputs(model: Network, pixels_B3HW: Tensor, needed: int, compiled: bool) -> Iterator[tuple[int, Tensor]]:
    """The index and the output of each of the first ``needed`` blocks."""
    given: Any  # of the kind that the model's own step() takes
    hidden, given = model.begin(pixels_B3HW)
    if compiled and len(hidden) > 1:
        # One compiled code for all batch sizes but 1. By default, torch compiles one for the first size and another for
        # all others, so that results would depend on which size came first.
        torch._dynamo.mark_dynamic(hidden, 0)
    for index, block in enumerate(islice(model.blocks, needed)):
        hidden = model.step(block, hidden, given)
        yield index, hidden


def _layer(model: Network, index: int, hidden: Tensor, pixels_B3HW: Tensor, spec: FeatureSpec) -> Tensor:
    """The map of block ``index``, whose output is ``hidden``."""
    if not isinstance(model, ConvNext):
        patches_BND = hidden[:, model.num_prefix_tokens :]
        cut_BND = model.norm(patches_BND) if spec.norm else _cut_out(patches_BND)
        return _as_map(cut_BND, _grid(model, pixels_B3HW), spec)
    if spec.norm and index == len(model.blocks) - 1:
        return _as_map(model.layer_norm(_as_tokens(hidden)), hidden.shape[-2:], spec)
    return _finished_map(hidden, spec)


def _grid(model: ViT | TransformersNetwork, pixels_B3HW: Tensor) -> tuple[int, ...]:
    return tuple(side // model.architecture.patch_size for side in pixels_B3HW.shape[-2:])


def _finish(
    model: Network, tokens_BND: Tensor, grid: tuple[int, ...], spec: FeatureSpec, layers: dict[int, Tensor]
) -> Features:
    """Split the last block's normed tokens into outputs."""
    prefix = model.num_prefix_tokens
    return Features(
        cls=_cut_out(tokens_BND[:, 0]) if spec.cls else None,
        feature_map=_as_map(_cut_out(tokens_BND[:, prefix:]), grid, spec) if spec.feature_map else None,
        registers=_cut_out(tokens_BND[:, prefix - model.num_register_tokens : prefix]) if spec.registers else None,
        layers=layers,
    )


def _wants_final(spec: FeatureSpec) -> bool:
    return spec.cls or spec.feature_map or spec.registers


def _as_tokens(map_BDhw: Tensor) -> Tensor:
    return map_BDhw.flatten(2).transpose(1, 2)


def _cut_out(tokens: Tensor) -> Tensor:
    # Not contiguous(): one image's tokens would stay a view, and keep all others' memory.
    return tokens.clone(memory_format=torch.contiguous_format)


def _as_map(patches_BND: Tensor, grid: tuple[int, ...], spec: FeatureSpec) -> Tensor:
    map_BhwD = patches_BND.view(len(patches_BND), *grid, -1)
    return _finished_map(map_BhwD.permute(0, 3, 1, 2), spec)


def _finished_map(map_BDhw: Tensor, spec: FeatureSpec) -> Tensor:
    resampled = map_BDhw if spec.map_size is None else resample_map(map_BDhw, spec.map_size)
    return resampled if in_channels_last(resampled) else resampled.clone(memory_format=torch.channels_last)
