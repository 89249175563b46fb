"""A running cluster: whether it answers, takes this machine's token, has the same versions, and what pools need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dinov3_ray.doctor.finding import Finding, fine, problem, warning
from dinov3_ray.errors import PoolError
from dinov3_ray.pool.cluster import Runtime, connect
from dinov3_ray.pool.probe import answers, find_obstacle

__all__ = ["check_nodes", "check_packages", "check_reach", "join"]

_LEAST_STORE = 2 * 2**30  # max_queued_bytes of one replica, by default
_PORTS = {"NodeManagerPort": "node manager", "ObjectManagerPort": "object manager", "MetricsExportPort": "metrics"}


def check_reach(address: str) -> Finding:
    """Whether the head at ``address`` can be reached, and takes this machine's token and certificate."""
    obstacle = find_obstacle(address)
    if obstacle is not None:
        return problem("cluster", obstacle.message, obstacle.remedy)
    return fine("cluster", f"{address} answers")


def join(address: str) -> tuple[Finding, Runtime | None]:
    """Join the cluster; Ray compares the versions as it does."""
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
    """What the nodes of the joined cluster have, and whether their ports answer from here."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    told = f"nodes: {len(nodes)}, with {resources.get('CPU', 0):g} CPUs and {gpus} GPUs in all"
    if gpus < wanted_gpus:
        yield problem(
            "resources",
            f"{told}; {wanted_gpus} GPUs asked for with --gpus",
            "start more worker nodes; one whose GPUs Ray does not see needs `worker.sh --gpus N` and NVIDIA's driver",
        )
    else:
        yield fine("resources", told)
    small = [node for node in nodes if node["Resources"].get("object_store_memory", 0) < _LEAST_STORE]
    if small:
        names = ", ".join(node["NodeManagerAddress"] for node in small)
        yield warning(
            "object store",
            f"less than {_LEAST_STORE >> 30} GiB on {names}: the queue of one replica may take that",
            "start the node with a larger --object-store, or give the pool a smaller max_queued_bytes",
        )
    else:
        least = min(node["Resources"].get("object_store_memory", 0) for node in nodes)
        yield fine("object store", f"{least / 2**30:.1f} GiB or more on each node")
    shut = [f"{what} of {host}:{port}" for what, host, port in _ports(nodes) if not answers(host, port)]
    if shut:
        remedy = "open them between nodes and clients (deploy/README.md lists the ports)"
        yield problem("ports", f"shut from here: {', '.join(shut)}", remedy)
    else:
        yield fine("ports", f"{', '.join(_PORTS.values())} of each node answer from here")


def check_packages(here: Mapping[str, str], timeout: float) -> Finding:
    """Whether each node has the packages of this process, in its versions ``here``, within ``timeout`` seconds."""

    # Inside, so that it is sent to the nodes as it stands: theirs may not have this module.
    def installed(names: list[str]) -> dict[str, str]:
        found = {}
        for name in names:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "missing"
        return found

    task = ray.remote(num_cpus=0, max_retries=0)(installed)
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote([*here]): host
        for node_id, host in nodes.items()
    }
    done, silent = ray.wait([*asked], num_returns=len(asked), timeout=timeout)
    different = [f"no answer from {asked[ref]} within {timeout:g} s" for ref in silent]
    for ref in done:
        try:
            there = ray.get(ref)
        except ray.exceptions.RayError as error:
            different.append(f"{asked[ref]} runs no task: {str(error).strip().splitlines()[-1]}")
            continue
        wrong = [f"{name} {there[name]} (here {here[name]})" for name in here if there[name] != here[name]]
        different += [f"{asked[ref]} has {', '.join(wrong)}"] if wrong else []
    if different:
        remedy = "install the same on nodes and clients: pip install -c deploy/constraints.txt . in each one's checkout"
        return problem("nodes' packages", "; ".join(different), remedy)
    return fine("nodes' packages", f"{', '.join(here)} are the same on each node as here")


def _ports(nodes: list[dict[str, Any]]) -> Iterator[tuple[str, str, int]]:
    for node in nodes:
        for key, what in _PORTS.items():
            if node.get(key):
                yield what, node["NodeManagerAddress"], int(node[key])
