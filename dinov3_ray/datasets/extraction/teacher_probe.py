"""The teacher's answers before a run starts: what it is, and what it gives for the first image. It needs no Ray."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dinov3_ray.config.preprocessing import Preprocessing
from dinov3_ray.datasets.sources.piece import Decoded, decode_piece
from dinov3_ray.datasets.store.schema import encode_columns
from dinov3_ray.errors import InputError
from dinov3_ray.feature_spec import FeatureSpec
from dinov3_ray.pool.spec import builder
from dinov3_ray.teacher import computed_in, least_side

if TYPE_CHECKING:
    from dinov3_ray.pool.client.remote import RemoteTeacher
    from dinov3_ray.pool.replica.hosted import HostedReplica

__all__ = ["Probe", "answer_early_probe", "probe_teacher"]


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
    open_teacher: Callable[[], HostedReplica | RemoteTeacher],
    spec: FeatureSpec,
    decode: Callable[[], Iterator[Decoded]],
) -> Probe:
    """What the teacher says of itself, and the shapes and dtypes of what it gives for the first readable image.

    Where there is none, or it is refused, a grey square stands for it.
    """

    def first_image() -> np.ndarray | None:
        return next((each.image for each in decode() if isinstance(each.image, np.ndarray)), None)

    with ThreadPoolExecutor(1) as decoding:
        first = decoding.submit(first_image)
        opened = open_teacher()  # meanwhile, since both take seconds
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


def answer_early_probe() -> None:
    """What a process does without Ray: probe the teacher, with the first readable image.

    Standard input asks, and standard output answers, both pickled: the teacher's configuration, the spec, the first
    pieces, the decoder and the number of CPU threads; the probe.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is not an answer
    pickled, spec, pieces, decoder, threads = pickle.load(sys.stdin.buffer)  # noqa: S301 - by this process's own run
    config = pickle.loads(pickled)  # noqa: S301 - the same
    from dinov3_ray.pool.replica.hosted import HostedReplica  # which imports torch

    def decode() -> Iterator[Decoded]:
        return (decoded for piece in pieces for chunk in decode_piece(piece, decoder) for decoded in chunk)

    def open_teacher() -> HostedReplica:
        return HostedReplica(builder(config, "cpu"), max_batch=1, threads=threads)

    with answers:
        pickle.dump(probe_teacher(open_teacher, spec, decode), answers)
