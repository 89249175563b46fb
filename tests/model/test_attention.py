"""The attention kernel: which one a device gets, and that it is a teacher's own affair."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import FakeCuda
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec
from dinov3_ray.checkpoint import VARIANTS, build_model
from dinov3_ray.errors import ConfigError
from dinov3_ray.model import attention

SPEC = FeatureSpec(cls=True, feature_map=True)
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def flags() -> tuple[bool, ...]:
    return (
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What ``work`` gives in a thread of its own."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()), name="dinov3-test")
    thread.start()
    thread.join()
    return results[0]


def kernels(cuda: FakeCuda) -> set[str]:
    """Of the attention that was launched on a GPU; empty where torch chose one that is not a single kernel."""
    names = [name for _, _, name in cuda.watch.launches if "attention" in name]
    return {name.removeprefix("aten._scaled_dot_product_").removesuffix("_attention.default") for name in names}


def chosen(dtype: torch.dtype = torch.bfloat16) -> str:
    """The implementation that a model on the first fake GPU gets."""
    model = build_model(VARIANTS["vit-test"])
    attention.choose_attention(model, "auto", torch.device("cuda:0"), dtype)
    return model.attention


@pytest.mark.parametrize(("capability", "kernel"), [((9, 0), "cudnn"), ((8, 0), "flash"), ((10, 0), "flash")])
def test_hopper_gets_cudnns_kernel_and_others_torchs_order(capability: tuple[int, int], kernel: str) -> None:
    with FakeCuda(capability=capability):
        assert chosen() == f"sdpa-{kernel}"
        assert chosen(torch.float16) == f"sdpa-{kernel}"
        assert chosen(torch.float32) == "sdpa-efficient", "cuDNN's would read float32 as float16"


def test_a_kernel_that_does_not_run_is_passed_over(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> tuple[Tensor]:
        raise RuntimeError("No available kernel. Aborting execution.")

    found = [chosen()]
    for name in ("cudnn", "flash", "efficient"):
        monkeypatch.setitem(attention._KERNELS, name, refuses)
        found.append(chosen())
    assert found == ["sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "sdpa"]


def test_a_kernel_without_memory_for_its_trial_is_an_error(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs_short(*_: object, **__: object) -> tuple[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(attention._KERNELS, "cudnn", runs_short)
    with pytest.raises(torch.OutOfMemoryError):  # another kernel would give other bits than the pool's other replicas
        chosen()


def test_what_was_asked_for_computes(tiny_checkpoint: Path) -> None:
    sdpa, eager = (
        DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32", attention=name)) for name in ("sdpa", "eager")
    )
    assert (sdpa.model.attention, eager.model.attention) == ("sdpa", "eager")
    found, expected = (teacher.extract_features(IMAGES) for teacher in (eager, sdpa))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, expected)


def test_other_names_are_those_of_transformers(tiny_checkpoint: Path) -> None:
    called: list[str] = []

    def mine(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any) -> tuple[Tensor, None]:
        called.append(module.config._attn_implementation)
        return F.scaled_dot_product_attention(query, key, value, scale=options["scaling"]).transpose(1, 2), None

    AttentionInterface.register("mine", mine)
    config = DinoV3Config(tiny_checkpoint, dtype="float32", attention="mine")
    teacher, plain = (DinoV3Teacher(one) for one in (config, replace(config, attention="sdpa")))
    assert torch.equal(teacher.extract_features(IMAGES), plain.extract_features(IMAGES))
    assert called == ["mine"] * teacher.depth
    with pytest.raises(ConfigError, match="attention 'no-such' cannot be used"):
        DinoV3Teacher(replace(config, attention="no-such"))


@pytest.mark.slow
def test_a_teacher_and_a_student_in_two_threads_choose_for_themselves(tiny_checkpoint: Path, cuda: FakeCuda) -> None:
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="bfloat16", image_size=64), "cuda:0")
    before = flags()
    during: list[tuple[bool, ...]] = []
    # The student enters its context while a pass is running, and leaves it after the pass: with one set of flags,
    # whoever leaves last puts back what it found.
    student = sdpa_kernel([SDPBackend.MATH])
    entered: list[bool] = []

    def enter(*_: object) -> None:
        if not entered:
            entered.append(True)
            in_a_thread(student.__enter__)

    hook = teacher.model.embeddings.register_forward_hook(enter)
    cuda.forget()
    teacher.extract(IMAGES, SPEC)
    during.append(flags())
    hook.remove()
    teacher.extract(IMAGES, SPEC)
    during.append(flags())
    student.__exit__(None, None, None)
    assert kernels(cuda) == {"cudnn"}
    assert during == [(False, False, False, True)] * 2
    assert flags() == before


def test_a_students_choice_leaves_the_teachers_bits(tiny_checkpoint: Path) -> None:
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32", image_size=64))
    expected = teacher.extract(IMAGES, SPEC)
    with sdpa_kernel([SDPBackend.MATH]):
        before = flags()
        found = in_a_thread(lambda: teacher.extract(IMAGES, SPEC))
        assert flags() == before
        made_meanwhile = in_a_thread(lambda: DinoV3Teacher(teacher.config).extract(IMAGES, SPEC))
    for features in (found, made_meanwhile):
        for (name, ours), (_, theirs) in zip(features.named(), expected.named(), strict=True):
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("kernel", attention._KERNELS)
def test_compiled_it_is_the_same_kernel(kernel: str) -> None:
    query = torch.randn(2, 3, 41, 64)
    graphs = []

    def on_a_cpu(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph.code)
        return lambda *given: (F.scaled_dot_product_attention(query, query, query),)

    attend = attention._by_kernel(attention._KERNELS[kernel])
    compiled = torch.compile(lambda q: attend(q, q, q, scale=0.125), fullgraph=True, backend=on_a_cpu)
    torch._dynamo.reset()
    compiled(query)
    (code,) = graphs
    assert f"torch.ops.aten._scaled_dot_product_{'flash_attention_for_cpu' if kernel == 'cpu' else kernel}" in code


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_the_chosen_kernel_is_right(tiny_checkpoint: Path, compile: bool) -> None:
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="bfloat16", compile=compile), "cuda")
    hopper = torch.cuda.get_device_capability()[0] == 9
    assert teacher.model.attention == ("sdpa-cudnn" if hopper else "sdpa-flash")
    before = flags()
    expected = teacher.extract(IMAGES, SPEC)
    with sdpa_kernel([SDPBackend.MATH]):
        found = in_a_thread(lambda: teacher.extract(IMAGES, SPEC))
    assert flags() == before
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found.named(), expected.named(), strict=True))
    assert teacher.prove() > 0.999
