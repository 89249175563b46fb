"""``dinov3-ray doctor``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click

from dinov3_ray.doctor.cluster import check_nodes, check_packages, check_reach, join
from dinov3_ray.doctor.descriptors import check_descriptors
from dinov3_ray.doctor.disk import check_disk
from dinov3_ray.doctor.finding import Finding, Verdict, skipped
from dinov3_ray.doctor.gpus import check_gpus
from dinov3_ray.doctor.modelroot import check_model_root
from dinov3_ray.doctor.roundtrip import check_round_trip
from dinov3_ray.doctor.sharedmemory import check_shared_memory
from dinov3_ray.doctor.token import check_token
from dinov3_ray.doctor.versions import check_versions, installed_versions

__all__ = ["doctor"]


@click.command()
@click.option("--root", type=click.Path(path_type=Path), help="The model directory of the pool to be.")
@click.option("--address", metavar="HOST:PORT", help="The cluster to look at. [default: RAY_ADDRESS, or none]")
@click.option(
    "--gpus", type=click.IntRange(min=0), default=0, help="GPUs that this machine, or the cluster, is to have."
)
@click.option("--timeout", type=float, default=120.0, show_default=True, help="Seconds that the round trip may take.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for scripts.")
@click.pass_context
def doctor(
    context: click.Context, /, root: Path | None, address: str | None, gpus: int, timeout: float, as_json: bool
) -> None:
    """Look at this machine, and at a cluster, as a pool would; say what to do about what is found.

    Exits with 1 if there is a problem: something that keeps a pool from working. Warnings alone exit with 0.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    worst = Verdict.FINE
    for finding in examine(root, address, gpus, timeout):
        if finding.verdict is Verdict.PROBLEM:
            worst = Verdict.PROBLEM
        click.echo(json.dumps(asdict(finding)) if as_json else _line(finding))
    context.exit(1 if worst is Verdict.PROBLEM else 0)


def examine(root: Path | None, address: str | None, gpus: int, timeout: float) -> Iterator[Finding]:
    """Every check, one after the other; those that need what failed before are skipped."""
    yield check_versions(installed_versions())
    yield check_shared_memory()
    yield check_descriptors()
    yield check_disk()
    # With a cluster, GPUs are asked of that.
    yield check_gpus(0 if address else gpus)
    model = check_model_root(root)
    yield model
    token = check_token(os.environ, address)
    yield token
    if address is None:
        yield _round_trip(model, root, in_cluster=False, timeout=timeout)
        return
    reach = check_reach(address)
    yield reach
    if Verdict.PROBLEM in (token.verdict, reach.verdict):
        yield skipped("round trip", "the cluster cannot be joined")
        return
    joined, runtime = join(address)
    yield joined
    if runtime is None:
        yield skipped("round trip", "the cluster cannot be joined")
        return
    try:
        yield from check_nodes(gpus)
        packages = check_packages(installed_versions(), timeout)
        yield packages
        if packages.verdict is Verdict.PROBLEM:
            yield skipped("round trip", "the nodes have other packages than this process")
            return
        yield _round_trip(model, root, in_cluster=True, timeout=timeout)
    finally:
        runtime.close()


def _round_trip(model: Finding, root: Path | None, *, in_cluster: bool, timeout: float) -> Finding:
    if model.verdict is Verdict.PROBLEM:
        return skipped("round trip", "the model cannot be loaded")
    return check_round_trip(root, in_cluster=in_cluster, timeout=timeout)


def _line(finding: Finding) -> str:
    text = f"{finding.verdict:<8} {finding.subject}: {finding.message}"
    return f"{text}\n{'':<9}-> {finding.remedy}" if finding.remedy else text
