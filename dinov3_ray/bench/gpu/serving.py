"""A pool of one replica, and an extraction, each compared with a bare loop over the same teacher."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dinov3_ray.bench.dataset.extracting import bare_loop, timed_extract, write_photographs
from dinov3_ray.bench.gpu.acceptance import BASE
from dinov3_ray.bench.gpu.setting import Reporter, Workbench
from dinov3_ray.bench.rates import free_memory, seconds_of
from dinov3_ray.bench.teacher_modes import TEACHER_SPEC, TeacherWork, load_ours, through_pipeline
from dinov3_ray.bench.throughput import prefetch_all
from dinov3_ray.features import FeatureSpec
from dinov3_ray.model import DinoV3Teacher
from dinov3_ray.pool.teacher_pool import TeacherPool

__all__ = ["measure_extraction", "measure_pool"]

_NAME = "bench-gpu"


def measure_pool(bench: Workbench, reporter: Reporter) -> None:
    """Images/s of CLS tokens and maps that reach the host: from loops in this process, and from a pool."""
    sizes, device = bench.sizes, bench.device
    config = bench.config()
    work = TeacherWork(config, device, sizes.batch)
    images = work.images()

    def rate(once: Callable[[], object]) -> float:
        return sizes.batches * len(images) / statistics.median(seconds_of(once, device, sizes.repeats, 0.0))

    def bare_rates() -> dict[str, float]:
        extract = load_ours(work, "bfloat16", compile=config.compile)
        plain = rate(lambda: [extract(images).to("cpu") for _ in range(sizes.batches)])
        overlapped = rate(through_pipeline(extract, work, sizes.batches))
        return {"bare loop, each batch copied before the next": plain, "bare loop, copies overlapped": overlapped}

    reporter.step("bare loops")
    bare = bare_rates()
    base = max(bare.values())
    for what, measured in bare.items():
        reporter.row({"what": what, "img/s": measured, BASE: measured / base})
    free_memory(device)
    if reporter.leaves_out("pool"):
        return
    reporter.step("start of a pool")
    bench.connect()
    with (
        TeacherPool.start(config, name=_NAME, replicas=1, num_gpus=int(bench.on_gpu), max_batch=sizes.batch) as pool,
        pool.teacher() as remote,
    ):
        reporter.step("pool")
        measured = rate(lambda: prefetch_all(remote, images, sizes.batches, TEACHER_SPEC))
    reporter.row({"what": "pool", "img/s": measured, BASE: measured / base})


def measure_extraction(bench: Workbench, reporter: Reporter) -> None:
    """Images/s of an extraction from JPEG files, and of loops that write nothing."""
    sizes, device = bench.sizes, bench.device
    config = bench.config()
    spec = FeatureSpec(cls=True, feature_map=True, map_size=sizes.map_size, dtype="float16")
    folder = Path(bench.setting.folder)
    reporter.step("JPEG files")
    files = write_photographs(folder / "files", sizes.images, sizes.files)
    decoded = [np.asarray(Image.open(path)) for path in files[: sizes.files]] * (sizes.images // sizes.files)
    reporter.step("bare loops")
    teacher = DinoV3Teacher(config, device)
    few = max(sizes.batch, sizes.images // 4)
    bare_loop(teacher, decoded[: sizes.batch], sizes.batch, spec)  # memory is had, kernels are loaded
    loops: dict[str, tuple[Sequence[np.ndarray | Path], float]] = {
        "bare loop over decoded images": (decoded, bare_loop(teacher, decoded, sizes.batch, spec)[1]),
        "bare loop, each batch decoded first": (files[:few], bare_loop(teacher, files[:few], sizes.batch, spec)[1]),
    }
    rates = {what: len(images) / seconds for what, (images, seconds) in loops.items()}
    base = max(rates.values())
    for what, rate in rates.items():
        reporter.row({"what": what, "img/s": rate, BASE: rate / base})
    del teacher
    free_memory(device)
    if reporter.leaves_out("extract"):
        return
    reporter.step("extract")
    bench.connect()
    whole, steady = timed_extract(folder / "files", folder / "features", config, spec)
    rate = sizes.images / steady
    with_start = {"with its start, img/s": sizes.images / whole}
    reporter.row({"what": "extract", "img/s": rate, BASE: rate / base} | with_start)
