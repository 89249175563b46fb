"""One run of an extraction: it says what it is, finds what remains to be done, and does it."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dinov3_ray.datasets.decode import Decoder
from dinov3_ray.datasets.extraction import plan as plans
from dinov3_ray.datasets.extraction.attempts import Attempts
from dinov3_ray.datasets.extraction.blocks import Blocks, unifying
from dinov3_ray.datasets.extraction.lost_gpus import watching
from dinov3_ray.datasets.extraction.probe_process import EarlyProbe, probe_on_ray
from dinov3_ray.datasets.extraction.resources import Allocation
from dinov3_ray.datasets.extraction.teacher_choice import TeacherChoice
from dinov3_ray.datasets.extraction.teacher_probe import Probe
from dinov3_ray.datasets.extraction.worker import BlockWorker, ExtractionJob
from dinov3_ray.datasets.folder import ERRORS, LEDGER, MANIFEST, PARTS, PLAN, Folder
from dinov3_ray.datasets.meter import Meter, metering
from dinov3_ray.datasets.sources.piece import Piece
from dinov3_ray.datasets.sources.ray_dataset import actor_strategy, execution
from dinov3_ray.datasets.store.schema import FORMAT, spec_to_json
from dinov3_ray.datasets.store.writer import count_batch_sizes
from dinov3_ray.errors import StoreError
from dinov3_ray.feature_spec import FeatureSpec

__all__ = ["Extraction", "Run"]

logger = logging.getLogger("dinov3_ray")

_BATCH = 32
_ATTEMPTS = 5  # nodes may be lost, too


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
        blocks: the images.
        teacher, spec, decoder: what computes, what is asked of it, and what makes pixels of the images.
        allocation: what the run takes of the cluster.
        batch_size, block_size: as they were asked for; None takes those of the run that is resumed, or the usual ones.
            What is finished stays, whatever its batch size.
        old: the identity of the run that is resumed.
        moved: whether its images lie elsewhere now.
        max_errors: the largest share of images that may have no features; None for any but all.
        pieces: the first images, by which the teacher is probed.
        early: such a probe that began before there was a Ray; for a teacher that computes on CPUs.
    """

    def __init__(
        self,
        folder: Folder,
        blocks: Blocks,
        teacher: TeacherChoice,
        spec: FeatureSpec,
        decoder: Decoder,
        allocation: Allocation,
        *,
        batch_size: int | None,
        block_size: int | None,
        old: dict[str, Any] | None,
        moved: bool,
        max_errors: float | None,
        pieces: Sequence[Piece],
        early: EarlyProbe | None,
    ) -> None:
        self.folder = folder
        self.blocks = blocks
        self.teacher = teacher
        self.spec = spec
        self.decoder = decoder
        self.allocation = allocation
        self.batch_size = batch_size
        self.block_size = block_size
        self.old = {**old, "source": {**old["source"], **_place(blocks)}} if old and moved else old
        self.moved = moved
        self.max_errors = max_errors
        self.pieces, self.early = pieces, early

    def execute(
        self,
        progress: bool | None,
        check_space: bool,
        dry_run: bool,
        on_forecast: Callable[[plans.Forecast], None] | None,
    ) -> Extraction:
        if self.old is None and (self.folder.exists(MANIFEST) or self.folder.names(LEDGER, ".json")):
            raise StoreError(
                f"{self.folder.path} holds features, but no {PLAN} that says whose: bring it back, or choose another "
                "output folder"
            )
        found = self._probe()
        identity = self._identify(found)
        if self.old is not None:
            plans.check_same_run(self.folder, self.old, identity)
        self.blocks.cut(identity["block_size"])
        finished = {name.removesuffix(".json") for name in self.folder.names(LEDGER, ".json")}
        forecast = self._forecast(identity, found, *self.blocks.count(finished))
        is_whole = self.folder.exists(MANIFEST)
        if self.old is not None and self.old["batch_size"] != identity["batch_size"] and not is_whole:
            made = count_batch_sizes(self.folder.ledger())
            forecast = forecast.noting(plans.batch_note(made, identity["batch_size"]))
        if on_forecast is not None:
            on_forecast(forecast)
        if dry_run:
            return Extraction(forecast)
        if is_whole:
            manifest = self.folder.read_json(MANIFEST, "rows", "errors", "blocks")
            self.blocks.check_finished(manifest)
            if self.moved and self.old is not None and manifest["source"] != self.old["source"]:
                manifest = {**manifest, "source": self.old["source"]}
                self.folder.write_json(PLAN, self.old)
                self.folder.write_json(MANIFEST, manifest)
                logger.info("%s: its images lie at %s from now on", self.folder.path, manifest["source"]["path"])
            self._check_errors(manifest)
            return Extraction(forecast, manifest)
        if check_space and not forecast.fits:
            raise StoreError(f"out must have room for the features: {forecast} (check_space=False starts all the same)")
        self._prepare(identity)
        job = ExtractionJob(
            teacher=self.teacher,
            blocks=self.blocks.reader(identity["batch_size"]),
            folder=self.folder,
            identity=identity,
            spec=self.spec,
            decoder=self.decoder,
            batch_size=identity["batch_size"],
            attempts=Attempts(_ATTEMPTS),
            window=self.allocation.window,
            decode_cpus=self.allocation.decode_cpus,
            made_by=found.made_by,
            rule=found.rule,
        )
        return self._work(job, forecast, progress)

    def _probe(self) -> Probe:
        """What the teacher says of itself, and gives for the first image. The decoder learns the smallest side.

        Raises:
            StoreError: it has no fingerprint that a resumed run could compare; or there is no place for it.
        """
        found = None
        if self.early is not None and not self.allocation.num_gpus:
            found = self.early.result()
        if found is None:
            found = probe_on_ray(self.teacher, self.spec, self.pieces, self.decoder, self.allocation)
        if found.fingerprint is None:
            raise StoreError(
                "the teacher must have a fingerprint, or a resumed run could mix two teachers; got None: give it an "
                "attribute `fingerprint`, a string that changes whenever its outputs would"
            )
        self.decoder = replace(self.decoder, min_side=found.min_side)
        return found

    def _identify(self, found: Probe) -> dict[str, Any]:
        """What distinguishes this run from others.

        Sizes of batches and blocks that are not asked for are those of the run that is resumed.
        """
        kept = self.old or {}
        outputs = kept.get("outputs", found.outputs)
        batch_size = self.batch_size or kept.get("batch_size") or _BATCH
        size = plans.row_bytes(outputs)
        block_size = self.block_size or kept.get("block_size") or plans.block_size_for(size, batch_size)
        return {
            "format": FORMAT,
            "fingerprint": found.fingerprint,
            "origin": found.origin,
            "computed_in": found.computed_in,
            "spec": spec_to_json(self.spec),
            "result_dtype": found.result_dtype,
            "outputs": outputs,
            "preprocessing": found.preprocessing,
            "license": found.license,
            "decoding": self.decoder.describe(),
            "source": self.blocks.describe(),
            "batch_size": batch_size,
            "block_size": block_size,
            "versions": plans.versions(),
        }

    def _forecast(
        self, identity: dict[str, Any], found: Probe, images: int | None, remaining: int | None
    ) -> plans.Forecast:
        outputs = identity["outputs"]
        maps = self.spec.feature_map or bool(self.spec.layers)
        return plans.Forecast(
            images,
            remaining,
            plans.row_bytes(outputs),
            not maps or self.spec.map_size is not None or (found.rule is not None and found.rule.has_fixed_size),
            plans.free_bytes(self.folder),
            plans.storage_note(identity["result_dtype"], outputs),
        )

    def _prepare(self, identity: dict[str, Any]) -> None:
        """Make the folders, delete what interrupted writes left, and write the plan."""
        for name in ("", PARTS, LEDGER):
            self.folder.make(name)
        self.folder.sweep(PARTS)
        self.folder.sweep(LEDGER)
        self.blocks.record()
        if self.old is None or self.moved or self.old["batch_size"] != identity["batch_size"]:
            self.folder.write_json(PLAN, {**(self.old or identity), "batch_size": identity["batch_size"]})

    def _work(self, job: ExtractionJob, forecast: plans.Forecast, progress: bool | None) -> Extraction:
        """Compute what is to do, and finish the store."""
        computed = errors = 0
        total = forecast.images
        done = 0 if total is None or forecast.remaining is None else total - forecast.remaining
        with metering(progress, total, done, start="starting the teacher", doing="extracting") as meter:
            for result in self._results(job):
                self.blocks.note(result)
                if result["computed"]:
                    computed += 1
                    errors += int(result["errors"])
                    meter.add(int(result["rows"] + result["errors"]), int(result["bytes"]), float(result["seconds"]))
                    if total is not None and self.max_errors is not None and errors > self.max_errors * total:
                        raise StoreError(
                            f"at most {self.max_errors:.2%} of the images may be errors (max_errors); {errors:,} of "
                            f"{total:,} are so already, and the rest was left: finished blocks, and their errors in "
                            f"{self.folder.join(LEDGER)}, stay"
                        )
        manifest = self.blocks.finish(job.identity)
        self._report(meter, manifest)
        self._check_errors(manifest)
        return Extraction(forecast, manifest, computed, meter.images, round(meter.seconds, 3))

    def _results(self, job: ExtractionJob) -> Iterator[dict[str, Any]]:
        """What the workers report of each block, as they finish."""
        dataset = self.blocks.todo(self.allocation.replicas)
        if dataset is None:
            return
        dataset = dataset.map_batches(
            BlockWorker,
            fn_constructor_args=(job,),
            batch_size=self.blocks.rows_per_call,
            batch_format="numpy",
            num_cpus=self.allocation.num_cpus,
            num_gpus=self.allocation.num_gpus or None,
            compute=actor_strategy(self.allocation.replicas),
        )
        column = self.blocks.describe().get("image_column")
        with unifying(column), watching(self.allocation), execution(dataset.context, ordered=self.blocks.ordered):
            for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
                for values in zip(*batch.values(), strict=True):
                    result = dict(zip(batch, values, strict=True))
                    if result["failure"]:
                        raise pickle.loads(result["failure"])  # noqa: S301 - by this run's own actor
                    yield result

    def _check_errors(self, manifest: Mapping[str, Any]) -> None:
        """Raise StoreError if the finished store has more errors than it may."""
        rows, errors = manifest["rows"], manifest["errors"]
        if not rows and not errors:  # a store of an earlier version, or a Dataset whose rows have gone
            raise StoreError(f"source must hold images; {self.folder.path} has neither rows nor errors")
        if not errors or (rows and (self.max_errors is None or errors <= self.max_errors * (rows + errors))):
            return
        first = self.folder.read_table(ERRORS).slice(0, 1).to_pylist()[0]
        rule = (
            f"at most {self.max_errors:.2%} of the images may be errors (max_errors)" if rows else "no image was read"
        )
        raise StoreError(
            f"{rule}; {errors:,} of {rows + errors:,} are errors ({_kinds(manifest)}), such as {first['id']!r}: "
            f"{first['detail']}. {self.folder.join(ERRORS)} lists all"
        )

    def _report(self, meter: Meter, manifest: dict[str, Any]) -> None:
        kinds = _kinds(manifest)
        logger.info(
            "extracted %d images into %s (%s): %d rows, %d errors%s",
            meter.images,
            self.folder.path,
            meter,
            manifest["rows"],
            manifest["errors"],
            f" ({kinds})" if kinds else "",
        )


def _kinds(manifest: Mapping[str, Any]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in manifest["errors_by_kind"].items())


def _place(blocks: Blocks) -> dict[str, Any]:
    """Where the images of ``blocks`` lie, as their description has it."""
    described = blocks.describe()
    return {key: described[key] for key in ("path", "root", "moved_from") if key in described}
