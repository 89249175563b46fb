"""Brings teachers of different scales to one scale: :class:`PhiS` standardises a teacher's features."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov3_ray.errors import ConfigError, InputError

__all__ = ["PhiS", "hadamard_matrix"]

_LEAST_VARIANCE = 1e-10
"""Of features that differ, as a part of their mean square: less is what rounding makes of equal ones."""


class PhiS(nn.Module):
    """PHI standardisation: all channels get mean 0 and the same variance, 1, without a distortion between them.

    y = (H·Uᵀ)(x - μ) / φ, where U holds the eigenvectors of the features' covariance, H is a Hadamard matrix of unit
    rows, and φ² is the mean of the eigenvalues. U makes the channels uncorrelated, H spreads each of them over all, so
    that one scale φ standardises every channel. It is a rotation and a scale: distances and angles from the mean stay
    as they were, and :meth:`inverse` gives x back.

    Its statistics are buffers: they are saved with the loss that has it, and take no gradient. They are those of
    :meth:`fit`; without it, in training mode, those of the first batch that is standardised, and of the batches of all
    ranks in a process group, which must all have one then. A batch of maps has enough locations; of CLS vectors, it has
    few, of which the scale is an estimate: :meth:`fit` takes more.

    Args:
        channels: D, for which a Hadamard matrix must be known (see :func:`hadamard_matrix`).

    Raises:
        ConfigError: no Hadamard matrix is known for D.

    Source: PHI-S (arXiv 2410.01680), and ``examples/common/phi_s.py`` of the repository NVlabs/RADIO, which takes a
    random rotation where no Hadamard matrix is known.
    """

    mean: Tensor
    rotation: Tensor
    scale: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        hadamard_matrix(channels)  # what is not known is refused now
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("rotation", torch.eye(channels))
        self.register_buffer("scale", torch.zeros(()))  # 0: not fitted
        self._seen_fitted = False  # on an accelerator, a look at the scale would be waited for in each step

    def fit(self, sample: Tensor | Iterable[Tensor]) -> PhiS:
        """Take the statistics of ``sample``: a teacher's maps [B, D, h, w] or vectors [B, D], in one tensor or several.

        Some thousand locations of images as the training has them will do. Returns itself.

        Raises:
            InputError: the features are of another width, not finite, or all the same.
        """
        parts = [sample] if isinstance(sample, Tensor) else list(sample)
        channels = len(self.mean)
        if not parts or any(part.ndim not in (2, 4) or part.shape[1] != channels for part in parts):
            shapes = ", ".join(str(list(part.shape)) for part in parts) or "nothing"
            raise InputError(f"sample must hold features [B, {channels}] or [B, {channels}, h, w]; got {shapes}")
        rows_ND = torch.cat([part.detach().double().cpu().movedim(1, -1).flatten(0, -2) for part in parts])
        self._take(rows_ND.new_tensor(len(rows_ND)), rows_ND.sum(0), rows_ND.T @ rows_ND)
        return self

    def _fit_first(self, features: Tensor) -> None:
        here = features.detach().cpu() if features.device.type == "mps" else features.detach()  # it has no float64
        rows_ND = here.double().movedim(1, -1).flatten(0, -2)
        moments = [rows_ND.new_tensor(len(rows_ND)), rows_ND.sum(0), rows_ND.T @ rows_ND]
        if dist.is_available() and dist.is_initialized():
            for each in moments:
                dist.all_reduce(each)
        self._take(*(each.cpu() for each in moments))

    @torch.no_grad()
    def _take(self, count: Tensor, sum_D: Tensor, products_DD: Tensor) -> None:
        """Take the statistics of as many rows, by their sum and that of their outer products, in float64."""
        mean_D = sum_D / count
        covariance_DD = (products_DD - count * mean_D.outer(mean_D)) / (count - 1).clamp(min=1)
        variance = covariance_DD.trace()
        if not bool(covariance_DD.isfinite().all()) or not variance > _LEAST_VARIANCE * mean_D.square().sum():
            raise InputError(
                "sample must be finite, and hold features that differ from one another (the first batch is the sample "
                "unless distiller.fit_statistics gets one)"
            )
        _, vectors_DD = torch.linalg.eigh(covariance_DD)
        self.mean.copy_(mean_D)
        self.rotation.copy_(hadamard_matrix(len(mean_D)) @ vectors_DD.T)
        self.scale.copy_((variance / len(mean_D)).sqrt())

    @property
    def fitted(self) -> bool:
        return bool(self.scale)

    def forward(self, features: Tensor) -> Tensor:
        """Maps [B, D, h, w] or vectors [B, D], standardised, in float32 at least.

        Raises:
            InputError: in eval mode, before there are statistics; or the first batch has none.
        """
        if not self._seen_fitted:
            if not self.fitted and not self.training:
                raise InputError(
                    "statistics must be there before features are standardised in eval mode (train first, or fit a "
                    "sample of the teacher's)"
                )
            if not self.fitted:
                self._fit_first(features)
            self._seen_fitted = True
        wide = features.to(torch.promote_types(features.dtype, torch.float32)).movedim(1, -1)
        with torch.autocast(features.device.type, enabled=False):
            rotated = (wide - self.mean.to(wide.dtype)) @ self.rotation.to(wide.dtype).T
        standardised: Tensor = (rotated / self.scale.to(wide.dtype)).movedim(-1, 1)
        return standardised

    def inverse(self, standardised: Tensor) -> Tensor:
        """The features of which :meth:`forward` gave ``standardised``, such as a student's output as the teacher's."""
        wide = standardised.to(torch.promote_types(standardised.dtype, torch.float32)).movedim(1, -1)
        with torch.autocast(standardised.device.type, enabled=False):
            rotated: Tensor = (wide * self.scale.to(wide.dtype)) @ self.rotation.to(wide.dtype)
        features: Tensor = (rotated + self.mean.to(wide.dtype)).movedim(-1, 1)
        return features

    def _load_from_state_dict(self, *args: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*args, **keywords)
        self._seen_fitted = False  # it may be of one that was not fitted

    def extra_repr(self) -> str:
        return f"{len(self.mean)}"


def hadamard_matrix(size: int) -> Tensor:
    """An orthogonal matrix [size, size] whose entries are all ±1/√size, in float64.

    Sylvester's construction for powers of 2, Paley's two for primes, and products of these: all widths of published
    DINOv3, DINOv2 and SigLIP models are among them.

    Raises:
        ConfigError: none of them gives this size.
    """
    for doublings in range(max(size, 1).bit_length()):
        core = size >> doublings
        if core << doublings != size:
            break
        matrix = _paley(core)
        if matrix is not None:
            for _ in range(doublings):
                matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
            return matrix.div(size**0.5)
    raise ConfigError(
        f"channels must be a number for which a Hadamard matrix is known, such as 16, 192, 384, 768, 1024; got {size}"
    )


def _paley(size: int) -> Tensor | None:
    """A Hadamard matrix of exactly this size: 1, q + 1 or 2·(q + 1) for a prime q; None if there is none of these."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size % 4 == 0 and _is_prime(size - 1):  # q = 3 mod 4: Paley's first
        skew = torch.zeros(size, size, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _residues(size - 1)
        return torch.eye(size, dtype=torch.float64) + skew
    if size % 8 == 4 and _is_prime(size // 2 - 1):  # q = 1 mod 4: his second
        half = size // 2
        symmetric = torch.zeros(half, half, dtype=torch.float64)
        symmetric[0, 1:], symmetric[1:, 0], symmetric[1:, 1:] = 1, 1, _residues(half - 1)
        plus, on_diagonal = ([[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(symmetric, torch.tensor(plus, dtype=torch.float64)) + torch.kron(
            torch.eye(half, dtype=torch.float64), torch.tensor(on_diagonal, dtype=torch.float64)
        )
    return None


def _residues(prime: int) -> Tensor:
    """[q, q], at i, j: 1 if i - j is a square modulo q, -1 if it is not, 0 on the diagonal."""
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[torch.arange(1, prime).square() % prime] = 1.0
    character[0] = 0.0
    at = torch.arange(prime)
    return character[(at[:, None] - at[None, :]) % prime]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, int(number**0.5) + 1))
