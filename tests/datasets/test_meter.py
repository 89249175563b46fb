"""What a run shows of itself."""

from __future__ import annotations

import io
import logging
from types import SimpleNamespace

import pytest

from dinov3_ray.datasets import meter as meters


def test_the_bar_tells_rates_and_time_left_from_blocks_however_far_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(meters, "time", SimpleNamespace(monotonic=lambda: now))
    with meters.metering(True, total=1000, done=200, start="starting", doing="extracting") as meter:
        assert meter.seconds_left(800) is None
        now += 150  # of which the teacher took 50 to start
        meter.add(100, 50_000_000, 100)
        assert str(meter) == "1.0 img/s, 0.5 MB/s"
        assert meter.seconds_left(700) == 700
        now += 60  # no block since
        assert meter.seconds_left(700) == 640
    shown = capsys.readouterr().err
    assert "300/1000" in shown
    assert "1.0 img/s" in shown
    assert "0:10:40 left" in shown


def test_no_bar_unless_asked_or_at_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for show in (False, None):
        with meters.metering(show, total=None, done=0, start="", doing="") as meter:
            meter.add(3, 5, 0.1)
        assert meter.images == 3
    assert capsys.readouterr().err == ""


def test_what_ray_data_notes_does_not_stand_amid_the_bar() -> None:
    """Its warnings do; and all goes to its log file as before."""
    terminal, file, logger = io.StringIO(), io.StringIO(), logging.getLogger("ray.data")
    console, record, level = logging.StreamHandler(terminal), logging.Handler(), logger.level
    record.emit = lambda one: file.write(one.getMessage())  # type: ignore[assignment, method-assign, return-value]
    logger.setLevel(logging.INFO)
    logger.addHandler(console)
    logger.addHandler(record)
    try:
        with meters.metering(True, total=1, done=0, start="", doing=""):
            logger.getChild("inner").info("finished")
            logger.getChild("inner").warning("too slow")
        logger.info("later")
    finally:
        logger.removeHandler(console)
        logger.removeHandler(record)
        logger.setLevel(level)
    assert terminal.getvalue() == "too slow\nlater\n"
    assert file.getvalue() == "finishedtoo slowlater"
