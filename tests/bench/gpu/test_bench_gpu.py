"""The GPU bench without a GPU: how it divides its time, what it says, and what it makes of workers that die or hang."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from paths import TESTS

from dinov3_ray.bench.gpu.acceptance import BASE, judge
from dinov3_ray.bench.gpu.budget import PARTS, TOTAL_SECONDS, share_of, wanted_parts
from dinov3_ray.bench.gpu.checks import count_results, files_with_marked_tests
from dinov3_ray.bench.gpu.journal import Journal
from dinov3_ray.bench.gpu.sanitized import drive
from dinov3_ray.bench.gpu.supervisor import run_parts
from dinov3_ray.errors import ConfigError

THREE = wanted_parts(["training", "sanitizer", "tests"])

# It measures nothing, and needs no torch.
WORKER = """
import json, os, signal, sys, time
def send(**message):
    print(json.dumps(message), flush=True)
send(kind="ready", machine={"device": "a device"})
for line in sys.stdin:
    part = json.loads(line)["part"]
    send(kind="step", what="work")
    send(kind="row", row={"what": part, "pid": os.getpid()}, detail=None)
    if part == "sanitizer":
        SANITIZER
    send(kind="done")
"""


def run(journal: Journal, sanitizer: str, on_step: object = lambda _: None, total: float = 60.0) -> None:
    command = [sys.executable, "-c", WORKER.replace("SANITIZER", sanitizer)]
    run_parts(THREE, journal, command, total, on_step)  # type: ignore[arg-type]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.of(THREE, tmp_path / "found.json", command="a command")


def states(journal: Journal) -> list[str]:
    return [record.state for record in journal.parts.values()]


def on_disk(journal: Journal) -> dict[str, dict[str, object]]:
    assert journal.path is not None
    parts: dict[str, dict[str, object]] = json.loads(journal.path.read_text())["parts"]
    return parts


def test_all_parts_together_leave_time_for_the_start_and_the_end_within_nine_minutes() -> None:
    assert sum(part.seconds for part in PARTS) == TOTAL_SECONDS
    last = share_of(PARTS[-1].seconds, PARTS[-1:])
    assert TOTAL_SECONDS - last.begin + last.end + 15 < 9 * 60


def test_what_a_part_saves_or_overruns_all_later_ones_share() -> None:
    assert share_of(TOTAL_SECONDS, PARTS).begin == pytest.approx(PARTS[0].seconds)
    usual = sum(part.seconds for part in PARTS[1:])
    assert share_of(usual + 100, PARTS[1:]).begin > PARTS[1].seconds > share_of(usual - 100, PARTS[1:]).begin
    assert share_of(77.0, PARTS[-1:]).begin == pytest.approx(77.0)  # the last one has what is left
    assert share_of(-5.0, PARTS[-1:]).begin == 0.0


def large(rate: float, bound: float = 1000.0, eager: float | None = 10.0) -> dict[str, object]:
    return {"model": "vitl16", "px": 512, "eager": eager, "compiled": rate, "float8": 5000.0, "bound": bound}


@pytest.mark.parametrize(
    ("rate", "device", "counts", "words"),
    [
        (600.0, "NVIDIA H100 80GB HBM3", True, ["pass", "pass"]),
        (560.0, "NVIDIA H200", True, ["FAIL", "pass"]),  # float8 is faster, and does not count
        (540.0, "NVIDIA H100 80GB HBM3", True, ["FAIL", "FAIL"]),
        (560.0, "NVIDIA L4", True, ["- (asked of an H100)", "pass"]),
        (600.0, "NVIDIA H100 80GB HBM3", False, ["- (not a full run on a GPU)"] * 2),
    ],
)
def test_figures_are_judged_where_they_were_asked_for(rate: float, device: str, counts: bool, words: list[str]) -> None:
    other = large(9999.0) | {"px": 224}
    verdicts = judge({"large-teacher": [other, large(rate)]}, device, counts=counts)
    assert [one.word for one in verdicts] == [*words, "- (not measured)", "- (not measured)"]
    assert verdicts[1].value == pytest.approx(rate / 1000)


def test_rates_are_judged_by_the_bare_loop() -> None:
    rows = {
        "pool": [{"what": "bare loop", BASE: 1.0}, {"what": "pool", BASE: 0.94}],
        "extraction": [{"what": "bare loop", BASE: 1.0}, {"what": "extract", BASE: 0.91}],
        "large-teacher": [large(None, eager=None)],  # type: ignore[arg-type]
    }
    assert [one.word for one in judge(rows, "NVIDIA H100", counts=True)] == [
        "- (not measured)",
        "- (not measured)",
        "FAIL",
        "pass",
    ]


def test_a_worker_that_dies_costs_its_part_only(journal: Journal) -> None:
    run(journal, "os.kill(os.getpid(), signal.SIGKILL)")
    assert states(journal) == ["done", "failed", "done"]
    assert journal.failed
    assert journal.parts["sanitizer"].remark == "the worker process ended with exit code -9"
    rows = [record.rows[0] for record in journal.parts.values()]
    assert [row["what"] for row in rows] == ["training", "sanitizer", "tests"]  # what it had measured is kept
    assert rows[0]["pid"] == rows[1]["pid"] != rows[2]["pid"]
    assert on_disk(journal)["sanitizer"]["rows"] == [rows[1]]
    assert journal.header["device"] == "a device"


def test_a_part_that_fails_gets_the_next_one_a_new_worker(journal: Journal) -> None:
    run(journal, 'send(kind="failed", remark="OutOfMemoryError: 3 GiB", traceback="..."); continue')
    assert states(journal) == ["done", "failed", "done"]
    pids = [record.rows[0]["pid"] for record in journal.parts.values()]
    assert pids[0] == pids[1] != pids[2]
    failed, *_ = [line for line in journal.markdown().splitlines() if "| failed |" in line]
    assert failed.endswith("| OutOfMemoryError: 3 GiB |")


@pytest.mark.slow
def test_a_worker_that_hangs_is_stopped(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov3_ray.bench.gpu.budget._PATIENCE", 0.3)
    monkeypatch.setattr("dinov3_ray.bench.gpu.supervisor._CLOSE_SECONDS", 0.1)
    run(journal, "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)", total=1.5)
    assert states(journal) == ["done", "failed", "done"]
    assert journal.parts["sanitizer"].remark == "it did not end in time, and was stopped"
    with pytest.raises(ProcessLookupError):
        os.kill(journal.parts["sanitizer"].rows[0]["pid"], 0)


def test_ctrl_c_ends_the_worker_and_keeps_what_was_measured(journal: Journal) -> None:
    def interrupt(step: str) -> None:
        if step.startswith("tests"):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(journal, "pass", interrupt)
    assert states(journal) == ["done", "done", "interrupted"]
    assert [part["state"] for part in on_disk(journal).values()] == ["done", "done", "interrupted"]
    with pytest.raises(ProcessLookupError):
        os.kill(journal.parts["sanitizer"].rows[0]["pid"], 0)


def test_a_device_that_is_not_there_is_an_error(journal: Journal) -> None:
    program = 'print(\'{"kind": "unable", "remark": "device must be one that this process has"}\')'
    with pytest.raises(ConfigError, match="device must be"):
        run_parts(THREE, journal, [sys.executable, "-c", program], 60.0, lambda _: None)


def test_tables_have_every_column_and_name_what_was_left_out(journal: Journal) -> None:
    record = journal.parts["tests"]
    record.state = "done"
    for message in (
        {"kind": "row", "row": {"model": "vitl16", "eager": 480.4}, "detail": {"more": 1}},
        {"kind": "row", "row": {"model": "a|b", "eager": None, "compiled": 0.12345}, "detail": None},
        {"kind": "left out", "what": "vitl16 at 224 px"},
    ):
        record.note(message)
    lines = journal.markdown().splitlines()
    assert "| model | eager | compiled |" in lines
    assert "| vitl16 | 480 | - |" in lines
    assert "| a\\|b | - | 0.123 |" in lines
    assert any("left out for time: vitl16 at 224 px" in line for line in lines)
    journal.write()
    assert on_disk(journal)["tests"]["details"] == [{"more": 1}]
    assert list(Path(journal.path or "").parent.iterdir()) == [journal.path]  # nothing half written


def test_tests_are_counted_and_named() -> None:
    junit = """<testsuites><testsuite>
      <testcase name="test_a"/><testcase name="test_b"><skipped message="needs a CUDA device"/></testcase>
      <testcase name="test_c"><failure message="assert 1 == 2&#10;more">...</failure></testcase>
      <testcase name="test_d"><error message="ImportError: no skimage">...</error></testcase>
    </testsuite></testsuites>"""
    counts, unhappy = count_results(junit)
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert unhappy == ["test_c: assert 1 == 2", "test_d: ImportError: no skimage"]


@pytest.mark.slow
def test_the_pipeline_is_driven_with_stacked_and_ragged_batches(tiny_checkpoint: Path) -> None:
    assert drive(str(tiny_checkpoint), "cpu", batches=2) == 4


def test_the_tests_that_need_a_gpu_are_found() -> None:
    found = files_with_marked_tests(TESTS)
    assert {path.name for path in found} > {"test_device_pipeline.py", "test_float8.py", "test_pipeline.py"}
