"""The proof by distillation: its statistics and verdict by hand, its arms, and its smallest form from end to end."""

from __future__ import annotations

import json
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from dinov3_ray.bench.proof.arms import ARMS, ProofSettings, partners, train_arm
from dinov3_ray.bench.proof.measuring import measure_proof
from dinov3_ray.bench.proof.outcome import Proof, Score
from dinov3_ray.bench.proof.paired import paired_bounds
from dinov3_ray.errors import ConfigError
from dinov3_ray.interrupts import Interrupts
from dinov3_ray.scenes.scene_teacher import SceneTeaching
from dinov3_ray.scenes.scenery import draw_scenery

SMALLEST = ProofSettings(
    seeds=2,
    labels=3,
    unlabelled=10,
    unseen=5,
    steps=2,
    label_batch=2,
    distil_steps=2,
    batch=4,
    channels=16,
    teaching=SceneTeaching(side=32, scenes=6, steps=2, batch=4),
)


def test_bounds_are_those_of_students_t() -> None:
    # scipy.stats.t.interval(0.95, df=n-1, loc=mean, scale=sem) of the differences
    bounds = paired_bounds([0.5, 0.6, 0.7, 0.9, 0.8], [0.4, 0.4, 0.6, 0.7, 0.5])
    assert bounds.mean == pytest.approx(0.18)
    assert (bounds.low, bounds.high) == pytest.approx((0.0761, 0.2839), abs=1e-4)
    two = paired_bounds([1.0, 2.0], [0.0, 0.0])
    assert (two.low, two.high) == pytest.approx((1.5 - 12.706 * 0.5, 1.5 + 12.706 * 0.5))
    same = paired_bounds([0.3] * 31, [0.1] * 31)
    assert (same.low, same.high) == pytest.approx((0.2, 0.2))


def test_the_table_of_t_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for count in range(2, 32):
        values = [float(index) for index in range(count)]
        bounds = paired_bounds(values, [0.0] * count)
        reach = stats.t.ppf(0.975, count - 1) * torch.tensor(values).std().item() / count**0.5
        assert bounds.high - bounds.mean == pytest.approx(reach, rel=1e-3)


@pytest.mark.parametrize(("values", "others"), [([1.0], [0.0]), ([1.0, 2.0], [0.0]), ([0.0] * 32, [0.0] * 32)])
def test_bounds_need_pairs(values: list[float], others: list[float]) -> None:
    with pytest.raises(ConfigError, match="must be 2 to 31 numbers, as many of each"):
        paired_bounds(values, others)


def test_swapped_targets_are_all_another_images() -> None:
    for seed in range(5):
        partner = partners(7, seed)
        assert sorted(partner.tolist()) == list(range(7))
        assert not (partner == torch.arange(7)).any()
    assert partners(2, 0).tolist() == [1, 0]


def test_arms_differ_in_what_they_distil_and_in_nothing_else() -> None:
    labelled, unlabelled = draw_scenery(0, 3, 32), draw_scenery(10, 6, 32).pictures
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(6, 8, 2, 2, generator=generator)

    def weights(name: str, steps: int, seed: int = 0) -> torch.Tensor:
        settings = replace(SMALLEST, steps=steps, distil_steps=2 * (name != "labels"))
        of_teacher = targets if ARMS[name].teacher else None
        student = train_arm(ARMS[name], seed, labelled, unlabelled, of_teacher, settings)
        assert not student.training
        return torch.cat([each.flatten() for each in student.stem.parameters()])

    untrained = weights("labels", 0)
    assert torch.equal(untrained, weights("joint", 0)), "an arm that distils beside begins with the same weights"
    assert not torch.equal(untrained, weights("labels", 0, seed=1))
    before = weights("trained", 0)
    assert not torch.equal(untrained, before)
    assert torch.equal(before, weights("random", 0)), "the same targets would give the same student"
    assert not torch.equal(before, weights("swapped", 0))
    after = {name: weights(name, 2) for name in ("labels", "trained", "swapped", "joint")}
    assert len({each.sum().item() for each in after.values()}) == 4
    assert torch.equal(after["labels"], weights("labels", 2))


def test_an_arm_draws_its_first_weights_at_once_and_from_then_on_by_its_own_generators() -> None:
    labelled, unlabelled = draw_scenery(0, 3, 32), draw_scenery(10, 6, 32).pictures
    before, states = torch.get_rng_state(), []
    for arm in ARMS.values():
        targets = torch.ones(6, 8, 2, 2) if arm.teacher else None
        train_arm(arm, 1, labelled, unlabelled, targets, SMALLEST, lambda: states.append(torch.get_rng_state()))
    assert len(states) > len(ARMS)
    assert all(torch.equal(state, before) for state in (*states, torch.get_rng_state()))


def made_up(**mious: tuple[float, ...]) -> Proof:
    """A proof of three seeds with these mIoU."""
    scenes = draw_scenery(0, 2, 32)
    found = {
        name: [Score(miou, scenes.labels) for miou in mious.get(name, (0.5, 0.6, 0.55))] for name in (*ARMS, "teacher")
    }
    teachers = {"trained": found.pop("teacher"), "random": found["labels"]}
    return Proof(ProofSettings(seeds=3), found, teachers, scenes)  # type: ignore[arg-type]


def test_a_proof_is_one_only_if_the_teacher_wins_and_no_control_does() -> None:
    good = made_up(trained=(0.7, 0.81, 0.75), teacher=(0.8, 0.9, 0.85))
    assert good.complaints() == []
    assert good.share_handed_on == pytest.approx(0.2033 / 0.3, abs=1e-3)
    assert good.gain("trained").mean == pytest.approx(0.2033, abs=1e-3)
    (beaten, by_random, by_swapped) = made_up(trained=(0.51, 0.6, 0.56)).complaints()
    assert beaten.startswith("Distilling from the trained teacher was not shown to beat the labels alone: +0.7 [")
    assert by_random.startswith("Distilling from the trained teacher was not shown to beat a random teacher: ")
    assert by_swapped.startswith("Distilling from the trained teacher was not shown to beat the maps of other images: ")
    (swapped,) = made_up(trained=(0.7, 0.81, 0.75), swapped=(0.6, 0.7, 0.66)).complaints()
    assert swapped.startswith("The control passes, and must not: swapped targets first, +10.3 [")
    (no_better,) = made_up(trained=(0.7, 0.81, 0.75), random=(0.69, 0.8, 0.76)).complaints()
    assert no_better.startswith("Distilling from the trained teacher was not shown to beat a random teacher: +0.3 [")
    assert made_up(trained=(0.7, 0.81, 0.75)).share_handed_on is None
    helpful = made_up(trained=(0.7, 0.81, 0.75), random=(0.6, 0.7, 0.66), joint=(0.6, 0.7, 0.66))
    passing = {name: arm["passes"] for name, arm in helpful.as_dict()["arms"].items()}
    assert passing == dict.fromkeys(ARMS, False) | {"trained": True}, "what a random teacher brings too is not a gain"


@pytest.mark.slow
def test_the_smallest_proof_runs_from_end_to_end(tmp_path: Path) -> None:
    lines: list[str] = []
    (tmp_path / "work").mkdir()
    threads = torch.get_num_threads()
    proof = measure_proof(SMALLEST, tmp_path / "work", None, lines.append, cache=tmp_path / "cache")
    assert torch.get_num_threads() == threads
    report = json.loads(json.dumps(proof.as_dict()))
    assert report["seeds"] == 2
    assert {"mean", "low", "high"} == set(report["gain_over_labels"]) == set(report["gain_over_random_teacher"])
    assert "share_handed_on" in report
    assert set(report["arms"]) == set(ARMS)
    for row in (*report["arms"].values(), *report["teachers"].values()):
        assert len(row["miou"]) == 2
        assert all(0 <= miou <= 1 for miou in row["miou"])
    gain = report["gain_over_labels"]["mean"]
    assert gain == pytest.approx(report["arms"]["trained"]["mean"] - report["arms"]["labels"]["mean"])
    assert any(line.startswith("10 of 10: ") for line in lines)

    pictures = proof.save_pictures(tmp_path)
    assert [picture.name for picture in pictures] == ["gains.png", "predictions.png"]
    for picture in pictures:
        with Image.open(picture) as image:
            assert len(image.convert("RGB").getcolors(2**24) or ()) > 5
    console = Console(width=120)
    with console.capture() as capture:
        console.print(*proof.tables())
    assert all(arm.title in capture.get() for arm in ARMS.values())


@pytest.mark.slow
def test_an_interrupt_ends_the_arms_that_train(tmp_path: Path) -> None:
    many = replace(SMALLEST, steps=100_000)

    def interrupt(line: str) -> None:
        if line.endswith("students"):
            threading.Timer(1.0, signal.raise_signal, [signal.SIGINT]).start()

    before = set(threading.enumerate())
    with Interrupts("") as interrupts, pytest.raises(KeyboardInterrupt):
        measure_proof(many, tmp_path, None, interrupt, cache=tmp_path / "cache")
    assert interrupts.exit_code == 130
    assert not [thread for thread in set(threading.enumerate()) - before if "ThreadPool" in thread.name]
