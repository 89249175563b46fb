"""What the tests share: real photographs, a small checkpoint of random weights, and one isolated Ray."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import no_datasets  # noqa: F401 - for transformers, which others import
import pytest
import ray
import torch
from fake_cuda import FakeCuda
from lean_ray import start_lean_rays
from skimage import data
from torch import Tensor

from dinov3_ray import TeacherPool
from dinov3_ray.checkpoint import init_checkpoint
from dinov3_ray.testing import FakeTeacher

TESTS = Path(__file__).parent

pytest.register_assert_rewrite(
    "teacher_contract", "lightning_training", "kills", "export_readers"
)  # which assert for the tests that use them

# The suite shares few cores with the processes that it starts: threads that wait for a core by spinning cost more than
# they bring.
torch.set_num_threads(1)

# Without bytecode on disk each process that the tests start would compile the package anew: half a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Nor shall Ray's processes do more than the tests look at: workers that nobody asked for, the machine's load, new logs.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "10")

# A shell starts what runs in its background with SIGINT ignored, and so would be all that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole suite, much of which waits; the tests that are named run in this one.

    Not one for each core: deadlines and what is flat in memory were tried with two, each with a Ray of its own.
    """
    named = config.args_source is pytest.Config.ArgsSource.ARGS or config.getoption("keyword")
    return 0 if named else 2


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import what a run without Ray leaves out anyway: that takes as long as a tenth of the quick loop."""
    expression = config.getoption("markexpr")
    without_ray = "not ray" in expression.split(" and ") and " or " not in expression
    return True if without_ray and collection_path.name == "with_ray" else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Refuse a test that starts Ray in a folder where the quick loop would run it."""
    if "ray_cluster" in metafunc.fixturenames and metafunc.definition.path.parent.name != "with_ray":
        pytest.fail(f"{metafunc.definition.name} needs ray_cluster: it belongs in a folder with_ray", pytrace=False)


# The files that take the most CPU time, the longest first.
LONGEST = (
    "datasets/extraction/with_ray/test_extract.py",
    "pool/with_ray/test_elastic.py",
    "pool/with_ray/test_faults.py",
    "pool/with_ray/test_hub_nodes.py",
    "pool/with_ray/test_lifetime.py",
    "pool/with_ray/test_soak.py",
    "pool/with_ray/test_torchrun.py",
    "pool/with_ray/test_gpu_sharing.py",
    "pool/with_ray/test_left_ray.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what stands in a folder named ``with_ray``, and sort the files.

    Those with Ray go first, so that it need not run to the end; of these and of the others the longest, lest one be
    left when all else is done.
    """
    for item in items:
        if item.path.parent.name == "with_ray":
            item.add_marker("ray")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    longest = [TESTS / name for name in LONGEST]
    assert all(path.is_file() for path in longest)

    def place(item: pytest.Item) -> tuple[bool, int, bool]:
        rank = longest.index(item.path) if item.path in longest else len(longest)
        return item.path.parent.name != "with_ray", rank, item.path not in slow

    items.sort(key=place)


@pytest.fixture(autouse=True)
def interrupts_as_before() -> Iterator[None]:
    """Ctrl-C is Python's own in each test, and in what it starts.

    Some libraries, such as Ray Train, leave a handler of SIGINT behind; and what nohup starts ignores it.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# Those whose files stand in scikit-image's wheel: nothing is downloaded. Two are of one size, the rest of their own.
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field", "immunohistochemistry")


@pytest.fixture(scope="session")
def photographs() -> list[Tensor]:
    """Real photographs of mixed sizes: uint8 [3,H,W], RGB. Not to be changed in place."""
    return [torch.from_numpy(getattr(data, name)()).permute(2, 0, 1).contiguous() for name in PHOTOGRAPHS]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory: a ViT of 3 blocks, D=128, 4 registers, patch 16, at 224 px; a pass takes milliseconds."""
    return init_checkpoint("vit-test", tmp_path_factory.mktemp("checkpoints") / "vit-test", seed=1)


@pytest.fixture
def local_pool() -> Iterator[TeacherPool]:
    """A pool of two FakeTeachers in this process."""
    with TeacherPool.start(FakeTeacher.factory(), name="local", replicas=2, local_mode=True) as pool:
        yield pool


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    """Two fake GPUs in this thread, and in those of the package that start meanwhile."""
    with FakeCuda() as cuda:
        yield cuda


_running_ray = ExitStack()


@pytest.fixture(scope="module")
def ray_cluster() -> str:
    """The address of a Ray of the tests' own: its own folder, ports and token, and a small object store.

    Started once, since it takes seconds. A test must end the pools that it starts; it may kill their processes.
    """
    if not ray.is_initialized():
        _running_ray.enter_context(_ray_of_the_tests())
    return ray.get_runtime_context().gcs_address


def pytest_runtest_setup(item: pytest.Item) -> None:
    """End Ray after the last test that may need it: it takes CPU time even where nothing happens."""
    if item.path.parent.name != "with_ray":
        _running_ray.close()


def pytest_sessionfinish() -> None:
    _running_ray.close()


@contextmanager
def _ray_of_the_tests() -> Iterator[None]:
    start_lean_rays()
    # Not pytest's folder: the paths of Ray's sockets must stay under about 100 characters.
    folder = Path(tempfile.mkdtemp(prefix="dr-"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        # ray.init() turns token authentication on by setting this; undone at the end because it is named here. (Setting
        # it here would come too late for the part of Ray that reads it when it is imported.)
        patch.setenv("RAY_AUTH_MODE", "")
        del os.environ["RAY_AUTH_MODE"]
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=4,
            object_store_memory=300 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            namespace="dinov3_ray_tests",
            _temp_dir=str(folder / "ray"),
            _system_config={
                "metrics_report_interval_ms": 3000,  # not 10,000, so that tests see metrics soon
                # By default a process that has run a task ends a second later, as soon as Ray has four others: the
                # next test would start it again. One that waits for longer takes more than its start does.
                "idle_worker_killing_time_threshold_ms": 10_000,
            },
        )
        try:
            yield
        finally:
            ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)  # Ray's processes may still be closing their logs
