"""How many files and sockets a process may have open."""

from __future__ import annotations

import resource

from dinov3_ray.doctor.finding import Finding, fine, problem, warning

__all__ = ["check_descriptors"]

_LEAST, _COMFORTABLE = 1024, 8192


def check_descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = f"{soft} open files allowed (up to {hard})"
    remedy = "ulimit -n 65536 before ray start, or LimitNOFILE=65536 in its systemd unit"
    if soft < _LEAST:
        return problem("file descriptors", f"{told}; Ray's processes need {_LEAST}", remedy)
    if soft < _COMFORTABLE:
        return warning("file descriptors", f"{told}; a pool with many clients needs {_COMFORTABLE}", remedy)
    return fine("file descriptors", told)
