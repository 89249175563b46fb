"""A store as a dataset of Hugging Face's ``datasets``: arrays of known shapes, memory-mapped or streamed."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from dinov3_ray.datasets.store.part import Part
from dinov3_ray.errors import ConfigError, StoreError

__all__ = ["huggingface_dataset"]

_RELEASE = (4, 3)  # the first whose from_generator takes a fingerprint


def huggingface_dataset(
    parts: Sequence[Part],
    result_dtype: str,
    digest: str,
    *,
    streaming: bool,
    cache_dir: str | os.PathLike[str] | None,
    num_proc: int | None,
) -> Any:
    """See :meth:`FeatureStore.to_datasets`; ``digest`` identifies what ``parts`` hold."""
    datasets = _import_datasets()
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "height": datasets.Value("int32"),
            "width": datasets.Value("int32"),
            **{
                name: _feature(datasets, dtype.name, shape)
                for name, (dtype, shape) in parts[0].layout(result_dtype).items()
            },
        }
    )
    given: dict[str, Any] = {"features": features, "gen_kwargs": {"parts": list(parts), "result_dtype": result_dtype}}
    if streaming:
        return datasets.IterableDataset.from_generator(_rows, **given)
    place = None if cache_dir is None else os.fspath(cache_dir)
    try:
        with _Forks.ended_by_sigterm():
            return datasets.Dataset.from_generator(
                _rows, **given, cache_dir=place, fingerprint=digest, num_proc=num_proc
            )
    except datasets.exceptions.DatasetGenerationError as error:
        told = _store_error(error)
        if told is None:
            raise
        raise told from error


class _Forks:
    """What datasets forks, it ends by SIGTERM, and waits for. With a handler in Python, such as the one that ray.init
    leaves in its process, a fork may miss the signal as it begins to wait for work, and would never end.
    """

    end_by_sigterm = False

    @classmethod
    @contextmanager
    def ended_by_sigterm(cls) -> Iterator[None]:
        """A context whose forks have no handler of SIGTERM; this process keeps its own."""
        cls.end_by_sigterm = True
        try:
            yield
        finally:
            cls.end_by_sigterm = False

    @classmethod
    def begin(cls) -> None:
        """In each fork, first of all."""
        if cls.end_by_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_Forks.begin)


def _rows(parts: Sequence[Part], result_dtype: str) -> Iterator[dict[str, Any]]:
    """Row by row, with one part at a time in memory; datasets gives each worker some of ``parts``."""
    for part in parts:
        columns = part.load(result_dtype)
        plain = {name: values.to_pylist() for name, values in columns.items() if not isinstance(values, np.ndarray)}
        for row in range(part.count):
            yield {name: values[row] for name, values in {**columns, **plain}.items()}


def _feature(datasets: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    """Arrays of two or more dimensions are read sixty times as fast as lists of lists."""
    if len(shape) == 1:
        return datasets.List(datasets.Value(dtype), length=shape[0])
    return getattr(datasets, f"Array{len(shape)}D")(shape=shape, dtype=dtype)


def _store_error(error: Exception) -> StoreError | None:
    """That which datasets has wrapped in ``error``; what one of its processes raised comes as text."""
    cause = error.__cause__
    if isinstance(cause, StoreError):
        return StoreError(str(cause))
    found = re.search(r"^dinov3_ray\.errors\.StoreError: (.*)", str(cause), re.MULTILINE)
    return None if found is None else StoreError(found[1])


def _import_datasets() -> Any:
    try:
        import datasets
        import datasets.exceptions
    except ImportError as error:
        found = str(error)
    else:
        release = tuple(int(number) for number in datasets.__version__.split(".")[:2])
        if release >= _RELEASE:
            return datasets
        found = f"this is {datasets.__version__}"
    raise ConfigError(
        f"to_datasets needs Hugging Face's datasets, {'.'.join(map(str, _RELEASE))} or newer: pip install "
        f"'dinov3-ray[datasets]' ({found})"
    )
