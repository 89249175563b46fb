"""``dinov3-ray doctor``."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import click

from dinov3_ray.doctor.cluster_checks import (
    examine,
)
from dinov3_ray.doctor.machine_checks import (
    Finding,
    Severity,
)

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
    worst = Severity.FINE
    for finding in examine(root, address, gpus, timeout):
        if finding.verdict is Severity.PROBLEM:
            worst = Severity.PROBLEM
        click.echo(json.dumps(asdict(finding)) if as_json else _line(finding))
    context.exit(1 if worst is Severity.PROBLEM else 0)


def _line(finding: Finding) -> str:
    text = f"{finding.verdict:<8} {finding.subject}: {finding.message}"
    return f"{text}\n{'':<9}-> {finding.remedy}" if finding.remedy else text
