"""What the Hugging Face Hub, the network and the disk answer, as this package's errors: what failed, and the remedy.

huggingface_hub has used three HTTP libraries so far, whose errors it lets through. They are found by what its own
errors derive from.
"""

from __future__ import annotations

import errno
from pathlib import Path

from dinov3_ray.config.hub.access import HubAccess
from dinov3_ray.errors import CheckpointError, ConfigError, DinoV3Error

__all__ = ["cannot_write", "hub_failures", "is_offline", "is_passing", "reason_of_failure", "refusal"]

_OF_THE_DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.EEXIST,
}
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP: worth another try


def hub_failures() -> tuple[type[Exception], ...]:
    """What calls of huggingface_hub raise for reasons that are not this package's mistakes.

    ValueError is how it refuses what is not a hub's answer, such as the page of a proxy.
    """
    from huggingface_hub.errors import HfHubHTTPError

    of_http = (kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind is not Exception)
    return (*of_http, OSError, ValueError)


def is_passing(error: Exception) -> bool:
    """Whether the same call may succeed a moment later."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in _PASSING
    return not isinstance(error, (OfflineModeIsEnabled, ValueError)) and not cannot_write(error)


def cannot_write(error: BaseException) -> bool:
    """Whether it is this machine's disk that fails: full, over its quota, or not to be written to."""
    return isinstance(error, OSError) and error.errno in _OF_THE_DISK


def is_offline(error: BaseException) -> bool:
    """Whether the hub was not asked, since HF_HUB_OFFLINE is set."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(_cause(error), OfflineModeIsEnabled)


def reason_of_failure(error: BaseException) -> str:
    """``error`` in one line, without what huggingface_hub wraps around it."""
    from huggingface_hub.errors import HfHubHTTPError

    if is_offline(error):
        return "HF_HUB_OFFLINE is set"
    error = _cause(error)
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        said = error.server_message or error.response.headers.get("X-Error-Message") or error.response.reason_phrase
        return f"it answers {error.response.status_code}: {' '.join(str(said).split())}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _cause(error: BaseException) -> BaseException:
    """What made huggingface_hub say that a file is not in the cache; another error is its own cause."""
    inner = error.__cause__ or error.__context__
    return _cause(inner) if inner is not None and type(error).__name__ == "LocalEntryNotFoundError" else error


def refusal(
    error: Exception, hub_id: str, revision: str, access: HubAccess, *, directory: Path | None, is_dataset: bool
) -> DinoV3Error | None:
    """Why the hub does not give ``hub_id``, where that is its answer; None where the network or the disk fails.

    Args:
        error: what huggingface_hub raised.
        revision: that was asked for.
        directory: what the id would name as a path; None where nobody took it for one.
        is_dataset: whether the hub has a data set of that id.
    """
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page, has_token = f"{access.url}/{hub_id}", access.token is not None
    if isinstance(error, GatedRepoError):
        return CheckpointError(_gated(hub_id, page, access))
    if isinstance(error, RepositoryNotFoundError):
        if is_dataset:
            return ConfigError(f"root must be the id of a model; {hub_id} is a data set of {access.url}")
        neither = f"; {directory} is missing, too" if directory is not None else ""
        private = (
            "the token in use must be allowed to read it"
            if has_token
            else "set HF_TOKEN, or run `hf auth login`, since this process has no token"
        )
        return ConfigError(
            f"root must be a model directory or the id of a model on the hub; {access.url} has no model {hub_id!r}"
            f"{neither} (check its spelling, owner/name; if it is private, {private})"
        )
    if isinstance(error, RevisionNotFoundError):
        return ConfigError(
            f"revision must be a branch, a tag or a commit of {hub_id}; the hub has no {revision!r} of it "
            f"({page}/commits/main lists them)"
        )
    if isinstance(error, DisabledRepoError):
        return CheckpointError(f"{hub_id} cannot be downloaded: the hub has disabled it (see {page})")
    if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code in (401, 403):
        remedy = (
            f"make another at {access.url}/settings/tokens, with the right to read, and set HF_TOKEN to it"
            if has_token
            else "set HF_TOKEN, or run `hf auth login`"
        )
        return CheckpointError(
            f"{hub_id} cannot be downloaded: the hub refuses {'this' if has_token else 'access without a'} token, "
            f"{reason_of_failure(error)} ({remedy})"
        )
    return None


def _gated(hub_id: str, page: str, access: HubAccess) -> str:
    gated = f"{hub_id} is gated: the hub gives it to those whom its owners let in"
    if access.token is None:
        return (
            f"{gated}, and this process has no token (ask for access at {page}, make a token at "
            f"{access.url}/settings/tokens, and set HF_TOKEN to it, or run `hf auth login`)"
        )
    return (
        f"{gated}, and the account of the token in use is not one of them (ask for access at {page}, and wait for the "
        "owners' answer; a fine-grained token must also be allowed to read gated repositories)"
    )
