"""A node dies under load and another joins: no batch is lost, and the pool ends at its target size."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from paths import SUPPORT


@pytest.mark.slow
def test_node_lost_and_joined_under_load() -> None:
    folder = Path(tempfile.mkdtemp(prefix="dr-"))  # short, for the paths of Ray's sockets
    try:
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        # Workers when they are needed, and not one for each CPU as soon as somebody connects: they take a core each.
        environment["RAY_prestart_worker_first_driver"] = "0"
        # Ray's Cluster writes its address to the default folder, which may be missing, or a user's.
        environment["RAY_TMPDIR"] = str(folder)
        script = SUPPORT / "two_nodes.py"
        ran = subprocess.run(
            [sys.executable, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=280
        )
        assert ran.returncode == 0, ran.stderr[-4000:]
        report = json.loads((folder / "report.json").read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(report)
    assert report["order"]
    assert report["wrong"] == []
    assert report["nodes_before"] == report["nodes_after"] == 2
    assert report["new_node_used"]
    assert report["ready"] == 4
