"""Run a teacher once over a data set, with Ray Data, into a store that can be resumed and read back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import ray
import ray.data

from dinov3_ray.config import ModelConfig
from dinov3_ray.datasets.extraction.attempts import MEMORY_REMEDY
from dinov3_ray.datasets.extraction.blocks import open_blocks
from dinov3_ray.datasets.extraction.plan import Forecast
from dinov3_ray.datasets.extraction.probe_process import EarlyProbe
from dinov3_ray.datasets.extraction.resources import Resources, allocate
from dinov3_ray.datasets.extraction.run import Extraction, Run
from dinov3_ray.datasets.extraction.teacher_choice import TeacherChoice
from dinov3_ray.datasets.folder import PLAN, Folder
from dinov3_ray.datasets.sources.open import SourceOptions
from dinov3_ray.datasets.store.schema import check_format
from dinov3_ray.errors import ConfigError, DinoV3Error, SpecError, StoreError
from dinov3_ray.feature_spec import FeatureSpec
from dinov3_ray.machine.gpus import has_gpus
from dinov3_ray.pool.cluster import connect, starts_ray
from dinov3_ray.pool.spec import check_teacher, pickle_teacher
from dinov3_ray.teacher import Extractor

if TYPE_CHECKING:
    from dinov3_ray.pool.client.remote import RemoteTeacher

__all__ = ["Extraction", "extract"]


def extract(
    source: str | os.PathLike[str] | ray.data.Dataset,
    out: str | os.PathLike[str],
    config: ModelConfig | str | os.PathLike[str] | Callable[[], Extractor] | None = None,
    spec: FeatureSpec = FeatureSpec(cls=True, feature_map=True),  # noqa: B008 - frozen
    *,
    pool: str | RemoteTeacher | None = None,
    batch_size: int | None = None,
    block_size: int | None = None,
    max_errors: float | None = None,
    source_moved: bool = False,
    options: SourceOptions = SourceOptions(),  # noqa: B008 - frozen
    resources: Resources = Resources(),  # noqa: B008 - frozen
    out_filesystem: Any = None,
    address: str | None = None,
    progress: bool | None = None,
    check_space: bool = True,
    dry_run: bool = False,
    on_forecast: Callable[[Forecast], None] | None = None,
) -> Extraction:
    """Write the teacher's features of every image of ``source`` to ``out``; see :class:`FeatureStore` for reading.

    The same call resumes a run that ended early, however it ended. Blocks in its ledger are neither computed nor read
    again, and the source is not listed again (files that came since are not seen). The result is the undisturbed run's,
    row for row. Blocks that were in flight are computed again. The source of a finished run need not exist any longer,
    unless it is a Dataset.

    Ray is used as this process has it, joined at ``address``, or started for the run. Teachers run in an actor pool of
    Ray Data; each is hosted by a replica, as in a pool. Decoding runs in tasks on the cluster's CPUs.

    Args:
        source: a folder, file, glob or URI of images, WebDataset shards (.tar) or Parquet files; or a Ray Dataset with
            a column of images (encoded, or pixels as arrays) and one of ids. A Dataset's first rows are computed twice,
            to see what it holds. It is read again when it is resumed, and must give its rows in the same order (shuffle
            with a seed); finished rows are dropped from it.
        out: a folder; local, or a URI.
        config: the teacher: a configuration, the path of a model directory, a hub id, or a picklable factory.
        spec: what to extract. Its ``dtype`` is the stored one: float32, float16, int8, or native (the compute dtype;
            bfloat16 is stored as float32, without loss).
        pool: the name of a running pool, in place of ``config``; or its client, for a pool in another namespace.
        batch_size: images per forward pass; by default that of the run that is resumed, or 32. A resumed run may have
            another one, as after running out of memory: finished blocks stay, and the rest is computed with it. The
            same image gives the same bits in the same batch only; ``manifest["batch_sizes"]`` counts the parts of each.
        block_size: images per block, the unit that is committed and resumed. By default whole batches (at least one,
            512 images at most) whose features take about 32 MB.
        max_errors: the largest share of images, 0 to 1, that may have no features; more are an error, as soon as that
            is certain. By default, only a run in which no image at all could be read is one.
        source_moved: go on with a run whose images lie at ``source`` now: the same files under the same names below it.
        options: how images are found and decoded.
        resources: what the run may take of the cluster.
        out_filesystem: a pyarrow file system, for an ``out`` without a URI.
        address: of the Ray cluster, if this process is not connected to one.
        progress: show a bar; by default, if standard error is a terminal.
        check_space: refuse to start what does not fit the disk.
        dry_run: plan and forecast only; nothing is written.
        on_forecast: called with the forecast before work begins.

    Raises:
        StoreError: nothing to read, no image that can be read, or more errors than ``max_errors``; no room, ``out`` is
            in use, or it holds another run's features: says what differs; or one block ended the teacher's process
            again and again, as where its node runs out of memory.
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
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} must be an integer, at least 1; got {value!r}")
    if max_errors is not None and not (isinstance(max_errors, (int, float)) and 0 <= max_errors <= 1):
        raise ConfigError(f"max_errors must be a share, 0 to 1, or None; got {max_errors!r}")
    teacher = None if config is None else check_teacher(config)
    pickled = None if teacher is None else pickle_teacher(teacher)
    client = None if pool is None else _client(pool)
    folder = Folder.at(out, out_filesystem)
    old = folder.read_json(PLAN, "source", "batch_size", "block_size", "outputs") if folder.exists(PLAN) else None
    if old is not None:
        check_format(folder.path, old)
    try:
        # A path without images is an error before Ray is started; a Dataset has started it already.
        blocks = open_blocks(source, options, folder, old, moved=source_moved)
        # A row's shapes may depend on the image: a resumed run keeps those that it has.
        decoder, pieces = options.decoder(), blocks.first() if old is None else []
        with contextlib.ExitStack() as stack:
            early = None
            gpus = has_gpus() if resources.num_gpus is None else resources.num_gpus
            if isinstance(teacher, ModelConfig) and pickled is not None and not gpus and starts_ray(address):
                early = EarlyProbe(pickled, spec, pieces, decoder, resources.threads)
                stack.callback(early.close)
            stack.enter_context(contextlib.closing(connect(address, may_start=pool is None)))
            nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
            allocation = allocate(
                ray.cluster_resources(),
                max(1, nodes),
                resources,
                pooled=pool is not None,
                free_cpus=ray.available_resources().get("CPU", 0.0),
                # Compiled code is not reentrant: torch.compile keeps state. Of other teachers nothing is known.
                reentrant=isinstance(teacher, ModelConfig) and teacher.compile_mode("cpu") is None,
            )
            run = Run(
                folder,
                blocks,
                TeacherChoice(pickled, client, allocation.num_gpus, allocation.threads, allocation.passes),
                spec,
                decoder,
                allocation,
                batch_size=batch_size,
                block_size=block_size,
                old=old,
                moved=source_moved,
                max_errors=max_errors,
                pieces=pieces,
                early=early,
            )
            with contextlib.nullcontext() if dry_run else folder.exclusive():
                if folder.exists(PLAN) != (old is not None):
                    raise StoreError(f"{folder.path} was changed by another run just now: run the same command again")
                return run.execute(progress, check_space, dry_run, on_forecast)
    except ray.exceptions.RayError as error:
        explained = _explanation(error)
        if explained is None:
            raise
        raise explained from error


def _client(pool: str | RemoteTeacher) -> RemoteTeacher:
    from dinov3_ray.pool.client.remote import RemoteTeacher  # here: a teacher of the run's own is planned without torch

    return pool if isinstance(pool, RemoteTeacher) else RemoteTeacher(pool)


def _explanation(error: BaseException) -> DinoV3Error | None:
    """This package's own error within what Ray wrapped around it; or what the end of a process may be due to."""
    found = list(_causes(error))
    for one in found:
        if isinstance(one, DinoV3Error) and not isinstance(one, ray.exceptions.RayError):
            return one
    for one in found:
        if isinstance(one, _DEATHS):
            said = " ".join(str(one).split())
            return StoreError(
                f"a teacher's process must not end before its work is done, but did so again and again: {said} "
                f"({MEMORY_REMEDY})"
            )
    return None


_DEATHS = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """``error``, and what it was raised from, or wraps."""
    seen: list[BaseException] = []
    inner: BaseException | None = error
    while inner is not None and inner not in seen:
        yield inner
        seen.append(inner)
        cause = getattr(inner, "cause", None)
        inner = cause if isinstance(cause, BaseException) else inner.__cause__ or inner.__context__
