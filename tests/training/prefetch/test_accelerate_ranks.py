"""accelerate's dispatched loaders: a draw is a collective call, which all ranks must make in the same order."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

dispatched = pytest.importorskip("dispatched", reason="needs accelerate", exc_type=ImportError)


@pytest.mark.slow
def test_ranks_with_teachers_of_unlike_speed_draw_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(dispatched.train, (2, port, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(first) == len(second) == 22
    assert [synced for _, synced in first[:11]] == [False, False, True] * 3 + [False, True]
    images = [dispatched.picture(number, (32, 32)).long().sum() for number in range(44)]
    assert sum(total for total, _ in first[:11] + second[:11]) == sum(images)
