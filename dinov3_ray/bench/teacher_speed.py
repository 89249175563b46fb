"""The speed of a local teacher, compared with its peer and with the bound that this device's own rates set."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.table import Table

from dinov3_ray.bench.printout import describe_machine, new_table
from dinov3_ray.bench.rates import copy_rates, free_memory, matmul_rate, seconds_of
from dinov3_ray.bench.teacher_modes import TeacherMode, TeacherWork, through_pipeline
from dinov3_ray.config.architecture import Architecture, ConvNextArchitecture
from dinov3_ray.config.preprocessing import Size
from dinov3_ray.errors import NumericsError
from dinov3_ray.features import Features
from dinov3_ray.model.golden import agreement

__all__ = ["Effort", "TeacherBench", "device_name", "flops_per_image", "measure_teacher"]


_PIPELINE_BATCHES = 10
_TYPICAL_RATES = (100, 300, 1_000, 3_000, 10_000)


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure.

    Attributes:
        repeats: runs per mode, of which the median counts.
        least: seconds per run; 0 to see that it works.
        to_host: on CUDA devices, whether our modes are measured to the host as well.
    """

    repeats: int
    least: float = 0.3
    to_host: bool = True


@dataclass(frozen=True, slots=True)
class TeacherRow:
    """The result of one mode.

    Attributes:
        name: of the mode.
        dtype: of its matrix products.
        ours: True for this package, False for its peer.
        seconds: per batch, one value per run.
        first_seconds: the cost of a start: loading the model, and the first two batches.
        cosine: between its golden results and those of the first mode; None for the first mode.
        peak_bytes: of device memory, on CUDA devices.
        missing: the reason why it was not measured.
    """

    name: str
    dtype: str
    ours: bool
    seconds: tuple[float, ...] = ()
    first_seconds: float = 0.0
    cosine: float | None = None
    peak_bytes: int | None = None
    missing: str | None = None

    def rate(self, batch: int) -> float:
        """Images/s: the median over the runs."""
        return batch / statistics.median(self.seconds)


@dataclass(frozen=True, slots=True)
class TeacherBench:
    """The results of all modes, and of what they were measured on.

    Attributes:
        model: its variant, or its directory.
        device: its name.
        machine: as :func:`describe_machine` gives it.
        image_size: (h, w) of the model's input.
        batch: images per batch.
        flops: floating-point operations per image.
        matmul: FLOP/s by dtype.
        copies: images/s that can be copied in as uint8, and out as results, on CUDA devices.
        rows: one per mode.
        target: the images/s to size a pool for; None for a list of usual rates.
    """

    model: str
    device: str
    machine: str
    image_size: tuple[int, int]
    batch: int
    flops: float
    matmul: dict[str, float]
    copies: tuple[float, float] | None
    rows: tuple[TeacherRow, ...]
    target: float | None

    @property
    def best(self) -> TeacherRow:
        """The fastest row of this package, by which a pool is sized."""
        return max((row for row in self.rows if row.ours and row.seconds), key=lambda row: row.rate(self.batch))

    def bound(self, row: TeacherRow) -> float:
        """Images/s if only the matrix products took time."""
        return self.matmul[row.dtype] / self.flops

    def replicas(self) -> dict[float, int]:
        """By images/s: the number of replicas on devices like this one that give them."""
        rate = self.best.rate(self.batch)
        targets = _TYPICAL_RATES if self.target is None else (self.target,)
        return {target: math.ceil(target / rate) for target in targets}

    @property
    def base(self) -> float:
        """Images/s of the first row that was measured, over which ratios are."""
        return next(row.rate(self.batch) for row in self.rows if row.seconds)

    def as_dict(self) -> dict[str, Any]:
        base = self.base
        rows = []
        for row in self.rows:
            rate = row.rate(self.batch) if row.seconds else None
            derived = (
                {}
                if rate is None
                else {
                    "images_per_second": rate,
                    "ratio": rate / base,
                    "share_of_bound": rate / self.bound(row),
                }
            )
            rows.append(asdict(row) | derived)
        needed = self.replicas() if any(row.ours and row.seconds for row in self.rows) else {}
        return asdict(self) | {"rows": rows, "replicas_needed": needed}

    def tables(self) -> list[Table | str]:
        """The modes as a table, and the number of replicas that a pool needs."""
        return [self._table(), self.advice()]

    def _table(self) -> Table:
        height, width = self.image_size
        rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in self.matmul.items())
        runs = max(len(row.seconds) for row in self.rows)
        caption = [
            f"median of {runs} runs after a warm-up, preprocessing included; golden cosine to the first row's results",
            f"bound: {self.flops / 1e12:.3g} TFLOP per image over this device's matmul rates in TFLOP/s ({rates})",
        ]
        if self.copies is not None:
            caption.append(f"copies alone: {self.copies[0]:.0f} img/s in, {self.copies[1]:.0f} img/s of results out")
        table = new_table(
            f"{self.model}, {height} x {width} px, batch {self.batch}, on {self.device}",
            "\n".join([*caption, self.machine]),
            *("", "img/s", "ratio", "of bound", "cosine", "start s", "GiB"),
        )
        base = self.base
        for row in self.rows:
            name = f"[bold]{row.name}[/]" if row.ours else row.name
            if not row.seconds:
                table.add_row(name, "-", "-", "-", "-", "-", row.missing)
                continue
            rate = row.rate(self.batch)
            table.add_row(
                name,
                f"{rate:.3g}" if rate < 100 else f"{rate:.0f}",
                f"{rate / base:.2f}",
                f"{rate / self.bound(row):.0%}",
                "-" if row.cosine is None else f"{row.cosine:.6f}",
                f"{row.first_seconds:.1f}",
                "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f}",
            )
        return table

    def advice(self) -> str:
        """One line: the number of replicas that a pool needs."""
        needed = ", ".join(f"{count} for {target:g} img/s" for target, count in self.replicas().items())
        return f"Replicas needed, at {self.best.rate(self.batch):.3g} img/s each ({self.best.name}): {needed}"


def measure_teacher(
    work: TeacherWork,
    modes: Sequence[TeacherMode],
    effort: Effort,
    *,
    model: str,
    target: float | None = None,
    on_step: Callable[[str], None],
    leaves_out: Callable[[str], bool] = lambda _: False,
) -> TeacherBench:
    """Measure all modes, one after the other; each is freed before the next is loaded.

    Args:
        work: what each mode does.
        modes: ways to do it; results are compared with those of the first one that runs.
        effort: how long to measure.
        model: its name in the result.
        target: images/s to size a pool for; None for a list of usual rates.
        on_step: called with the name of each step.
        leaves_out: called with the name of each mode: whether it is left out, and gets no row.

    Raises:
        Exception: what the last mode raised, if none of them runs.
    """
    device, architecture = work.device, work.config.architecture
    golden = work.golden()
    rows: list[TeacherRow] = []
    reference: Features | None = None
    failure: Exception | None = None
    for mode in modes:
        if rows and leaves_out(mode.name):
            continue
        if mode.missing:
            rows.append(TeacherRow(mode.name, _name(mode.dtype), mode.ours, missing=mode.missing))
            continue
        on_step(mode.name)
        try:
            measured, features = _measure_mode(mode, work, golden, effort)
        except Exception as error:  # noqa: BLE001 - other modes may run
            failure = error
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append(TeacherRow(mode.name, _name(mode.dtype), mode.ours, missing=reason))
            continue
        finally:
            free_memory(device)
        if reference is None:
            reference = features
        else:
            measured = [replace(row, cosine=_cosine(features, reference, mode.name)) for row in measured]
        rows += measured
    if reference is None:
        assert failure is not None, "no mode was given"
        raise failure
    on_step("matmul and copy rates")
    tokens = work.batch * (1 + work.config.num_register_tokens + math.prod(work.grid_size))
    side = 8192 if device.type == "cuda" else 2048 if effort.least else 512
    width = work.config.hidden_size
    shapes = [(side, side, side), (tokens, width, 4 * width), (tokens, 4 * width, width)]
    # A product takes a GPU a millisecond.
    least = min(effort.least, 0.05) if device.type == "cuda" else effort.least
    matmul = {_name(dtype): matmul_rate(device, dtype, shapes, effort.repeats, least) for dtype in _dtypes(rows, modes)}
    return TeacherBench(
        model=model,
        device=device_name(device),
        machine=describe_machine(),
        image_size=work.input_size,
        batch=work.batch,
        flops=flops_per_image(architecture, work.input_size),
        matmul=matmul,
        copies=_copies(work, reference, effort),
        rows=tuple(rows),
        target=target,
    )


def _measure_mode(
    mode: TeacherMode, work: TeacherWork, golden: torch.Tensor, effort: Effort
) -> tuple[list[TeacherRow], Features]:
    """(Rows, golden results) of one mode. On CUDA devices, ours may have a second row through a replica's pipeline."""
    device, images = work.device, work.images()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.init()  # type: ignore[no-untyped-call] # nothing else may have, and the next line does not
        torch.cuda.reset_peak_memory_stats(device)
    begun = time.perf_counter()
    extract = mode.make(work)
    features = extract(golden).to("cpu")
    extract(images).to("cpu")
    first = time.perf_counter() - begun
    seconds = seconds_of(lambda: extract(images), device, effort.repeats, effort.least)
    peak = torch.cuda.max_memory_allocated(device) if cuda else None
    row = TeacherRow(mode.name, _name(mode.dtype), mode.ours, tuple(seconds), first, peak_bytes=peak)
    rows = [row]
    if cuda and mode.ours and effort.to_host:
        once = through_pipeline(extract, work, _PIPELINE_BATCHES)
        delivered = [passed / _PIPELINE_BATCHES for passed in seconds_of(once, device, effort.repeats, effort.least)]
        peak = torch.cuda.max_memory_allocated(device)
        rows.append(replace(row, name=f"{mode.name}, to the host", seconds=tuple(delivered), peak_bytes=peak))
    return rows, features


def _cosine(features: Features, reference: Features, name: str) -> float:
    """The cosine of the golden check; -1 if values are not finite."""
    try:
        return agreement(features, reference, -1.0, name)
    except NumericsError:
        return -1.0


def _copies(work: TeacherWork, reference: Features, effort: Effort) -> tuple[float, float] | None:
    if work.device.type != "cuda":
        return None
    into, out = copy_rates(work.device, 64 * 2**20, effort.repeats, effort.least)
    results = reference.nbytes / len(reference) / 2  # float32 here; bfloat16 is what a pool delivers
    return into / work.images()[0].numel(), out / results


def _dtypes(rows: Sequence[TeacherRow], modes: Sequence[TeacherMode]) -> list[torch.dtype]:
    """The dtypes that were measured."""
    measured = {row.dtype for row in rows if row.seconds}
    return list(dict.fromkeys(mode.dtype for mode in modes if _name(mode.dtype) in measured))


def _name(dtype: torch.dtype) -> str:
    return "float8" if dtype == torch.float8_e4m3fn else str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """The device's name; a CPU's with the number of threads that compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # in newer releases of torch
    return f"{capabilities.get('cpu_name', 'CPU')}, {torch.get_num_threads()} threads"


def flops_per_image(architecture: Architecture, image_size: Size) -> float:
    """Floating-point operations per image in all matrix products; a multiplication and an addition are two.

    Norms, activations, RoPE and softmax are left out: they are a few per cent, and memory limits them.

    Args:
        architecture: of the model.
        image_size: (h, w) of its input, in pixels.
    """
    cells = [_cells(image_size, stride) for stride in architecture.layer_strides]
    total = 0.0
    for name, shape in architecture.tensors().items():
        if not name.endswith("weight") or len(shape) == 1:
            continue
        if isinstance(architecture, ConvNextArchitecture):
            # Convolutions and linear layers use each weight of a stage once per cell of its grid.
            positions = cells[int(name.split(".")[1])]
        else:
            embeds = name.startswith("embeddings.")
            positions = cells[0] + (0 if embeds else 1 + architecture.num_register_tokens)
        total += 2.0 * math.prod(shape) * positions
    if not isinstance(architecture, ConvNextArchitecture):
        tokens = cells[0] + 1 + architecture.num_register_tokens
        # Queries times keys, and the result times values.
        total += 4.0 * tokens**2 * architecture.hidden_size * architecture.num_layers
    return total


def _cells(image_size: Size, stride: int) -> int:
    return (image_size[0] // stride) * (image_size[1] // stride)
