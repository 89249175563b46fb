"""Checks of a cluster: whether it answers and accepts this client, what its nodes have, and a round trip in a pool."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dinov3_ray.config import ModelConfig, TransformersConfig
from dinov3_ray.config.preprocessing import Size, ViewSize
from dinov3_ray.config.weights import WeightFiles
from dinov3_ray.doctor.machine_checks import (
    Finding,
    Severity,
    check_descriptors,
    check_disk,
    check_gpus,
    check_locks,
    check_model_root,
    check_ray_folder,
    check_shared_memory,
    check_token,
    check_versions,
    fine,
    installed_versions,
    problem,
    skipped,
    warning,
)
from dinov3_ray.errors import DinoV3Error, PoolError
from dinov3_ray.features import FeatureSpec
from dinov3_ray.pool.address import Address
from dinov3_ray.pool.cluster import Runtime, connect, open_way
from dinov3_ray.pool.probe import answers
from dinov3_ray.pool.spec import TeacherGiven, pickle_teacher, unpickle_teacher
from dinov3_ray.pool.teacher_pool import TeacherPool
from dinov3_ray.testing import FakeTeacher

__all__ = [
    "check_model_on_nodes",
    "check_nodes",
    "check_packages",
    "check_reach",
    "check_round_trip",
    "examine",
    "join_cluster",
]


_LEAST_STORE = 2 * 2**30  # the default of max_queued_bytes, per replica
_BATCH = 4
_SPEC = FeatureSpec(cls=True)
_PORTS = {"NodeManagerPort": "node manager", "ObjectManagerPort": "object manager", "MetricsExportPort": "metrics"}


def check_reach(address: str) -> Finding:
    """Check that the head at ``address`` answers, and accepts this machine's token and certificate."""
    head = Address.parse(address)
    obstacle = None if head is None else open_way(head)
    if obstacle is not None:
        return problem("cluster", obstacle.message, obstacle.remedy)
    return fine("cluster", f"{head or 'the Ray that is found here'} answers")


def join_cluster(address: str) -> tuple[Finding, Runtime | None]:
    """Join the cluster, which compares the versions of Ray and Python; no runtime if that fails."""
    try:
        runtime = connect(address)
    except PoolError as error:
        cause = str(error.__cause__ or error).strip()
        if "ersion mismatch" in cause:
            remedy = "install the cluster's versions of Ray and Python here (deploy/constraints.txt names those tested)"
            return problem("cluster's versions", " ".join(cause.split()), remedy), None
        return problem("cluster", cause, "look at the head's logs, in session_latest/logs of its --temp-dir"), None
    return fine("cluster's versions", f"Ray {ray.__version__} and this Python, as here"), runtime


def check_nodes(wanted_gpus: int) -> Iterator[Finding]:
    """Check the resources of the joined cluster's nodes, and that their ports answer from here."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    seen = f"nodes: {len(nodes)}, with {resources.get('CPU', 0):g} CPUs and {gpus} GPUs in all"
    if gpus < wanted_gpus:
        yield problem(
            "resources",
            f"{seen}; --gpus {wanted_gpus} asks for more",
            "start more worker nodes; where Ray sees no GPUs, install NVIDIA's driver and use `worker.sh --gpus N`",
        )
    else:
        yield fine("resources", seen)
    small = [node for node in nodes if node["Resources"].get("object_store_memory", 0) < _LEAST_STORE]
    if small:
        names = ", ".join(node["NodeManagerAddress"] for node in small)
        yield warning(
            "object store",
            f"less than {_LEAST_STORE >> 30} GiB on {names}: the queue of one replica may take as much",
            "start the node with a larger --object-store, or give the pool a smaller max_queued_bytes",
        )
    else:
        least = min(node["Resources"].get("object_store_memory", 0) for node in nodes)
        yield fine("object store", f"{least / 2**30:.1f} GiB or more on each node")
    closed = [f"{what} of {address}" for what, address in _ports(nodes) if not answers(address)]
    if closed:
        remedy = "open them between nodes and clients (deploy/README.md lists the ports)"
        yield problem("ports", f"closed to this machine: {', '.join(closed)}", remedy)
    else:
        yield fine("ports", f"{', '.join(_PORTS.values())} of each node answer from here")


def check_packages(here: Mapping[str, str], timeout: float) -> Finding:
    """Check that each node has the packages ``here`` (name: version of this process); it has ``timeout`` seconds."""

    # Inside, so that Ray sends its code to the nodes, whose package may not have this module.
    def installed(names: list[str]) -> dict[str, str]:
        found = {}
        for name in names:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "missing"
        return found

    hosts = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    different = []
    for host, reply in _ask_nodes(installed, ([*here],), hosts, timeout):
        if reply.error:
            different.append(f"{host} cannot run a task: {reply.error}")
            continue
        there = reply.value
        wrong = [f"{name} {there[name]} (here {here[name]})" for name in here if there[name] != here[name]]
        different += [f"{host} has {', '.join(wrong)}"] if wrong else []
    if different:
        remedy = "install the same versions everywhere: pip install -c deploy/constraints.txt . in each checkout"
        return problem("nodes' packages", "; ".join(different), remedy)
    return fine("nodes' packages", f"{', '.join(here)} have the same versions on each node as here")


def check_model_on_nodes(config: ModelConfig, timeout: float) -> Finding:
    """Check that each node has the model, or can download it from the hub, all in ``timeout`` seconds.

    Only nodes with GPUs count, if the cluster has any.
    """
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    with_gpus = {node_id: node for node_id, node in nodes.items() if node["Resources"].get("GPU")}
    hosts = {node_id: node["NodeManagerAddress"] for node_id, node in (with_gpus or nodes).items()}
    answers_of = _ask_nodes(_look_for_weights, (pickle_teacher(config),), hosts, timeout)
    lacking = [f"{host}: {answer.error}" for host, answer in answers_of if answer.error]
    if lacking:
        remedy = (
            f"a model of the hub: `hf download {config.hub_id} --revision {config.revision}` there, with HF_TOKEN and "
            "HF_HOME as Ray's processes have them; a longer --timeout if it is still being downloaded"
            if config.hub_id
            else "copy the directory to the same path on each node, or share it"
        )
        return problem("model on nodes", "; ".join(lacking), remedy)
    return fine("model on nodes", f"{len(hosts)} of {len(hosts)} have {config.place.origin}")


def _look_for_weights(pickled: bytes) -> str:
    """Where this node has the weights of a configuration; raises what is wrong with them."""
    config = unpickle_teacher(pickled)
    assert isinstance(config, ModelConfig)
    root = config.place.with_weights()
    WeightFiles.find(root, buffers=isinstance(config, TransformersConfig))
    return str(root)


class _Reply(NamedTuple):
    """What a node's task returned, or in words why it did not."""

    value: Any = None
    error: str = ""


def _ask_nodes(
    function: Any, arguments: tuple[Any, ...], hosts: Mapping[str, str], timeout: float
) -> list[tuple[str, _Reply]]:
    """Run a task on each of ``hosts`` (node id to address); each address with what came of it."""
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(*arguments): host
        for node_id, host in hosts.items()
    }
    done, silent = ray.wait([*asked], num_returns=len(asked), timeout=timeout)
    replies = [(asked[ref], _Reply(error=f"no answer within {timeout:g} s")) for ref in silent]
    for ref in silent:
        ray.cancel(ref, force=True)
    for ref in done:
        try:
            replies.append((asked[ref], _Reply(ray.get(ref))))
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            replies.append((asked[ref], _Reply(error=str(cause).strip().splitlines()[-1])))
    return replies


def _ports(nodes: list[dict[str, Any]]) -> Iterator[tuple[str, Address]]:
    for node in nodes:
        for key, what in _PORTS.items():
            if node.get(key):
                yield what, Address(node["NodeManagerAddress"], int(node[key]))


def check_round_trip(source: TeacherGiven | None, *, in_cluster: bool, timeout: float) -> Finding:
    """Send images through a pool of one replica, in the cluster or else in this process.

    Args:
        source: what gives the teacher; None takes a stand-in without weights.
        in_cluster: whether to use the joined cluster.
        timeout: seconds for the start, and for each answer.
    """
    images = torch.randint(0, 256, (_BATCH, 3, 224, 224), dtype=torch.uint8)
    began = time.monotonic()
    try:
        pool = TeacherPool.start(
            source or FakeTeacher.factory(),
            name=f"doctor-{os.getpid()}",
            replicas=1,
            local_mode=not in_cluster,
            timeout=timeout,
        )
        with pool, pool.teacher(timeout=timeout) as teacher:
            up = time.monotonic()
            tokens_BD = teacher.extract(images, _SPEC).cls
            first = time.monotonic()
            teacher.extract(images, _SPEC)
            again = time.monotonic()
    except DinoV3Error as error:
        remedy = "the message names the error; the log of the replica has the details (deploy/README.md, Logs)"
        return problem("round trip", str(error), remedy)
    assert tokens_BD is not None
    if not torch.isfinite(tokens_BD).all():
        return problem("round trip", "features are not finite", "dinov3-ray checkpoint verify, and try dtype float32")
    where = "in the cluster" if in_cluster else "in this process"
    what = "" if source else " (a stand-in without weights: name a model with --root)"
    return fine(
        "round trip",
        f"a replica {where}{what} was up after {up - began:.1f} s; {_BATCH} images took {1e3 * (first - up):.0f} ms "
        f"the first time, and {1e3 * (again - first):.0f} ms the second time",
    )


def examine(
    root: str | Path | None,
    revision: str | None,
    image_size: Size | ViewSize | None,
    address: str | None,
    gpus: int,
    timeout: float,
) -> Iterator[Finding]:
    """Yield the finding of each check; a check that needs what another one found broken is skipped.

    Args:
        root: the model directory or hub id to check; None skips it.
        revision: of the hub id.
        image_size: of the model's input; None takes the directory's.
        address: of the cluster's head, as :meth:`Address.parse` takes it; None checks this machine alone.
        gpus: GPUs that the cluster, or else this machine, must have.
        timeout: seconds for the nodes' packages, for their model, and for the start and each answer of the round trip.

    Raises:
        ConfigError: the address names no head.
    """
    if address is not None:
        Address.parse(address)
    yield check_versions(installed_versions())
    yield check_shared_memory()
    yield check_descriptors()
    yield check_ray_folder(os.environ)
    yield check_locks()
    yield check_disk()
    # If there is a cluster, it must have the GPUs.
    yield check_gpus(0 if address else gpus)
    model, config = check_model_root(root, revision, image_size, weights_here=address is None)
    yield model
    token = check_token(os.environ, address)
    yield token
    if address is None:
        yield _round_trip(model, config, in_cluster=False, timeout=timeout)
        return
    reach = check_reach(address)
    yield reach
    if Severity.PROBLEM in (token.verdict, reach.verdict):
        yield skipped("round trip", "the cluster cannot be joined")
        return
    joined, runtime = join_cluster(address)
    yield joined
    if runtime is None:
        yield skipped("round trip", "the cluster cannot be joined")
        return
    try:
        yield from check_nodes(gpus)
        packages = check_packages(installed_versions(), timeout)
        yield packages
        if packages.verdict is Severity.PROBLEM:
            yield skipped("round trip", "the nodes have other packages than this process")
            return
        if config is not None:
            model = check_model_on_nodes(config, timeout)
            yield model
        yield _round_trip(model, config, in_cluster=True, timeout=timeout)
    finally:
        runtime.close()


def _round_trip(model: Finding, config: ModelConfig | None, *, in_cluster: bool, timeout: float) -> Finding:
    if model.verdict is Severity.PROBLEM:
        return skipped("round trip", "the model cannot be loaded")
    return check_round_trip(config, in_cluster=in_cluster, timeout=timeout)
