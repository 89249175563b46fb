"""Requests to replicas that are Ray actors: how they are framed, sent and answered.

Ray pickles every Python object with cloudpickle, which takes longer than a small forward pass, but passes bytes through
unchanged. So headers cross as bytes that the C pickler made, with small arrays inside them. Large arrays cross
separately, because only then are they not copied: images are put into the object store once, and sent by reference
however often they are sent again; results come back as arrays that alias the object store.
"""

from __future__ import annotations

import pickle
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import ray
from ray import cloudpickle
from ray._private import worker  # its put() is ray.put() without the habit of starting a Ray where there is none

from dinov3_ray.errors import PoolError
from dinov3_ray.pool.cluster import Runtime
from dinov3_ray.pool.kv import PoolKV
from dinov3_ray.pool.messages import Answer, Array, Outcome, ReplicaView, RequestHeader
from dinov3_ray.pool.metrics import Publisher, Sample
from dinov3_ray.pool.transport.protocol import Gone, OnAnswer, OnView, Unreachable

__all__ = [
    "INLINE_BYTES",
    "RayTransport",
    "Reply",
    "frame_answer",
    "frame_request",
    "is_small",
    "open_answer",
    "open_request",
]


#: Below this many bytes, arrays travel inside the message; Ray's own limit for arguments inside a call is 100 KB.
INLINE_BYTES = 64 * 1024

Reply = bytes | list[Any]
"""One message with everything inside, or a message followed by its arrays."""

# What is unpickled here was pickled by this package on the other side of a Ray connection, which is authenticated and
# may run code on this machine anyway.


def is_small(arrays: Sequence[Array]) -> bool:
    """Whether ``arrays`` travel inside the message."""
    return sum(array.nbytes for array in arrays) <= INLINE_BYTES


def frame_request(header: RequestHeader, staged: Sequence[Any], *, small: bool) -> tuple[Any, ...]:
    """The call's arguments; ``staged`` are arrays to put inside, or references to arrays that Ray fetches."""
    if small:
        return (pickle.dumps((header, list(staged)), protocol=5),)
    return (pickle.dumps((header, None), protocol=5), *staged)


def open_request(message: bytes, arrays: Sequence[Array]) -> tuple[RequestHeader, Sequence[Array]]:
    header, inside = pickle.loads(message)  # noqa: S301 - see above
    return header, arrays if inside is None else inside


def frame_answer(answer: Answer, arrays: list[Array]) -> Reply:
    # Only an error may be of a class that the driver's own script defines, which takes cloudpickle.
    dumps = cloudpickle.dumps if answer.outcome is Outcome.FAILED else pickle.dumps
    if is_small(arrays):
        message: bytes = dumps((answer, arrays), protocol=5)
        return message
    return [dumps((answer, None), protocol=5), *arrays]


def open_answer(reply: Reply) -> tuple[Answer, list[Array]]:
    message, arrays = (reply, []) if isinstance(reply, bytes) else (reply[0], reply[1:])
    answer, inside = pickle.loads(message)  # noqa: S301 - see above
    return answer, arrays if inside is None else inside


_STORE_SHARE = 0.3  # of one node's object store: what one client may have in flight, and what its results may keep
_WATCH_SECONDS = 5.0


class RayTransport:
    """One client's way to one pool; see :class:`~dinov3_ray.pool.transport.protocol.Transport`."""

    def __init__(self, controller: Any, namespace: str, pool: str, runtime: Runtime) -> None:
        self._runtime = runtime
        self.node_id = ray.get_runtime_context().get_node_id()
        stores = [node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]]
        self.default_max_bytes = int(min((size for size in stores if size), default=2**30) * _STORE_SHARE)
        self._controller = controller
        self._kv = PoolKV(namespace, pool)
        self._publisher = Publisher(pool)
        self._kept_bytes = 0
        self._kept_lock = threading.Lock()

    def loss(self) -> PoolError | None:
        return self._runtime.loss()

    def follow(self, client_id: str, known_epoch: int, on_view: OnView) -> None:
        # The call itself shows the controller that this client is alive.
        with self._runtime.held():
            ref = self._controller.watch.remote(client_id, known_epoch, _WATCH_SECONDS)

        def watched(future: Any) -> None:
            error = future.exception()
            if error is None:
                on_view(future.result())
            elif isinstance(error, ray.exceptions.ActorDiedError):
                on_view(Gone(_reason(error)))  # for good: it is restarted as long as its pool lives
            else:
                on_view(Unreachable(_reason(error)))

        ref.future().add_done_callback(watched)

    def stage(self, arrays: Sequence[Array], *, send_now: bool) -> list[Any]:
        if send_now and not is_small(arrays):
            return self._put(arrays)
        return [np.array(array) for array in arrays]

    def send(
        self, replica: ReplicaView, header: RequestHeader, staged: list[Any], on_answer: OnAnswer
    ) -> Callable[[], None]:
        small = isinstance(staged[0], np.ndarray) and is_small(staged)
        if not small and isinstance(staged[0], np.ndarray):
            staged[:] = self._put(staged)  # in place: a re-send finds it put already
        with self._runtime.held():
            ref = replica.actor.infer.remote(*frame_request(header, staged, small=small))

        def answered(future: Any) -> None:
            error = future.exception()
            if error is None:
                try:
                    on_answer(open_answer(future.result()))
                except Exception as unreadable:  # noqa: BLE001 - unpickling runs foreign code; an answer is never lost
                    on_answer(unreadable)
            elif isinstance(error, (ray.exceptions.ActorUnavailableError, ray.exceptions.ObjectLostError)):
                on_answer(Unreachable(_reason(error)))
            elif isinstance(error, ray.exceptions.RayActorError):
                on_answer(Gone(_reason(error)))
            else:
                on_answer(error)

        ref.future().add_done_callback(answered)

        def cancel() -> None:
            with self._runtime.held():
                ray.cancel(ref)

        return cancel

    def _put(self, arrays: Sequence[Array]) -> list[Any]:
        try:
            return [worker.put(array) for array in arrays]
        except ray.exceptions.RaySystemError as error:
            raise self.loss() or error from error

    def adopt(self, arrays: list[Array]) -> list[Array]:
        """Results alias the object store as long as all that the caller keeps fits its share; beyond, they are copied.

        A caller who collects results would else fill the store, and stop the pool for everyone.
        """
        size = sum(array.nbytes for array in arrays)
        with self._kept_lock:
            if self._kept_bytes + size > self.default_max_bytes:
                return [np.array(array) for array in arrays]
            self._kept_bytes += size
        for array in arrays:
            weakref.finalize(array, self._released, array.nbytes)
        return arrays

    def _released(self, size: int) -> None:
        with self._kept_lock:
            self._kept_bytes -= size

    def was_computing(self, replica_id: str, request_id: str) -> bool:
        with self._runtime.held():
            return self._kv.was_computing(replica_id, request_id)

    def report_sick(self, replica_id: str, reason: str) -> None:
        with self._runtime.held():
            self._controller.report_sick.remote(replica_id, reason)

    def publish(self, samples: Iterable[Sample]) -> None:
        with self._runtime.held():
            self._publisher.publish(samples)

    def leave(self, client_id: str) -> None:
        with self._runtime.held():
            self._publisher.close()
            self._controller.leave.remote(client_id)


def _reason(error: BaseException) -> str:
    """The first line of Ray's message, which says more than the type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
