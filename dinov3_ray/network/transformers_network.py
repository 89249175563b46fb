"""A vision model of transformers, taken apart into embeddings, blocks and final norm, so that it runs as ours do.

Nothing is known of the model's class. How it is put together is found out when it is made, and proven by a run: the
parts must give the last hidden state of transformers' own forward pass, bit for bit.

Shapes: B images, N = P + h × w tokens (P that come before the patches, patches row by row), D channels.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_ray.config.architecture import TransformersArchitecture
from dinov3_ray.config.preprocessing import Size
from dinov3_ray.errors import ConfigError

__all__ = ["TransformersNetwork"]

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""What transformers gives each block besides the tokens."""


class TransformersNetwork(nn.Module):
    """A transformers model in parts.

    Args:
        model: with its weights, on its device, in eval mode. It belongs to this network from now on.
        architecture: what its configuration says.
        size: (h, w) of the images for the run that proves the parts.
        any_size: whether they are proven at another size too, since images will have any.

    Attributes:
        model: the given one without its blocks: it serves for what comes before them. Parts that the last hidden state
            does not need, such as poolers, are removed.
        blocks: what ``FeatureSpec.layers`` counts.
        norm: what the last block's tokens go through; an identity in models, such as CLIP's, whose last hidden state
            is not normed.
        has_cls: whether a CLS token is there.
        num_register_tokens: R.

    Raises:
        ConfigError: the model does not consist of such parts, or cannot compute images of these sizes.
    """

    def __init__(
        self, model: nn.Module, architecture: TransformersArchitecture, size: Size, *, any_size: bool = False
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.model = model
        self._resizes_positions = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self.num_register_tokens = architecture.num_register_tokens
        pixels_23HW = _two_images(size, architecture.patch_size, next(model.parameters()))
        another = _other_size(size, architecture.patch_size) if any_size else size
        others_23HW = _two_images(another, architecture.patch_size, pixels_23HW)
        with torch.no_grad():
            expected_2ND = self._run_whole(pixels_23HW, size)
            others_2ND = self._run_whole(others_23HW, another, any_size=any_size)
            self.blocks = self._take_blocks_out()
            tokens_2ND, given, called = self._probe(pixels_23HW)
            self.num_prefix_tokens = self._count_prefix(tokens_2ND, size)
            self.norm = self._find_norm(self._run_blocks(tokens_2ND, given), expected_2ND)
            if not torch.equal(self(others_23HW), others_2ND):
                raise self._unlike(f"at {_by(another)} px its parts do not give its last hidden state")
        self.has_cls = self.num_prefix_tokens > self.num_register_tokens
        self._prune(called)

    def _run_whole(self, pixels_23HW: Tensor, size: Size, *, any_size: bool = False) -> Tensor:
        """The last hidden state, [2,N,D], as transformers computes it."""
        try:
            expected_2ND: Tensor = self.model(pixel_values=pixels_23HW, **self._options(size)).last_hidden_state
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            why = f"{self.architecture.model_type} of transformers fails with {type(error).__name__}: {error}"
            own = self._native_size
            if own[0] != own[1]:
                why += f" (its code may take square positions only; those of this model are of {_by(own)} px)"
            if size != own:
                got = f"one that follows the images, of which one has {_by(size)}" if any_size else _by(size)
                raise ConfigError(
                    f"image_size must be one that the model can compute (its own is {_by(own)}); got {got}, and {why}"
                ) from error
            raise self._unlike(
                f"at its own size, {_by(own)}, it cannot compute [2,3,{own[0]},{own[1]}]: it takes more than one "
                f"image's pixel_values (such as text or frames), or other ones; {why}"
            ) from error
        return expected_2ND

    def _probe(self, pixels_23HW: Tensor) -> tuple[Tensor, Given, set[nn.Module]]:
        """What :meth:`begin` returns, and the modules that it called."""
        called: set[nn.Module] = set()
        hooks = [
            module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in self.model.modules()
        ]
        try:
            tokens_2ND, given = self.begin(pixels_23HW)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
            raise self._unlike(f"its blocks are not called one after the other ({error})") from error
        finally:
            for hook in hooks:
                hook.remove()
        return tokens_2ND, given, called

    def _run_blocks(self, tokens_2ND: Tensor, given: Given) -> Tensor:
        try:
            for block in self.blocks:
                tokens_2ND = self.step(block, tokens_2ND, given)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            raise self._unlike(f"a block fails with {type(error).__name__}: {error}") from error
        return tokens_2ND

    def _prune(self, called: set[nn.Module]) -> None:
        """Remove what comes after the blocks: of their holders, the parts that were not ``called``."""
        for holder in list(self.model.modules()):
            if not any(isinstance(part, _Gate) for part in holder.modules()):
                continue
            for name, child in list(holder.named_children()):
                if called.isdisjoint(child.modules()):
                    setattr(holder, name, None)

    @property
    def attention(self) -> str:
        """The name of what computes attention."""
        return str(self.model.config._attn_implementation)  # type: ignore[union-attr]

    def begin(self, pixels_B3HW: Tensor) -> tuple[Tensor, Given]:
        """The tokens before the first block, [B,N,D], and what else each block is given."""
        pixels_B3HW = pixels_B3HW.to(next(self.blocks.parameters()).dtype)
        height, width = pixels_B3HW.shape[-2:]
        try:
            self.model(pixel_values=pixels_B3HW, **self._options((height, width)))
        except _BlocksReached as reached:
            return reached.tokens_BND, reached.given
        raise AssertionError("the forward pass must come to the blocks")

    def step(self, block: nn.Module, tokens_BND: Tensor, given: Given) -> Tensor:
        """The tokens after ``block``."""
        positional, named = given
        after = block(tokens_BND, *positional, **named)
        result: Tensor = after[0] if isinstance(after, tuple) else after
        return result

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """All tokens after the final norm, [B,N,D]."""
        tokens_BND, given = self.begin(pixels_B3HW)
        for block in self.blocks:
            tokens_BND = self.step(block, tokens_BND, given)
        normed_BND: Tensor = self.norm(tokens_BND)
        return normed_BND

    def _options(self, size: Size) -> dict[str, bool]:
        """Of the forward pass: at another size than its own, a model interpolates its positions only if it is asked."""
        return {"interpolate_pos_encoding": True} if self._resizes_positions and size != self._native_size else {}

    @property
    def _native_size(self) -> Size:
        return self.architecture.native_size

    def _take_blocks_out(self) -> nn.ModuleList:
        """The blocks; a gate has their place in the model."""
        depth = self.architecture.num_layers
        lists = [
            (holder, name, child)
            for holder in self.model.modules()
            for name, child in holder.named_children()
            if isinstance(child, nn.ModuleList) and len(child) == depth
        ]
        if not lists:
            raise self._unlike(f"it has no list of its {depth} blocks")
        holder, name, blocks = max(lists, key=lambda found: sum(1 for _ in found[2].parameters()))
        setattr(holder, name, nn.ModuleList([_Gate()]))
        return blocks

    def _count_prefix(self, tokens_2ND: Tensor, size: Size) -> int:
        """P, by where the first row's last patch went, in which alone the two images differ."""
        patch = self.architecture.patch_size
        rows, columns = (side // patch for side in size)
        if tokens_2ND.ndim == 3 and len(tokens_2ND) == 2:
            change_N = (tokens_2ND[0].float() - tokens_2ND[1].float()).abs().amax(dim=-1)
            changed = (change_N > change_N.max() / 64).nonzero().flatten().tolist()
            prefix = changed[0] - (columns - 1) if changed else -1
            alone = len(changed) == 1 and prefix == len(change_N) - rows * columns
            if alone and prefix >= self.num_register_tokens:
                return prefix
        raise self._unlike(
            f"of {_by(size)} px in patches of {patch} px, its first block gets {list(tokens_2ND.shape)} for 2 "
            f"images, which are not {rows} x {columns} patches row by row after {self.num_register_tokens} registers "
            "and a CLS token"
        )

    def _find_norm(self, tokens_2ND: Tensor, expected_2ND: Tensor) -> nn.Module:
        norms = [module for module in self.model.modules() if "norm" in type(module).__name__.lower()]
        for norm in (nn.Identity(), *norms):
            try:
                if torch.equal(norm(tokens_2ND), expected_2ND):
                    return norm
            except RuntimeError:  # it is for tokens of another width
                continue
        raise self._unlike("its blocks and a norm, one after the other, do not give its last hidden state")

    def _unlike(self, why: str) -> ConfigError:
        return ConfigError(
            f"the model must be a Vision Transformer: embeddings, blocks, and at most a norm; got "
            f"{self.architecture.model_type}, and {why}"
        )


class _BlocksReached(Exception):  # noqa: N818 - it is not an error
    def __init__(self, tokens_BND: Tensor, given: Given) -> None:
        super().__init__()
        self.tokens_BND = tokens_BND
        self.given = given


class _Gate(nn.Module):
    """In place of the blocks: it ends the forward pass with what the first of them would have been given."""

    def forward(self, hidden_states: Tensor, *positional: Any, **named: Any) -> Tensor:
        raise _BlocksReached(hidden_states, (positional, named))


def _two_images(size: Size, patch: int, like: Tensor) -> Tensor:
    """[2,3,H,W] with no two patches alike; the images differ in the last patch of the first row."""
    height, width = size
    count = torch.arange(3 * height * width, dtype=torch.float32)
    image_3HW = torch.sin(count * 0.7 + torch.sin(count * 0.013)).view(3, height, width)
    other_3HW = image_3HW.clone()
    right = width // patch * patch
    other_3HW[:, :patch, right - patch : right] *= -1
    return torch.stack([image_3HW, other_3HW]).to(like)


def _other_size(size: Size, patch: int) -> Size:
    """A size that is not square where ``size`` is: one patch lower, if there are two, and one wider."""
    height, width = size
    return height - patch if height >= 2 * patch else height, width + patch


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
