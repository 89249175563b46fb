"""A pool declared in a file: what is read, what is refused, and what differs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hub_server import serving_hub, use_hub

from dinov3_ray import DinoV3Config
from dinov3_ray.errors import ConfigError
from dinov3_ray.pool.address import NAMESPACE
from dinov3_ray.pool.poolfile import Change, PoolFile, changes_between
from dinov3_ray.pool.spec import PoolOptions, PoolSpec


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
    assert (read.name, read.namespace, read.spec.replicas) == ("big", "teachers", (2, 8))
    teacher, placement = read.spec.given, read.spec.placement
    assert isinstance(teacher, DinoV3Config)
    assert (teacher.root, teacher.dtype, teacher.image_size) == (tiny_checkpoint, "bfloat16", (64, 96))
    assert (placement.num_gpus, placement.num_cpus) == (0.5, 2)
    assert placement.label_selector == {"ray.io/accelerator-type": "H200", "zone": "a"}
    assert read.spec.options == PoolOptions(batching="dynamic", max_batch=64)


def test_most_may_be_left_out_and_a_root_is_relative_to_the_file(tiny_checkpoint: Path) -> None:
    read = PoolFile.of({"teacher": {"root": tiny_checkpoint.name}}, folder=tiny_checkpoint.parent)
    assert (read.name, read.namespace, read.spec.replicas) == ("dinov3", NAMESPACE, "auto")
    assert read.spec == PoolSpec(DinoV3Config(tiny_checkpoint))
    assert read.spec.placement.num_gpus is None


@pytest.mark.parametrize("size", ["input", "input/2"])
def test_an_input_that_follows_the_images(tmp_path: Path, tiny_checkpoint: Path, size: str) -> None:
    path = tmp_path / "pool.yaml"
    path.write_text(f"teacher: {{root: {tiny_checkpoint}, image_size: {size}}}")
    read = resolved(PoolFile.read(path))
    assert read.given == DinoV3Config(tiny_checkpoint, image_size=size)  # type: ignore[arg-type]
    assert changes_between(read, read.pickled().unpickled()) == ()
    fixed = resolved(PoolFile.of({"teacher": {"root": str(tiny_checkpoint)}}, folder=tmp_path))
    change, _ = changes_between(fixed, read)
    assert change == Change("teacher.image_size", "[224, 224]", size)


@pytest.mark.slow
def test_a_model_of_the_hub(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commit is part of the declaration; where a cache is, is not."""
    with serving_hub() as hub:
        use_hub(hub, tmp_path / "home", monkeypatch)
        repository = hub.add("facebook/tiny", tiny_checkpoint)
        first = repository.revisions["v1"] = repository.revisions["main"]

        def state(**keys: str) -> PoolSpec:
            return resolved(PoolFile.of({"teacher": {"root": "facebook/tiny", **keys}}, folder=tmp_path))

        before = state()
        monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere"))
        assert changes_between(before, state()) == ()
        second = repository.commit({path.name: path for path in tiny_checkpoint.iterdir()})
        assert changes_between(before, state(revision="v1")) == ()
        assert changes_between(before, state()) == (Change("teacher.revision", first, second),)
        assert changes_between(
            before, resolved(PoolFile.of({"teacher": {"root": str(tiny_checkpoint)}}, folder=tmp_path))
        )
        with pytest.raises(ConfigError, match=rf"{tmp_path}/pool.yaml: revision must be a branch, .* no 'v9' of it"):
            PoolFile.of(
                {"teacher": {"root": "facebook/tiny", "revision": "v9"}}, folder=tmp_path, path=tmp_path / "pool.yaml"
            )
        # A path starts at the file's folder, also where it looks like an id.
        shutil.copytree(tiny_checkpoint, tmp_path / "facebook" / "tiny")
        monkeypatch.chdir("/")
        assert state().given.root == tmp_path / "facebook" / "tiny"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("teacher: {root: a/b, revision: 1234567}", "teacher.revision must be text (put it in quotes); got 1234567"),
        ("replica: 2", "'replica' is not a key of a pool's file; did you mean 'replicas'?"),
        ("gpus: 2", "'gpus' is not a key of a pool's file (keys: name, namespace,"),
        ("teacher: {root: ROOT, dtyp: float32}", "'teacher.dtyp' is not a key of a pool's file; did you mean 'dtype'?"),
        ("teacher: {root: ROOT, dtype: float4}", "dtype must be one of"),
        ("teacher: {root: ROOT, image_size: big}", "'input' or 'input/2'; got 'big'"),
        ("teacher: {}", "teacher.root must be the path of a model directory, or a hub id (owner/name); got None"),
        ("teacher: ROOT", "teacher must hold `key: value` lines"),
        ("teacher: {root: /nowhere}", "/nowhere is missing"),
        ("options: {max_bach: 3}", "'options.max_bach' is not an option of a pool; did you mean 'max_batch'?"),
        ("options: {max_batch: 0}", "max_batch must be a whole number, at least 1; got 0"),
        ("replicas: [3, 2]", "max (2) must be >= min (3)"),
        ("replicas: 0", "replicas must be a whole number >= 1"),
        ("placement: {num_gpu: 1}", "did you mean 'num_gpus'?"),
        ("placement: {num_gpus: 2}", "num_gpus must be a number from 0 to 1, since a replica computes on one GPU"),
        ("placement: {labels: {zone: 1}}", "placement.labels.zone must be text (put it in quotes); got 1"),
        ("placement: {labels: {1: a}}", "must be text (put it in quotes); got 1"),
        ("options: []", "options must hold `key: value` lines; got []"),
        ("options: {max_batch: '32'}", "options.max_batch must be a whole number, at least 1; got '32'"),
        ("placement: {num_gpus: true}", "placement.num_gpus must be a number from 0 to 1"),
        ("replicas: '2'", "replicas must be a whole number >= 1"),
        ("1: 2", "'1' is not a key of a pool's file"),
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


def test_all_problems_of_a_file_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "pool.yaml"
    path.write_text("""
name: a b
replicas: [3, 2]
teacher: {dtype: float4, image_sise: 224}
placement: {num_gpus: "1", labels: {zone: 1}}
options: {max_batch: 0, max_wait: true}
gpus: 2
""")
    with pytest.raises(ConfigError) as caught:
        PoolFile.read(path)
    first, *problems = str(caught.value).splitlines()
    assert first == f"{path} has 10 problems:"
    assert problems == [
        "  - name must be 1 to 100 letters, digits, '.', '_' or '-'; got 'a b'",
        "  - replicas=(min, max): max (2) must be >= min (3)",
        "  - teacher.dtype must be one of auto, float32, bfloat16, float16, float8; got 'float4'",
        "  - teacher.root must be the path of a model directory, or a hub id (owner/name); got None",
        "  - 'teacher.image_sise' is not a key of a pool's file; did you mean 'image_size'?",
        "  - placement.num_gpus must be a number from 0 to 1, since a replica computes on one GPU at most (for more "
        "GPUs, more replicas); got '1'",
        "  - placement.labels.zone must be text (put it in quotes); got 1",
        "  - options.max_batch must be a whole number, at least 1; got 0",
        "  - options.max_wait must be at least 0 seconds, and finite; got True",
        "  - 'gpus' is not a key of a pool's file "
        "(keys: name, namespace, replicas, leave_gpus, teacher, placement, options)",
    ]


def resolved(file: PoolFile) -> PoolSpec:
    return file.spec.resolved(file.spec.placement.resolved(has_gpus=False), auto=1)


def test_differences_name_each_key(tmp_path: Path, tiny_checkpoint: Path) -> None:
    def state(content: dict[str, object]) -> PoolSpec:
        return resolved(PoolFile.of(content, folder=tmp_path))

    root = str(tiny_checkpoint)
    before = state({"replicas": 2, "teacher": {"root": root}})
    same = state({"replicas": [2, 2], "teacher": {"root": root, "image_size": 224}, "options": {"max_batch": 32}})
    assert changes_between(before, same) == ()
    after = state(
        {
            "replicas": [2, 4],
            "teacher": {"root": root, "dtype": "bfloat16"},
            "placement": {"num_gpus": 0.5, "accelerator": "H200"},
            "options": {"max_batch": 64},
        }
    )
    changes = changes_between(before, after)
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

    def state() -> PoolSpec:
        return resolved(PoolFile.of({"teacher": {"root": str(root)}}, folder=tmp_path))

    before = state()
    preprocessor = root / "preprocessor_config.json"
    preprocessor.write_text(preprocessor.read_text().replace("0.485", "0.5"))
    (change,) = changes_between(before, state())
    assert change.key == "teacher (preprocessor_config.json)"
