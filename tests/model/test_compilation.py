"""Compiled blocks: when a teacher has them, that all of its code is there before its first result, and what becomes of
a compile that fails."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from compile_backend import Backend, compile_on_cpus
from fake_cuda import FakeCuda
from test_config import model_dir
from torch import nn

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec
from dinov3_ray.checkpoint import init_checkpoint
from dinov3_ray.errors import ConfigError
from dinov3_ray.model.compilation import compile_blocks, is_compiled

CLS = FeatureSpec(cls=True)
IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    return Backend.in_place_of_inductor(monkeypatch)


@pytest.fixture
def auto_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_on_cpus(monkeypatch)


def plain_bits(config: DinoV3Config) -> torch.Tensor:
    cls = (
        DinoV3Teacher(DinoV3Config(config.root, dtype="float32", image_size=64, compile=False)).extract(IMAGES, CLS).cls
    )
    assert cls is not None
    return cls


@pytest.mark.parametrize(
    ("compile", "device", "mode"),
    [
        ("auto", "cuda", "default"),
        ("auto", "cpu", None),
        ("auto", "mps", None),
        (False, "cuda", None),
        (True, "cpu", "default"),
        ("reduce-overhead", "cuda", "reduce-overhead"),
        ("max-autotune-no-cudagraphs", "cpu", "max-autotune-no-cudagraphs"),
    ],
)
def test_what_is_compiled_where(tmp_path: Path, compile: Any, device: str, mode: str | None) -> None:
    assert DinoV3Config(model_dir(tmp_path), compile=compile).compile_mode(device) == mode


def test_auto_is_the_default_and_leaves_models_whose_input_varies_in_size(tmp_path: Path) -> None:
    root = model_dir(tmp_path, size={"shortest_edge": 224})
    assert DinoV3Config(root) == DinoV3Config(root, compile="auto")
    assert DinoV3Config(root).compile_mode("cuda") is None
    assert DinoV3Config(root, image_size=(64, 96)).compile_mode("cuda") == "default"
    assert DinoV3Config(root, compile=True).compile_mode("cuda") == "default"


@pytest.mark.slow
def test_all_code_is_there_before_the_first_result(tiny_checkpoint: Path, auto_on_cpu: None, backend: Backend) -> None:
    config = DinoV3Config(tiny_checkpoint, dtype="float32", image_size=64)
    teacher = DinoV3Teacher(config)
    assert (teacher.compiled, backend.graphs) == (True, 2), "one image, or more; the blocks share it"
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (2, 3, 1):
            teacher.extract(IMAGES[:rows], FeatureSpec(cls=True, layers=(0, -1)))
        cls = teacher.extract(IMAGES, CLS).cls
    assert torch.equal(cls, plain_bits(config))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_default_device_does_not_matter(
    tiny_checkpoint: Path, auto_on_cpu: None, backend: Backend, when: str
) -> None:
    config = DinoV3Config(tiny_checkpoint, dtype="float32", image_size=64)
    with torch.device("cpu") if when == "before" else nullcontext():
        teacher = DinoV3Teacher(config)
    assert teacher.compiled
    with torch.device("cpu"):
        cls = teacher.extract(IMAGES, CLS).cls
    assert torch.equal(cls, plain_bits(config))  # type: ignore[arg-type]


@pytest.mark.slow
def test_autocast_of_the_caller_needs_no_other_code(tiny_checkpoint: Path, auto_on_cpu: None, backend: Backend) -> None:
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32", image_size=64))
    with torch.compiler.set_stance("fail_on_recompile"), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        teacher.extract(IMAGES, CLS)


@pytest.mark.slow
def test_too_little_memory_is_not_taken_for_a_missing_compiler(
    tiny_checkpoint: Path, auto_on_cpu: None, backend: Backend
) -> None:
    backend.fails_at, backend.error = 1, torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(Exception, match="CUDA out of memory"):
        DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32", image_size=64))


@pytest.mark.slow
def test_code_does_not_depend_on_what_was_compiled_before(
    tiny_checkpoint: Path, auto_on_cpu: None, backend: Backend
) -> None:
    for number, size in enumerate((64, 96, 128), 1):
        assert DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32", image_size=size)).compiled
        assert backend.graphs == 2 * number, "each size has its own code, not one for any size"


@pytest.mark.slow
def test_a_process_has_room_for_several_convnexts(tmp_path: Path, auto_on_cpu: None, backend: Backend) -> None:
    root = init_checkpoint("convnext-test", tmp_path / "model")
    for number, size in enumerate((32, 64), 1):
        assert DinoV3Teacher(DinoV3Config(root, dtype="float32", image_size=size)).compiled
        assert backend.graphs == 8 * number


@pytest.mark.slow
@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_compile_that_fails_leaves_the_model_plain(
    tiny_checkpoint: Path, auto_on_cpu: None, backend: Backend, caplog: pytest.LogCaptureFixture, fails_at: int
) -> None:
    backend.fails_at = fails_at
    config = DinoV3Config(tiny_checkpoint, dtype="float32", image_size=64)
    with caplog.at_level(logging.WARNING, "dinov3_ray"):
        teacher = DinoV3Teacher(config)
        cls = teacher.extract(IMAGES, CLS).cls
        assert teacher.prove() > 0.999
        teacher.extract(IMAGES[:1], CLS)
    assert (teacher.compiled, backend.graphs) == (False, fails_at), "it is not tried again, nor for one batch size only"
    assert torch.equal(cls, plain_bits(config))  # type: ignore[arg-type]
    (warning,) = [record.getMessage() for record in caplog.records if "compile" in record.getMessage()]
    assert "torch.compile fails there: RuntimeError: Failed to find C compiler" in warning
    assert "DinoV3Config(compile=False)" in warning


@pytest.mark.slow
@pytest.mark.parametrize("compile", [True, "default"])
def test_one_that_was_asked_for_is_an_error(tiny_checkpoint: Path, backend: Backend, compile: Any) -> None:
    backend.fails_at = 1
    config = DinoV3Config(tiny_checkpoint, dtype="float32", image_size=64, compile=compile)
    with pytest.raises(
        ConfigError, match=rf"(?s)got {compile!r}, and on cpu RuntimeError: Failed to find C compiler.*"
    ):
        DinoV3Teacher(config)


@pytest.mark.slow
def test_a_moved_teacher_follows_its_device(tiny_checkpoint: Path) -> None:
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="bfloat16", image_size=64))
    assert not teacher.compiled
    with FakeCuda():
        assert teacher.to("cuda:1").compiled
        blocks = teacher.model.blocks
        compile_blocks(blocks, teacher.config, torch.device("cpu"), trial=lambda: None)
        assert not teacher.compiled


def test_what_fails_without_it_too_is_not_blamed_on_it(
    tmp_path: Path, auto_on_cpu: None, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = nn.ModuleList([nn.Linear(4, 4)])

    def trial() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        compile_blocks(blocks, DinoV3Config(model_dir(tmp_path)), torch.device("cpu"), trial)
    assert not is_compiled(blocks)
    assert not caplog.records


@pytest.mark.slow
def test_inductor_without_a_compiler(
    tiny_checkpoint: Path, auto_on_cpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor import config as inductor
    from torch._inductor.utils import fresh_cache

    torch.compiler.reset()
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with fresh_cache(), inductor.patch({"cpp.cxx": ("/nowhere/g++",)}):
        teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32", image_size=64))
    assert not teacher.compiled
    assert "torch.compile fails there: InvalidCxxCompiler" in caplog.text
