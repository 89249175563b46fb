"""The teacher's answers before a run starts: what it is, and what it gives for the source's first image."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from dinov3_ray.config.preprocessing import Preprocessing
from dinov3_ray.datasets.decode import Decoder
from dinov3_ray.datasets.extraction.decode_tasks import Piece, decode_pieces
from dinov3_ray.datasets.extraction.resources import Allocation
from dinov3_ray.datasets.extraction.teacher_choice import TeacherChoice
from dinov3_ray.datasets.store.schema import encode_columns
from dinov3_ray.errors import InputError, StoreError
from dinov3_ray.feature_spec import FeatureSpec
from dinov3_ray.teacher import computed_in, least_side

__all__ = ["Probe", "probe_teacher"]

logger = logging.getLogger("dinov3_ray")

_PATIENCE_SECONDS, _LIMIT_SECONDS = 20.0, 1800.0  # without a teacher, until a warning, and until the run ends


@dataclass(frozen=True, slots=True)
class Probe:
    """What a run needs to know of its teacher.

    Attributes:
        fingerprint: the teacher's own.
        origin: what it was loaded from; None if it does not say.
        made_by: the fingerprint of its results; it differs if the teacher wraps another one.
        computed_in: its precision, such as float32 or float8; None if it is unknown.
        preprocessing: its rule, as JSON values; None of a teacher without one.
        license: of its weights, in words; None of a teacher that says nothing.
        rule: the same, by which images that come to one size can share a batch.
        min_side: pixels of the smallest side of an image that it takes.
        result_dtype: torch's name of the dtype in which stored results come back.
        outputs: the NumPy dtype and shape per image of each stored column.
    """

    fingerprint: str | None
    origin: str | None
    made_by: str | None
    computed_in: str | None
    preprocessing: dict[str, Any] | None
    license: str | None
    rule: Preprocessing | None
    min_side: int
    result_dtype: str
    outputs: dict[str, dict[str, Any]]


def probe_teacher(
    teacher: TeacherChoice, spec: FeatureSpec, pieces: Sequence[Piece], decoder: Decoder, allocation: Allocation
) -> Probe:
    """Probe the teacher in a process that has its resources, with the first readable image of ``pieces``.

    Raises:
        StoreError: there is no place for it, or no fingerprint that a resumed run could compare.
    """
    task = ray.remote(num_cpus=allocation.num_cpus, num_gpus=allocation.num_gpus, max_retries=1)(_probe)
    pending = task.remote(teacher, spec, pieces, decoder, allocation.decode_cpus)
    if not ray.wait([pending], timeout=_PATIENCE_SECONDS)[0]:
        logger.warning("the first teacher is not ready after %g s: %s", _PATIENCE_SECONDS, _place_wanted(allocation))
        if not ray.wait([pending], timeout=_LIMIT_SECONDS - _PATIENCE_SECONDS)[0]:
            ray.cancel(pending, force=True)
            raise StoreError(f"a teacher must be ready within {_LIMIT_SECONDS:g} s: {_place_wanted(allocation)}")
    found: Probe = ray.get(pending)
    if found.fingerprint is None:
        raise StoreError(
            "the teacher must have a fingerprint, or a resumed run could mix two teachers; got None: give it an "
            "attribute `fingerprint`, a string that changes whenever its outputs would"
        )
    return found


def _place_wanted(allocation: Allocation) -> str:
    """What a teacher waits for, if it has no place yet."""
    have, free = ray.cluster_resources(), ray.available_resources()
    counts = ", ".join(f"{free.get(key, 0):g} of {have.get(key, 0):g} {key}" for key in ("GPU", "CPU"))
    return (
        f"it needs {allocation.num_gpus:g} GPU and {allocation.num_cpus:g} CPU in the cluster, and then time to load; "
        f"free are {counts}. If a pool has the GPUs, extract through it (pool=NAME, --pool NAME), or compute on CPUs "
        "(num_gpus=0, --num-gpus 0)"
    )


def _probe(
    teacher: TeacherChoice, spec: FeatureSpec, pieces: Sequence[Piece], decoder: Decoder, decode_cpus: float
) -> Probe:
    """What the teacher says of itself, and the shapes and dtypes of what it gives for the first image of ``pieces``.

    Where there is none, or it is refused, a grey square stands for it.
    """
    with ThreadPoolExecutor(1) as decoding:
        first = decoding.submit(_first_image, pieces, decoder, decode_cpus)
        opened = teacher.open(max_batch=1)  # meanwhile, since both take seconds
        image = first.result()
    features = None
    if image is not None:
        with contextlib.suppress(InputError):  # it will be in the errors, with this reason
            features = opened.submit(np.array(image)[None], spec.native()).result()
    if features is None:
        features = opened.submit(np.full((1, 3, 224, 224), 128, np.uint8), spec.native()).result()
    columns, result_dtype = encode_columns(features, spec)
    rule = opened.preprocessing
    found = Probe(
        fingerprint=opened.fingerprint or features.fingerprint,
        origin=opened.info.origin,
        made_by=features.fingerprint,
        computed_in=computed_in(opened),
        # By way of JSON, so that what is compared with a former run's is of the same types.
        preprocessing=None if rule is None else json.loads(json.dumps(rule.described())),
        license=opened.info.license,
        rule=rule,
        min_side=least_side(opened),
        result_dtype=result_dtype,
        outputs={name: {"dtype": array.dtype.str, "shape": list(array.shape[1:])} for name, array in columns.items()},
    )
    opened.close()  # its process goes on to other work
    return found


def _first_image(pieces: Sequence[Piece], decoder: Decoder, cpus: float) -> np.ndarray | None:
    """The first readable one of ``pieces`` [3,H,W], decoded where a fault in a decoder does no harm."""
    for decoded in decode_pieces(pieces, decoder, cpus=cpus, window=1, retries=0):
        if isinstance(decoded.image, np.ndarray):
            return decoded.image
    return None
