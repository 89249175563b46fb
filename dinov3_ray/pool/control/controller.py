"""The controller of one pool: it starts, watches, replaces, scales and reloads replicas. No tensor passes through it.

It is a detached, named actor. If it dies, clients and replicas continue with what they know. Ray restarts it, and it
finds its pool again: the declaration in the key-value store, the replicas by their names.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ray

from dinov3_ray.errors import ReplicaError
from dinov3_ray.pool.cluster import controller_name, list_actors, replica_name
from dinov3_ray.pool.control.autoscaler import Autoscaler
from dinov3_ray.pool.control.declaration import Declaration, PoolChange
from dinov3_ray.pool.control.gpu_share import GpuWatch
from dinov3_ray.pool.control.holders import Holders, holding_process
from dinov3_ray.pool.control.loading import load_teacher
from dinov3_ray.pool.control.membership import Action, ActionKind, Membership
from dinov3_ray.pool.control.process_end import end_hung, kill_process
from dinov3_ray.pool.control.status import PoolStatus, ReplicaRecord, make_status, make_view
from dinov3_ray.pool.kv import PoolKV
from dinov3_ray.pool.messages import MemberState, PoolView, ReplicaStatistics
from dinov3_ray.pool.metrics import Publisher, Sample
from dinov3_ray.pool.replica.actor import ReplicaActor, ReplicaProcess, ReplicaSetup, thread_groups

__all__ = ["Controller", "read_controller", "reason_of"]


log = logging.getLogger("dinov3_ray")

_FAREWELL = 0.1  # seconds in which the last answers leave this process
_KILL_SECONDS = 30.0
_REJOIN_SECONDS = 3.0  # in which clients, which try every half a second, find a controller that was restarted
_LINGER_SECONDS = 60.0
_SICK_AFTER_ERRORS = 3  # requests in a row that raised, after which a replica is replaced


class _SupervisedReplica:
    """A replica, with what the controller knows of it, the process that it runs in, and the task that watches it."""

    def __init__(self, actor: Any) -> None:
        self.record = ReplicaRecord(actor)
        self.process: ReplicaProcess | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def actor(self) -> Any:
        return self.record.actor


class Controller:
    """See the module. All of it runs in one asyncio loop, so nothing here needs a lock.

    Args:
        holder: of the process that starts the pool; None for a pool that outlives it.
    """

    def __init__(self, namespace: str, name: str, declaration: Declaration, holder: str | None = None) -> None:
        self._namespace, self._name = namespace, name
        self._kv = PoolKV(namespace, name)
        former = self._kv.load_declaration()
        self._declaration: Declaration = former or declaration
        declared = self._declaration
        self._membership = Membership(declared.spec.low, declared.spec.high)
        # A restarted controller's views must count as newer than the former one's.
        self._membership.epoch = time.time_ns() // 1_000_000
        self._membership.generation, self._membership.newest = declared.generation, declared.newest
        self._membership.settled = declared.former.generation if declared.former else None
        self._membership.resize(declared.target)
        self._replicas: dict[str, _SupervisedReplica] = {}
        self._clients: dict[str, float] = {}
        self._watching: Counter[str] = Counter()  # calls of each client
        self._autoscaler = Autoscaler.of(declared.spec.options)
        self._publisher = Publisher(name)
        self._wake = asyncio.Event()
        self._published = asyncio.Condition()
        self._closed, self._why_closed = False, ""
        self._gpus = GpuWatch(name)
        self._ending: set[ReplicaProcess] = set()  # not replicas any more, but perhaps still there
        #: Set once running replicas are known, so that no client sees an empty pool before.
        self._found = asyncio.Event()
        self._background: set[asyncio.Task[Any]] = set()
        self._was_restarted = former is not None
        self._holders = Holders(namespace, name, self._spawn, self._expire)
        if holder is not None:
            if former is not None:
                self._holders.find()
            self._holders.add(holder)
        self._supervision = self._spawn(self._supervise())

    # What clients and pools call ------------------------------------------------------------------------------------

    async def watch(self, client_id: str, known_epoch: int, timeout: float) -> PoolView:
        """The view, as soon as its epoch differs from ``known_epoch``, or after ``timeout`` seconds.

        A client that is in this call, or was recently, counts as alive.
        """
        self._clients[client_id] = time.monotonic()
        self._watching[client_id] += 1
        try:
            await self._found.wait()
            async with asyncio.timeout(timeout), self._published:
                await self._published.wait_for(lambda: self._membership.epoch != known_epoch or self._closed)
        except TimeoutError:
            log.debug("nothing new for client %s within %s s", client_id, timeout)
        finally:
            self._watching[client_id] -= 1
        if client_id in self._clients:
            self._clients[client_id] = time.monotonic()
        return self._view()

    async def leave(self, client_id: str) -> None:
        """A client leaves: its queued requests are dropped."""
        if self._clients.pop(client_id, None) is not None:
            self._forget(client_id)

    async def report_sick(self, replica_id: str, reason: str) -> None:
        """Replace a replica whose values were not finite, as a client found out.

        Clients report nothing else: the next health check notices a replica that is dead or does not answer.
        """
        self._lose(replica_id, f"sick: {reason}")

    async def scale(self, low: int, high: int) -> None:
        self._membership.scale(low, high)
        self._save()

    async def declaration(self) -> Declaration:
        return self._declaration

    async def change(self, change: PoolChange) -> int:
        """Begin to replace the replicas by such as ``change`` asks for; returns the number of their generation.

        Changes are applied in the order of their calls. One that comes while another's replicas are still being
        replaced overtakes it; if it is given up, the pool returns to what it was before both.
        """
        if change.token in self._declaration.taken:
            return self._declaration.taken[change.token]
        settled = self._membership.reload()
        generation = self._membership.generation
        self._turn_to(self._declaration.changed(change, generation, settled=settled))
        return generation

    def _turn_to(self, declared: Declaration) -> None:
        self._declaration = declared
        self._autoscaler = Autoscaler.of(declared.spec.options)
        self._save()

    async def status(self) -> PoolStatus:
        await self._found.wait()
        options = self._declaration.spec.options
        return make_status(
            self._name,
            self._membership,
            self._records(),
            options,
            clients=len(self._clients),
            gpus=self._gpus.seen,
            lifetime=self._declaration.lifetime,
        )

    async def hold(self, holder: str) -> bool:
        """One more process holds the pool. False if the pool is ending."""
        if not self._closed:
            self._holders.add(holder)
        return not self._closed

    async def release(self, holder: str) -> list[ReplicaProcess] | None:
        """A process no longer holds the pool. If it was the last one, this is :meth:`shutdown`; else None."""
        if self._holders.remove(holder) and not self._closed:
            return await self.shutdown("the last process that held it has left it")
        return None

    async def notice(self, known: str, timeout: float) -> str:
        """What people should know of the cluster's GPUs, as soon as it differs from ``known``, or after ``timeout``
        seconds; "" if there is nothing.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout), self._published:
                await self._published.wait_for(lambda: self._closed or self._gpus.notice != known)
        return self._gpus.notice

    async def shutdown(self, why: str = "") -> list[ReplicaProcess]:
        """End all replicas and inform the clients. Returns the replicas' processes, for the caller to check on."""
        self._closed, self._why_closed = True, self._why_closed or why
        self._holders.end()
        # A controller that was restarted just now may still wait for some of its replicas to answer.
        self._supervision.cancel()
        self._found.set()
        for replica_id, actor in list_actors(self._namespace, self._name):
            self._replicas.setdefault(replica_id, _SupervisedReplica(actor))
        known = (self._process_of(replica_id, replica) for replica_id, replica in self._replicas.items())
        processes = [*self._ending, *filter(None, known)]
        self._kv.clear()
        for replica_id in list(self._replicas):
            self._membership.drained(replica_id)
            self._remove(replica_id)
        async with self._published:
            self._published.notify_all()
        # The caller ends this actor next, unless it dies: let the clients' answers leave first.
        self._spawn(self._leave(after=_LINGER_SECONDS))
        while self._watching.total():
            await asyncio.sleep(0)
        await asyncio.sleep(_FAREWELL)
        return processes

    # Supervision ----------------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        await self._find_replicas()
        self._found.set()
        self._save()
        while not self._closed:
            epoch = self._membership.epoch
            now = time.monotonic()
            self._drop_silent_clients(now)
            self._autoscale(now)
            if self._membership.is_hopeless:
                self._go_back()
            unplaced = [replica_id for replica_id, replica in self._replicas.items() if replica.process is None]
            for action in self._membership.plan(now, unplaced):
                self._carry_out(action)
            if self._membership.epoch != epoch:
                self._save()
            self._publisher.publish(read_controller(self._membership, clients=len(self._clients)))
            await self._see_gpus(now)
            async with self._published:
                self._published.notify_all()
            pause = self._declaration.spec.options.health_interval
            delayed = self._membership.next_change(time.monotonic())
            try:
                async with asyncio.timeout(pause if delayed is None else min(pause, delayed + 0.01)):
                    await self._wake.wait()
            except TimeoutError:
                continue  # nothing woke it: time for the next look
            finally:
                self._wake.clear()

    async def _see_gpus(self, now: float) -> None:
        each = self._declaration.spec.placement.num_gpus or 0.0
        unplaced = sum(replica.process is None for replica in self._replicas.values())
        await self._gpus.look(now, wanted=each * len(self._replicas), unplaced=each * unplaced)

    async def _expire(self, holder: str) -> None:
        """End the pool, since the last process that held it has ended."""
        if self._closed:
            return
        why = f"{holding_process(holder)}, which held it, has ended (a pool with lifetime='detached' outlives that)"
        log.warning("pool %s ends: %s", self._name, why)
        processes = await self.shutdown(why)
        # Ray asks processes to end, which one that is stopped, or hangs in a driver, does not do.
        kills = [kill_process(process) for process in processes]
        if kills:
            await asyncio.wait([asyncio.ensure_future(kill) for kill in kills], timeout=_KILL_SECONDS)
        await self._leave(after=_REJOIN_SECONDS if self._was_restarted else 0.0)

    async def _leave(self, after: float) -> None:
        """End this actor."""
        await asyncio.sleep(after)
        ray.kill(ray.get_actor(controller_name(self._name), namespace=self._namespace))

    def _go_back(self) -> None:
        membership = self._membership
        given_up = membership.generation
        membership.go_back()
        log.error(
            "pool %s: generation %d is given up, generation %d serves on: %s",
            self._name,
            given_up,
            membership.generation,
            membership.recent_errors[-1],
        )
        self._turn_to(self._declaration.gone_back())

    async def _find_replicas(self) -> None:
        """Adopt replicas that run already, after a restart."""
        self._membership.begin_at(self._declaration.serial)
        found = list_actors(self._namespace, self._name)
        await asyncio.gather(*(self._adopt(replica_id, actor) for replica_id, actor in found))

    async def _adopt(self, replica_id: str, actor: Any) -> None:
        patience = self._declaration.spec.options.health_timeout
        try:
            process = await asyncio.wait_for(actor.process.remote(), patience)
            state = await asyncio.wait_for(actor.state.remote(), patience)
        except (TimeoutError, ray.exceptions.RayError) as error:
            # Dead, without an answer, or not placed yet: a successor is as good.
            log.warning("pool %s: replica %s is not taken over: %s", self._name, replica_id, reason_of(error))
            self._end(replica_id, _SupervisedReplica(actor), may_hang=True)
            return
        self._membership.adopt(replica_id, process.generation, state, time.monotonic())
        self._begin_supervision(replica_id, actor)
        if state is MemberState.DRAINING:
            self._spawn(self._drain(replica_id))

    def _carry_out(self, action: Action) -> None:
        if action.kind is ActionKind.START:
            self._begin_supervision(action.replica_id, self._start_actor(action.replica_id))
        else:
            self._spawn(self._drain(action.replica_id))

    def _start_actor(self, replica_id: str) -> Any:
        spec = self._declaration.spec
        setup = ReplicaSetup(
            replica_id=replica_id,
            generation=self._membership.generation,
            namespace=self._namespace,
            pool=self._name,
            spec=spec,
            threads=self._threads(),
        )
        options: dict[str, Any] = {
            "name": replica_name(self._name, replica_id),
            "namespace": self._namespace,
            "lifetime": "detached",
            "max_restarts": 0,  # replacing it is this controller's work: Ray would not say why it could not start
            # Replicas that reserve nothing would all be put on one node.
            "scheduling_strategy": "DEFAULT" if spec.placement.num_gpus else "SPREAD",
            **spec.placement.actor_options(),
        }
        actor_class: Any = ray.remote(concurrency_groups=thread_groups(spec.options))(ReplicaActor)
        return actor_class.options(**options).remote(setup)

    def _threads(self) -> int | None:
        """CPU threads per replica, so that replicas of one machine do not compete for its cores."""
        spec = self._declaration.spec
        if spec.options.threads is not None or spec.placement.device != "cpu":
            return spec.options.threads
        if spec.placement.num_cpus >= 1:
            return int(spec.placement.num_cpus)
        return max(1, int(ray.cluster_resources().get("CPU", 1)) // self._membership.target)

    def _begin_supervision(self, replica_id: str, actor: Any) -> None:
        replica = self._replicas[replica_id] = _SupervisedReplica(actor)
        replica.task = self._spawn(self._watch_over(replica_id, replica))

    async def _watch_over(self, replica_id: str, replica: _SupervisedReplica) -> None:
        """Follow a replica from when Ray places it until it is lost."""
        options = self._declaration.spec.options
        try:
            # No deadline: a replica that Ray cannot place yet makes Ray's autoscaler add a node.
            replica.process = await replica.actor.process.remote()
            replica.record.node_id, replica.record.pid = replica.process.node_id, replica.process.pid
            replica.record.info = await load_teacher(replica.actor, options)
            self._membership.became_ready(replica_id, time.monotonic())
            self._wake.set()
            while True:
                seen: ReplicaStatistics = await asyncio.wait_for(replica.actor.health.remote(), options.health_timeout)
                replica.record.statistics = seen
                self._require_healthy(seen)
                await asyncio.sleep(options.health_interval)
        except TimeoutError:
            self._lose(replica_id, f"no answer to health within {options.health_timeout:g} s")
        except ReplicaError as error:
            self._lose(replica_id, reason_of(error))
        except ray.exceptions.RayError as error:
            reason = await asyncio.to_thread(self._kv.load_end, replica_id) or reason_of(error)
            self._lose(replica_id, reason, dead=isinstance(error, ray.exceptions.ActorDiedError))

    def _require_healthy(self, statistics: ReplicaStatistics) -> None:
        limit = self._declaration.spec.options.hang_timeout
        if statistics.busy_for > limit:
            raise ReplicaError(f"one forward pass has taken {statistics.busy_for:.1f} s (hang_timeout is {limit:g} s)")
        if statistics.errors_in_a_row >= _SICK_AFTER_ERRORS:
            raise ReplicaError(f"{statistics.errors_in_a_row} requests in a row raised")

    def _lose(self, replica_id: str, reason: str, *, dead: bool = False) -> None:
        if self._membership.lost(replica_id, reason, time.monotonic()):
            log.warning("pool %s: replica %s is lost: %s", self._name, replica_id, reason)
            self._remove(replica_id, may_hang=not dead)
            self._wake.set()

    async def _drain(self, replica_id: str) -> None:
        replica = self._replicas.get(replica_id)
        if replica is None:
            return  # it was lost before its turn came
        patience, drained = self._declaration.spec.options.drain_timeout, False
        if replica.record.statistics is not None:
            try:
                drained = await asyncio.wait_for(replica.actor.drain.remote(patience), patience + 1)
            except (TimeoutError, ray.exceptions.RayError) as error:
                log.warning("pool %s: replica %s did not drain: %s", self._name, replica_id, reason_of(error))
        if self._membership.drained(replica_id):  # or it was lost meanwhile, and removed
            self._remove(replica_id, may_hang=not drained)
            self._wake.set()

    def _remove(self, replica_id: str, *, may_hang: bool = False) -> None:
        """End a replica."""
        replica = self._replicas.pop(replica_id)
        if replica.task is not None and replica.task is not asyncio.current_task():
            replica.task.cancel()
        self._end(replica_id, replica, may_hang=may_hang)

    def _end(self, replica_id: str, replica: _SupervisedReplica, *, may_hang: bool) -> None:
        process = self._process_of(replica_id, replica) if may_hang else None
        if process is not None:
            self._spawn(self._end_hung(replica_id, replica.actor, process))
        else:
            ray.kill(replica.actor)

    def _process_of(self, replica_id: str, replica: _SupervisedReplica) -> ReplicaProcess | None:
        """The replica's process, though it may never have answered; None if it has not begun."""
        return replica.process or self._kv.load_process(replica_id)

    async def _end_hung(self, replica_id: str, actor: Any, process: ReplicaProcess) -> None:
        self._ending.add(process)
        trouble = await end_hung(actor, process)
        self._ending.discard(process)
        if trouble:
            log.error("pool %s: replica %s: %s", self._name, replica_id, trouble)
            self._membership.recent_errors.append(f"{replica_id}: {trouble}")

    def _drop_silent_clients(self, now: float) -> None:
        limit = self._declaration.spec.options.client_timeout
        self._watching = +self._watching
        silent = [one for one, seen in self._clients.items() if not self._watching[one] and now - seen > limit]
        for client_id in silent:
            log.warning("pool %s: client %s has been silent for %g s: dropped", self._name, client_id, limit)
            del self._clients[client_id]
            self._forget(client_id)

    def _forget(self, client_id: str) -> None:
        for replica in self._replicas.values():
            replica.actor.forget.remote(client_id)

    def _autoscale(self, now: float) -> None:
        membership = self._membership
        if membership.low == membership.high:
            return
        ready = [self._replicas[member.replica_id].record.statistics for member in membership.ready()]
        starting = sum(member.state is MemberState.STARTING for member in membership.members)
        known = [statistics for statistics in ready if statistics is not None]
        membership.resize(self._autoscaler.target(membership.target, known, starting, now))

    # Small parts ----------------------------------------------------------------------------------------------------

    def _records(self) -> dict[str, ReplicaRecord]:
        return {replica_id: replica.record for replica_id, replica in self._replicas.items()}

    def _view(self) -> PoolView:
        options = self._declaration.spec.options
        return make_view(self._membership, self._records(), options, closed=self._closed, why_closed=self._why_closed)

    def _save(self) -> None:
        if self._closed:
            return
        membership = self._membership
        self._declaration = replace(
            self._declaration,
            spec=replace(self._declaration.spec, replicas=(membership.low, membership.high)),
            target=membership.target,
            newest=membership.newest,
            serial=membership.serial,
            former=None if membership.settled == membership.generation else self._declaration.former,
        )
        self._kv.save_declaration(self._declaration)
        self._wake.set()

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("pool %s: a task of the controller failed", self._name, exc_info=task.exception())
            if task is self._supervision:
                # A controller that supervises nothing is worse than one that restarts: Ray restarts it.
                os._exit(1)


def reason_of(error: BaseException) -> str:
    """Why a replica was lost, in one line for people."""
    if isinstance(error, ray.exceptions.ActorDiedError):
        return "its process died"
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or ["no message"]
    return f"{type(cause).__name__}: {lines[-1]}"


def read_controller(membership: Membership, *, clients: int) -> Iterator[Sample]:
    counts = Counter(member.state for member in membership.members)
    for state in MemberState:
        yield Sample("dinov3_replicas", counts[state], str(state))
    yield Sample("dinov3_replicas_target", membership.target)
    yield Sample("dinov3_clients", clients)
    yield Sample("dinov3_restarts", membership.restarts)
