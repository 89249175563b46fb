"""Run a teacher once over a data set, with Ray Data, into a store that can be resumed and read back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import ray
import ray.data

from dinov3_ray.config import DinoV3Config
from dinov3_ray.datasets.decode import MAX_PIXELS, Decoder
from dinov3_ray.datasets.extraction import plan as plans
from dinov3_ray.datasets.extraction.resources import place
from dinov3_ray.datasets.extraction.run import Extraction, Run
from dinov3_ray.datasets.extraction.worker import ExtractionJob, TeacherChoice
from dinov3_ray.datasets.folder import PLAN, Folder
from dinov3_ray.datasets.sources.open import open_source, reopen_source
from dinov3_ray.datasets.sources.ray_dataset import DatasetRows
from dinov3_ray.errors import ConfigError, DinoV3Error, SpecError, StoreError
from dinov3_ray.features import FeatureSpec
from dinov3_ray.pool.cluster import connect
from dinov3_ray.pool.spec import check_source
from dinov3_ray.teacher import Extractor

__all__ = ["Extraction", "extract"]


def extract(
    source: str | os.PathLike[str] | ray.data.Dataset,
    out: str | os.PathLike[str],
    config: DinoV3Config | str | os.PathLike[str] | Callable[[], Extractor] | None = None,
    spec: FeatureSpec = FeatureSpec(cls=True, feature_map=True),  # noqa: B008 - frozen
    *,
    pool: str | None = None,
    batch_size: int | None = None,
    block_size: int | None = None,
    replicas: int | None = None,
    num_gpus: float | None = None,
    decoders: int | None = None,
    threads: int | None = None,
    image_column: str | None = None,
    id_column: str | None = None,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = (255, 255, 255),
    filesystem: Any = None,
    out_filesystem: Any = None,
    address: str | None = None,
    progress: bool | None = None,
    check_space: bool = True,
    dry_run: bool = False,
    on_forecast: Callable[[plans.Forecast], None] | None = None,
) -> Extraction:
    """Write the teacher's features of every image of ``source`` to ``out``; see :class:`FeatureStore` for reading.

    The same call resumes a run that ended early, however it ended: blocks in its ledger are neither computed nor read
    again, the source is not listed again (files that came since are not seen), and the result is the undisturbed
    run's, row for row. Blocks that were on the way are computed anew. Of a finished run, a source other than a Dataset
    need not even be there any more.

    Ray is used as this process has it, joined at ``address``, or started for the run. Teachers run in an actor pool of
    Ray Data, one a GPU where the cluster has any; decoding runs in tasks on its CPUs.

    Args:
        source: a folder, file, glob or URI of images, WebDataset shards (.tar) or Parquet files; or a Ray Dataset with
            a column of images (bytes, or uint8 arrays) and one of ids. A Dataset's first rows are computed twice, to
            see what it holds. It is read again when it is resumed, and must give its rows in the same order (shuffle
            with a seed); what is finished is dropped from it.
        out: a folder; local, or a URI.
        config: the teacher: a configuration, the path of a model directory, or a picklable factory.
        spec: what to extract. Its ``dtype`` is the stored one: float32, float16, int8, or native (the compute dtype;
            bfloat16 is stored as float32, without loss).
        pool: the name of a running pool, in place of ``config``.
        batch_size: images a forward pass; 32.
        block_size: images a block, the unit that is committed and resumed; by default so many that their features take
            about 32 MB, but whole batches (at least one, 512 images at most).
        replicas, num_gpus: of the teacher's actors; by default all GPUs, or one actor a node without any.
        decoders: decoding tasks for each block that is under way; by default as many as an actor's share of the CPUs.
        threads: torch's, of an actor that computes on CPUs; by default its share of the node's.
        image_column, id_column: of a Parquet source or a Dataset; guessed from usual names.
        max_pixels: larger images are errors, taken for decompression bombs.
        background: RGB under transparent pixels.
        filesystem, out_filesystem: pyarrow file systems, for places without a URI.
        address: of the Ray cluster, if this process is not connected to one.
        progress: show a bar; by default, if standard error is a terminal.
        check_space: refuse to start what does not fit the disk.
        dry_run: plan and forecast only; nothing is written.
        on_forecast: called with the forecast before work begins.

    Raises:
        StoreError: nothing to read, no room, ``out`` is in use, or it holds another run's features: says what differs.
        ConfigError, CheckpointError, SpecError: the teacher or the spec is wrong.
        NumericsError: the stored dtype cannot hold the values.
        PoolError: Ray or the pool cannot be reached.
    """
    if not isinstance(spec, FeatureSpec):
        raise SpecError(f"spec must be a FeatureSpec; got {type(spec).__name__}")
    spec.require_outputs()
    if (config is None) == (pool is None):
        raise ConfigError("exactly one of config and pool must be given: they say who computes")
    for name, value in (("batch_size", batch_size), ("block_size", block_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} must be an integer, at least 1; got {value!r}")
    if not isinstance(source, (str, os.PathLike, ray.data.Dataset)):
        raise ConfigError(f"source must be a path, a glob, a URI or a Ray Dataset; got {type(source).__name__}")
    folder = Folder.at(out, out_filesystem)
    decoder = Decoder(max_pixels, background=background)
    old = folder.read_json(PLAN, "source", "batch_size", "block_size", "outputs") if folder.exists(PLAN) else None
    given = source if isinstance(source, ray.data.Dataset) else None
    images = None
    if not isinstance(source, ray.data.Dataset):
        options = {"filesystem": filesystem, "image_column": image_column, "id_column": id_column}
        if old is not None and "root" in old["source"]:
            images = reopen_source(old["source"], source, **options)
        else:
            images = open_source(source, **options, exclude=folder.path)
    teacher = None if config is None else check_source(config)
    runtime = connect(address, may_start=True)
    try:
        nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
        placement = place(
            ray.cluster_resources(),
            max(1, nodes),
            replicas=replicas,
            num_gpus=num_gpus,
            decoders=decoders,
            threads=threads,
            pooled=pool is not None,
            free_cpus=ray.available_resources().get("CPU", 0.0),
            # Compiled code is not: torch.compile keeps state of its own. Of others' teachers nothing is known.
            reentrant=isinstance(teacher, DinoV3Config) and not teacher.compile,
        )
        rows = None if given is None else DatasetRows(given, image_column, id_column)
        device = "cuda" if placement.num_gpus else "cpu"
        job = ExtractionJob(
            teacher=TeacherChoice(teacher, pool, device, placement.threads, placement.passes),
            folder=folder,
            identity={},
            spec=spec,
            decoder=decoder,
            source=images,
            batch_size=batch_size or 0,
            window=placement.window,
            decode_cpus=placement.decode_cpus,
            columns=None if rows is None else rows.columns,
        )
        with contextlib.nullcontext() if dry_run else folder.exclusive():
            if folder.exists(PLAN) != (old is not None):
                raise StoreError(f"{folder.path} was changed by another run just now: run the same command again")
            return Run(job, placement, rows, block_size, old).execute(progress, check_space, dry_run, on_forecast)
    except ray.exceptions.RayError as error:
        own = _own_error(error)
        if own is None:
            raise
        raise own from error
    finally:
        runtime.close()


def _own_error(error: BaseException) -> DinoV3Error | None:
    """This package's own error within what Ray wrapped around it."""
    seen: list[BaseException] = []
    inner: BaseException | None = error
    while inner is not None and inner not in seen:
        if isinstance(inner, DinoV3Error) and not isinstance(inner, ray.exceptions.RayError):
            return inner
        seen.append(inner)
        cause = getattr(inner, "cause", None)
        inner = cause if isinstance(cause, BaseException) else inner.__cause__ or inner.__context__
    return None
