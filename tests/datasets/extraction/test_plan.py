"""How an extraction is cut into blocks, and which one it may resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinov3_ray.datasets.extraction.plan import (
    Forecast,
    batch_note,
    batches_text,
    block_size_for,
    check_same_run,
    row_bytes,
)
from dinov3_ray.datasets.folder import Folder
from dinov3_ray.datasets.store.schema import Row, encode_part
from dinov3_ray.errors import StoreError


@given(size=st.integers(1, 2**34), batch_size=st.integers(1, 1024))
def test_blocks_hold_whole_batches_and_little_memory(size: int, batch_size: int) -> None:
    rows = block_size_for(size, batch_size)
    assert rows >= batch_size
    assert rows % batch_size == 0
    if rows > batch_size:
        assert rows * size <= 2**25
        assert rows <= 512
        assert (rows + batch_size) * size > 2**25 or rows + batch_size > 512, "there was room for another batch"


def test_blocks_of_some_teachers() -> None:
    assert block_size_for(384 * 4, 32) == 512  # CLS tokens of a ViT-S in float32
    assert block_size_for(384 * 4 + 384 * 14 * 14 * 4, 32) == 96  # its maps at 224 px
    assert block_size_for(1024 * 32 * 32 * 2, 32) == 32  # a ViT-L's at 518 px in float16: a batch takes 64 MiB


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("shape", [(384,), (4, 384), (384, 14, 14), (64, 32, 32)])
def test_a_row_takes_what_is_forecast(shape: tuple[int, ...], dtype: type) -> None:
    values = np.random.default_rng(0).integers(-9, 9, (64, *shape)).astype(dtype)
    buffer, _ = encode_part([Row(f"{index}.jpg", 9, 9, b"0" * 16) for index in range(64)], {"x": values}, {})
    forecast = 64 * row_bytes({"x": {"dtype": values.dtype.str, "shape": list(shape)}})
    assert 0.87 * forecast - 8_000 < buffer.size < 1.01 * forecast + 8_000


def test_a_run_is_the_same_with_another_batch_size_and_not_with_another_block_size(tmp_path: Path) -> None:
    plan = {"fingerprint": "f", "batch_size": 32, "block_size": 64, "versions": {"torch": "2.6"}}
    folder = Folder.at(tmp_path)
    check_same_run(folder, plan, {**plan, "batch_size": 8, "versions": {"torch": "2.13"}, "license": "known"})
    with pytest.raises(StoreError, match=r"with this one: block_size is 8, there it is 64\. Repeat"):
        check_same_run(folder, plan, {**plan, "block_size": 8, "batch_size": 8})
    with pytest.raises(StoreError, match=r"source.path is 'b', there it is 'a'.*--source-moved goes on with them"):
        check_same_run(folder, {**plan, "source": {"path": "a"}}, {**plan, "source": {"path": "b"}})


def test_batches_that_differ_are_told() -> None:
    assert batches_text({32: 12}) == "12 parts were made with batch size 32"
    assert batches_text({8: 4, 32: 1200, 1: 1}) == "1,200 parts were made with batch size 32, 4 with 8, 1 with 1"
    assert batch_note({}, 8) == batch_note({8: 3}, 8) == ""
    note = batch_note({32: 1}, 8)
    assert note.startswith("1 part was made with batch size 32; what remains is made with 8. ")
    forecast = Forecast(10, 4, 100, exact=True, free=None, note="int8").noting(note)
    assert str(forecast) == f"10 images, 100 B each, 400 B to write for the 4 that remain. int8. {note}"
