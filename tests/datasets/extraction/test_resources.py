"""Who computes where: what a cluster gives, shared out."""

from __future__ import annotations

import pytest

from dinov3_ray.datasets.extraction.resources import Resources, allocate
from dinov3_ray.errors import ConfigError


def test_one_actor_a_gpu() -> None:
    found = allocate({"CPU": 32, "GPU": 4}, 1, reentrant=True)
    assert (found.replicas, found.num_gpus) == (4, 1)
    assert (found.passes, found.threads) == (1, None)  # one thread does all the work of a GPU
    assert found.window == 8


def test_without_a_gpu_a_reentrant_teacher_makes_several_passes_on_fewer_threads_each() -> None:
    for cpus, passes, threads in ((1, 1, 1), (2, 2, 1), (8, 4, 2), (64, 4, 16)):
        found = allocate({"CPU": cpus}, 1, reentrant=True)
        assert (found.replicas, found.passes, found.threads) == (1, passes, threads)
        assert (allocate({"CPU": cpus}, 1).passes, allocate({"CPU": cpus}, 1).threads) == (1, cpus)


@pytest.mark.parametrize("cpus", [1, 2, 3, 8])
@pytest.mark.parametrize("replicas", [None, 2, 5])
def test_actors_leave_cpus_to_decode(cpus: int, replicas: int | None) -> None:
    found = allocate({"CPU": cpus}, 1, Resources(replicas=replicas))
    assert found.replicas * found.num_cpus + found.decode_cpus <= cpus
    assert found.decode_cpus > 0


def test_actors_of_nodes_that_died_leave_cpus_to_decode_on_those_that_are_left() -> None:
    for cpus in (1, 2, 8):
        found = allocate({"CPU": 4 * cpus}, 4)
        assert found.replicas == 4
        assert found.replicas * found.num_cpus + found.decode_cpus <= cpus


def test_a_pool_is_asked_by_one_actor_with_several_calls_in_flight() -> None:
    found = allocate({"CPU": 8, "GPU": 4}, 2, pooled=True)
    assert (found.replicas, found.num_gpus, found.threads) == (1, 0, None)
    assert found.passes > 1


def test_others_cpus_are_not_waited_for() -> None:
    for free, decode_cpus in ((8, 1.0), (1.2, 0.6), (0.3, 0.1), (0.0, 0.0)):
        found = allocate({"CPU": 8}, 2, pooled=True, free_cpus=free)
        assert (found.num_cpus, found.decode_cpus) == (0.0, decode_cpus)
    assert allocate({"CPU": 2, "GPU": 1}, 1, free_cpus=1.0).decode_cpus == 0.9


def test_more_than_the_cluster_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="must fit the cluster's 1 GPUs; got 2 x 1"):
        allocate({"CPU": 8, "GPU": 1}, 1, Resources(replicas=2))
    with pytest.raises(ConfigError, match="decoders must be an integer, at least 1; got 0"):
        Resources(decoders=0)


@pytest.mark.parametrize("num_gpus", [-1, 1.5, 2, float("nan"), True, "1"])
def test_a_teacher_takes_one_gpu_at_most(num_gpus: float) -> None:
    with pytest.raises(
        ConfigError, match=r"num_gpus must be a number from 0 to 1, .* \(for more GPUs, more replicas\)"
    ):
        Resources(num_gpus=num_gpus)
