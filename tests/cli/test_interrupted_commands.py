"""Commands that are asked to end while they wait for a cluster."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_exit_status_tells_the_signal(number: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        silent.settimeout(60)
        command = [sys.executable, "-m", "dinov3_ray", "status", "--address", f"127.0.0.1:{silent.getsockname()[1]}"]
        with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            silent.accept()[0].close()
            process.send_signal(number)
            said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert "Traceback" not in said
