"""How far a student is from its teacher: :class:`DistillationLoss`, and what it is made of and made into."""

from dinov3_ray.training.losses.distances import (
    cosine_loss,
    gram_loss,
    mse_loss,
    queue_loss,
    relation_loss,
    smooth_l1_loss,
)
from dinov3_ray.training.losses.distillation_loss import ClsLossKind, DistillationLoss, LossKind, TeacherQueue
from dinov3_ray.training.losses.gradient_share import GradientShare
from dinov3_ray.training.losses.phi_s import PhiS
from dinov3_ray.training.losses.projectors import ProjectorKind, make_projector
from dinov3_ray.training.losses.schedule import WeightSchedule
from dinov3_ray.training.losses.terms import Term, WeightedTerms

__all__ = [
    "ClsLossKind",
    "DistillationLoss",
    "GradientShare",
    "LossKind",
    "PhiS",
    "ProjectorKind",
    "TeacherQueue",
    "Term",
    "WeightSchedule",
    "WeightedTerms",
    "cosine_loss",
    "gram_loss",
    "make_projector",
    "mse_loss",
    "queue_loss",
    "relation_loss",
    "smooth_l1_loss",
]
