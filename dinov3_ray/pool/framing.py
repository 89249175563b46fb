"""A request and an answer as arguments and results of a Ray call.

Ray pickles every Python object with cloudpickle, which takes longer than a small forward pass, but passes bytes through
as they are: so headers cross as bytes that the C pickler made, and small arrays inside them. Large arrays stay by
themselves, because only then do they cross without a copy.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray import cloudpickle

from dinov3_ray.pool.messages import Answer, Outcome, RequestHeader

if TYPE_CHECKING:  # it loads torch, which the controller has no use for
    from dinov3_ray.pool.wire import Array

__all__ = ["INLINE_BYTES", "Reply", "frame_answer", "frame_request", "is_small", "open_answer", "open_request"]

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
    """The call's arguments; ``staged`` are arrays to put inside, or references to arrays that Ray shall fetch."""
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
