"""The arms of the proof: ways to train one student.

All arms have the same labels and the same supervised steps. They differ in what comes before or beside these steps.

Shapes: B images, D teacher channels, a grid of h × w patches, y × x cells; U unlabelled scenes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_ray.scenes.learning_rate import rate_factor
from dinov3_ray.scenes.scene_teacher import SceneTeaching
from dinov3_ray.scenes.scenery import Scenery
from dinov3_ray.scenes.segmentation import SegmentationHead
from dinov3_ray.scenes.student import Student
from dinov3_ray.training.losses import DistillationLoss

__all__ = ["ARMS", "QUICK_PROOF", "Arm", "ProofSettings", "TeacherName", "partners", "train_arm"]

TeacherName = Literal["trained", "random"]

_WEIGHT_DECAY = 0.01

_of_the_process = threading.Lock()  # torch's own generator of random numbers, where arms run in several threads


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train a student.

    Attributes:
        title: for tables and pictures.
        teacher: whose map it distils; None has the labels alone.
        joint: whether it distils in the supervised steps, and not before them.
        swapped: whether each image gets the target of another one.
    """

    title: str
    teacher: TeacherName | None = None
    joint: bool = False
    swapped: bool = False


ARMS = {
    "labels": Arm("labels alone"),
    "random": Arm("random teacher first", "random"),
    "swapped": Arm("swapped targets first", "trained", swapped=True),
    "joint": Arm("trained teacher beside", "trained", joint=True),
    "trained": Arm("trained teacher first", "trained"),
}


@dataclass(frozen=True, slots=True)
class ProofSettings:
    """What is done in each arm.

    Attributes:
        seeds: how many. A seed decides the labels, the student's first weights and the order of the scenes, for all
            arms alike.
        labels, unlabelled, unseen: numbers of scenes: with labels, to distil on, and to measure on.
        steps, label_batch, rate: of the supervised training.
        distil_steps, batch, distil_rate: of distilling before it. Beside it, there are ``steps`` of it.
        channels: of the student.
        teaching: how the teacher is made that knows the scenes.
        replicas: in each pool.
    """

    seeds: int = 5
    labels: int = 32
    unlabelled: int = 3000
    unseen: int = 300
    steps: int = 200
    label_batch: int = 16
    rate: float = 1e-3
    distil_steps: int = 200
    batch: int = 16
    distil_rate: float = 3e-3
    channels: int = 64
    teaching: SceneTeaching = field(default_factory=SceneTeaching)
    replicas: int = 1


QUICK_PROOF = ProofSettings(
    seeds=3, unlabelled=1000, unseen=100, steps=60, distil_steps=100, teaching=SceneTeaching(scenes=1000, steps=200)
)


def train_arm(
    arm: Arm,
    seed: int,
    labelled: Scenery,
    unlabelled_U3HW: Tensor,
    targets_UDhw: Tensor | None,
    settings: ProofSettings,
    on_step: Callable[[], None] = lambda: None,
) -> Student:
    """The student of ``arm``, trained, in eval mode.

    Args:
        labelled: its labels.
        unlabelled_U3HW: uint8.
        targets_UDhw: the teacher's maps of these; None without a teacher.
        on_step: called before each step, to stop by an exception.
    """
    generator = torch.Generator().manual_seed(seed)
    with _of_the_process, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same first weights in all arms: what differs in shape comes last
        head = SegmentationHead(settings.channels)
        student = Student(1 if targets_UDhw is None else targets_UDhw.shape[1], channels=settings.channels)
    distil = DistillationLoss("cosine", align="teacher")

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        assert targets_UDhw is not None
        partner_U = partners(len(unlabelled_U3HW), seed) if arm.swapped else torch.arange(len(unlabelled_U3HW))
        while True:
            chosen_B = torch.randint(len(unlabelled_U3HW), (settings.batch,), generator=generator)
            yield unlabelled_U3HW[chosen_B], targets_UDhw[partner_U[chosen_B]]

    stream = None if targets_UDhw is None else batches()
    if stream is not None and not arm.joint:
        optimizer = torch.optim.AdamW(student.parameters(), settings.distil_rate, weight_decay=_WEIGHT_DECAY)
        for step in range(settings.distil_steps):
            on_step()
            images_B3HW, targets_BDhw = next(stream)
            loss = distil(student(images_B3HW), targets_BDhw)
            _step(optimizer, settings.distil_rate * rate_factor(step / settings.distil_steps), loss)
    optimizer = torch.optim.AdamW(
        [*student.parameters(), *head.parameters()], settings.rate, weight_decay=_WEIGHT_DECAY
    )
    order = torch.Generator().manual_seed(seed)  # of its own: the same labels come in the same order in all arms
    for step in range(settings.steps):
        on_step()
        chosen_B = torch.randint(len(labelled), (settings.label_batch,), generator=order)
        batch = labelled[chosen_B].turned(order)
        loss = F.cross_entropy(head(student.features(batch.pictures)), batch.labels)
        if stream is not None and arm.joint:
            images_B3HW, targets_BDhw = next(stream)
            loss = loss + distil(student(images_B3HW), targets_BDhw)
        _step(optimizer, settings.rate * rate_factor(step / settings.steps), loss)
    return student.eval()


def partners(count: int, seed: int) -> Tensor:
    """For each of ``count`` images, at least 2, another one: int64 [count], each of them once, none its own partner."""
    shift = 1 + int(torch.randint(count - 1, (1,), generator=torch.Generator().manual_seed(seed)))
    return torch.arange(count).roll(shift)


def _step(optimizer: torch.optim.Optimizer, rate: float, loss: Tensor) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
