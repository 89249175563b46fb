"""``dinov3-ray bench`` in this process or in one of its own, as its JSON."""

from __future__ import annotations

import json
import subprocess
import sys

from click.testing import CliRunner

from dinov3_ray.cli import main


def run_bench(*arguments: str, in_process: bool = True) -> dict[str, object]:
    """What ``bench`` prints; a process of its own takes seconds to start, and shows that nothing else is printed."""
    command = ["bench", *arguments, "--json"]
    if in_process:
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
        text = done.stdout
    else:
        command = [sys.executable, "-m", "dinov3_ray", *command]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert ran.returncode == 0, ran.stderr
        text = ran.stdout
    report = json.loads(text)
    assert isinstance(report, dict)
    return report
