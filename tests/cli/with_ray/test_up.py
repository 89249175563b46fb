"""``dinov3-ray up --config``: applying a file makes the pool what the file says."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import yaml
from click.testing import Result
from commandline import run_command
from ray import cloudpickle

from dinov3_ray import TeacherPool
from dinov3_ray.pool.address import NAMESPACE
from dinov3_ray.pool.cluster import find_controller, list_actors, list_pools
from dinov3_ray.pool.control.declaration import Declaration

NAME = "declared"
OPTIONS = {"max_batch": 4, "threads": 1, "health_interval": 0.2}


def write(folder: Path, root: Path, **keys: object) -> Path:
    path = folder / "pool.yaml"
    teacher = {"root": str(root), "dtype": "float32"}
    content = {"name": NAME, "replicas": 1, "teacher": teacher, "options": OPTIONS, **keys}
    path.write_text(yaml.safe_dump(content))
    return path


def up(path: Path, *arguments: str) -> Result:
    return run_command("up", "--config", path, "--timeout", 240, *arguments)


def declared() -> Declaration:
    found = ray.get(find_controller(NAME, NAMESPACE).declaration.remote(), timeout=60)
    assert isinstance(found, Declaration)
    return found


def replicas() -> set[str]:
    return {replica_id for replica_id, _ in list_actors(NAMESPACE, NAME)}


def test_up_makes_the_pool_what_the_file_says(ray_cluster: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    path = write(tmp_path, tiny_checkpoint)
    looked = up(path, "--dry-run")
    assert (looked.exit_code, looked.output) == (0, f"pool {NAME!r} does not run: it would be started\n")
    assert NAME not in list_pools()
    try:
        started = up(path)
        assert started.exit_code == 0, started.output
        assert f"pool {NAME!r} is as {path} says" in started.output
        first, ran = declared(), replicas()
        assert cloudpickle.loads(first.spec.teacher).root == tiny_checkpoint

        again = up(path)
        assert (again.exit_code, again.output) == (0, f"pool {NAME!r} is as {path} says: nothing to change\n")
        assert (declared(), replicas()) == (first, ran)

        write(tmp_path, tiny_checkpoint, replicas=[1, 2], options={**OPTIONS, "max_batch": 8})
        looked = up(path, "--dry-run")
        assert looked.output == "  replicas: 1 -> [1, 2]\n  options.max_batch: 4 -> 8\n"
        assert (declared(), replicas()) == (first, ran)

        changed = up(path)
        assert changed.exit_code == 0, changed.output
        assert changed.output.startswith(looked.output), "the difference shown is the difference applied"
        now = declared()
        assert (now.spec.low, now.spec.high, now.spec.options.max_batch, now.generation) == (1, 2, 8, 1)
        assert not replicas() & ran, "other options take new replicas"
        assert up(path, "--dry-run").output == f"pool {NAME!r} is as {path} says: nothing to change\n"

        # The number alone takes no new replicas, and auto leaves it as it is.
        ran = replicas()
        write(tmp_path, tiny_checkpoint, replicas="auto", options={**OPTIONS, "max_batch": 8})
        assert "nothing to change" in up(path).output
        write(tmp_path, tiny_checkpoint, replicas=1, options={**OPTIONS, "max_batch": 8})
        assert "  replicas: [1, 2] -> 1\n" in up(path).output
        assert (replicas(), declared().spec.high) == (ran, 1)
    finally:
        if NAME in list_pools():
            TeacherPool.connect(NAME).shutdown()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["up"], "--root, or declare the pool in a file: --config"),
        (["up", "--root", "x", "--dry-run"], "--dry-run needs --config"),
        (["up", "--config", "FILE", "--replicas", "2"], "--replicas does not go with --config: say it in the file"),
        (["up", "--config", "/nowhere.yaml"], "does not exist"),
    ],
)
def test_options_that_contradict(tmp_path: Path, tiny_checkpoint: Path, arguments: list[str], message: str) -> None:
    path = str(write(tmp_path, tiny_checkpoint))
    result = run_command(*(path if word == "FILE" else word for word in arguments))
    assert result.exit_code == 2
    assert message in result.output
