"""TeacherPool: start a pool or connect to one, scale it, reload its teacher, shut it down."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import ray
import torch

from dinov3_ray.checkpoint import verify
from dinov3_ray.config import DinoV3Config
from dinov3_ray.errors import ConfigError, PoolClosedError
from dinov3_ray.pool.client.remote import RemoteTeacher
from dinov3_ray.pool.cluster import NAMESPACE, Runtime, check_name, connect
from dinov3_ray.pool.control.declaration import Declaration
from dinov3_ray.pool.control.remote_control import RayControl, wait_ready
from dinov3_ray.pool.control.status import PoolStatus
from dinov3_ray.pool.local import LocalController, local_pool, register_local, unregister_local
from dinov3_ray.pool.replica.actor import ReplicaActor
from dinov3_ray.pool.spec import (
    CheckedSource,
    Placement,
    PoolOptions,
    PoolSpec,
    ReplicaCount,
    TeacherSource,
    check_source,
    parse_replicas,
)
from dinov3_ray.validation import check

__all__ = ["TeacherPool", "resolve_placement"]


class _Control(Protocol):
    """What a TeacherPool needs of a pool's controller, in Ray or in this process."""

    @property
    def address(self) -> str | None: ...
    def status(self) -> PoolStatus: ...
    def scale(self, low: int, high: int) -> None: ...
    def reload(self, teacher: CheckedSource) -> int: ...
    def shutdown(self) -> None: ...
    def disconnect(self) -> None: ...


class TeacherPool:
    """A pool of teacher replicas. Made by :meth:`start` or :meth:`connect`.

    As a context manager, a pool that was started is shut down at the end, and one that was connected to goes on.
    """

    def __init__(self, name: str, namespace: str, control: _Control, *, started: bool) -> None:
        self.name = name
        self._namespace = namespace
        self._control = control
        self._started = started
        self._closed = False
        self._teachers: weakref.WeakSet[RemoteTeacher] = weakref.WeakSet()

    @classmethod
    def start(
        cls,
        teacher: TeacherSource,
        *,
        name: str = "dinov3",
        replicas: ReplicaCount = "auto",
        num_gpus: float | None = None,
        num_cpus: float = 0,
        label_selector: Mapping[str, str] | None = None,
        local_mode: bool = False,
        address: str | None = None,
        namespace: str = NAMESPACE,
        timeout: float = 300.0,
        on_status: Callable[[PoolStatus], None] | None = None,
        **options: Any,
    ) -> Self:
        """Start a pool and wait until it serves with as many replicas as were asked for (the minimum of a range).

        It joins the Ray that this process is connected to, or the one at ``address`` or RAY_ADDRESS, or starts one,
        which ends with the pool.

        Args:
            teacher: a DinoV3Config, a checkpoint directory, or a picklable callable without arguments that returns an
                object with ``.extract(images, spec)``. A checkpoint must be at the same path on every node.
            name: what clients call the pool.
            replicas: how many; ``"auto"`` is one for each free GPU, or one where there is none; (min, max) lets the
                pool grow and shrink with its load.
            num_gpus: GPUs per replica; None is 1 where the cluster has GPUs, else 0.
            num_cpus: CPUs that each replica reserves in Ray.
            label_selector: labels that a replica's node must have, such as ``{"ray.io/accelerator-type": "H200"}``.
            local_mode: no Ray at all: replicas are threads of this process, on its GPU if it has one, unless
                ``num_gpus=0``.
            address: ``host:port`` of a running Ray.
            namespace: the Ray namespace of the pool's actors.
            timeout: seconds until which the replicas must be ready.
            on_status: called with each status until then, to show progress.
            options: those of :class:`~dinov3_ray.pool.spec.PoolOptions`, such as ``max_batch`` or ``batching``.

        Raises:
            ConfigError: an argument is wrong; nothing was started.
            PoolExistsError: a pool of that name is running.
            ReplicaError: replicas fail to start; says why. Nothing is left running.
            PoolTimeoutError: they were not ready in time; says what they wait for. Nothing is left running.
        """
        check_name(name)
        # All of it is checked before Ray starts.
        parse_replicas(replicas, auto=1)
        wanted = {"num_gpus": num_gpus, "num_cpus": num_cpus, "label_selector": dict(label_selector or {})}
        spec = PoolSpec(check_source(teacher), replicas, check(Placement, wanted), PoolOptions.of(options))
        if local_mode:
            if address:
                raise ConfigError(f"local_mode=True runs in this process, without an address; got {address!r}")
            control: _Control = _start_local(name, spec)
        else:
            spec = spec.pickled()  # what cannot be is said before Ray starts
            runtime = connect(address, may_start=True)
            try:
                placement = resolve_placement(spec.placement)
                spec = spec.resolved(placement, auto=_free_replicas(placement))
                control = RayControl.start(name, namespace, runtime, Declaration(spec, target=spec.low))
            except BaseException:
                runtime.close()
                raise
        pool = cls(name, namespace, control, started=True)
        try:
            pool.wait_ready(timeout, on_status=on_status)
        except BaseException:
            pool.shutdown()
            raise
        return pool

    @classmethod
    def connect(cls, name: str = "dinov3", *, address: str | None = None, namespace: str = NAMESPACE) -> Self:
        """A pool that is running, in this process (local mode) or in Ray.

        Raises:
            PoolNotFoundError: with the names of those that are.
            PoolError: this process cannot reach a Ray.
        """
        check_name(name)
        local = local_pool(name) if address is None else None
        if local is not None:
            return cls(name, namespace, local, started=False)
        runtime: Runtime = connect(address)
        try:
            control = RayControl.connect(name, namespace, runtime)
        except BaseException:
            runtime.close()
            raise
        return cls(name, namespace, control, started=False)

    def teacher(self, **settings: Any) -> RemoteTeacher:
        """A RemoteTeacher of this pool; ``settings`` are those of its constructor."""
        self._require_open()
        settings = {"address": self._control.address, "namespace": self._namespace, **settings}
        teacher = RemoteTeacher(self.name, **settings)
        self._teachers.add(teacher)
        return teacher

    def status(self) -> PoolStatus:
        """A snapshot of the pool."""
        self._require_open()
        return self._control.status()

    def scale(self, replicas: ReplicaCount, *, wait: bool = False, timeout: float = 300.0) -> None:
        """Change the number of replicas, or the range in which it moves. Those that leave finish their work first.

        Args:
            wait: until that many (the minimum) are ready.

        Raises:
            ConfigError: it is not a number of at least 1 or a range.
            PoolTimeoutError: with ``wait``, after ``timeout`` seconds.
        """
        self._require_open()
        if replicas == "auto":
            raise ConfigError('replicas: scale() takes a number or (min, max); "auto" is for start()')
        low, high = parse_replicas(replicas, auto=1)
        self._control.scale(low, high)
        if wait:
            self.wait_ready(timeout)

    def reload(
        self,
        teacher: TeacherSource,
        *,
        wait: bool = True,
        timeout: float = 600.0,
        on_status: Callable[[PoolStatus], None] | None = None,
    ) -> None:
        """Replace the teacher, replica by replica, while the pool serves; each is removed when its successor is ready.

        Each result says by its ``fingerprint`` which teacher made it, and no batch is made by two. If the new replicas
        fail to start three times in a row, the pool goes back to the former teacher.

        Args:
            wait: until all replicas have the new teacher. Without it, ``status()`` shows how the reload ends.
            on_status: called with each status until then.

        Raises:
            ConfigError, CheckpointError: the new teacher's files are wrong; nothing has changed.
            ReplicaError: with ``wait``, the new replicas do not start; says why. The pool serves the former teacher.
            PoolError: with ``wait``, a later reload has overtaken this one.
            PoolTimeoutError: with ``wait``, the old replicas were not all replaced in time; that goes on meanwhile.
        """
        self._require_open()
        source = check_source(teacher)
        if isinstance(source, DinoV3Config):
            verify(source)  # a damaged file shows here, and not in replica after replica
        generation = self._control.reload(source)
        if wait:
            self.wait_ready(timeout, generation=generation, on_status=on_status)

    def wait_ready(
        self,
        timeout: float,
        *,
        generation: int | None = None,
        on_status: Callable[[PoolStatus], None] | None = None,
    ) -> PoolStatus:
        """Wait until the pool is what was asked for: its minimum of replicas ready, all of one teacher, none to spare.

        Args:
            generation: the teacher's number, where it matters which one it is.
            on_status: called with each status.

        Raises:
            ReplicaError: replicas fail to start, one after the other, and none of the teacher is ready; or the pool has
                gone back to the former one.
            PoolError: a later reload has overtaken ``generation``.
            PoolTimeoutError: after ``timeout`` seconds.
        """
        self._require_open()
        return wait_ready(self._control, self.name, timeout, generation=generation, on_status=on_status)

    def shutdown(self) -> None:
        """End the pool: its clients learn of it, and no actor is left behind. Harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        for teacher in list(self._teachers):
            teacher.close()
        try:
            self._control.shutdown()
        finally:
            if isinstance(self._control, LocalController):
                unregister_local(self._control)
            self._control.disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._started:
            self.shutdown()
        elif not self._closed:
            self._closed = True
            for teacher in list(self._teachers):
                teacher.close()
            self._control.disconnect()

    def __repr__(self) -> str:
        if self._closed:
            return f"<TeacherPool {self.name!r}: closed>"
        status = self.status()
        return f"<TeacherPool {self.name!r}: {status.ready} of {status.target} replicas ready>"

    def _require_open(self) -> None:
        if self._closed:
            raise PoolClosedError(f"pool {self.name!r} was shut down, or this connection to it closed")


def _start_local(name: str, spec: PoolSpec) -> LocalController:
    has_gpus = torch.cuda.is_available()
    placement = spec.placement.resolved(has_gpus=True) if has_gpus else Placement(num_gpus=0)
    controller = LocalController(name, spec.resolved(placement, auto=1))
    try:
        register_local(controller)
    except BaseException:
        controller.shutdown()
        raise
    return controller


def resolve_placement(placement: Placement) -> Placement:
    """``placement`` with a number of GPUs for the cluster that this process is connected to.

    Raises:
        ConfigError: Ray would refuse an actor that asks for it, such as a label with a space.
    """
    has_gpus = placement.num_gpus is None and bool(ray.cluster_resources().get("GPU", 0))
    resolved = placement.resolved(has_gpus=has_gpus)
    try:
        ray.remote(ReplicaActor).options(**resolved.actor_options())
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(
            f"what a replica asks for must be what Ray takes; got {resolved}. Ray says: {error}"
        ) from error
    return resolved


def _free_replicas(placement: Placement) -> int:
    """How many replicas the free GPUs hold; 1 where replicas need none."""
    if not placement.num_gpus:
        return 1
    return max(1, int(ray.available_resources().get("GPU", 0) / placement.num_gpus))
