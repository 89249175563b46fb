"""`dinov3-ray up | status | scale | reload | down`, as a user runs them, against a real Ray."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from commandline import run_command as run

from dinov3_ray import FeatureSpec, RemoteTeacher, TeacherPool
from dinov3_ray.checkpoint import init_checkpoint
from dinov3_ray.pool.address import NAMESPACE
from dinov3_ray.pool.cluster import controller_name, list_actors, list_pools
from dinov3_ray.testing import FakeTeacher

NAME = "by-command"


def command(*arguments: object, address: str | None, **options: object) -> subprocess.Popen[str]:
    """The command in a separate process."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    if address is not None:
        environment["RAY_ADDRESS"] = address
    given = [sys.executable, "-m", "dinov3_ray", *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(given, env=environment, text=True, **streams)  # type: ignore[call-overload, no-any-return]


def finished(process: subprocess.Popen[str], status: int) -> tuple[str, str]:
    out, err = process.communicate(timeout=180)
    assert process.returncode == status, err
    assert "Traceback" not in err
    return out, err


@pytest.fixture(scope="module")
def pool(ray_cluster: str, tiny_checkpoint: Path) -> Iterator[str]:
    """A pool of one (each replica takes seconds to start), started and ended by commands; its name."""
    options = ("--replicas", 1, "--num-cpus", 2, "--threads", 1, "--dtype", "float32", "--max-batch", 4)
    options += ("--set", "health_interval=0.2")
    up = command("up", "--name", NAME, "--root", tiny_checkpoint, *options, address=ray_cluster)
    out, err = finished(up, 0)
    assert f"pool {NAME!r} is up: 1 of 1 ready; teacher " in out
    assert f"RemoteTeacher({NAME!r}, address={ray_cluster!r})" in out
    assert "0 of 1 ready; 1 starting" in err, "no progress is shown"
    yield NAME
    out, _ = finished(command("down", "--name", NAME, address=ray_cluster), 0)
    assert out == f"pool {NAME!r} has ended\n"
    assert NAME not in list_pools()
    assert list_actors(NAMESPACE, NAME) == []
    again = run("down", "--name", NAME)
    assert again.exit_code == 0
    assert "nothing to end: no pool named 'by-command'" in again.output


def test_a_pool_serves_after_the_command_that_started_it(pool: str) -> None:
    with RemoteTeacher(pool) as teacher:
        assert teacher.extract(torch.rand(5, 3, 64, 64), FeatureSpec(cls=True)).cls is not None


def test_status(pool: str) -> None:
    shown = run("status", "--name", pool)
    assert shown.exit_code == 0
    assert f"{pool} healthy  1 of 1 ready · DinoV3Teacher" in shown.output
    assert shown.output.count("ready") == 2

    shown = run("status", "--name", pool, "--json")
    assert shown.exit_code == 0
    seen = json.loads(shown.output)
    assert (seen["name"], seen["ready"], seen["target"], seen["batching"]) == (pool, 1, 1, "exact")
    assert all(replica["golden_cosine"] > 0.999 for replica in seen["replicas"])
    assert {replica["statistics"]["errors"] for replica in seen["replicas"]} == {0}


def test_watch_until_interrupted(pool: str, ray_cluster: str) -> None:
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 130, 0, 0))
    watch = command(
        "status", "--name", pool, "--watch", "--interval", 0.3, address=ray_cluster, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    shown = ""
    try:
        while shown.count("healthy") < 3:
            shown += os.read(reader, 65536).decode(errors="replace")
        watch.send_signal(signal.SIGINT)
        assert watch.wait(timeout=60) == 0
        shown += os.read(reader, 65536).decode(errors="replace")
    finally:
        watch.kill()
        watch.wait()
        os.close(reader)
    assert "Traceback" not in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor stays hidden"


def test_scale_and_a_degraded_status(pool: str) -> None:
    assert " of 3 ready" in run("scale", 3, "--name", pool).output
    shown = run("status", "--name", pool)  # the cluster has no room for a third
    assert shown.exit_code == 3
    assert re.search("degraded  [12] of 3 ready", shown.output)
    back = run("scale", "1", "--wait", "--timeout", 120, "--name", pool)
    assert back.exit_code == 0
    assert back.output.endswith(f"pool {pool!r}: 1 of 1 ready\n")
    assert run("status", "--name", pool).exit_code == 0


def test_reload(pool: str, tmp_path: Path) -> None:
    former = json.loads(run("status", "--name", pool, "--json").output)["fingerprint"]
    other = init_checkpoint("vit-test", tmp_path / "other", seed=2)
    done = run("reload", "--name", pool, "--root", other, "--dtype", "float32", "--timeout", 120)
    assert done.exit_code == 0, done.output
    now = json.loads(run("status", "--name", pool, "--json").output)
    assert now["fingerprint"] != former
    assert f"teacher {former} -> {now['fingerprint']}; 1 of 1 ready" in done.output
    assert now["generation"] == 1


def test_mistakes_with_a_pool(pool: str, tiny_checkpoint: Path) -> None:
    twice = run("up", "--name", pool, "--root", tiny_checkpoint)
    assert twice.exit_code == 1
    assert f"Error: a pool named {pool!r} is running already" in twice.output
    for arguments in (["status"], ["scale", 2], ["reload", "--root", tiny_checkpoint]):
        missing = run(*arguments, "--name", "elsewhere")
        assert missing.exit_code == 1
        assert "Error: no pool named 'elsewhere'" in missing.output
        assert f"running there: {pool!r}" in missing.output


def test_without_a_ray_it_says_how_to_get_one(tiny_checkpoint: Path) -> None:
    _, err = finished(command("up", "--root", tiny_checkpoint, address=None), 1)
    assert err.startswith("Error: no Ray is named: pass --address HOST:PORT or set RAY_ADDRESS")
    assert "ray start --head" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["up", "--root", "nowhere"], 1, "Error: root must be a model directory"),
        (["up", "--root", "nowhere", "--replicas", "many"], 2, "such as 4 or 2-8, or auto; got 'many'"),
        (["up", "--root", "nowhere", "--label", "fast"], 2, "must be NAME=VALUE; got 'fast'"),
        (["up", "--root", "{model}", "--replicas", "5-2"], 1, "max (2) must be >= min (5)"),
        (["up", "--root", "{model}", "--set", "hang_timout=3"], 1, "did you mean 'hang_timeout'?"),
        (["up", "--root", "{model}", "--set", "hang_timeout=soon"], 1, "hang_timeout must be more than 0 seconds"),
        (["up", "--root", "{model}", "--name", "a/b"], 1, "name must be 1 to 100 letters"),
        (["scale", "auto"], 2, "such as 4 or 2-8; got 'auto'"),
        (["status", "--address", "127.0.0.1:1"], 1, "address is 127.0.0.1:1, but this process is connected to the Ray"),
        (["status", "--interval", "0"], 2, "0.0 is not in the range"),
    ],
)
def test_mistakes_get_a_sentence_and_a_status(
    ray_cluster: str, tiny_checkpoint: Path, arguments: list[str], status: int, message: str
) -> None:
    result = run(*(argument.format(model=tiny_checkpoint) for argument in arguments))
    assert result.exit_code == status, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_down_ends_what_a_lost_controller_left(ray_cluster: str) -> None:
    started = TeacherPool.start(FakeTeacher.factory(), name="orphans", replicas=1)
    ray.kill(ray.get_actor(controller_name("orphans"), namespace=NAMESPACE), no_restart=True)
    ended = run("down", "--name", "orphans")
    assert ended.exit_code == 0
    assert ended.output == "pool 'orphans' had no controller; its replicas r0 have ended\n"
    assert list_actors(NAMESPACE, "orphans") == []
    started.shutdown()  # finds it gone
