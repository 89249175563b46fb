"""A pool leaves GPUs to trainers; who waits for GPUs that the other holds is told so; and none has two tenants."""

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
def test_pool_and_trainer_share_two_gpus() -> None:
    folder = Path(tempfile.mkdtemp(prefix="dr-"))
    try:
        (folder / "token").touch(mode=0o600)
        (folder / "token").write_text(secrets.token_hex(32))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
        environment |= {"RAY_TMPDIR": str(folder), "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        script = [sys.executable, str(SUPPORT / "gpu_sharing.py")]
        ran = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=280, check=False)
        assert ran.returncode == 0, ran.stderr[-4000:]
        seen = json.loads(ran.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert (seen["left"], seen["taken"]) == (1, 2)
    assert seen["nobody waits"] == ""
    assert "leave_gpus=2 must leave the pool num_gpus=1 of the cluster's 2 GPUs at least" in seen["leave too many"]
    assert "others wait for 1 GPU" in seen["trainer waits"]
    assert "of the cluster's 2 GPUs this pool holds 2, others 0" in seen["trainer waits"]
    assert "leave_gpus=N" in seen["trainer waits"]
    assert "others wait for 1 GPU" in " ".join(seen["status"].split())
    assert "0 of 1 replicas ready" in seen["pool waits"]
    assert "replicas wait for 1 GPU: of the cluster's 2 GPUs this pool holds 0, others 2" in seen["pool waits"]
    assert seen["segments"] == "expandable_segments:True"
    assert seen["double tenants"] == []
    assert seen["stopped is gone"]
