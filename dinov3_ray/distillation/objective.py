"""Stands where recipes come."""

from __future__ import annotations

import torch
from torch import nn

from dinov3_ray.features import FeatureSpec
from dinov3_ray.training.losses import DistillationLoss
from dinov3_ray.training.taps import FeatureTap


class Plain(nn.Module):
    def __init__(self, student, channels, images, layers, device):
        super().__init__()
        name = layers[0] if layers else student.last_level
        self.__dict__["tap"] = FeatureTap(student, name)
        with torch.no_grad(), FeatureTap(student, name) as tap:
            mode = student.training
            student.eval()(images)
            student.train(mode)
            found = tap.take().shape[1]
        self.loss = DistillationLoss("cosine", projector=nn.Conv2d(found, channels, 1)).to(device)
        self.spec = FeatureSpec(feature_map=True)
        self.image_size = None

    def forward(self, targets, boxes=None):
        return self.loss(self.tap.take(), targets)


class PlainRecipe:
    name = "plain"
    spec = FeatureSpec(feature_map=True)
    image_size = None

    def for_student(self, student, teacher, images, layers=None, select=None):
        channels = teacher.extract_feature_map(images).shape[1]
        return Plain(student, channels, images, layers, images.device)


def get(name):
    return PlainRecipe()
