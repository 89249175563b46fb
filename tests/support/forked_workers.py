"""Ray's workers, forked from a process that has imported torch: each does without that import.

Ray starts a worker as ``python SETUP WORKER ARGUMENTS``; :func:`fork_workers` makes this file the SETUP of each Ray
that this process starts. As such it hands its arguments, environment, folder and streams to a server, and ends; the
server runs WORKER in a child. The child imports Ray itself, since Ray reads each worker's environment when imported.
It has a process, a connection and an end of its own, as any worker has.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["fork_workers"]

SERVER = "FORKED_WORKERS_SERVER"  # the variable that has the name of its socket, which is not a file's
# What workers import that takes long. Of Ray nothing.
MODULES = (
    *("filelock", "google.protobuf", "jsonschema", "pandas", "psutil", "pyarrow.dataset", "requests", "torch", "yaml"),
    *("dinov3_ray.datasets.sources.open", "dinov3_ray.datasets.store.writer"),
    *("dinov3_ray.pool.replica.hosted", "dinov3_ray.testing"),
)
CONTEXT = "--serialized-runtime-env-context="


def fork_workers() -> None:
    """Have the workers forked of every Ray that this process starts, until it ends.

    Scripts that this process starts, and which call this, share its server.
    """
    from ray._private.node import Node

    if SERVER not in os.environ:
        os.environ[SERVER] = f"forked-workers-{os.getpid()}"
        _start_server()
    start_raylet = Node.start_raylet

    def with_forked_workers(self: Any, *args: Any, **kwargs: Any) -> None:
        self._ray_params.setup_worker_path = __file__
        start_raylet(self, *args, **kwargs)

    Node.start_raylet = with_forked_workers  # type: ignore[method-assign]


def _start_server() -> None:
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve"],
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        stdin=subprocess.PIPE,  # whose end tells the server that this process has ended
        stdout=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is not for it
    )
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdout.read()  # until it listens
    atexit.register(server.stdin.close)


def _request(arguments: list[str]) -> None:
    """Have the server run a worker with these arguments and what else this process has got from Ray."""
    worker = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "nice": os.nice(0)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect("\0" + os.environ[SERVER])
        socket.send_fds(connection, [b"\0"], [0, 1, 2])
        connection.sendall(json.dumps(worker).encode())
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)  # which ends when the child has it all


def _serve() -> None:
    """Fork a worker for each that connects, until the process that started this ends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("\0" + os.environ[SERVER])
    listener.listen(64)
    os.dup2(2, 1)
    for module in MODULES:
        importlib.import_module(module)
    assert "ray" not in sys.modules
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries the children
    gc.freeze()  # or the children's collections would copy what they share
    while 0 not in select.select([listener, 0], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _become_worker(connection)
            return
        connection.close()


def _become_worker(connection: socket.socket) -> None:
    """Take over what the process that connected has got from Ray, and run its worker here."""
    import numpy as np

    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection, connection.makefile() as sent:
        worker = json.load(sent)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setpgid(0, 0)
        os.nice(worker["nice"] - os.nice(0))
        os.chdir(worker["folder"])
        os.environ.clear()
        os.environ.update(worker["environment"])
        np.random.seed()
    sys.argv = [argument for argument in worker["arguments"] if not argument.startswith((CONTEXT, "--language="))]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def _has_runtime_environment(arguments: list[str]) -> bool:
    context = next((argument.removeprefix(CONTEXT) for argument in arguments if argument.startswith(CONTEXT)), "{}")
    return any(json.loads(context).get(part) for part in ("command_prefix", "env_vars", "override_worker_entrypoint"))


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        _serve()
    elif _has_runtime_environment(sys.argv[1:]):  # Ray's own setup is for these
        from ray._private.workers import setup_worker

        os.execv(sys.executable, [sys.executable, setup_worker.__file__, *sys.argv[1:]])
    else:
        _request(sys.argv[1:])
