"""How far a student is from its teacher: :class:`DistillationLoss`, and the functions that it is made of."""

from dinov3_ray.training.losses.distances import cosine_loss, gram_loss, mse_loss, smooth_l1_loss
from dinov3_ray.training.losses.distillation_loss import DistillationLoss, LossKind
from dinov3_ray.training.losses.projectors import make_projector

__all__ = ["DistillationLoss", "LossKind", "cosine_loss", "gram_loss", "make_projector", "mse_loss", "smooth_l1_loss"]
