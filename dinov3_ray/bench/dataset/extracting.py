"""The speed of extraction, compared with a bare loop and with plain Ray Data.

Each contender gets the same images in two forms: decoded pixels ([224,224,3], in memory or in Ray's object store),
which leaves out file system and decoder; and JPEG files of 500 x 375 px, decoded on the same CPUs. Decoding of larger
files, and reading, are measured by themselves.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
import torch.nn.functional as F
from PIL import Image
from rich.table import Table

from dinov3_ray.bench.dataset.decoding import LARGE, DecodeRate, decoding_table, measure_decoding
from dinov3_ray.bench.dataset.reading import (
    PeerRead,
    ReadRate,
    measure_peers,
    measure_reading,
    peers_table,
    reading_table,
)
from dinov3_ray.bench.printout import describe_machine, new_table
from dinov3_ray.bench.throughput import quiet_data
from dinov3_ray.checkpoint import init_checkpoint
from dinov3_ray.config import Backend, CompileChoice, ComputeDtype, DinoV3Config
from dinov3_ray.datasets import extract
from dinov3_ray.datasets.decode import Decoder
from dinov3_ray.datasets.store.schema import encode_columns
from dinov3_ray.feature_spec import FeatureSpec
from dinov3_ray.model import DinoV3Teacher

__all__ = [
    "DatasetResult",
    "DatasetWork",
    "ImageRate",
    "bare_loop",
    "measure_dataset",
    "timed_extract",
    "write_photographs",
]


_SPEC = FeatureSpec(cls=True, feature_map=True)
_SIDE = 224
_FILE_SIZE = (500, 375)  # width, height: about ImageNet's


@dataclass(frozen=True, slots=True)
class DatasetWork:
    """What is extracted.

    Attributes:
        images: their number in each form (decoded, JPEG). The peers are slower, and get a quarter of them.
        batch: images per forward pass.
        variant: of the teacher, which has random weights.
        dtype, compile, attention, backend: of the teacher, which the bare loop uses too.
    """

    images: int = 768
    batch: int = 32
    variant: str = "vits16"
    dtype: ComputeDtype = "auto"
    compile: CompileChoice = "auto"
    attention: str = "auto"
    backend: Backend = "auto"

    @property
    def peers_images(self) -> int:
        """Images per run of a peer."""
        return max(2 * self.batch, self.images // 4)


@dataclass(frozen=True, slots=True)
class ImageRate:
    """The times of one contender, one value per run.

    Attributes:
        name: as the table shows it.
        images: images per run.
        steady: seconds from the start of the first image to the end of the last one, without the start of actors.
        whole: seconds of the whole call, with the start of actors and teachers; empty if it starts none.
    """

    name: str
    images: int
    steady: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        """Images/s of the steady part, the median of the runs."""
        return self.images / statistics.median(self.steady)

    @property
    def whole_per_second(self) -> float | None:
        """Images/s of the whole call, the median of the runs; None if it starts nothing."""
        return self.images / statistics.median(self.whole) if self.whole else None


@dataclass(frozen=True, slots=True)
class DatasetResult:
    """The rates of decoded images and of JPEG files, each with the bare loop first; of decoding; and of reading."""

    work: DatasetWork
    computed_in: str
    decoded: list[ImageRate]
    files: list[ImageRate]
    decoding: list[DecodeRate]
    reading: list[ReadRate]
    peers: list[PeerRead]
    machine: str

    def as_dict(self) -> dict[str, Any]:
        def rows(rates: Sequence[ImageRate]) -> list[dict[str, Any]]:
            return [
                asdict(rate) | {"images_per_second": rate.per_second, "of_the_bare_loop": _ratio(rate, rates[0])}
                for rate in rates
            ]

        return {
            "work": asdict(self.work),
            "computed_in": self.computed_in,
            "machine": self.machine,
            "decoded": rows(self.decoded),
            "files": rows(self.files),
            "decoding": [asdict(rate) | {"images_per_second": rate.per_second} for rate in self.decoding],
            "reading": [asdict(reading) | {"ratio": reading.ratio} for reading in self.reading],
            "reading_beside_others": [peer.as_dict(self.peers[0]) for peer in self.peers],
        }

    def tables(self) -> list[Table]:
        """One table per form of the images, and one of reading."""
        found = []
        for title, rates in (
            (f"images decoded already, {_SIDE} px", self.decoded),
            (f"JPEG files, {_FILE_SIZE[0]} x {_FILE_SIZE[1]} px", self.files),
        ):
            if not rates:
                continue
            title = f"{self.work.variant}, CLS and map, {self.computed_in}: {title}"
            caption = f"medians of {len(rates[0].steady)} runs, after one to warm up"
            table = new_table(title, caption, "", "img/s", "of the bare loop", "with its start", "images")
            for rate in rates:
                whole = rate.whole_per_second
                table.add_row(
                    rate.name,
                    f"{rate.per_second:.1f}",
                    f"{_ratio(rate, rates[0]):.1%}",
                    "-" if whole is None else f"{whole:.1f}",
                    str(rate.images),
                )
            found.append(table)
        tables = decoding_table(self.decoding), reading_table(self.reading, self.machine), peers_table(self.peers)
        return [*found, *tables]


def measure_dataset(
    work: DatasetWork, repeats: int, folder: Path, on_contender: Callable[[str], None], *, quick: bool = False
) -> DatasetResult:
    """Measure in the Ray that this process is connected to, and write files to ``folder``. Contenders take turns.

    ``quick`` leaves out the warming up, the files, and the peer with many actors.
    """
    root = init_checkpoint(work.variant, folder / "model")
    config = DinoV3Config(root, dtype=work.dtype, compile=work.compile, attention=work.attention, backend=work.backend)
    teacher = DinoV3Teacher(config)
    files = write_photographs(folder / "files", work.images)
    pixels = [_square(Image.open(path)) for path in files]
    rows = [{"id": path.name, "image": image} for path, image in zip(files, pixels, strict=True)]
    with quiet_data(), _all_threads():
        # Enough blocks for every actor to get one; with many images, blocks of about 20 MB.
        given, few = (
            ray.data.from_items(part, override_num_blocks=max(_cpus(), len(part) // 128)).materialize()
            for part in (rows, rows[: work.peers_images])
        )
        sets: dict[str, list[tuple[ImageRate, _Contender]]] = {
            "decoded": [
                (ImageRate("bare loop", work.images), lambda _: bare_loop(teacher, pixels, work.batch)),
                (ImageRate("extract", work.images), lambda out: timed_extract(given, out, config)),
                *_peers(few, root, work.peers_images),
            ],
            "files": [
                (ImageRate("bare loop, decoding first", work.images), lambda _: bare_loop(teacher, files, work.batch)),
                (ImageRate("extract", work.images), lambda out: timed_extract(folder / "files", out, config)),
                *_peers([str(path) for path in files[: work.peers_images]], root, work.peers_images)[-1:],
            ],
        }
        if quick:
            sets = {"decoded": sets["decoded"][:-1]}
        for turn in range(1 if quick else 0, repeats + 1):
            for form, contenders in sets.items():
                for number, (rate, contender) in enumerate(contenders):
                    on_contender(f"{rate.name} ({form}), {'warming up' if turn == 0 else f'run {turn}'}")
                    whole, steady = contender(folder / f"{form}-{number}-{turn}")
                    if turn:
                        rate.steady.append(steady)
                        rate.whole.extend([] if whole is None else [whole])
        on_contender("decoding")
        decoding = measure_decoding(write_photographs(folder / "large", 1 if quick else 4, size=LARGE), repeats)
        on_contender("reading")
        reading = measure_reading(folder / "decoded-1-1", folder / "reading", repeats)
        on_contender("reading beside Lance and datasets")
        peers = measure_peers(folder / "peers", 64 if quick else 512, repeats)
    return DatasetResult(
        work,
        teacher.computed_in,
        [rate for rate, _ in sets["decoded"]],
        [rate for rate, _ in sets.get("files", [])],
        decoding,
        reading,
        peers,
        describe_machine(),
    )


_Contender = Callable[[Path], tuple[float | None, float]]
"""Writes to a folder; returns (seconds of the whole call, or None if it starts nothing; seconds of the steady part)."""


def bare_loop(
    teacher: DinoV3Teacher, images: Sequence[np.ndarray | Path], batch: int, spec: FeatureSpec = _SPEC
) -> tuple[None, float]:
    """The bound: one batch after the other through the teacher, to arrays on the host. Nothing is written."""
    begun = time.perf_counter()
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        encode_columns(teacher.extract(np.stack([_pixels(image) for image in part]), spec), spec)
    return None, time.perf_counter() - begun


def _pixels(image: np.ndarray | Path) -> np.ndarray:
    """The pixels of an image, uint8 [3,H,W]."""
    if isinstance(image, Path):
        return Decoder().read(image.read_bytes(), str(image))
    return image.transpose(2, 0, 1)


def timed_extract(source: Any, out: Path, config: DinoV3Config, spec: FeatureSpec = _SPEC) -> tuple[float, float]:
    """This project's extraction: (seconds of the whole call, and of its steady part).

    The steady part lasts from the start of its first block to the end of its last one.
    """
    begun = time.perf_counter()
    extract(source, out, config, spec, progress=False)
    whole = time.perf_counter() - begun
    spans = [
        (path.stat().st_mtime - json.loads(path.read_text())["seconds"], path.stat().st_mtime)
        for path in (out / "ledger").iterdir()
    ]
    return whole, max(end for _, end in spans) - min(start for start, _ in spans)


class PlainTransformers:
    """A class for Ray Data as the documentation of transformers suggests it: one image at a time, in float32.

    The steps of the image processor are written out, since the processor itself needs torchvision.
    """

    def __init__(self, root: str) -> None:
        from transformers import AutoModel  # here, since it takes seconds, and only this contender needs it

        self.model = AutoModel.from_pretrained(root, dtype=torch.float32)
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in _STATISTICS)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        begun = time.time()
        tokens, maps = [], []
        for image in batch["image"]:
            pixels_3HW = torch.from_numpy(np.array(image)).permute(2, 0, 1) * (1 / 255)
            pixels_B3hw = F.interpolate(pixels_3HW[None], size=(_SIDE, _SIDE), mode="bilinear", antialias=True)
            with torch.inference_mode():
                outputs = self.model((pixels_B3hw - self.mean) / self.std)
            hidden_BND = outputs.last_hidden_state
            tokens.append(outputs.pooler_output[0].numpy())
            maps.append(hidden_BND[0, -((_SIDE // 16) ** 2) :].numpy())
        count = len(tokens)
        times = {"begun": np.full(count, begun), "ended": np.full(count, time.time())}
        return {"cls": np.stack(tokens), "map": np.stack(maps), **times}


_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _peers(source: Any, root: Path, images: int) -> list[tuple[ImageRate, _Contender]]:
    def contender(actors: int) -> _Contender:
        return lambda out: _plain(source, out, root, actors)

    return [
        (ImageRate("map_batches with transformers, one actor", images), contender(1)),
        (ImageRate("map_batches with transformers, one actor per CPU", images), contender(_cpus())),
    ]


def _plain(source: Any, out: Path, root: Path, actors: int) -> tuple[float, float]:
    begun = time.perf_counter()
    dataset = ray.data.read_images(source) if isinstance(source, list) else source
    dataset.map_batches(
        PlainTransformers,
        fn_constructor_args=(str(root),),
        batch_size=32,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=min(1.0, max(0.1, (_cpus() - 1) / actors)),  # else no CPU is left for tasks that read
    ).write_parquet(str(out))
    whole = time.perf_counter() - begun
    times = pq.read_table(out, columns=["begun", "ended"])
    return whole, times["ended"].to_numpy().max() - times["begun"].to_numpy().min()


def _cpus() -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


@contextmanager
def _all_threads() -> Any:
    """Let torch use all CPUs of the cluster, as in the extraction's actor."""
    before = torch.get_num_threads()
    torch.set_num_threads(_cpus())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_photographs(
    folder: Path, count: int, distinct: int | None = None, size: tuple[int, int] = _FILE_SIZE
) -> list[Path]:
    """Write JPEG files with the size and about the detail of photographs: smooth colours with noise.

    Where fewer are ``distinct``, the others are links to them: writing takes longer than reading.
    """
    folder.mkdir(parents=True)
    width, height = size
    paths: list[Path] = []
    for index in range(count):
        path = folder / f"{index:05}.jpg"
        if distinct is not None and index >= distinct:
            path.hardlink_to(paths[index % distinct])
            paths.append(path)
            continue
        generator = np.random.default_rng(index)
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        grain = generator.integers(-12, 13, (height, width, 1), dtype=np.int16)
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(path, quality=90)
        paths.append(path)
    return paths


def _square(image: Image.Image) -> np.ndarray:
    """The image as pixels, uint8 [224,224,3]."""
    return np.asarray(image.convert("RGB").resize((_SIDE, _SIDE)))


def _ratio(rate: ImageRate, bound: ImageRate) -> float:
    return rate.per_second / bound.per_second
