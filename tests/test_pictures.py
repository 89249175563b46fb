"""Feature maps as colours, and grids of pictures on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_ray.errors import ConfigError, InputError
from dinov3_ray.pictures import PcaBasis, save_grid


def map_of(seed: int, channels: int = 8) -> torch.Tensor:
    return torch.randn(2, channels, 5, 7, generator=torch.Generator().manual_seed(seed))


def test_the_basis_is_that_of_numpys_singular_values() -> None:
    features_BDhw = map_of(0)
    basis = PcaBasis.fit(features_BDhw)
    rows_ND = features_BDhw.permute(0, 2, 3, 1).reshape(-1, 8).double().numpy()
    rows_ND = rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)
    _, _, right_DD = np.linalg.svd(rows_ND - rows_ND.mean(0), full_matrices=False)
    overlap_33 = np.abs(right_DD[:3] @ basis.components.double().numpy())
    np.testing.assert_allclose(overlap_33, np.eye(3), atol=1e-5)


def test_colours_spread_over_the_whole_range_and_forget_the_length_of_features() -> None:
    features_BDhw = map_of(1)
    basis = PcaBasis.fit(features_BDhw)
    colours_B3hw = basis.rgb(features_BDhw)
    assert colours_B3hw.dtype == torch.uint8
    assert colours_B3hw.shape == (2, 3, 5, 7)
    assert colours_B3hw.amin((0, 2, 3)).tolist() == [0, 0, 0]
    assert colours_B3hw.amax((0, 2, 3)).tolist() == [255, 255, 255]
    difference = colours_B3hw.int() - basis.rgb(7 * features_BDhw).int()
    assert difference.abs().max() <= 1  # of rounding alone


def test_one_basis_gives_equal_features_equal_colours_in_any_map() -> None:
    first, second = map_of(2), map_of(3)
    basis = PcaBasis.fit(first)
    both = basis.rgb(torch.cat([second, first]))
    assert torch.equal(both[:2], basis.rgb(second))
    assert torch.equal(both[2:], basis.rgb(first))
    assert not torch.equal(both[:2], both[2:])


def test_a_constant_map_has_one_colour() -> None:
    basis = PcaBasis.fit(torch.ones(1, 4, 3, 3))
    assert basis.rgb(torch.ones(1, 4, 3, 3)).flatten(2).unique(dim=2).shape[2] == 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (torch.zeros(4, 8), r"\[B,D,h,w\]"),
        (torch.zeros(1, 8, 4, 4, dtype=torch.int64), "floating-point"),
        (torch.zeros(1, 2, 4, 4), "at least 3 channels"),
        (torch.full((1, 8, 4, 4), float("nan")), "finite"),
    ],
)
def test_what_is_no_map_is_refused(wrong: torch.Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        PcaBasis.fit(wrong)


def test_a_map_of_other_channels_is_refused() -> None:
    with pytest.raises(InputError, match="basis' 8 channels"):
        PcaBasis.fit(map_of(4)).rgb(map_of(4, channels=9))


def test_a_grid_shows_every_picture(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    pictures = [torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, 6, 6) for colour in colours]
    path = save_grid(tmp_path / "grid.png", {"left": pictures[:2], "right": pictures[2:]})
    with Image.open(path) as image:
        seen = {colour for _, colour in image.convert("RGB").getcolors(2**24)}
        width, height = image.size
        where = {
            colour: image.convert("RGB").getpixel((width * x // 4, height * y // 4))
            for colour, (x, y) in zip(colours, [(1, 1), (1, 3), (3, 1), (3, 3)], strict=True)
        }
    assert seen.issuperset(colours)
    assert where == {colour: colour for colour in colours}


@pytest.mark.parametrize("columns", [{}, {"a": []}, {"a": [torch.zeros(3, 2, 2, dtype=torch.uint8)], "b": []}])
def test_uneven_or_empty_columns_are_refused(tmp_path: Path, columns: dict[str, list[torch.Tensor]]) -> None:
    with pytest.raises(ConfigError, match="columns must be"):
        save_grid(tmp_path / "grid.png", columns)
    assert not list(tmp_path.iterdir())
