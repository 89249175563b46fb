"""CachedTeacher: right answers or misses, whatever happens to the cache."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
from float8 import FLOAT8_ON_CPU
from sample_features import same
from torch import Tensor

from dinov3_ray.config import ComputeDtype, DinoV3Config
from dinov3_ray.datasets import CachedTeacher
from dinov3_ray.datasets.cache_db import FeatureCache
from dinov3_ray.errors import InputError, StoreError
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.model import DinoV3Teacher
from dinov3_ray.testing import FakeTeacher

SPEC = FeatureSpec(cls=True, feature_map=True, layers=(0, 2))
MB = 2**20


def views(count: int, seed: int = 0, size: int = 48) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_a_second_epoch_makes_no_forward_pass_and_gives_the_same_bits(
    tiny_checkpoint: Path, photographs: list[Tensor], tmp_path: Path
) -> None:
    teacher = DinoV3Teacher(tiny_checkpoint)
    batches = [photographs[:2], photographs[2:4], photographs[4:]]
    with CachedTeacher(teacher, tmp_path, 64 * MB) as cached:
        first = [cached.extract(batch, SPEC) for batch in batches]
        assert cached.flush()
        assert cached.statistics().written == len(photographs)
    # Any pass fails.
    counting = FakeTeacher(fail_on=range(1000), fingerprint=teacher.fingerprint, dtype=teacher.dtype)
    with CachedTeacher(counting, tmp_path, 64 * MB) as cached:
        for batch, expected in zip(batches, first, strict=True):
            again = cached.extract(batch, SPEC)
            assert same(again, expected)
            assert again.fingerprint == expected.fingerprint == teacher.fingerprint
        # Another composition of the batch hits too.
        swapped = cached.extract([photographs[4], photographs[0]], SPEC)
        assert same(swapped.rows(1, 2), first[0].rows(0, 1))
        now = cached.statistics()
        assert (now.hits, now.misses, now.hit_rate) == (len(photographs) + 2, 0, 1.0)
        assert now.read_bytes > 0
        assert now.read_seconds > 0


@pytest.mark.slow
def test_the_same_weights_in_another_dtype_are_another_teacher(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Their fingerprint is one; what they compute is not."""
    images = views(2, size=224)
    dtypes: list[ComputeDtype] = ["float32", "bfloat16"]
    if FLOAT8_ON_CPU:
        dtypes.append("float8")  # its results are in bfloat16
    teachers = [DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype=dtype, backend="torch")) for dtype in dtypes]
    assert len({teacher.fingerprint for teacher in teachers}) == 1
    assert [teacher.computed_in for teacher in teachers] == dtypes
    for teacher in teachers:
        with CachedTeacher(teacher, tmp_path, 64 * MB) as cached:
            assert same(cached.extract(images, SPEC), teacher.extract(images, SPEC))
            assert torch.equal(cached.extract_features(images), teacher.extract_features(images))


@pytest.mark.parametrize("dtype", ["native", "float32", "bfloat16", "float16", "int8"])
def test_every_result_dtype_comes_back_as_it_was(dtype: str, tmp_path: Path) -> None:
    teacher = FakeTeacher(dtype=torch.bfloat16)
    spec = FeatureSpec(cls=True, registers=True, layers=(1,), dtype=dtype)  # type: ignore[arg-type]
    with CachedTeacher(teacher, tmp_path, MB) as cached:
        first = cached.extract(views(3), spec)
        assert cached.flush()
        assert same(cached.extract(views(3), spec), first)
    assert teacher.calls == 1


def test_only_what_is_missing_is_computed(tmp_path: Path) -> None:
    teacher = FakeTeacher()
    with CachedTeacher(teacher, tmp_path, 4 * MB) as cached:
        cached.extract(views(4), SPEC)
        assert cached.flush()
        batch = torch.cat([views(2, seed=1), views(4), views(1, seed=2)])
        assert same(cached.extract(batch, SPEC), FakeTeacher().extract(batch, SPEC))
        now = cached.statistics()
    assert (now.hits, now.misses) == (4, 7)


def test_view_spec_fingerprint_and_form_are_all_in_the_key(tmp_path: Path) -> None:
    images = views(1)
    with CachedTeacher(FakeTeacher(), tmp_path, 4 * MB) as cached:
        cached.extract(images, SPEC)
        assert cached.flush()
        others = [
            (images.flip(-1), SPEC),
            (images.half(), SPEC),
            (images.bfloat16(), SPEC),
            (images[..., :32], SPEC),
            (images, FeatureSpec(cls=True, feature_map=True, layers=(0, 1))),
            (images, FeatureSpec(cls=True, feature_map=True, layers=(0, 2), norm=False)),
        ]
        for view, spec in others:
            assert same(cached.extract(view, spec), FakeTeacher().extract(view, spec))
        assert cached.statistics().hits == 0
    other = FakeTeacher(fingerprint="other weights")
    with CachedTeacher(other, tmp_path, 4 * MB) as cached:
        cached.extract(images, SPEC)
        assert cached.statistics().hits == 0


def test_a_teacher_that_is_reloaded_under_way_never_shares_a_batch(tmp_path: Path) -> None:
    """The pool's fingerprint as the client knows it lags behind the weights that answered."""

    class Reloaded(FakeTeacher):
        def extract(self, images: Tensor, spec: FeatureSpec) -> Features:  # type: ignore[override]
            doubled = FakeTeacher().extract(images, spec).map(lambda _, tensor: tensor * 2)
            return Features.from_named(dict(doubled.named()), "new")

    new = Reloaded().extract(views(2), SPEC)
    with CachedTeacher(FakeTeacher(fingerprint="old"), tmp_path, 4 * MB) as cached:
        cached.extract(views(2)[:1], SPEC)
    teacher = Reloaded(fingerprint="old")
    with CachedTeacher(teacher, tmp_path, 4 * MB) as cached:
        assert same(cached.extract(views(2), SPEC), new)
        assert cached.statistics().hits == 1  # the former teacher's, and not used
        assert cached.flush()
        teacher.fingerprint = "new"
        assert same(cached.extract(views(2), SPEC), new)
        assert cached.statistics().hits == 3


def test_results_are_the_callers_own(tmp_path: Path) -> None:
    with CachedTeacher(FakeTeacher(), tmp_path, 4 * MB) as cached:
        expected = FakeTeacher().extract(views(2), SPEC)
        for _ in range(3):
            features = cached.extract(views(2), SPEC)
            assert same(features, expected)
            for _, tensor in features.named():
                tensor.zero_()  # also what was queued for writing must not see this
            cached.flush()


@pytest.mark.slow
def test_least_recently_used_leave_first_and_the_bound_holds(tmp_path: Path) -> None:
    spec = FeatureSpec(feature_map=True)
    teacher = FakeTeacher(hidden_size=1024)  # 36,864 bytes per image
    bound = 2 * MB
    with CachedTeacher(teacher, tmp_path, bound) as cached:
        for seed in range(100):
            cached.extract(views(1, seed=seed), spec)
            cached.extract(views(1, seed=0), spec)  # stays in use
            assert cached.flush()
        now = cached.statistics()
        assert now.evicted > 40
        assert now.entries == 100 - now.evicted
        assert now.size <= bound
        calls = teacher.calls
        cached.extract(views(1, seed=0), spec)
        cached.extract(views(1, seed=99), spec)
        assert teacher.calls == calls
        cached.extract(views(1, seed=1), spec)
        assert teacher.calls == calls + 1
    assert (tmp_path / "features.sqlite").stat().st_size <= bound


def test_what_the_queue_does_not_take_is_dropped_and_counted(tmp_path: Path) -> None:
    with CachedTeacher(FakeTeacher(), tmp_path, 4 * MB, queue_bytes=1) as cached:
        expected = FakeTeacher().extract(views(3), SPEC)
        assert same(cached.extract(views(3), SPEC), expected)
        assert cached.statistics().dropped == 3
        assert same(cached.extract(views(3), SPEC), expected)


def test_a_locked_database_never_holds_up_the_stream(tmp_path: Path) -> None:
    with CachedTeacher(FakeTeacher(), tmp_path, 4 * MB) as cached:
        other = sqlite3.connect(tmp_path / "features.sqlite", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        for seed in range(5):
            cached.extract(views(2, seed=seed), SPEC)
        assert cached.statistics().written == 0
        other.execute("ROLLBACK")
        assert cached.flush()
        assert cached.statistics().written == 10


@pytest.mark.parametrize("damage", ["flip", "truncate", "swap", "text"])
def test_a_damaged_or_foreign_entry_is_a_miss_and_is_replaced(damage: str, tmp_path: Path) -> None:
    teacher = FakeTeacher()
    with CachedTeacher(teacher, tmp_path, 4 * MB) as cached:
        expected = cached.extract(views(2), SPEC)
    database = sqlite3.connect(tmp_path / "features.sqlite", isolation_level=None)
    (value,) = database.execute("SELECT value FROM contents WHERE id = 1").fetchone()
    if damage == "swap":
        (other,) = database.execute("SELECT value FROM contents WHERE id = 2").fetchone()
        changed: object = other
    else:
        flipped = bytes([*value[:-9], value[-9] ^ 1, *value[-8:]])
        changed = {"flip": flipped, "truncate": value[:-5], "text": "not bytes"}[damage]
    database.execute("UPDATE contents SET value = ? WHERE id = 1", (changed,))
    database.close()
    with CachedTeacher(teacher, tmp_path, 4 * MB) as cached:
        assert same(cached.extract(views(2), SPEC), expected)
        now = cached.statistics()
        assert (now.hits, now.misses, now.torn) == (1, 1, 1)
        assert cached.flush()
        calls = teacher.calls
        assert same(cached.extract(views(2), SPEC), expected)
        assert teacher.calls == calls


def test_a_database_with_rubbish_in_it_costs_hits_not_answers(tmp_path: Path) -> None:
    with CachedTeacher(FakeTeacher(), tmp_path, 4 * MB) as cached:
        cached.extract(views(20), SPEC)
    file = tmp_path / "features.sqlite"
    database = sqlite3.connect(file)
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    data = bytearray(file.read_bytes())
    assert len(data) > 4 * 2**14
    data[3 * 2**14 :] = os.urandom(len(data) - 3 * 2**14)
    file.write_bytes(bytes(data))
    with CachedTeacher(FakeTeacher(), tmp_path, 4 * MB) as cached:
        assert same(cached.extract(views(20), SPEC), FakeTeacher().extract(views(20), SPEC))
        cached.flush()
        assert cached.statistics().torn > 0


def test_another_programs_file_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "features.sqlite"
    foreign = sqlite3.connect(file)
    foreign.execute("CREATE TABLE precious (x)")
    foreign.close()
    with pytest.raises(StoreError, match="is not a feature cache"):
        CachedTeacher(FakeTeacher(), tmp_path, 4 * MB)
    file.write_bytes(b"a text, and no database at all, of a hundred bytes or more" * 5)
    with pytest.raises(StoreError, match="cannot be used as a feature cache"):
        CachedTeacher(FakeTeacher(), tmp_path, 4 * MB)
    assert file.read_bytes().startswith(b"a text")


def test_options_and_images_are_checked(tmp_path: Path) -> None:
    class Nameless:
        def extract(self, images: Tensor, spec: FeatureSpec) -> Features:
            return FakeTeacher().extract(images, spec)

    with pytest.raises(StoreError, match="Nameless has no fingerprint"):
        CachedTeacher(Nameless(), tmp_path, 4 * MB)
    with pytest.raises(StoreError, match="max_bytes must be a number of bytes, at least 1048576; got 5"):
        CachedTeacher(FakeTeacher(), tmp_path, 5)
    with pytest.raises(StoreError, match="max_bytes must be a number of bytes, at least 1048576; got '50GB'"):
        CachedTeacher(FakeTeacher(), tmp_path, "50GB")  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="path must be a folder that can be written, or made"):
        CachedTeacher(FakeTeacher(), tmp_path / "file", 4e6)
    with CachedTeacher(Nameless(), tmp_path, 4 * MB, fingerprint="mine") as cached:
        first = cached.extract(views(1), SPEC)
        cached.extract(views(1, size=64), SPEC)
        assert cached.flush()
        assert same(cached.extract(views(1), SPEC), first)
        with pytest.raises(InputError, match="outputs of one shape"):
            cached.extract([views(1)[0], views(1, size=64)[0]], SPEC)


_WRITER = """
import sys, torch
from dinov3_ray.config import DinoV3Config
from dinov3_ray.datasets import CachedTeacher
from dinov3_ray.datasets.cache_db import FeatureCache
from dinov3_ray.features import FeatureSpec
from dinov3_ray.testing import FakeTeacher
cached = CachedTeacher(FakeTeacher(hidden_size=512), sys.argv[1], 2**26)
for seed in range(100_000):
    image = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(seed))
    cached.extract(image, FeatureSpec(cls=True, feature_map=True, layers=(0, 2)))
    if seed % 8 == 0:
        cached.flush()
        print(seed, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [2, 9])
def test_killed_while_writing_loses_at_most_what_was_not_written(rounds: int, tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    flushed = -1
    for _ in range(rounds):
        flushed = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    writer.wait(30)
    writer.stdout.close()
    database = sqlite3.connect(tmp_path / "features.sqlite")
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
    teacher = FakeTeacher(hidden_size=512)
    with CachedTeacher(teacher, tmp_path, 64 * MB) as cached:
        for seed in range(flushed + 1):
            expected = FakeTeacher(hidden_size=512).extract(views(1, seed=seed), SPEC)
            assert same(cached.extract(views(1, seed=seed), SPEC), expected)
        assert teacher.calls == 0
        assert cached.statistics().torn == 0


def _rank(cached: CachedTeacher, start: int, results: multiprocessing.Queue[object]) -> None:
    torch.set_num_threads(1)
    right = 0
    for step in range(30):
        batch = views(2, seed=(start + step) % 40)
        right += same(cached.extract(batch, SPEC), FakeTeacher().extract(batch, SPEC))
    cached.close()
    results.put((right, cached.statistics().trouble))


@pytest.mark.slow
def test_ranks_share_a_path(tmp_path: Path) -> None:
    """Forked with the cache open, and used by the parent meanwhile; the tests of killing start processes anew."""
    context = multiprocessing.get_context("fork")
    teacher = FakeTeacher()
    with CachedTeacher(teacher, tmp_path, 8 * MB) as cached:
        cached.extract(views(2, seed=0), SPEC)
        results = context.Queue()
        ranks = [context.Process(target=_rank, args=(cached, 10 * rank, results)) for rank in range(3)]
        for rank in ranks:
            rank.start()
        for step in range(30):
            batch = views(2, seed=step)
            assert same(cached.extract(batch, SPEC), FakeTeacher().extract(batch, SPEC))
        for _ in ranks:
            assert results.get(timeout=60) == (30, None)
        for rank in ranks:
            rank.join(30)
            assert rank.exitcode == 0
        assert cached.flush()
        calls = teacher.calls
        for seed in range(40):
            cached.extract(views(2, seed=seed), SPEC)
        assert teacher.calls == calls


def make_caches(folder: Path, together: Barrier) -> None:
    for round_ in range(20):
        together.wait(60)
        FeatureCache(folder / str(round_), 4 * MB)


@pytest.mark.slow
def test_many_may_make_it_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    together = context.Barrier(6)
    ranks = [context.Process(target=make_caches, args=(tmp_path, together)) for _ in range(6)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0] * 6


def test_repr_says_how_it_stands(tmp_path: Path) -> None:
    with CachedTeacher(FakeTeacher(), tmp_path, 4 * MB) as cached:
        cached.extract(views(3), SPEC)
        assert cached.flush()
        assert "3 entries" in repr(cached)
        assert "hit rate 0%" in repr(cached)


def test_a_small_cache_stays_within_its_bound(tmp_path: Path) -> None:
    spec = FeatureSpec(feature_map=True, map_size=(32, 32))
    with CachedTeacher(FakeTeacher(), tmp_path, 2 * MB) as cached:
        cached.extract(views(200), spec)  # 64 KiB each: 12.5 MiB in one batch
        assert cached.flush()
        assert cached.statistics().evicted > 100
        assert cached.statistics().size <= 2 * MB
