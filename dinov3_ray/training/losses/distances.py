"""How far a student's features are from a teacher's, as functions.

Shapes: B images, D teacher channels, C student channels, a grid of h × w locations, N = h·w.

All of them compute in float32, or in the student's dtype if that is wider. Autocast does not change this: in half
precision, sums of squares overflow and a cosine near 1 is rounded to 1. The teacher may have any floating dtype and
gets no gradient. The result is a scalar.

``weight_Bhw`` is the weight w_p >= 0 of each location p. The loss is then Σ w_p·l_p / Σ w_p over the batch, where l_p
is the loss of one location; equal weights give the plain mean. If all weights are 0 (only boxes count, and no image has
one), the loss is 0. Its gradients are then 0 and not missing, as DDP needs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_ray.errors import InputError

__all__ = ["cosine_loss", "gram_loss", "mse_loss", "queue_loss", "relation_loss", "smooth_l1_loss"]

_EPS = 1e-3
"""Vectors shorter than this are not scaled up to unit length.

The gradient of a cosine grows as 1 / length, and a ReLU network does give vectors of length 0. With the usual 1e-12,
one such vector spoils a step; with an fp16 GradScaler, it spoils every step. The length of a feature vector is about
the square root of its channels, so that the limit does not touch it.
"""


def cosine_loss(student: Tensor, teacher: Tensor, weight_Bhw: Tensor | None = None) -> Tensor:
    """1 - cos(s_p, t_p) at each location p, averaged.

    cos(s, t) = s·t / (max(|s|, ε) · max(|t|, ε)) over channels, ε = 0.001.

    Args:
        student: maps [B, D, h, w], or vectors [B, D].
        teacher: the same shape.
        weight_Bhw: [B, h, w], or [B] for vectors; see the module's docstring.

    Source: RT-DETRv4 (arXiv 2510.25257), on the whole map and with a projector. Weights from boxes make a detector
    resemble its teacher on objects most.
    """
    student, teacher = _widened(student, teacher)
    return _mean(1 - (_unit(student) * _unit(teacher)).sum(1), weight_Bhw)


def mse_loss(student: Tensor, teacher: Tensor, weight_Bhw: Tensor | None = None) -> Tensor:
    """(s - t)², averaged over channels, then over locations; arguments as in :func:`cosine_loss`.

    Source: FitNets (arXiv 1412.6550); lightly-train's distillation on resized maps.
    """
    student, teacher = _widened(student, teacher)
    return _mean((student - teacher).square().mean(1), weight_Bhw)


def smooth_l1_loss(student: Tensor, teacher: Tensor, weight_Bhw: Tensor | None = None, *, beta: float = 1.0) -> Tensor:
    """0.5·d²/β where d = |s - t| < β, else d - 0.5·β; averaged over channels, then over locations.

    The outlier channels of a DINOv3 map weigh less here than in :func:`mse_loss`. Arguments as in :func:`cosine_loss`.

    Source: Fast R-CNN (arXiv 1504.08083), with torch's β.
    """
    student, teacher = _widened(student, teacher)
    return _mean(F.smooth_l1_loss(student, teacher, reduction="none", beta=beta).mean(1), weight_Bhw)


def gram_loss(student: Tensor, teacher: Tensor, weight_Bhw: Tensor | None = None, *, per_image: bool = True) -> Tensor:
    """Mean of (ŝ_p·ŝ_q - t̂_p·t̂_q)² over all pairs of locations p, q, where x̂ = x / max(|x|, ε).

    It compares which patches resemble which, so student and teacher may have different channels. It needs two N × N
    matrices per image. At 80 × 80 locations each takes 164 MB in float32: use a coarser grid (``align="teacher"``).

    Args:
        student: [B, C, h, w].
        teacher: [B, D, h, w].
        weight_Bhw: [B, h, w]; a pair has the weight w_p·w_q, and the mean is Σ w_p·w_q·(...)² / Σ w_p·w_q.
        per_image: pairs within an image, as the paper writes it. False adds the pairs across the batch, which is the
            official code's default (``gram.img_level: false``); the matrices then have (B·N)² entries.

    Source: DINOv3 (arXiv 2508.10104, Gram anchoring) and ``dinov3/loss/gram_loss.py``. As by default there, vectors are
    normalised and negative similarities are kept; that code has ε = 1e-12.
    """
    student, teacher = _widened(student, teacher, same_channels=False)
    student_BNC, teacher_BND = (_unit(each).flatten(2).mT for each in (student, teacher))
    weight_BN = None if weight_Bhw is None else weight_Bhw.flatten(1)
    if not per_image:
        student_BNC, teacher_BND = student_BNC.flatten(0, 1)[None], teacher_BND.flatten(0, 1)[None]
        weight_BN = None if weight_BN is None else weight_BN.flatten()[None]
    with torch.autocast(student.device.type, enabled=False):  # it would compute these products in half precision
        difference_BNN = student_BNC @ student_BNC.mT - teacher_BND @ teacher_BND.mT
    pairs_BNN = None if weight_BN is None else weight_BN[:, :, None] * weight_BN[:, None, :]
    return _mean(difference_BNN.square(), pairs_BNN)


def relation_loss(
    student: Tensor, teacher: Tensor, weight_Bhw: Tensor | None = None, *, temperature: float = 0.07
) -> Tensor:
    """KL divergence between how the teacher and the student rank the locations that resemble a location, averaged.

    Of each location p: KL(softmax_q(t̂_p·t̂_q / τ) || softmax_q(ŝ_p·ŝ_q / τ)), over the locations q of its image. It
    needs two N × N matrices per image, as :func:`gram_loss` does.

    Args:
        student: [B, C, h, w].
        teacher: [B, D, h, w].
        weight_Bhw: [B, h, w], of the locations p.
        temperature: τ.

    Source: LightlyTrain's ``distillationv3``, the local loss (repository lightly-ai/lightly-train,
    ``distillationv3_loss.py``).
    """
    student, teacher = _widened(student, teacher, same_channels=False)
    student_BNC, teacher_BND = (_unit(each).flatten(2).mT for each in (student, teacher))
    with torch.autocast(student.device.type, enabled=False):
        student_BNN, teacher_BNN = student_BNC @ student_BNC.mT, teacher_BND @ teacher_BND.mT
    return _mean(
        _divergence(student_BNN, teacher_BNN, temperature), None if weight_Bhw is None else weight_Bhw.flatten(1)
    )


def queue_loss(student: Tensor, teacher: Tensor, queue_QD: Tensor, *, temperature: float = 0.07) -> Tensor:
    """KL divergence between the teacher's and the student's likeness to the images of a queue, averaged over images.

    Of each image: KL(softmax_q(t̂·q / τ) || softmax_q(ŝ·q / τ)), over the rows q of the queue.

    Args:
        student: vectors [B, D].
        teacher: vectors [B, D].
        queue_QD: [Q, D], the teacher's vectors of this batch and of earlier ones, of unit length; a row that is not
            filled yet is 0.
        temperature: τ.

    Source: LightlyTrain's ``distillationv3``, the global loss; so its ``distillationv1``.
    """
    student, teacher = _widened(student, teacher)
    queue_QD = queue_QD.to(student.dtype)
    with torch.autocast(student.device.type, enabled=False):
        student_BQ, teacher_BQ = _unit(student) @ queue_QD.mT, _unit(teacher) @ queue_QD.mT
    return _divergence(student_BQ, teacher_BQ, temperature).mean()


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(softmax(teacher / τ) || softmax(student / τ)) over the last dimension."""
    target = (teacher / temperature).softmax(-1)
    return F.kl_div((student / temperature).log_softmax(-1), target, reduction="none").sum(-1)


def _widened(student: Tensor, teacher: Tensor, *, same_channels: bool = True) -> tuple[Tensor, Tensor]:
    """Both in the computing dtype, the teacher detached."""
    shapes = [[*each.shape[:1], *each.shape[1 if same_channels else 2 :]] for each in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"student and teacher must have the same {'shape' if same_channels else 'images and grid'}; "
            f"got {list(student.shape)} and {list(teacher.shape)} (DistillationLoss aligns them)"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def _unit(vectors: Tensor) -> Tensor:
    """[B, D, ...] divided by its length over D, or by ε if that is more."""
    length: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / length.clamp_min(_EPS)


def _mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Σ w·l / Σ w; the plain mean without weights."""
    if weights is None:
        return losses.mean()
    if weights.shape != losses.shape:
        raise InputError(f"weights must be {list(losses.shape)}, one per location; got {list(weights.shape)}")
    weights = weights.to(losses.dtype)
    return (losses * weights).sum() / weights.sum().clamp_min(torch.finfo(losses.dtype).tiny)
