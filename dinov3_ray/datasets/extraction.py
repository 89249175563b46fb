"""Run a teacher once over a data set, with Ray Data, into a store that can be resumed and read back."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
import ray.data

from dinov3_ray.config import DinoV3Config
from dinov3_ray.datasets import plan as plans
from dinov3_ray.datasets.decode import MAX_PIXELS, Decoder
from dinov3_ray.datasets.decoding import Piece
from dinov3_ray.datasets.extractor import BlockExtractor, Job, TeacherFactory
from dinov3_ray.datasets.layout import LEDGER, MANIFEST, PARTS, PLAN, Folder
from dinov3_ray.datasets.opening import check_there, open_source, reopen_source
from dinov3_ray.datasets.placement import Placement, place
from dinov3_ray.datasets.probing import ask_teacher, first_image
from dinov3_ray.datasets.progress import Meter, metering
from dinov3_ray.datasets.raydata import actor_pool, execution
from dinov3_ray.datasets.rayrows import DATASET, DatasetRows
from dinov3_ray.datasets.schema import spec_to_json
from dinov3_ray.datasets.store import FeatureStore
from dinov3_ray.datasets.writer import finish
from dinov3_ray.errors import ConfigError, DinoV3Error, StoreError
from dinov3_ray.features import FeatureSpec
from dinov3_ray.pool.cluster import connect
from dinov3_ray.pool.remote import RemoteTeacher
from dinov3_ray.teacher import Extractor

__all__ = ["Extraction", "extract"]

logger = logging.getLogger("dinov3_ray")

_BATCH = 32
_PROBED_IMAGES = 8


@dataclass(frozen=True)
class Extraction:
    """What a run did.

    Attributes:
        forecast: what it was going to write.
        manifest: of the finished store; None after a dry run.
        blocks, images: that this run computed; those that it found finished are not counted.
        seconds: for them.
    """

    forecast: plans.Forecast
    manifest: dict[str, Any] | None = None
    blocks: int = 0
    images: int = 0
    seconds: float = 0.0


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
    spec.require_outputs()
    if (config is None) == (pool is None):
        raise ConfigError("exactly one of config and pool must be given: they say who computes")
    for name, value in (("batch_size", batch_size), ("block_size", block_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1; got {value}")
    folder = Folder.at(out, out_filesystem)
    decoder = Decoder(max_pixels, background=background)
    old = folder.read_json(PLAN) if folder.exists(PLAN) else None
    given = source if isinstance(source, ray.data.Dataset) else None
    images = None
    if not isinstance(source, ray.data.Dataset):
        options = {"filesystem": filesystem, "image_column": image_column, "id_column": id_column}
        if old is not None and old["source"]["kind"] != DATASET:
            images = reopen_source(old["source"], source, **options)
        else:
            images = open_source(source, **options, exclude=folder.path)
    factory = None if config is None or isinstance(config, (DinoV3Config, str, os.PathLike)) else config
    model = None if config is None or factory is not None else DinoV3Config.of(config)  # type: ignore[arg-type]
    if pool is not None:
        factory = partial(RemoteTeacher, pool)
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
            # Compiled code is not: torch.compile keeps state of its own. Of others' teachers nothing is known.
            reentrant=model is not None and not model.compile,
        )
        rows = None if given is None else DatasetRows(given, image_column, id_column)
        job = Job(
            teacher=TeacherFactory(model, factory, "cuda" if placement.num_gpus else "cpu", placement.threads),
            folder=folder,
            identity={},
            spec=spec,
            decoder=decoder,
            source=images,
            batch_size=batch_size or 0,
            passes=placement.passes,
            window=placement.window,
            decode_cpus=placement.decode_cpus,
            columns=None if rows is None else rows.columns,
        )
        with contextlib.nullcontext() if dry_run else folder.exclusive():
            if folder.exists(PLAN) != (old is not None):
                raise StoreError(f"{folder.path} was changed by another run just now: run the same command again")
            return _Run(job, placement, rows, block_size, old).execute(progress, check_space, dry_run, on_forecast)
    except ray.exceptions.RayError as error:
        own = _own_error(error)
        if own is None:
            raise
        raise own from error
    finally:
        runtime.close()


class _Run:
    """One call of :func:`extract`, with Ray at hand.

    Args:
        given: the Dataset whose rows are the images, unless the job has a source.
        old: the identity of the run that is resumed.
    """

    def __init__(
        self,
        job: Job,
        placement: Placement,
        given: DatasetRows | None,
        block_size: int | None,
        old: dict[str, Any] | None,
    ) -> None:
        self.job = job
        self.folder = job.folder
        self.placement = placement
        self.given = given
        self.block_size = block_size
        self.old = old

    def execute(
        self,
        progress: bool | None,
        check_space: bool,
        dry_run: bool,
        on_forecast: Callable[[plans.Forecast], None] | None,
    ) -> Extraction:
        source = self.job.source
        listed = None if self.old is not None or source is None else source.rows()
        identity = self._identify(listed)
        if self.old is not None:
            plans.check_same_run(self.folder, identity)
        self.job = replace(self.job, identity=identity, batch_size=identity["batch_size"])
        spans = None
        if source is None:
            sizes = []
        elif listed is None:
            sizes = plans.block_rows(self.folder)
        else:
            spans = plans.cut_blocks(listed, identity["block_size"], by_file=source.by_file)
            sizes = [stop - start for start, stop in spans]
        finished = {name.removesuffix(".json") for name in self.folder.names(LEDGER, ".json")}
        todo = [index for index in range(len(sizes)) if plans.block_name(index) not in finished]
        forecast = self._forecast(identity, sizes, todo)
        if on_forecast is not None:
            on_forecast(forecast)
        if dry_run:
            return Extraction(forecast)
        if self.folder.exists(MANIFEST):
            return Extraction(forecast, self.folder.read_json(MANIFEST))
        if check_space and not forecast.fits:
            raise StoreError(f"out must have room for the features: {forecast} (check_space=False starts all the same)")
        if source is not None and listed is None and todo:
            check_there(source, plans.load_block(self.folder, todo[0]))
        self._prepare(identity, listed, spans)
        return self._work(identity, forecast, todo, progress)

    def _prepare(self, identity: dict[str, Any], listed: Any, spans: list[tuple[int, int]] | None) -> None:
        """The folders and the plan; what interrupted writes left is deleted."""
        for name in ("", PARTS, LEDGER):
            self.folder.make(name)
        self.folder.sweep(PARTS)
        self.folder.sweep(LEDGER)
        if spans is not None:
            plans.save_rows(self.folder, listed, spans)
        if self.old is None:
            self.folder.write_json(PLAN, identity)

    def _work(
        self, identity: dict[str, Any], forecast: plans.Forecast, todo: list[int], progress: bool | None
    ) -> Extraction:
        """Compute what is to do, and finish the store."""
        computed = given = 0
        order = []
        total = forecast.images
        done = 0 if total is None or forecast.remaining is None else total - forecast.remaining
        with metering(progress, total, done) as meter:
            for result in self._results(todo, identity["block_size"]):
                order.append(result["block"])
                given += int(result["given"])
                computed += bool(result["computed"])
                meter.add(int(result["rows"] + result["errors"]), int(result["bytes"]))
        if self.given is None:
            manifest = finish(self.folder, identity)
        else:
            manifest = finish(self.folder, identity, order=order, given=given)
        self._report(meter, manifest)
        return Extraction(forecast, manifest, computed, meter.images, round(meter.seconds, 3))

    def _identify(self, listed: Any) -> dict[str, Any]:
        """What tells this run from others.

        Sizes of batches and blocks that are not asked for are those of the run that is resumed.
        """
        kept, images = self.old or {}, self.given or self.job.source
        assert images is not None
        image = None if kept else first_image(self._first(listed), self.job.decoder, self.placement.decode_cpus)
        found = ask_teacher(self.job.teacher, self.job.spec, image, self.placement)
        decoder = replace(self.job.decoder, min_side=found["min_side"])
        self.job = replace(self.job, decoder=decoder, made_by=found["made_by"], mixes_sizes=found["mixes_sizes"])
        # A row's shapes may depend on the image, and without it the probe had none of this source's.
        outputs = kept.get("outputs", found["outputs"])
        batch_size = self.job.batch_size or kept.get("batch_size") or _BATCH
        size = plans.row_bytes(outputs)
        block_size = self.block_size or kept.get("block_size") or plans.block_size_for(size, batch_size)
        return {
            "format": 1,
            "fingerprint": found["fingerprint"],
            "computed_in": found["computed_in"],
            "spec": spec_to_json(self.job.spec),
            "result_dtype": found["result_dtype"],
            "outputs": outputs,
            "preprocessing": found["preprocessing"],
            "decoding": {
                "max_pixels": decoder.max_pixels,
                "min_side": decoder.min_side,
                "background": list(decoder.background),
            },
            "source": images.describe(),
            "batch_size": batch_size,
            "block_size": block_size,
            "versions": plans.versions(),
        }

    def _first(self, listed: Any) -> list[Piece]:
        """The first images, one a piece."""
        if self.given is not None:
            return [Piece(0, [row[0]], None, [row]) for row in self.given.first]
        ids = listed["id"].slice(0, _PROBED_IMAGES).to_pylist()
        return [Piece(0, [id_], self.job.source, listed.slice(index, 1)) for index, id_ in enumerate(ids)]

    def _forecast(self, identity: dict[str, Any], sizes: list[int], todo: list[int]) -> plans.Forecast:
        images: int | None = sum(sizes)
        remaining: int | None = sum(sizes[index] for index in todo)
        if self.given is not None:
            images = remaining = self.given.count()
        outputs = identity["outputs"]
        maps = self.job.spec.feature_map or bool(self.job.spec.layers)
        return plans.Forecast(
            images,
            remaining,
            plans.row_bytes(outputs),
            not maps or self.job.spec.map_size is not None or self.job.mixes_sizes,
            plans.free_bytes(self.folder),
            plans.storage_note(identity["result_dtype"], outputs),
        )

    def _results(self, todo: list[int], block_size: int) -> Iterator[dict[str, Any]]:
        """What the extractors say of each block, as they finish."""
        if self.given is not None:
            dataset, rows = self.given.dataset, block_size
            self.job = replace(self.job, finished_ids=ray.put(self._finished_ids()))
        elif todo:
            dataset = ray.data.from_items([{"block": index} for index in todo], override_num_blocks=len(todo))
            rows = 1
        else:
            return
        dataset = dataset.map_batches(
            BlockExtractor,
            fn_constructor_args=(self.job,),
            batch_size=rows,
            batch_format="numpy",
            num_cpus=self.placement.num_cpus,
            num_gpus=self.placement.num_gpus or None,
            **actor_pool(self.placement.replicas),
        )
        # A Dataset's rows must fall into the same blocks each time.
        with execution(dataset.context, ordered=self.given is not None):
            for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
                for values in zip(*batch.values(), strict=True):
                    result = dict(zip(batch, values, strict=True))
                    if result["failure"]:
                        raise pickle.loads(result["failure"])  # noqa: S301 - by this run's own actor
                    yield result

    def _finished_ids(self) -> frozenset[str]:
        store = FeatureStore(self.folder.path, filesystem=self.folder.system, partial=True)
        return frozenset([*store.ids, *store.errors["id"].to_pylist()])

    def _report(self, meter: Meter, manifest: dict[str, Any]) -> None:
        kinds = ", ".join(f"{count} {kind}" for kind, count in manifest["errors_by_kind"].items())
        logger.info(
            "extracted %d images into %s (%s): %d rows, %d errors%s",
            meter.images,
            self.folder.path,
            meter,
            manifest["rows"],
            manifest["errors"],
            f" ({kinds})" if kinds else "",
        )


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
