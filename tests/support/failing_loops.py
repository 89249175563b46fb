"""Loops over a prefetch that fail at different places."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from streams import picture
from torch import Tensor

from dinov3_ray import FeatureSpec, RemoteTeacher

SPEC = FeatureSpec(cls=True, feature_map=True)


def batches(count: int = 20) -> list[Tensor]:
    return [torch.stack([picture(2 * number + row, (48, 80)) for row in range(2)]) for number in range(count)]


def idle(remote: RemoteTeacher) -> bool:
    statistics = remote.statistics()
    return statistics.in_flight == statistics.waiting == statistics.in_flight_bytes == 0


class MistakeError(Exception):
    pass


def fail_in_loader(remote: RemoteTeacher, error: Exception) -> None:
    def loader() -> Iterator[Tensor]:
        yield from batches(8)
        raise error

    for _ in remote.prefetch(loader(), SPEC):
        pass


def fail_in_body(remote: RemoteTeacher, error: Exception) -> None:
    for number, _ in enumerate(remote.prefetch(batches(), SPEC)):
        if number == 3:
            raise error


def fail_in_images(remote: RemoteTeacher, error: Exception) -> None:
    left = iter(range(5))

    def images(batch: Tensor) -> Tensor:
        if next(left, None) is None:
            raise error
        return batch

    for _ in remote.prefetch(batches(), SPEC, images=images):
        pass
