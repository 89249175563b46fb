"""The token that this machine would show to a cluster. Its value is never told."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from dinov3_ray.doctor.finding import Finding, fine, problem, skipped, warning

__all__ = ["check_token"]

_SUBJECT = "token"


def check_token(environment: Mapping[str, str], address: str | None) -> Finding:
    """Whether a client with ``environment`` has a token for the cluster at ``address``."""
    if address is None:
        return skipped(_SUBJECT, "no cluster is named (--address, RAY_ADDRESS)")
    mode = environment.get("RAY_AUTH_MODE", "")
    if mode != "token":
        return problem(
            _SUBJECT,
            f"RAY_AUTH_MODE is {mode or 'not set'}: clients that join {address} show no token",
            "export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH=FILE with the cluster's token",
        )
    if environment.get("RAY_AUTH_TOKEN"):
        remedy = "put it in a file of mode 0600 and name that in RAY_AUTH_TOKEN_PATH"
        return warning(_SUBJECT, "RAY_AUTH_TOKEN holds it, where /proc and logs may show it", remedy)
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path(environment.get("HOME", "/")) / ".ray" / "auth_token"
    try:
        text, permissions = path.read_text().strip(), stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        remedy = f"copy the cluster's token to {path}, mode 0600, or name its file in RAY_AUTH_TOKEN_PATH"
        return problem(_SUBJECT, f"{path} cannot be read: {error.strerror}", remedy)
    if not text:
        return problem(_SUBJECT, f"{path} is empty", f"copy the cluster's token to {path}, mode 0600")
    if permissions & 0o077:
        return warning(_SUBJECT, f"others may read {path} (mode {permissions:o})", f"chmod 600 {path}")
    return fine(_SUBJECT, f"in {path}")
