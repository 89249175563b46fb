"""``dinov3-ray extract`` and ``show`` where they need no Ray: mistakes, Ctrl-C, and the map of an image file."""

from __future__ import annotations

from pathlib import Path

import pytest
from commandline import failure
from commandline import run_command as run
from PIL import Image
from stores import store_of

from dinov3_ray.datasets import SourceOptions
from dinov3_ray.datasets.extraction.plan import Forecast
from dinov3_ray.datasets.extraction.run import Extraction
from dinov3_ray.features import FeatureSpec


@pytest.mark.slow
def test_show_pictures_an_image_by_a_model(folder: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    result = run(
        "show", "--image", folder / "1.png", "--root", tiny_checkpoint, "--image-size", "96x128", "--to", picture
    )
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 10_000
    result = run("show", "--image", folder / "broken.jpg", "--root", tiny_checkpoint)
    assert result.exit_code == 1
    assert "cannot be read as an image (not an image)" in result.output


def test_show_finds_a_stored_map_s_image_where_it_lies_now(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "images" / "0.png")
    store_of(tmp_path / "images", tmp_path / "out", FeatureSpec(feature_map=True))
    now = (tmp_path / "images").rename(tmp_path / "elsewhere")
    widths = []
    for options in ((), ("--images", now)):
        result = run("show", tmp_path / "out", "0.png", "--to", tmp_path / "x.png", *options)
        assert result.exit_code == 0, result.output
        assert ("without the image: image '0.png' cannot be read" in result.output) == (options == ())
        widths.append(Image.open(tmp_path / "x.png").width)
    assert widths[1] > 1.5 * widths[0], "the image is beside it"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract", "a", "b", "--outputs", "cls,patches"], "must be of cls, map, registers"),
        (["extract", "a", "b", "--layers", "x"], "such as 4,11,-1; got 'x'"),
        (["extract", "a", "b", "--map-size", "3x4x5"], "must be SIZE or HEIGHTxWIDTH"),
        (["extract", "a", "b", "--background", "white"], "must be R,G,B, each from 0 to 255"),
        (["extract", "a", "b", "--pool", "p", "--image-size", "64"], "belong to --root"),
        (["extract", "a", "b", "--plugin", "no_such_module"], "such as pillow_heif:register_heif_opener; got 'no_such"),
        (["extract", "a", "b", "--plugin", "json:nothing"], "MODULE:FUNCTION, such as"),
        (["extract", "a", "b", "--max-errors", "2"], "2.0 is not in the range 0<=x<=1"),
        (["extract", "a", "b"], "exactly one of config and pool must be given"),
        (["show", "a"], "give either OUT and ID, or --image FILE and --root DIR"),
        (["show", "nowhere", "x"], "is not a feature store"),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str) -> None:
    assert message in failure(*arguments)


def test_options_reach_the_extraction(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def noted(*_arguments: object, **options: object) -> Extraction:
        seen.update(options)
        return Extraction(Forecast(0, 0, 0, exact=True, free=None))

    monkeypatch.setattr("dinov3_ray.datasets.extraction.extract.extract", noted)
    options = ["--shrink-to", "448", "--max-errors", "0.1", "--source-moved", "--plugin", "json"]
    assert run("extract", "photographs", "features", "--pool", "p", *options).exit_code == 0
    assert (seen["max_errors"], seen["source_moved"]) == (0.1, True)
    assert isinstance(seen["options"], SourceOptions)
    assert seen["options"].shrink_to == 448


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dinov3_ray.datasets.extraction.extract.extract", interrupted)
    result = run("extract", "photographs", "features", "--pool", "p")
    assert result.exit_code == 130
    assert "finished blocks stay in features, and the same command continues" in result.output
