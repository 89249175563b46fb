"""A pool declared in a file: what is refused, what differs, and that applying a file makes the pool what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import yaml
from click.testing import Result
from commandline import run_command
from ray import cloudpickle

from dinov3_ray import TeacherPool
from dinov3_ray.errors import ConfigError
from dinov3_ray.pool.cluster import NAMESPACE, find_controller, list_actors, list_pools
from dinov3_ray.pool.control.declaration import Declaration
from dinov3_ray.pool.poolfile import Change, PoolFile, PoolState, differences
from dinov3_ray.pool.spec import Placement, PoolOptions

NAME = "declared"
OPTIONS = {"max_batch": 4, "threads": 1, "health_interval": 0.2}


def write(folder: Path, root: Path, **keys: object) -> Path:
    path = folder / "pool.yaml"
    teacher = {"root": str(root), "dtype": "float32"}
    content = {"name": NAME, "replicas": 1, "teacher": teacher, "options": OPTIONS, **keys}
    path.write_text(yaml.safe_dump(content))
    return path


def test_everything_is_read(tmp_path: Path, tiny_checkpoint: Path) -> None:
    path = tmp_path / "pool.yaml"
    path.write_text(f"""
name: big
namespace: teachers
replicas: [2, 8]
teacher: {{root: {tiny_checkpoint}, dtype: bfloat16, image_size: [64, 96], compile: false, attention: sdpa}}
placement: {{num_gpus: 0.5, num_cpus: 2, accelerator: H200, labels: {{zone: a}}}}
options: {{batching: dynamic, max_batch: 64}}
""")
    read = PoolFile.read(path)
    assert (read.name, read.namespace, read.replicas) == ("big", "teachers", (2, 8))
    assert (read.teacher.root, read.teacher.dtype, read.teacher.image_size) == (tiny_checkpoint, "bfloat16", (64, 96))
    assert (read.num_gpus, read.num_cpus) == (0.5, 2)
    assert read.labels == {"ray.io/accelerator-type": "H200", "zone": "a"}
    assert read.options == PoolOptions(batching="dynamic", max_batch=64)


def test_most_may_be_left_out_and_a_root_is_relative_to_the_file(tiny_checkpoint: Path) -> None:
    read = PoolFile.of({"teacher": {"root": tiny_checkpoint.name}}, folder=tiny_checkpoint.parent)
    assert (read.name, read.namespace, read.replicas, read.num_gpus) == ("dinov3", NAMESPACE, "auto", None)
    assert read.teacher.root == tiny_checkpoint
    assert read.options == PoolOptions()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("replica: 2", "'replica' is not a key of a pool's file; did you mean 'replicas'?"),
        ("gpus: 2", "'gpus' is not a key of a pool's file (keys: name, namespace,"),
        ("teacher: {root: ROOT, dtyp: float32}", "'teacher.dtyp' is not a key of a pool's file; did you mean 'dtype'?"),
        ("teacher: {root: ROOT, dtype: float4}", "dtype must be one of"),
        ("teacher: {root: ROOT, image_size: big}", "image_size must be"),
        ("teacher: {}", "teacher.root must be the path of a model directory; got None"),
        ("teacher: ROOT", "teacher must hold `key: value` lines"),
        ("teacher: {root: /nowhere}", "/nowhere is missing"),
        ("options: {max_bach: 3}", "'max_bach' is not an option of a pool; did you mean 'max_batch'?"),
        ("options: {max_batch: 0}", "max_batch must be a whole number, at least 1; got 0"),
        ("replicas: [3, 2]", "max (2) must be >= min (3)"),
        ("replicas: 0", "replicas must be a whole number >= 1"),
        ("placement: {num_gpu: 1}", "did you mean 'num_gpus'?"),
        ("placement: {num_gpus: 1.5}", "num_gpus above 1 must be a whole number"),
        ("placement: {labels: {zone: 1}}", "the label zone must be text (put it in quotes); got 1"),
        ("placement: {accelerator: A, labels: {ray.io/accelerator-type: B}}", "say the same: leave one out"),
        ("name: a b", "name must be 1 to 100 letters"),
        ("namespace: 3", "namespace must be"),
        ("name: a\nname: b", "'name' stands here twice"),
        ("name: [", "is not valid YAML"),
        ("- name", "is not valid YAML"),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, tiny_checkpoint: Path, keys: str, message: str) -> None:
    path = tmp_path / "pool.yaml"
    text = keys if "teacher" in keys else f"{keys}\nteacher: {{root: ROOT}}"
    path.write_text(text.replace("ROOT", str(tiny_checkpoint)))
    with pytest.raises(ConfigError) as caught:
        PoolFile.read(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_list_is_no_pool_file() -> None:
    with pytest.raises(ConfigError, match="the file must hold `key: value` lines"):
        PoolFile.of(["name"], folder=Path())


def test_differences_name_each_key(tmp_path: Path, tiny_checkpoint: Path) -> None:
    def state(content: dict[str, object]) -> PoolState:
        read = PoolFile.of(content, folder=tmp_path)
        placement = Placement(num_gpus=read.num_gpus or 0, num_cpus=read.num_cpus, label_selector=read.labels)
        assert isinstance(read.replicas, (int, tuple))
        low, high = (read.replicas, read.replicas) if isinstance(read.replicas, int) else read.replicas
        return PoolState(read.teacher, low, high, placement, read.options)

    root = str(tiny_checkpoint)
    before = state({"replicas": 2, "teacher": {"root": root}})
    same = state({"replicas": [2, 2], "teacher": {"root": root, "image_size": 224}, "options": {"max_batch": 32}})
    assert differences(before, same) == ()
    after = state(
        {
            "replicas": [2, 4],
            "teacher": {"root": root, "dtype": "bfloat16"},
            "placement": {"num_gpus": 0.5, "accelerator": "H200"},
            "options": {"max_batch": 64},
        }
    )
    changes = differences(before, after)
    assert changes == (
        Change("replicas", "2", "[2, 4]"),
        Change("placement.num_gpus", "0", "0.5"),
        Change("teacher.dtype", "auto", "bfloat16"),
        Change("options.max_batch", "32", "64"),
        Change("placement.labels.ray.io/accelerator-type", "-", "H200"),
    )
    assert [change.rolling for change in changes] == [False, True, True, True, True]


def test_a_model_exchanged_under_the_same_path_is_a_difference(tmp_path: Path, tiny_checkpoint: Path) -> None:
    root = tmp_path / "model"
    root.mkdir()
    for file in tiny_checkpoint.iterdir():
        (root / file.name).write_bytes(file.read_bytes())

    def state() -> PoolState:
        read = PoolFile.of({"teacher": {"root": str(root)}}, folder=tmp_path)
        return PoolState(read.teacher, 1, 1, Placement(), read.options)

    before = state()
    preprocessor = root / "preprocessor_config.json"
    preprocessor.write_text(preprocessor.read_text().replace("0.485", "0.5"))
    (change,) = differences(before, state())
    assert change.key == "teacher (preprocessor_config.json)"


# Against a real Ray ---------------------------------------------------------------------------------------------------


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
        assert cloudpickle.loads(first.source).root == tiny_checkpoint

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
        assert (now.low, now.high, now.options.max_batch, now.generation) == (1, 2, 8, 1)
        assert not replicas() & ran, "other options take new replicas"
        assert up(path, "--dry-run").output == f"pool {NAME!r} is as {path} says: nothing to change\n"

        # The number alone takes no new replicas, and auto leaves it as it is.
        ran = replicas()
        write(tmp_path, tiny_checkpoint, replicas="auto", options={**OPTIONS, "max_batch": 8})
        assert "nothing to change" in up(path).output
        write(tmp_path, tiny_checkpoint, replicas=1, options={**OPTIONS, "max_batch": 8})
        assert "  replicas: [1, 2] -> 1\n" in up(path).output
        assert (replicas(), declared().high) == (ran, 1)
    finally:
        if NAME in list_pools():
            TeacherPool.connect(NAME).shutdown()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["up"], "--root, or declare the pool in a file: --config"),
        (["up", "--root", "x", "--dry-run"], "--dry-run goes with --config"),
        (["up", "--config", "FILE", "--replicas", "2"], "--replicas does not go with --config: say it in the file"),
        (["up", "--config", "/nowhere.yaml"], "does not exist"),
    ],
)
def test_options_that_contradict(tmp_path: Path, tiny_checkpoint: Path, arguments: list[str], message: str) -> None:
    path = str(write(tmp_path, tiny_checkpoint))
    result = run_command(*(path if word == "FILE" else word for word in arguments))
    assert result.exit_code == 2
    assert message in result.output
