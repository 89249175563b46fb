"""Ray without processes that no test looks at: each Ray that is started costs half of the CPU time then.

They are the log monitor (log_to_driver is off), the autoscaler's (nothing scales) and the dashboard's head, which runs
even without a dashboard. Ray has no public options for all of them.
"""

from __future__ import annotations

from typing import Any

from ray._private.node import Node

__all__ = ["start_lean_rays"]


def start_lean_rays() -> None:
    """Have this process start every Ray so."""
    for name in ("start_log_monitor", "start_monitor"):
        setattr(Node, name, lambda self: None)
    Node.start_api_server = _without_api_server  # type: ignore[method-assign]


def _without_api_server(self: Any, **_: object) -> None:
    self._webui_url = ""
