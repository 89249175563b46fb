"""Pictures of feature maps: alike features have alike colours, and the panels are what was given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinov3_ray.errors import InputError
from dinov3_ray.pictures import PcaBasis, save_grid


def pca_rgb(map_Dhw: Tensor) -> np.ndarray:
    return PcaBasis.fit(map_Dhw).rgb(map_Dhw)


def some_map(channels: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(channels, 9, 14, generator=torch.Generator().manual_seed(seed))


def test_a_picture_has_the_maps_grid_and_uses_the_range_of_colours() -> None:
    picture = pca_rgb(some_map())
    assert picture.shape == (9, 14, 3)
    assert picture.dtype == np.uint8
    for channel in range(3):
        assert picture[..., channel].min() == 0
        assert picture[..., channel].max() == 255


def test_regions_of_one_kind_have_one_colour() -> None:
    kinds = torch.randint(0, 4, (9, 14), generator=torch.Generator().manual_seed(1))
    prototypes = some_map(24)[:, 0, :4]
    picture = pca_rgb(prototypes[:, kinds])
    colours = [{tuple(colour) for colour in picture[kinds.numpy() == kind]} for kind in range(4)]
    assert all(len(found) == 1 for found in colours)
    assert len(set.union(*colours)) == 4


def test_one_basis_shows_two_maps_alike() -> None:
    teacher = some_map()
    basis = PcaBasis.fit(teacher)
    assert np.array_equal(basis.rgb(teacher), pca_rgb(teacher))
    near = basis.rgb(teacher + 0.01 * some_map(seed=2)).astype(int)
    far = basis.rgb(some_map(seed=3)).astype(int)
    shown = basis.rgb(teacher).astype(int)
    assert np.abs(near - shown).mean() < 3 < 30 < np.abs(far - shown).mean()


def test_colours_do_not_depend_on_the_order_of_patches_or_the_dtype() -> None:
    full = some_map()
    assert np.array_equal(pca_rgb(full.flip(-1)), pca_rgb(full)[:, ::-1])
    assert np.abs(pca_rgb(full.bfloat16()).astype(int) - pca_rgb(full)).max() <= 4
    assert np.array_equal(PcaBasis.fit(full[None]).rgb(full), pca_rgb(full))


def test_maps_that_hardly_vary_are_grey_not_noise() -> None:
    assert (pca_rgb(torch.ones(24, 9, 14)) == 128).all()
    line = torch.linspace(0, 1, 9 * 14).reshape(1, 9, 14) * torch.ones(24, 1, 1)
    picture = pca_rgb(line)
    assert (picture[..., 1:] == 128).all()
    assert picture[..., 0].max() == 255


def test_what_is_no_map_is_refused() -> None:
    with pytest.raises(InputError, match=r"must be \[24, h, w\] for this basis; got shape \[8, 9, 14\]"):
        PcaBasis.fit(some_map()).rgb(some_map(8))
    with pytest.raises(InputError, match="holds NaN or infinity"):
        pca_rgb(some_map().index_fill(0, torch.tensor([3]), torch.nan))
    with pytest.raises(InputError, match="at least 2 patches"):
        pca_rgb(torch.ones(24, 1, 1))
    with pytest.raises(InputError, match=r"\[D, h, w\] or \[B, D, h, w\]"):
        PcaBasis.fit(torch.ones(24, 3))


@pytest.mark.slow
def test_a_grid_is_saved_with_its_panels(tmp_path: Path, photographs: list[Tensor]) -> None:
    photograph = photographs[0].permute(1, 2, 0).numpy()
    red, blue = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = blue[..., 2] = 255
    path = save_grid(
        [[photograph, red, blue]] * 2, tmp_path / "grid", ["image", "teacher", "student"], heading="Step 7"
    )
    assert path == tmp_path / "grid.png"
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 1200
    row = pixels[pixels.shape[0] // 4]
    assert row[len(row) // 2].tolist() == [255, 0, 0]
    assert row[len(row) * 5 // 6].tolist() == [0, 0, 255]
    with pytest.raises(InputError, match=r"equally many pictures, at least one; got \[2, 1\]"):
        save_grid([[red, blue], [red]], path)
    with pytest.raises(InputError, match="each of the 2 columns"):
        save_grid([[red, blue]], path, ["one"])
