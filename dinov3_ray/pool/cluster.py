"""Connects this process to Ray, and finds a pool's actors by their names."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.util.client
from ray._raylet import Config  # type: ignore[attr-defined] # private, seen in Ray 2.60.0: re-reads the environment

from dinov3_ray.errors import (
    CheckpointError,
    ConfigError,
    ForkedProcessError,
    PoolClosedError,
    PoolError,
    PoolNotFoundError,
)
from dinov3_ray.interrupts import wait
from dinov3_ray.machine.cpus import usable_cpus
from dinov3_ray.machine.processes import STARTED, STATE, read_stat
from dinov3_ray.machine.ray_folder import RayFolder
from dinov3_ray.pool.address import NAMESPACE, Address
from dinov3_ray.pool.probe import Obstacle, find_obstacle

__all__ = [
    "Runtime",
    "check_name",
    "connect",
    "controller_name",
    "find_controller",
    "list_actors",
    "list_named",
    "list_pools",
    "naming_node",
    "open_way",
    "process_start",
    "replica_name",
    "starts_ray",
    "use_token",
    "without_uv",
]


log = logging.getLogger("dinov3_ray")

_PREFIX = "dinov3"
_AUTH_MODE = "RAY_AUTH_MODE"
# Results leave the store as soon as their tensors are gone, and not within Ray's usual second: otherwise a pool that
# delivers 1 GB per second holds another one, and keeps writing to pages that its processes have not touched yet. (On
# 2 CPUs, four simulated accelerators, the first 300 batches: 91% of the ideal in place of 72%.)
_SYSTEM_CONFIG = {"free_objects_period_milliseconds": 100}


# ray.shutdown() holds it. Private, seen in Ray 2.60.0.
_shutdown_lock: Any = getattr(ray._private.worker, "_connect_or_shutdown_lock", None) or threading.RLock()


@dataclass(slots=True)
class Runtime:
    """This process's connection to Ray; ``owned`` if it was started or joined by :func:`connect`.

    ``ray.shutdown()``, whoever calls it, ends the connection for good: a later ``ray.init()`` makes another one. Almost
    every call to Ray starts a new Ray if there is no connection, so a pool calls Ray within :meth:`held` only.
    """

    address: str
    owned: bool
    auth_mode_before: str | None = None
    _connection: str | None = field(init=False)

    def __post_init__(self) -> None:
        self._connection = _connection()

    def loss(self) -> PoolClosedError | None:
        """What tells a caller that the connection has been ended; None if it has not."""
        with _shutdown_lock:
            if _connection() == self._connection:
                return None
        return PoolClosedError(
            f"this process has left the pool's Ray at {self.address}: ray.shutdown() was called here. If the pool runs "
            f"there still, make a new client with RemoteTeacher(name, address={self.address!r}) or "
            "TeacherPool.connect; if this process had started it, it has ended with the connection: start it again"
        )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A context in which the connection lasts: a ``ray.shutdown()`` in another thread waits for its end.

        Raises:
            PoolClosedError: the connection has been ended.
        """
        with _shutdown_lock:
            loss = self.loss()
            if loss is not None:
                raise loss
            yield

    def fetch(self, submit: Callable[[], Any], timeout: float) -> Any:
        """The value of the reference that ``submit()`` returns; as ``ray.get``, which may start a new Ray.

        Raises:
            PoolClosedError: the connection has been ended.
            TimeoutError: after ``timeout`` seconds.
            Exception: what the task raised.
        """
        with self.held():
            future = submit().future()
        wait(lambda seconds: bool(futures.wait([future], seconds).done or self.loss()), timeout)
        if not future.done():
            raise self.loss() or TimeoutError(f"no answer within {timeout:g} s")
        return future.result()

    def close(self) -> None:
        """End the connection, and the Ray that came with it, if it is ours."""
        if not self.owned or self.loss():
            return
        ray.shutdown()
        # ray.init() turns token authentication on by setting this for the whole process, and leaves it set.
        _restore_auth_mode(self.auth_mode_before)


def _restore_auth_mode(before: str | None) -> None:
    if before is None:
        os.environ.pop(_AUTH_MODE, None)
    else:
        os.environ[_AUTH_MODE] = before


def _connection() -> str | None:
    """What names this process's present connection, and no other; None without one."""
    if not ray.is_initialized():
        return None
    # A driver's worker id counts the jobs of its Ray: the first driver of each Ray has the same. The session is the
    # Ray's own name; private, seen in Ray 2.60.0.
    return f"{ray._private.worker._global_node.session_name} {ray.get_runtime_context().get_worker_id()}"


class _Fork:
    """Whether this process was forked from one that was connected to Ray, where every call to Ray hangs."""

    happened = False

    @classmethod
    def note(cls) -> None:
        cls.happened = cls.happened or ray.is_initialized()


# At import, since there is no other moment: a forked DataLoader worker runs none of our code before it needs to know.
if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_Fork.note)


def connect(address: str | None = None, *, may_start: bool = False, **start_options: Any) -> Runtime:
    """Use the Ray that this process is connected to; else join ``address`` or RAY_ADDRESS; else start one.

    Args:
        address: of a running Ray's head, as :meth:`Address.parse` takes it.
        may_start: whether to start a Ray of this process's own if none is named.
        start_options: further arguments of ``ray.init`` for a Ray that is started here.

    Raises:
        ConfigError: the address names no head, such as one of Ray Client or of the dashboard.
        PoolError: if the cluster cannot be reached, or this process is connected to another one, or Ray does not start.
    """
    wanted = _read(address, "address", may_start)
    if _Fork.happened:
        raise ForkedProcessError(
            f"process {os.getpid()} was forked from one that is connected to Ray, where Ray would hang: keep the "
            "teacher out of forked DataLoader workers (wrap the loader in teacher.prefetch(...) in the trainer's "
            "process), or start workers with multiprocessing_context='spawn'"
        )
    if ray.util.client.ray.is_connected():
        raise PoolError(
            "this process is connected through Ray Client (ray://), over which pools do not work: connect it to the "
            "cluster itself, with ray.init('HOST:6379') (ray start prints the port), where it reaches all nodes"
        )
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if wanted == "local" or (isinstance(wanted, Address) and not wanted.is_same(Address.of(here))):
            raise PoolError(
                f"address is {address}, but this process is connected to the Ray at {here}: disconnect first"
            )
        return Runtime(here, owned=False)
    before = os.environ.get(_AUTH_MODE)
    wanted = wanted or _read(os.environ.get("RAY_ADDRESS"), "RAY_ADDRESS", may_start)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if wanted is None and not may_start:
        raise PoolError(
            "this process is not connected to Ray, and no address is given: pass address='host:port', set RAY_ADDRESS, "
            "or call ray.init() first"
        )
    starts = wanted in (None, "local")
    if starts:
        # "local": without an address, Ray would follow a file in /tmp to a cluster that may be long gone.
        options |= {"address": "local", "include_dashboard": False, "_system_config": _SYSTEM_CONFIG}
        options |= {"num_cpus": usable_cpus(), **start_options}
        if "_temp_dir" not in options:
            options["_temp_dir"] = str(_folder())
    else:
        obstacle = open_way(wanted) if isinstance(wanted, Address) else None
        if obstacle is not None:
            raise PoolError(f"{obstacle.message}. Remedy: {obstacle.remedy}")
        options["address"] = str(wanted)
    try:
        with _sigterm_kept(), without_uv() if starts else contextlib.nullcontext():
            ray.init(**options)
    except Exception as error:  # Ray raises its own, those of the system, and plain ones
        if not ray.is_initialized():  # as another thread may have done meanwhile
            ray.shutdown()  # ends what has started already
        _restore_auth_mode(before)
        raise PoolError(_failure(error, None if starts else str(wanted), options.get("_temp_dir"))) from error
    return Runtime(ray.get_runtime_context().gcs_address, owned=True, auth_mode_before=before)


def starts_ray(address: str | None = None) -> bool:
    """Whether :func:`connect`, which may, would start a Ray here and now.

    Raises:
        ConfigError: the address names no head.
    """
    if ray.is_initialized():
        return False
    named = _read(address, "address", True) or _read(os.environ.get("RAY_ADDRESS"), "RAY_ADDRESS", True)
    return named in (None, "local")


def _folder() -> Path:
    """For the files of a Ray that is started here.

    Raises:
        PoolError: none will do.
    """
    folder = RayFolder(os.environ)
    if not folder.usable:
        raise PoolError(
            f"no Ray can be started, which keeps its files in {folder.path}: {folder.trouble}. Remedy: set RAY_TMPDIR "
            "to a short path of a folder that this user may write to"
        )
    if folder.trouble:
        log.warning("Ray keeps its files in %s: %s", folder.path, folder.trouble)
    return folder.path


def _failure(error: Exception, address: str | None, folder: str | None) -> str:
    """Why Ray did not start in ``folder``, or could not be joined at ``address``, and what to do."""
    cause = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if address is None:
        return (
            f"Ray does not start on this machine: {cause}. Its logs are in {folder}/session_latest/logs, and "
            "`dinov3-ray doctor` checks the machine"
        )
    if isinstance(error, ray.exceptions.RuntimeEnvSetupError):
        return (
            f"the working directory {os.getcwd()} cannot be sent to the Ray at {address}, as Ray does under `uv run`: "
            f"{cause}. Remedy: name large files in .gitignore or .rayignore; or, where all nodes have the packages, "
            "set RAY_ENABLE_UV_RUN_RUNTIME_ENV=0, which sends nothing"
        )
    return (
        f"cannot reach Ray at {address}: {cause}. Is it running, and does this process have its token "
        "(RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH)?"
    )


@contextlib.contextmanager
def without_uv() -> Iterator[None]:
    """A context for ``ray.init`` where Ray runs on this machine alone: its workers use this process's environment.

    Under ``uv run``, Ray would pack the working directory for them (12 s for 200 MB, an error from 512), and have uv
    make another environment from it. The setting is Ray's own, read when Ray is imported, and private thereafter (seen
    in Ray 2.60.0).
    """
    constants = ray._private.ray_constants
    before = constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV
    constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    try:
        yield
    finally:
        constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = before


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """A context for ``ray.init``, which sets a handler of its own for SIGTERM: one that was there before is back after.

    A trainer may save its state by it before a scheduler takes the machine, and the command line cleans up.
    """
    before = signal.getsignal(signal.SIGTERM)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False
    try:
        yield
    except SystemExit:
        came = True  # so Ray's handler ends the process
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        if came:
            signal.raise_signal(signal.SIGTERM)


def _read(text: str | None, name: str, may_start: bool) -> Address | str | None:
    """The head that ``text`` names; ``auto``; ``local``, which is Ray's word for a new one; None if it says nothing."""
    if not text or (may_start and text == "local"):
        return text or None
    return Address.parse(text, name=name) or text


def open_way(address: Address) -> Obstacle | None:
    """Why this process cannot join the head at ``address``; None if no reason was found.

    If the cluster asks for a token, RAY_AUTH_MODE is not set, and Ray's token is there, this process shows it from now
    on: a head that finds one asks for it without being told, but a client that is given an address does not show it.
    """
    obstacle = find_obstacle(address)
    source = _token_source()
    if obstacle is None or not obstacle.lacks_token or source is None or os.environ.get(_AUTH_MODE):
        return obstacle
    before = os.environ.get(_AUTH_MODE)
    use_token()
    refusal = find_obstacle(address)
    if refusal is None:
        log.warning("the Ray at %s asks for a token: the one in %s is used", address, source)
    else:
        _restore_auth_mode(before)
        Config.initialize("")
    return refusal


def use_token() -> None:
    """Show Ray's token from now on."""
    os.environ[_AUTH_MODE] = "token"
    Config.initialize("")


def _token_source() -> str | None:
    """Where Ray finds a token for this process; None if it would find none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return str(path) if path.read_text().strip() else None
    except (OSError, UnicodeDecodeError):
        return None


def check_name(name: str) -> str:
    """``name`` if it can name a pool.

    Raises:
        ConfigError: if it is not letters, digits, dots, dashes and underscores.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name):
        raise ConfigError(f"name must be 1 to 100 letters, digits, '.', '_' or '-'; got {name!r}")
    return name


def controller_name(pool: str) -> str:
    return f"{_PREFIX}/{pool}"


def replica_name(pool: str, replica_id: str) -> str:
    return f"{_PREFIX}/{pool}/{replica_id}"


def list_pools(namespace: str = NAMESPACE) -> list[str]:
    """The names of the pools in ``namespace``."""
    names = (name.split("/") for name in list_named(namespace, f"{_PREFIX}/"))
    return sorted(parts[1] for parts in names if len(parts) == 2)


def find_controller(name: str, namespace: str) -> Any:
    """The controller actor of a pool in the Ray that this process is connected to.

    Raises:
        PoolNotFoundError: with the names of the pools that there are.
    """
    try:
        return ray.get_actor(controller_name(name), namespace=namespace)
    except ValueError as error:
        others = list_pools(namespace)
        there = f"running there: {', '.join(map(repr, others))}" if others else "no pool is running there"
        raise PoolNotFoundError(
            f"no pool named {name!r} in namespace {namespace!r} of the Ray at "
            f"{ray.get_runtime_context().gcs_address}; {there}"
        ) from error


def list_actors(namespace: str, pool: str) -> list[tuple[str, Any]]:
    """(replica id, actor handle) of each replica of ``pool`` that is alive or starting, as far as Ray knows."""
    prefix = replica_name(pool, "")
    found = []
    for name in list_named(namespace, prefix):
        try:
            found.append((name.removeprefix(prefix), ray.get_actor(name, namespace=namespace)))
        except ValueError:
            continue  # it ended between the two calls
    return found


def list_named(namespace: str, prefix: str) -> list[str]:
    """The names of the actors in ``namespace`` that begin with ``prefix``."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [one["name"] for one in actors if one["namespace"] == namespace and one["name"].startswith(prefix)]


def process_start(pid: int) -> str:
    """When process ``pid`` of this machine began, in clock ticks since boot (field 22 of its stat file); "" if unknown,
    or if it has ended and only its parent has not asked how (a zombie).

    A process number may be given to another process later; number and start together name one process for good.
    """
    stat = read_stat(Path(f"/proc/{pid}"))
    return "" if stat is None or stat[1][STATE] in "ZX" else stat[1][STARTED]


@contextlib.contextmanager
def naming_node() -> Iterator[None]:
    """Within it, what is wrong with a model says on which node that is: others may have it as it should be.

    Raises:
        ConfigError, CheckpointError: as raised within it, with the node.
    """
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        node = ray.util.get_node_ip_address()
        raise type(error)(f"{error} (on node {node}, {platform.node()})") from error
