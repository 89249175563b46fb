"""``dinov3-ray doctor`` in a process of its own, and its findings by subject."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from dinov3_ray.doctor.machine_checks import Severity

Findings = dict[str, dict[str, str]]


def doctor(*arguments: object, prefix: tuple[str, ...] = (), token: str | None = None) -> tuple[int, Findings]:
    """The command in a process of its own: (exit status, findings by subject)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["OMP_NUM_THREADS"] = "1"
    environment["RAY_AUTH_TOKEN_PATH"] = token or "/nowhere"  # and not this user's own
    if token is not None:
        environment["RAY_AUTH_MODE"] = "token"
    command = [*prefix, sys.executable, "-m", "dinov3_ray", "doctor", "--json", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, by_subject(done.stdout)


def by_subject(text: str) -> Findings:
    findings = [json.loads(line) for line in text.splitlines()]
    for finding in findings:
        needs_one = finding["verdict"] in (Severity.PROBLEM, Severity.WARNING)
        assert bool(finding["remedy"]) == needs_one, finding
    return {finding["subject"]: finding for finding in findings}


def problems(findings: Findings) -> set[str]:
    return {subject for subject, finding in findings.items() if finding["verdict"] == Severity.PROBLEM}
