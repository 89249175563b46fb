"""The scripts of this folder, each in a process of its own, and the environment for one that starts Ray."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paths import SUPPORT

__all__ = ["own_ray", "run_script"]


def run_script(name: str, *arguments: object, env: dict[str, str], timeout: float = 280) -> tuple[dict[str, Any], str]:
    """What the script reports in its last line, and its standard error."""
    command = [sys.executable, str(SUPPORT / name), *map(str, arguments)]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    report = json.loads(ran.stdout.splitlines()[-1])
    assert isinstance(report, dict)
    return report, ran.stderr


@contextmanager
def own_ray() -> Iterator[dict[str, str]]:
    """The environment of a process that starts a Ray of its own, with its own folder and token."""
    folder = Path(tempfile.mkdtemp(prefix="dr-"))
    try:
        (folder / "token").touch(mode=0o600)
        (folder / "token").write_text(secrets.token_hex(32))
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
        yield {**kept, "RAY_TMPDIR": str(folder), "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
