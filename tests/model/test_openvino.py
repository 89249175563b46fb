"""Blocks computed by OpenVINO: every output, when it is chosen, and what is said where it cannot compute."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec, TeacherPool
from dinov3_ray.checkpoint import init_checkpoint
from dinov3_ray.errors import ConfigError
from dinov3_ray.features import Features
from dinov3_ray.model import openvino_blocks

if find_spec("openvino") is None:  # not importorskip(), which imports it: test_it_reports_to_nobody
    pytest.skip("openvino is not installed", allow_module_level=True)

EVERYTHING = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(1, 0, -1))
OF_A_CONVNEXT = FeatureSpec(cls=True, feature_map=True, layers=(3, 0, 1))


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: init_checkpoint(name, folder / name) for name in ("vit-test", "convnext-test")}


def images(count: int, height: int = 96, width: int = 64) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count))


def both(root: Path, **options: Any) -> tuple[DinoV3Teacher, DinoV3Teacher]:
    """The teacher by OpenVINO with ``options``, and the one in float32 by torch."""
    size = options.get("image_size", 96)
    by_openvino = DinoV3Teacher(DinoV3Config(root, backend="openvino", **{"image_size": size, **options}))
    return by_openvino, DinoV3Teacher(DinoV3Config(root, dtype="float32", image_size=size, backend="torch"))


def largest_error(found: Features, expected: Features) -> float:
    """Of all outputs, in shares of the largest value."""
    pairs = zip(found.named(), expected.named(), strict=True)
    errors = []
    for (name, ours), (same_name, theirs) in pairs:
        assert (name, ours.shape, ours.stride()) == (same_name, theirs.shape, theirs.stride())
        errors.append(((ours.float() - theirs).abs().max() / theirs.abs().max()).item())
    return max(errors)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(96, 96), (64, 160), (32, 32)], ids=str)
@pytest.mark.parametrize(
    "spec",
    [
        EVERYTHING,
        FeatureSpec(cls=True),
        FeatureSpec(layers=(1,), norm=False),
        FeatureSpec(feature_map=True, map_size=(2, 3), layers=(-1, 0)),
    ],
    ids=str,
)
def test_all_outputs_of_a_vit(roots: dict[str, Path], spec: FeatureSpec, size: tuple[int, int]) -> None:
    ours, torchs = both(roots["vit-test"], dtype="float32", image_size=size)
    for count in (1, 3):
        assert largest_error(ours.extract(images(count), spec), torchs.extract(images(count), spec)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("spec", [OF_A_CONVNEXT, FeatureSpec(layers=(1,), norm=False)], ids=str)
def test_all_outputs_of_a_convnext(roots: dict[str, Path], spec: FeatureSpec) -> None:
    ours, torchs = both(roots["convnext-test"], dtype="float32", image_size=(64, 96))
    for count in (1, 3):
        assert largest_error(ours.extract(images(count), spec), torchs.extract(images(count), spec)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-test", "convnext-test"])
def test_bfloat16_is_no_less_exact_than_torchs(roots: dict[str, Path], name: str) -> None:
    ours, exact = both(roots[name], dtype="bfloat16")
    torchs = DinoV3Teacher(DinoV3Config(roots[name], dtype="bfloat16", image_size=96, backend="torch"))
    spec = FeatureSpec(cls=True, feature_map=True)

    def error(teacher: DinoV3Teacher) -> float:
        found = teacher.extract(images(4), spec)
        assert found.cls is not None
        assert found.cls.dtype == torch.bfloat16
        return largest_error(found, exact.extract(images(4), spec))

    assert error(ours) <= 1.1 * error(torchs)
    assert ours.prove(rows=5) > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"dtype": "bfloat16"}, True),
        ({"dtype": "float32"}, False),
        ({"dtype": "bfloat16", "compile": True}, False),
        ({"dtype": "bfloat16", "backend": "torch"}, False),
        ({"dtype": "float8"}, False),
        ({"dtype": "float32", "backend": "openvino"}, True),
    ],
    ids=str,
)
def test_when_it_computes(
    roots: dict[str, Path], options: dict[str, Any], chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinov3_ray.model.frozen_teacher.compile_blocks", lambda *_, **__: None)
    config = DinoV3Config(roots["vit-test"], **options)
    monkeypatch.setattr("dinov3_ray.model.frozen_teacher.check_float8", lambda *_: None)
    teacher = DinoV3Teacher(config)
    assert teacher.by_openvino == chosen
    assert teacher.computed_in == options["dtype"] + (" by OpenVINO" if chosen else "")
    assert copy.deepcopy(teacher).by_openvino == chosen


def test_auto_does_without_it(
    roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(openvino_blocks, "find_spec", lambda _: None)
    config = DinoV3Config(roots["vit-test"], dtype="bfloat16")
    assert not DinoV3Teacher(config).by_openvino
    assert not caplog.records, "most do not have it, and need not hear of it"


def test_a_release_that_cannot_read_the_network(
    roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no conversion rule for aten::new\nand more")

    monkeypatch.setattr(openvino_blocks, "graph_of", fail)
    with caplog.at_level(logging.WARNING):
        teacher = DinoV3Teacher(DinoV3Config(roots["vit-test"], dtype="bfloat16"))
    assert teacher.extract(images(1), FeatureSpec(cls=True)).cls is not None
    assert "fails: no conversion rule for aten::new (pip install" in caplog.text
    with pytest.raises(ConfigError, match=r"backend must be .* got 'openvino', and OpenVINO .* fails: no conversion"):
        DinoV3Teacher(DinoV3Config(roots["vit-test"], dtype="bfloat16", backend="openvino"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"dtype": "bfloat16", "compile": True}, "compile is True"),
    ],
)
def test_what_it_cannot_compute(roots: dict[str, Path], options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"got 'openvino', and {reason}"):
        DinoV3Teacher(DinoV3Config(roots["vit-test"], backend="openvino", **options))
    with pytest.raises(ConfigError, match="backend must be one of auto, torch, openvino"):
        DinoV3Config(roots["vit-test"], backend="onnx")  # type: ignore[arg-type]


@pytest.mark.slow
def test_several_threads_and_a_pool_get_the_same_bits(roots: dict[str, Path]) -> None:
    config = DinoV3Config(roots["vit-test"], dtype="bfloat16", image_size=96, backend="openvino")
    teacher = DinoV3Teacher(config)
    batches = [images(2, 96, 32 * (1 + number % 3)) for number in range(8)]
    alone = [teacher.extract(batch, EVERYTHING) for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda batch: teacher.extract(batch, EVERYTHING), batches))
    with TeacherPool.start(config, name="openvino", replicas=2, local_mode=True) as pool:
        remote = pool.teacher()
        served = [remote.extract(batch, EVERYTHING) for batch in batches]
        assert remote.info.computed_in == "bfloat16 by OpenVINO"
    for expected, *others in zip(alone, together, served, strict=True):
        for other in others:
            for (_, one), (_, two) in zip(expected.named(), other.named(), strict=True):
                assert torch.equal(one, two)


@pytest.mark.slow
def test_it_reports_to_nobody(roots: dict[str, Path]) -> None:
    DinoV3Teacher(DinoV3Config(roots["vit-test"], dtype="bfloat16")).extract(images(1), FeatureSpec(cls=True))
    assert "openvino_telemetry" not in sys.modules


@pytest.mark.slow
def test_ctrl_c_after_another_thread_let_go_of_a_teacher(roots: dict[str, Path]) -> None:
    """OpenVINO gives the thread that makes its Core a signal stack, which is gone with the Core: none may be let go."""
    script = """
import gc, os, signal, sys, threading
import torch
from dinov3_ray import DinoV3Config, DinoV3Teacher
held = [DinoV3Teacher(DinoV3Config(sys.argv[1], backend="openvino"))]
held[0].extract_features(torch.rand(1, 3, 64, 64))
thread = threading.Thread(target=lambda: (held.clear(), gc.collect()))
thread.start()
thread.join()
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    ran = subprocess.run([sys.executable, "-c", script, roots["vit-test"]], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, "interrupted\n"), ran.stderr
