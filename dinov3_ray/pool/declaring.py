"""Makes the pool that a file declares: starts it, changes one that runs, or only says what would change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from ray import cloudpickle

from dinov3_ray.errors import ConfigError, PoolNotFoundError
from dinov3_ray.pool.cluster import Runtime
from dinov3_ray.pool.declaration import Declaration
from dinov3_ray.pool.options import parse_replicas
from dinov3_ray.pool.poolfile import Change, PoolFile, PoolState, differences
from dinov3_ray.pool.ray_control import RayControl
from dinov3_ray.pool.status import PoolStatus
from dinov3_ray.pool.teacher_pool import TeacherPool, place

__all__ = ["Plan", "plan_pool"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done to make a pool what its file says.

    Attributes:
        changes: what differs from the pool that runs; None if none runs.
    """

    wanted: PoolFile
    changes: tuple[Change, ...] | None
    _target: PoolState | None
    _control: RayControl | None

    def carry_out(self, timeout: float, on_status: Callable[[PoolStatus], None] | None = None) -> PoolStatus:
        """Start the pool, or change it replica by replica while it serves; waits until it is as declared.

        Raises:
            ReplicaError, PoolTimeoutError: as in :meth:`TeacherPool.start` and :meth:`TeacherPool.reload`; a pool that
                ran before is left running.
        """
        wanted = self.wanted
        if self._control is None or self._target is None:
            pool = TeacherPool.start(
                wanted.teacher,
                name=wanted.name,
                namespace=wanted.namespace,
                replicas=wanted.replicas,
                num_gpus=wanted.num_gpus,
                num_cpus=wanted.num_cpus,
                label_selector=wanted.labels,
                timeout=timeout,
                on_status=on_status,
                **asdict(wanted.options),
            )
            return pool.status()
        generation = None
        # The number last: while replicas are replaced, there are to be as many as before.
        if any(change.rolling for change in self.changes or ()):
            target = self._target
            generation = self._control.redeclare(target.source, placement=target.placement, options=target.options)
        if any(not change.rolling for change in self.changes or ()):
            self._control.scale(self._target.low, self._target.high)
        pool = TeacherPool.connect(wanted.name, namespace=wanted.namespace)
        return pool.wait_ready(timeout, generation=generation, on_status=on_status)


def plan_pool(wanted: PoolFile, address: str) -> Plan:
    """Compare what is ``wanted`` with what runs in the Ray at ``address``, which this process is connected to."""
    try:
        control = RayControl.connect(wanted.name, wanted.namespace, Runtime(address, owned=False))
    except PoolNotFoundError:
        return Plan(wanted, None, None, None)
    declared = control.declaration()
    running = _state_of(declared)
    low, high = (running.low, running.high) if wanted.replicas == "auto" else parse_replicas(wanted.replicas, auto=1)
    placement = place(wanted.num_gpus, wanted.num_cpus, wanted.labels)
    target = PoolState(wanted.teacher, low, high, placement, wanted.options)
    return Plan(wanted, differences(running, target), target, control)


def _state_of(declared: Declaration) -> PoolState:
    # The pool's own source, from the cluster whose word this process takes already.
    try:
        source = cloudpickle.loads(declared.source)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the running pool serves a factory that this process cannot load ({error}), so a file cannot be compared "
            "with it: end that pool, or give the file another name"
        ) from error
    return PoolState(source, declared.low, declared.high, declared.placement, declared.options)
