"""How an extraction is cut into blocks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dinov3_ray.datasets.extraction.plan import block_size_for


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
