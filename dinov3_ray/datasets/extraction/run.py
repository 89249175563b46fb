"""One run of an extraction: what it is, what is left of it to do, and that being done."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import ray
import ray.data

from dinov3_ray.datasets.extraction import plan as plans
from dinov3_ray.datasets.extraction.decode_tasks import Piece
from dinov3_ray.datasets.extraction.probe import ask_teacher, first_image
from dinov3_ray.datasets.extraction.progress import Meter, metering, watching
from dinov3_ray.datasets.extraction.resources import Placement
from dinov3_ray.datasets.extraction.worker import BlockExtractor, ExtractionJob
from dinov3_ray.datasets.folder import LEDGER, MANIFEST, PARTS, PLAN
from dinov3_ray.datasets.sources.open import check_there
from dinov3_ray.datasets.sources.ray_dataset import DatasetRows, actor_pool, execution
from dinov3_ray.datasets.store import listing
from dinov3_ray.datasets.store.reader import FeatureStore
from dinov3_ray.datasets.store.schema import spec_to_json
from dinov3_ray.datasets.store.writer import check_rows, finish
from dinov3_ray.errors import StoreError

__all__ = ["Extraction", "Run"]

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
        seconds: from the first block's begin to the last one's end.
    """

    forecast: plans.Forecast
    manifest: dict[str, Any] | None = None
    blocks: int = 0
    images: int = 0
    seconds: float = 0.0


class Run:
    """One call of :func:`extract`, with Ray at hand.

    Args:
        given: the Dataset whose rows are the images, unless the job has a source.
        old: the identity of the run that is resumed.
    """

    def __init__(
        self,
        job: ExtractionJob,
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
        if self.old is None and (self.folder.exists(MANIFEST) or self.folder.names(LEDGER, ".json")):
            raise StoreError(
                f"{self.folder.path} holds features, but no {PLAN} that says whose: bring it back, or choose another "
                "output folder"
            )
        listed = None if self.old is not None or source is None else source.rows()
        identity = self._identify(listed)
        if self.old is not None:
            plans.check_same_run(self.folder, identity)
        self.job = replace(self.job, identity=identity, batch_size=identity["batch_size"])
        spans = None
        if source is None:
            sizes = []
        elif listed is None:
            sizes = listing.block_rows(self.folder)
        else:
            spans = plans.cut_blocks(listed, identity["block_size"], by_file=source.by_file)
            sizes = [stop - start for start, stop in spans]
        finished = {name.removesuffix(".json") for name in self.folder.names(LEDGER, ".json")}
        todo = [index for index in range(len(sizes)) if listing.block_name(index) not in finished]
        forecast = self._forecast(identity, sizes, todo, finished)
        if on_forecast is not None:
            on_forecast(forecast)
        if dry_run:
            return Extraction(forecast)
        if self.folder.exists(MANIFEST):
            manifest = self.folder.read_json(MANIFEST, "rows", "errors", "blocks")
            if self.given is not None and forecast.images is not None:
                check_rows(self.folder, forecast.images, manifest["rows"] + manifest["errors"])
            return Extraction(forecast, manifest)
        if check_space and not forecast.fits:
            raise StoreError(f"out must have room for the features: {forecast} (check_space=False starts all the same)")
        if source is not None and listed is None and todo:
            check_there(source, listing.load_block(self.folder, todo[0]))
        self._prepare(identity, listed, spans)
        return self._work(identity, forecast, todo, progress)

    def _prepare(self, identity: dict[str, Any], listed: Any, spans: list[tuple[int, int]] | None) -> None:
        """The folders and the plan; what interrupted writes left is deleted."""
        for name in ("", PARTS, LEDGER):
            self.folder.make(name)
        self.folder.sweep(PARTS)
        self.folder.sweep(LEDGER)
        if spans is not None:
            listing.save_rows(self.folder, listed, spans)
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
                if result["computed"]:
                    computed += 1
                    meter.add(int(result["rows"] + result["errors"]), int(result["bytes"]), float(result["seconds"]))
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

    def _forecast(
        self, identity: dict[str, Any], sizes: list[int], todo: list[int], finished: Collection[str]
    ) -> plans.Forecast:
        images: int | None = sum(sizes)
        remaining: int | None = sum(sizes[index] for index in todo)
        if self.given is not None:
            images = remaining = self.given.count()
            if images is not None and finished:
                remaining = max(0, images - len(self._finished_ids))
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
            self.job = replace(self.job, finished_ids=ray.put(self._finished_ids))
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
        with watching(self.placement), execution(dataset.context, ordered=self.given is not None):
            for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
                for values in zip(*batch.values(), strict=True):
                    result = dict(zip(batch, values, strict=True))
                    if result["failure"]:
                        raise pickle.loads(result["failure"])  # noqa: S301 - by this run's own actor
                    yield result

    @cached_property
    def _finished_ids(self) -> frozenset[str]:
        """Of a Dataset's rows, those that need no work; read from all parts, and so once."""
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
