"""Makes a pool what its file says: starts it, changes one that runs, or only shows what would change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from dinov3_ray.errors import ConfigError, PoolNotFoundError
from dinov3_ray.pool.cluster import Runtime
from dinov3_ray.pool.control.remote_control import RayControl
from dinov3_ray.pool.control.status import PoolStatus
from dinov3_ray.pool.poolfile import Change, PoolFile, changes_between
from dinov3_ray.pool.spec import PoolSpec
from dinov3_ray.pool.teacher_pool import TeacherPool, resolve_placement

__all__ = ["Rollout", "plan_rollout"]


@dataclass(frozen=True, slots=True)
class Rollout:
    """What is to be done to make a pool what its file says.

    Attributes:
        changes: what differs from the pool that runs; None if none runs.
    """

    wanted: PoolFile
    changes: tuple[Change, ...] | None
    _target: PoolSpec
    _control: RayControl | None

    def carry_out(self, timeout: float, on_status: Callable[[PoolStatus], None] | None = None) -> PoolStatus:
        """Start the pool, or change it replica by replica while it serves; waits until it is as declared.

        Raises:
            ReplicaError, PoolTimeoutError: as in :meth:`TeacherPool.start` and :meth:`TeacherPool.reload`; a pool that
                ran before is left running.
        """
        wanted, target = self.wanted, self._target
        if self._control is None:
            pool = TeacherPool.start(
                target.given,
                name=wanted.name,
                namespace=wanted.namespace,
                replicas=target.replicas,
                leave_gpus=target.leave_gpus,
                lifetime="detached",
                **target.placement.model_dump(),
                timeout=timeout,
                on_status=on_status,
                **target.options.model_dump(),
            )
            return pool.status()
        generation = None
        # The number last: while replicas are replaced, there are to be as many as before.
        if any(change.rolling for change in self.changes or ()):
            generation = self._control.change(target.given, placement=target.placement, options=target.options)
        if any(not change.rolling for change in self.changes or ()):
            self._control.scale(target.low, target.high)
        pool = TeacherPool.connect(wanted.name, namespace=wanted.namespace)
        return pool.wait_ready(timeout, generation=generation, on_status=on_status)


def plan_rollout(wanted: PoolFile, address: str) -> Rollout:
    """Compare what is ``wanted`` with what runs in the Ray at ``address``, which this process is connected to.

    Raises:
        ConfigError: the running pool serves a factory that this process cannot load; or Ray would refuse the placement.
    """
    spec = wanted.spec
    try:
        control = RayControl.connect(wanted.name, wanted.namespace, Runtime(address, owned=False))
    except PoolNotFoundError:
        return Rollout(wanted, None, spec, None)
    try:
        running = control.declaration().spec.unpickled()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the running pool serves a factory that this process cannot load ({error}), so a file cannot be compared "
            "with it: end that pool, or give the file another name"
        ) from error
    if spec.replicas == "auto":
        spec = replace(spec, replicas=running.replicas)
    target = spec.resolved(resolve_placement(spec.placement), auto=1)
    return Rollout(wanted, changes_between(running, target), target, control)
