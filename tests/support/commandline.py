"""``dinov3-ray`` as a user runs it, in this process or in one of its own."""

from __future__ import annotations

import json
import subprocess
import sys

from click.testing import CliRunner, Result

from dinov3_ray.cli import main


def run_command(*arguments: object, **environment: str | None) -> Result:
    """The command in this process, and so in the Ray that the process is connected to; None removes a variable."""
    return CliRunner(env=environment).invoke(main, [str(argument) for argument in arguments])


def failure(*arguments: object) -> str:
    """What a command that fails says, in one line."""
    result = run_command(*arguments)
    assert result.exit_code != 0, result.output
    return " ".join(result.output.split())


def run_bench(*arguments: object, in_process: bool = True) -> dict[str, object]:
    """What ``bench`` prints; a process of its own takes seconds to start, and shows that nothing else is printed."""
    command = ["bench", *map(str, arguments), "--json"]
    if in_process:
        done = run_command(*command)
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
