"""The command ``dinov3-ray doctor``."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from dinov3_ray.cli.teacher_options import image_size_option, model_options

if TYPE_CHECKING:
    from dinov3_ray.config.preprocessing import Size, ViewSize
    from dinov3_ray.doctor.machine_checks import Finding

__all__ = ["doctor"]


@click.command()
@model_options("The model that the pool will use")
@image_size_option
@click.option("--address", metavar="HOST:PORT", help="The cluster to check. [default: RAY_ADDRESS, or none]")
@click.option(
    "--gpus", type=click.IntRange(min=0), default=0, help="GPUs that this machine, or the cluster, must have."
)
@click.option(
    "--timeout", type=float, default=120.0, show_default=True, help="The longest time of the round trip, in seconds."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
@click.pass_context
def doctor(
    context: click.Context,
    /,
    root: str | None,
    revision: str | None,
    image_size: Size | ViewSize | None,
    address: str | None,
    gpus: int,
    timeout: float,
    as_json: bool,
) -> None:
    """Check this machine and a cluster before a pool uses them, and give a remedy for each finding.

    The exit status is 1 if there is a problem, which keeps a pool from working. Warnings alone give 0.
    """
    from dinov3_ray.doctor.cluster_checks import examine  # here, so that the help answers at once
    from dinov3_ray.doctor.machine_checks import Severity

    address = address or os.environ.get("RAY_ADDRESS") or None
    worst = Severity.FINE
    for finding in examine(root, revision, image_size, address, gpus, timeout):
        if finding.verdict is Severity.PROBLEM:
            worst = Severity.PROBLEM
        click.echo(json.dumps(asdict(finding)) if as_json else _line(finding))
    context.exit(1 if worst is Severity.PROBLEM else 0)


def _line(finding: Finding) -> str:
    text = f"{finding.verdict:<8} {finding.subject}: {finding.message}"
    return f"{text}\n{'':<9}-> {finding.remedy}" if finding.remedy else text
