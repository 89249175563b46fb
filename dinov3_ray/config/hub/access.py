"""How a process reaches the Hugging Face Hub, and where its cache is: what the HF_* variables say, as users know them.

They are read when they are needed, and not at import as huggingface_hub does it: a process that Ray started imports
much before it knows which model it is for.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path

__all__ = ["HubAccess", "carried_access", "carrying_access"]

log = logging.getLogger("dinov3_ray")

_TRUE = {"1", "ON", "YES", "TRUE"}
_HUB = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class HubAccess:
    """How a process reaches the hub.

    Attributes:
        endpoint: the hub's URL (HF_ENDPOINT); None where nobody named one.
        token: as HF_TOKEN or ``hf auth login`` gave it; None where there is none.
        offline: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE; None where neither is set.
        cache: the folder that holds a folder for each model.
        cache_is_chosen: whether a variable names it.
    """

    endpoint: str | None
    token: str | None = field(repr=False)
    offline: bool | None
    cache: Path
    cache_is_chosen: bool

    @classmethod
    def here(cls) -> HubAccess:
        """Of this process."""
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")
        cache, chosen = _cache()
        return cls(
            endpoint=(os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None,
            token=_token(),
            offline=None if offline is None else offline.upper() in _TRUE,
            cache=cache,
            cache_is_chosen=chosen,
        )

    def completed_by(self, other: HubAccess | None) -> HubAccess:
        """With what ``other``, the access of the process that sent the model here, says where this one says nothing."""
        if other is None:
            return self
        return replace(
            self,
            endpoint=self.endpoint or other.endpoint,
            token=self.token or other.token,
            offline=other.offline if self.offline is None else self.offline,
        )

    @property
    def url(self) -> str:
        return self.endpoint or _HUB


def _token() -> str | None:
    from huggingface_hub import constants, get_token  # here: a model directory needs none of it

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return None
    try:
        return get_token()  # type: ignore[no-any-return]
    except OSError as error:  # such as the file of the colleague whose cache this is
        log.warning("the token of `hf auth login` cannot be read, so none is used: %s (HF_TOKEN goes before)", error)
        return None


def _cache() -> tuple[Path, bool]:
    """The cache, by the rule of huggingface_hub, and whether a variable names it."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return _expanded(os.environ[name]), True
    if os.environ.get("HF_HOME"):
        return _expanded(os.environ["HF_HOME"]) / "hub", True
    return _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub", False


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(path)).expanduser().absolute()


_carrying = ContextVar("dinov3_carrying_hub_access", default=False)


@contextlib.contextmanager
def carrying_access() -> Iterator[None]:
    """Within it, a model of the hub is pickled with this process's access, token included.

    For processes of the same user that must download it too; a configuration that is pickled otherwise has no token.
    """
    token = _carrying.set(True)
    try:
        yield
    finally:
        _carrying.reset(token)


def carried_access() -> HubAccess | None:
    """What goes with a model that is being pickled; None outside :func:`carrying_access`."""
    return HubAccess.here() if _carrying.get() else None
