"""TeacherPool: start a pool or connect to one, scale it, reload its teacher, shut it down."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, Self, get_args

import ray
import torch

from dinov3_ray.checkpoint import verify
from dinov3_ray.config import ModelConfig
from dinov3_ray.errors import ConfigError, PoolClosedError, PoolError, PoolExistsError, PoolNotFoundError
from dinov3_ray.model.device import as_device
from dinov3_ray.pool.address import NAMESPACE
from dinov3_ray.pool.client.remote import RemoteTeacher
from dinov3_ray.pool.cluster import Runtime, check_name, connect
from dinov3_ray.pool.control.declaration import Declaration
from dinov3_ray.pool.control.remote_control import RayControl, wait_ready
from dinov3_ray.pool.control.status import PoolStatus
from dinov3_ray.pool.local import LocalController, local_pool, register_local
from dinov3_ray.pool.poolfile import changes_between
from dinov3_ray.pool.replica.actor import ReplicaActor
from dinov3_ray.pool.shared_ray import Rank, connect_or_share
from dinov3_ray.pool.spec import (
    CheckedTeacher,
    Exist,
    Lifetime,
    Placement,
    PoolOptions,
    PoolSpec,
    ReplicaCount,
    TeacherGiven,
    check_teacher,
    parse_leave_gpus,
    parse_replicas,
    replicas_for,
)
from dinov3_ray.validation import check

__all__ = ["TeacherPool", "resolve_placement"]


log = logging.getLogger("dinov3_ray")

_TURN_SECONDS = 0.2  # between tries to start a pool whose name is being given up


class _Control(Protocol):
    """What a TeacherPool needs of a pool's controller, in Ray or in this process."""

    name: str

    @property
    def address(self) -> str | None: ...
    @property
    def holds(self) -> bool: ...
    def loss(self) -> PoolError | None: ...
    def status(self) -> PoolStatus: ...
    def scale(self, low: int, high: int) -> None: ...
    def reload(self, teacher: CheckedTeacher) -> int: ...
    def release(self) -> None: ...
    def shutdown(self) -> None: ...
    def disconnect(self) -> None: ...


class TeacherPool:
    """A pool of teacher replicas. Made by :meth:`start` or :meth:`connect`.

    As a context manager, a pool that was started is shut down at the end; one that is detached, or that was connected
    to, goes on.
    """

    def __init__(
        self, name: str, namespace: str, control: _Control, *, lifetime: Lifetime = "detached", shared: bool = False
    ) -> None:
        self.name = name
        self._namespace = namespace
        self._control = control
        self._lifetime = lifetime
        self._shared = shared
        self._closed = False
        self._teachers: weakref.WeakSet[RemoteTeacher] = weakref.WeakSet()

    @classmethod
    def start(
        cls,
        teacher: TeacherGiven,
        *,
        name: str = "dinov3",
        exist: Exist = "error",
        lifetime: Lifetime = "process",
        replicas: ReplicaCount = "auto",
        leave_gpus: float = 0,
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
            teacher: a DinoV3Config or a TransformersConfig, a model directory, or a picklable callable without
                arguments that returns an object with ``.extract(images, spec)``. A model directory must be at the same
                path on every node.
            name: what clients call the pool.
            exist: what to do if a pool of that name runs: raise an error, or connect to it. With ``"connect"``, whoever
                of several processes comes first starts the pool, and the others join it; the ranks of a node, as
                torchrun starts them, share one Ray if none is named. Each of them holds the pool, which ends when the
                last one has shut it down or has ended. A pool that is found serves another teacher: that is an error;
                it has other options: that is a warning. A detached pool that is found goes on.
            lifetime: ``"process"`` ends the pool when this process ends, however that happens, or leaves Ray;
                ``"detached"`` lets it outlive the process, until :meth:`shutdown` or ``dinov3-ray down``.
            replicas: how many; ``"auto"`` is one for each free GPU, or one where there is none; (min, max) lets the
                pool grow and shrink with its load.
            leave_gpus: with ``"auto"``, GPUs of the cluster that are for others, such as trainers, whether they have
                them yet or not.
            num_gpus: GPUs per replica, 1 at most; a share of a GPU, such as 0.5, is one of its memory too. None is 1
                where the cluster has GPUs, else 0.
            num_cpus: CPUs that each replica reserves in Ray.
            label_selector: labels that a replica's node must have, such as ``{"ray.io/accelerator-type": "H200"}``.
            local_mode: no Ray at all: replicas are threads of this process. They all compute on its GPU, if it has
                one and unless ``num_gpus=0``: on the caller's current device, whatever other GPUs the process sees; in
                a rank that has not called ``torch.cuda.set_device``, on the one that LOCAL_RANK numbers.
            address: ``host:port`` of a running Ray.
            namespace: the Ray namespace of the pool's actors.
            timeout: seconds until which the replicas must be ready.
            on_status: called with each status until then, to show progress.
            options: those of :class:`~dinov3_ray.pool.spec.PoolOptions`, such as ``max_batch`` or ``batching``.

        Raises:
            ConfigError: an argument is wrong; nothing was started.
            PoolExistsError: a pool of that name is running; with ``exist="connect"``, one with another teacher.
            ReplicaError: replicas fail to start; says why. Nothing is left running.
            PoolTimeoutError: they were not ready in time; says what they wait for. Nothing is left running.
        """
        check_name(name)
        # All of it is checked before Ray starts.
        parse_replicas(replicas, auto=1)
        _require_choice("exist", exist, Exist)
        _require_choice("lifetime", lifetime, Lifetime)
        wanted = {"num_gpus": num_gpus, "num_cpus": num_cpus, "label_selector": dict(label_selector or {})}
        spec = PoolSpec(
            check_teacher(teacher),
            replicas,
            check(Placement, wanted),
            PoolOptions.of(options),
            parse_leave_gpus(leave_gpus),
        )
        if local_mode and (address or lifetime == "detached"):
            given = f"address={address!r}" if address else "lifetime='detached'"
            raise ConfigError(f"local_mode=True runs in this process, and ends with it; got {given}")
        if not local_mode:
            spec.pickled()  # what cannot be pickled is refused before Ray starts
        left, deadline = timeout, time.monotonic() + timeout
        runtime = None if local_mode else connect_or_share(address, exist)
        try:
            while True:
                control, started = _open_control(name, namespace, runtime, spec, lifetime, exist, deadline)
                try:
                    wait_ready(control, name, left, on_status=on_status)
                    return cls(name, namespace, control, lifetime=lifetime, shared=exist == "connect")
                except BaseException as error:
                    _end(control, shared=not started)
                    given_up = isinstance(error, (PoolNotFoundError, PoolClosedError))
                    left = deadline - time.monotonic()
                    if started or not given_up or left < 0:
                        raise
                    # Whoever started it has given it up: the next try starts it here, and finds out why.
        except BaseException:
            if runtime is not None:
                runtime.close()
            raise

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
            return cls(name, namespace, local)
        runtime: Runtime = connect(address)
        try:
            control = RayControl.connect(name, namespace, runtime)
        except BaseException:
            runtime.close()
            raise
        return cls(name, namespace, control)

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
        teacher: TeacherGiven,
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
        source = check_teacher(teacher)
        if isinstance(source, ModelConfig) and source.hub_id is None:
            # A damaged file shows here, and not in replica after replica. Weights of the hub need not be here at all.
            verify(source)
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
        """End the pool: its clients learn of it, and no actor is left behind. Harmless when repeated.

        A pool that was started with ``exist="connect"`` ends when all that hold it have done this, or have ended. If it
        is detached it goes on: ``TeacherPool.connect(name).shutdown()`` ends it.

        Raises:
            PoolClosedError: this process has left the pool's Ray, where the pool goes on.
        """
        if self._closed:
            return
        self._part()
        try:
            _end(self._control, shared=self._shared)
        finally:
            self._control.disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._lifetime == "process":
            self.shutdown()
        elif not self._closed:
            self._part()
            self._control.disconnect()

    def _part(self) -> None:
        self._closed = True
        for teacher in list(self._teachers):
            teacher.close()

    def __repr__(self) -> str:
        if self._closed or self._control.loss():
            return f"<TeacherPool {self.name!r}: {'closed' if self._closed else 'its Ray was left'}>"
        status = self.status()
        return f"<TeacherPool {self.name!r}: {status.ready} of {status.target} replicas ready>"

    def _require_open(self) -> None:
        if self._closed:
            raise PoolClosedError(f"pool {self.name!r} was shut down, or this connection to it closed")
        loss = self._control.loss()
        if loss is not None:
            raise loss


def _require_choice(name: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        raise ConfigError(f"{name} must be one of {', '.join(get_args(choices))}; got {value!r}")


def _open_control(
    name: str,
    namespace: str,
    runtime: Runtime | None,
    spec: PoolSpec,
    lifetime: Lifetime,
    exist: Exist,
    deadline: float,
) -> tuple[_Control, bool]:
    """Start the pool; or join the one that runs, if there is one and ``exist`` allows it. Whether it was started.

    Raises:
        PoolExistsError: it does not, or that one serves another teacher.
        PoolNotFoundError: the name is taken until ``deadline``, by a pool that cannot be joined.
    """
    if runtime is None:
        return _open_local(name, spec, exist)
    while True:
        try:
            with runtime.held():
                placement = resolve_placement(spec.placement)
                resolved = spec.resolved(placement, auto=_free_replicas(spec, placement)).pickled()
                declaration = Declaration(resolved, target=resolved.low, lifetime=lifetime)
                return RayControl.start(name, namespace, runtime, declaration), True
        except PoolExistsError:
            if exist == "error":
                raise
        try:
            return _join(name, namespace, runtime, spec, lifetime, placement), False
        except PoolNotFoundError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_TURN_SECONDS)  # it has ended just now: this process's turn


def _join(
    name: str, namespace: str, runtime: Runtime, spec: PoolSpec, lifetime: Lifetime, placement: Placement
) -> RayControl:
    with runtime.held():
        control = RayControl.connect(name, namespace, runtime)
    declared = control.declaration()
    _require_same(name, declared.spec, spec, placement)
    if declared.lifetime == "process":
        control.hold()
        if lifetime == "detached":
            log.warning("pool %s runs with lifetime='process': it ends with the processes that hold it", name)
    return control


def _require_same(name: str, running: PoolSpec, wanted: PoolSpec, placement: Placement) -> None:
    """Compare a pool that runs with the one that is asked for.

    Raises:
        PoolExistsError: it serves another teacher. Other differences are logged.
    """
    try:
        running = running.unpickled() if isinstance(running.teacher, bytes) else running
    except (ImportError, AttributeError) as error:
        log.warning("pool %s runs; whether it serves this teacher cannot be seen here: %s", name, error)
        return
    if wanted.replicas == "auto":
        wanted = replace(wanted, replicas=running.replicas)
    changes = changes_between(running, wanted.resolved(placement, auto=1))
    of_teacher = "; ".join(str(change) for change in changes if change.section == "teacher")
    if of_teacher:
        raise PoolExistsError(
            f"a pool named {name!r} is running already, with another teacher ({of_teacher}): give this one another "
            "name, or end or reload that one"
        )
    if changes:
        log.warning("pool %s runs, and stays as it is; asked for: %s", name, "; ".join(map(str, changes)))


def _end(control: _Control, *, shared: bool) -> None:
    """End a pool, or this process's share of it."""
    if control.holds and control.loss():
        log.warning("pool %s has ended with this process's connection to Ray: ray.shutdown() was called", control.name)
    elif shared:
        control.release()
    else:
        control.shutdown()


def _open_local(name: str, spec: PoolSpec, exist: Exist) -> tuple[LocalController, bool]:
    has_gpus = torch.cuda.is_available() or torch.backends.mps.is_available()
    placement = spec.placement.resolved(has_gpus=True) if has_gpus else Placement(num_gpus=0)
    running = local_pool(name) if exist == "connect" else None
    if running is not None:
        _require_same(name, running.spec, spec, placement)
        running.hold()
        return running, False
    controller = LocalController(name, spec.resolved(placement, auto=1), _own_device(placement))
    try:
        register_local(controller)
    except BaseException:
        controller.shutdown()
        raise
    return controller, True


def _own_device(placement: Placement) -> str:
    """Where the replicas of a local pool compute: on this process's GPU, if they are to have one.

    That is Apple's (MPS), or the caller's current CUDA device. A rank that has not chosen one yet will take that of its
    number.
    """
    if placement.device != "cuda":
        return placement.device
    if not torch.cuda.is_available():
        return "mps:0"
    rank = Rank.of(os.environ)
    if rank is not None and torch.cuda.current_device() == 0 and rank.local_rank < torch.cuda.device_count():
        return f"cuda:{rank.local_rank}"
    return str(as_device("cuda"))


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


def _free_replicas(spec: PoolSpec, placement: Placement) -> int:
    """What ``"auto"`` is in this cluster."""
    if spec.replicas != "auto":
        return 1
    total, free = (resources.get("GPU", 0.0) for resources in (ray.cluster_resources(), ray.available_resources()))
    return replicas_for(total=total, free=free, each=placement.num_gpus or 0.0, leave=spec.leave_gpus)
