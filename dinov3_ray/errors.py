"""The errors that this package raises, in one tree.

::

    DinoV3Error
    ├── ConfigError (ValueError)              a configuration file or option is wrong
    ├── CheckpointError (ValueError)          weights are missing, damaged, or not what the configuration says
    ├── InputError (ValueError)               images, or other tensors, of a wrong type, shape or value
    ├── FrozenError (AttributeError)          a teacher was asked for what would change it
    ├── SpecError (ValueError)                a FeatureSpec that is malformed or that this model cannot satisfy
    ├── NumericsError (ArithmeticError)       a teacher that computes wrong or non-finite values
    ├── DeviceMemoryError (MemoryError)       one image that does not fit the memory of a teacher's device
    ├── StoreError (ValueError)               a feature store or cache that cannot be used as asked
    │   └── MissingViewError (KeyError)       a stored teacher was asked for a view that it does not hold
    └── PoolError (RuntimeError)              the pool cannot do what was asked
        ├── PoolNotFoundError (LookupError)   no pool of that name
        ├── PoolExistsError                   a pool of that name is running already, perhaps with another teacher
        ├── PoolClosedError                   used after shutdown() or close(), or after its Ray was left
        ├── PoolTimeoutError (TimeoutError)   a deadline passed; says what was waited for
        ├── ForkedProcessError                used in a process forked after connecting
        ├── ReplicaError                      a replica failed and no other could take its work
        │   └── DeviceLostError               its process can no longer use its device
        └── PoisonBatchError                  one batch ended replica after replica

Ray pickles errors to send them between processes. Therefore none of them defines ``__init__``, and all information is
in the message. A message names the parameter, the rule, the value and, where there is one, the remedy.
"""

from collections.abc import Mapping, Sequence

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DeviceLostError",
    "DeviceMemoryError",
    "DinoV3Error",
    "ForkedProcessError",
    "FrozenError",
    "InputError",
    "MissingViewError",
    "NumericsError",
    "PoisonBatchError",
    "PoolClosedError",
    "PoolError",
    "PoolExistsError",
    "PoolNotFoundError",
    "PoolTimeoutError",
    "ReplicaError",
    "SpecError",
    "StoreError",
    "describe",
]


class DinoV3Error(Exception):
    """Base of the errors that this package raises."""

    def __str__(self) -> str:
        # KeyError shows the repr of its message, in quotes.
        return "\n".join(str(argument) for argument in self.args)


class ConfigError(DinoV3Error, ValueError):
    """A configuration file or option is wrong."""


class CheckpointError(DinoV3Error, ValueError):
    """Weights are missing, damaged, or not what the configuration says."""


class InputError(DinoV3Error, ValueError):
    """Images, or other tensors, have a wrong type, shape or value."""


class FrozenError(DinoV3Error, AttributeError):
    """A teacher was asked for what would change it."""


class SpecError(DinoV3Error, ValueError):
    """A FeatureSpec that is malformed, or that this model cannot satisfy."""


class NumericsError(DinoV3Error, ArithmeticError):
    """A teacher that computes wrong or non-finite values."""


class DeviceMemoryError(DinoV3Error, MemoryError):
    """One image, computed alone, does not fit the memory of a teacher's device."""


class StoreError(DinoV3Error, ValueError):
    """A feature store or cache that cannot be used as asked."""


class MissingViewError(StoreError, KeyError):
    """A stored teacher was asked for a view that it does not hold."""


class PoolError(DinoV3Error, RuntimeError):
    """The pool cannot do what was asked."""


class PoolNotFoundError(PoolError, LookupError):
    """No pool of that name is running."""


class PoolExistsError(PoolError):
    """A pool of that name is running already."""


class PoolClosedError(PoolError):
    """Used after ``shutdown()`` or ``close()``, or after this process has left the pool's Ray."""


class PoolTimeoutError(PoolError, TimeoutError):
    """A deadline passed; the message says what was waited for."""


class ForkedProcessError(PoolError):
    """A pool client was used in a process forked after it connected; Ray would hang there."""


class ReplicaError(PoolError):
    """A replica failed, and no other could take its work within the retry budget."""


class DeviceLostError(ReplicaError):
    """A replica's process can no longer use its device, and must be started again."""


class PoisonBatchError(PoolError):
    """One batch ended replica after replica, and is failed alone so that the pool lives on."""


def first_line(error: BaseException) -> str:
    """``error`` in one line for people: its type, and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def describe(value: object) -> str:
    """A value for a message: its type, and a tensor's shape or a container's items."""
    kind = _kind(value)
    if isinstance(value, Mapping):
        return f"a {kind} with {', '.join(map(repr, value)) or 'nothing in it'}"
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return f"a {kind} of {len(value)}: {', '.join(map(_kind, value[:3]))}{', ...' if len(value) > 3 else ''}"
    return f"a {kind}"


def _kind(value: object) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ + ("" if shape is None else str(list(shape)))
