"""What a launcher's environment says of a process."""

from __future__ import annotations

import pytest

from dinov3_ray.pool.shared_ray import Rank

TORCHRUN = {"MASTER_ADDR": "here", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "7"}


@pytest.mark.parametrize(
    ("environment", "local_rank"),
    [
        ({}, None),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, None),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 1),
        ({"RANK": "5", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "1"}, None),  # one on each node
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1),  # Lightning's own launcher
        ({"RANK": "1", "WORLD_SIZE": "2"}, 1),  # torch.multiprocessing, as tutorials have it
        ({"WORLD_SIZE": "2"}, None),
        ({"RANK": "x", "WORLD_SIZE": "y"}, None),
    ],
    ids=str,
)
def test_a_rank_is_one_of_several_on_its_node(environment: dict[str, str], local_rank: int | None) -> None:
    rank = Rank.of(environment)
    assert (rank.local_rank if rank else None) == local_rank


def test_ranks_of_one_launch_have_its_name_and_those_of_others_have_not() -> None:
    first, second = (Rank.of({**TORCHRUN, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}) for rank in "01")
    other = Rank.of({**TORCHRUN, "MASTER_PORT": "29501", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"})
    assert first is not None
    assert second is not None
    assert other is not None
    assert first.launch == second.launch != other.launch
