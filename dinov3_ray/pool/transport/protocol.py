"""The seam between the router, which decides, and what carries requests: Ray actors or threads of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from dinov3_ray.errors import PoolError
from dinov3_ray.pool.messages import Answer, Array, PoolView, ReplicaView, RequestHeader
from dinov3_ray.pool.metrics import Sample

__all__ = ["Gone", "OnAnswer", "OnView", "Transport", "Unreachable"]


class Gone(Exception):  # noqa: N818 - not a user's error: it reports to the router that the other side is gone
    """A replica or the controller is dead for good; the message says how that showed."""


class Unreachable(Exception):  # noqa: N818 - not a user's error either
    """The connection to a replica broke; it may be there still."""


OnAnswer = Callable[[tuple[Answer, list[Array]] | Exception], None]
"""Called once, from any thread, with an answer and its arrays, with :class:`Gone` or :class:`Unreachable`, or with an
error on the way."""

OnView = Callable[[PoolView | Gone | Unreachable], None]
"""Called once, from any thread: with a view, :class:`Gone` if the pool has ended, or :class:`Unreachable`."""


class Transport(Protocol):
    """Carries one client's requests. Only the router's thread calls it, except ``stage``; no call waits for a
    replica."""

    #: The node that this client runs on, as replicas name theirs.
    node_id: str
    #: Bytes that this client may have in flight by default.
    default_max_bytes: int

    def loss(self) -> PoolError | None:
        """What tells a caller that this process can no longer reach the pool; None while it can."""
        ...

    def follow(self, client_id: str, known_epoch: int, on_view: OnView) -> None:
        """Call ``on_view`` once, when there is another view than ``known_epoch``, or every few seconds."""
        ...

    def stage(self, arrays: Sequence[Array], *, send_now: bool) -> list[Any]:
        """A private copy of ``arrays`` to send from, however often; with ``send_now`` it may be put in the store."""
        ...

    def send(
        self, replica: ReplicaView, header: RequestHeader, staged: list[Any], on_answer: OnAnswer
    ) -> Callable[[], None]:
        """Send a request; the returned function cancels it."""
        ...

    def adopt(self, arrays: list[Array]) -> list[Array]:
        """An answer's arrays as the caller may keep them: memory that nobody else reads or writes."""
        ...

    def was_computing(self, replica_id: str, request_id: str) -> bool:
        """Whether a replica that died had begun this suspect request."""
        ...

    def report_sick(self, replica_id: str, reason: str) -> None:
        """Report to the controller a replica whose values were not finite where another's were."""
        ...

    def publish(self, samples: Iterable[Sample]) -> None:
        """Add to the operator's metrics what this client reads off itself; called every few seconds, and at its end."""
        ...

    def leave(self, client_id: str) -> None:
        """Say goodbye: what the client still has queued may be dropped."""
        ...
