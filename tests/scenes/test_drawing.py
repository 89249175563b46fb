"""Scenes and their labels: drawn together, the same every time."""

from __future__ import annotations

import hashlib

import pytest
import torch
import torch.nn.functional as F

from dinov3_ray.scenes import drawing
from dinov3_ray.scenes.drawing import CLASSES, draw_labelled, draw_scene
from dinov3_ray.scenes.scenery import CELL, draw_scenery, relit
from dinov3_ray.scenes.student import Student


def test_scenes_are_the_same_every_time_and_all_different() -> None:
    scenes = [draw_scene(seed, 64) for seed in (0, 0, 1, 2)]
    assert torch.equal(scenes[0], scenes[1])
    assert len({scene.numpy().tobytes() for scene in scenes}) == 3
    assert scenes[0].shape == (3, 64, 64)
    assert scenes[0].dtype == torch.uint8


def test_each_label_has_the_colours_that_it_was_drawn_in() -> None:
    palette = {
        "field": drawing._FIELDS,
        "roof": drawing._ROOFS,
        "water": (drawing._WATER, drawing._SHORE),
        "road": (drawing._ROAD,),
        "tree": (drawing._TREE,),
    }
    assert tuple(palette) == CLASSES
    seen = dict.fromkeys(CLASSES, 0)
    for seed in range(6):
        picture_3HW, labels_HW = draw_labelled(seed, 128)
        assert labels_HW.shape == (128, 128)
        for label, (name, colours) in enumerate(palette.items()):
            # Away from edges to other labels, where colours mix; as they do where a shadow, which may lie on anything,
            # or a field or a roof of another colour begins.
            apart_HW = F.max_pool2d((labels_HW != label)[None, None].float(), 5, 1, 2)[0, 0] == 0
            pixels_N3 = picture_3HW[:, apart_HW].T.float()
            distances_NK = torch.cdist(pixels_N3, torch.tensor([*colours, drawing._SHADOW]).float())
            assert (distances_NK.amin(1) < 40).float().mean() > 0.95 or not len(pixels_N3), (seed, name)
            seen[name] += len(pixels_N3)
    assert min(seen.values()) > 50, seen


def test_cells_have_the_label_of_most_of_their_pixels_and_scenes_the_light_of_their_number() -> None:
    scenery = draw_scenery(5, 3, 32)
    picture_3HW, labels_HW = draw_labelled(6, 32)
    assert torch.equal(scenery.pictures[1], relit(picture_3HW, 6))
    for row in range(32 // CELL):
        for column in range(32 // CELL):
            cell = labels_HW[CELL * row : CELL * (row + 1), CELL * column : CELL * (column + 1)].flatten()
            assert scenery.labels[1, row, column] == torch.bincount(cell, minlength=len(CLASSES)).argmax()
    assert not torch.equal(relit(picture_3HW, 7), relit(picture_3HW, 8))


def test_another_light_keeps_what_is_where() -> None:
    grey_3HW = torch.full((3, 40, 40), 100, dtype=torch.uint8)
    lit_3HW = relit(grey_3HW, 3).float()
    # Grey has no hue: each channel is scaled, by at most the brightness and the tint, and gets noise.
    gains = lit_3HW.mean((1, 2)) / 100
    assert gains.max() / gains.min() < 1.2 / 0.8 + 0.02
    assert 5 < lit_3HW.std((1, 2)).mean() < 11


def test_turning_moves_labels_with_their_pixels() -> None:
    scenery = draw_scenery(0, 2, 32)
    generator = torch.Generator().manual_seed(0)
    turns = set()
    for _ in range(60):
        turned = scenery.turned(generator)
        assert turned.pictures.shape == scenery.pictures.shape
        before, after = (
            F.max_pool2d(each.pictures.float(), CELL, CELL).mean(1) + 1000 * each.labels for each in (scenery, turned)
        )
        assert torch.equal(before.flatten(1).sort().values, after.flatten(1).sort().values)
        turns.add(hashlib.sha256(turned.pictures.numpy().tobytes()).hexdigest())
    assert len(turns) == 8


@pytest.mark.parametrize(("size", "grid"), [((64, 96), (4, 6)), ((71, 96), (4, 6)), ((518, 32), (32, 2))])
def test_the_student_has_its_teachers_grid(size: tuple[int, int], grid: tuple[int, int]) -> None:
    views_B3HW = torch.zeros(2, 3, *size, dtype=torch.uint8)
    student = Student(24, channels=16)
    assert student(views_B3HW).shape == (2, 24, *grid)
    assert student.features(views_B3HW).shape == (2, 16, *grid)
