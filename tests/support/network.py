"""Several nodes on one machine: network namespaces, each with its own address, joined by a bridge in one of their own.

Nothing of it shows in the machine's own network, and nothing of it is left when the namespaces are deleted.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["Host", "Network", "why_not"]


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30).stdout


def why_not() -> str | None:
    """Why this machine cannot have them; None if it can."""
    if shutil.which("ip") is None:
        return "network namespaces need the command `ip` (Debian's iproute2)"
    name = f"dr{secrets.token_hex(3)}"
    try:
        with Network(name, hosts=1):
            return None
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.strip()}"


class Host:
    """One namespace with its address, and the processes that were started in it."""

    def __init__(self, namespace: str, address: str) -> None:
        self.namespace, self.address = namespace, address
        self._started: list[subprocess.Popen[str]] = []

    def start(
        self,
        command: Sequence[object],
        *,
        env: Mapping[str, str],
        stderr: Path | None = None,
        log: Path | None = None,
    ) -> subprocess.Popen[str]:
        """Start ``command`` here. It runs with ``env`` and no more.

        Args:
            stderr: where its errors go; its standard input and output are pipes.
            log: in place of that: where all that it writes goes.
        """
        words = ["ip", "netns", "exec", self.namespace, *map(str, command)]
        with open(log or stderr or os.devnull, "w", encoding="utf-8") as file:
            process = subprocess.Popen(
                words,
                env=dict(env),
                text=True,
                stdin=subprocess.PIPE,
                stdout=file if log else subprocess.PIPE,
                stderr=file,
            )
        self._started.append(process)
        return process

    def run(self, command: Sequence[object], *, env: Mapping[str, str], timeout: float = 60) -> tuple[int, str]:
        """Run ``command`` here to its end: (exit status, all that it wrote)."""
        words = ["ip", "netns", "exec", self.namespace, *map(str, command)]
        done = subprocess.run(
            words,
            env=dict(env),
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        )
        return done.returncode, done.stdout

    def pids(self) -> list[int]:
        """The processes that live in this namespace."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def end(self) -> None:
        """End what is left here: only processes of this namespace."""
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self._started:
            process.wait(30)
            for pipe in (process.stdin, process.stdout):
                pipe.close() if pipe else None
        deadline = time.monotonic() + 30
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.05)


class Network:
    """``hosts`` namespaces that reach each other by IPv4, or by IPv6 alone, and nothing else. A context manager."""

    def __init__(self, name: str, hosts: int, *, ipv6: bool = False) -> None:
        self._switch = f"{name}s"
        prefix = "fd00:203:77::" if ipv6 else "10.203.77."
        self.hosts = [Host(f"{name}h{n}", f"{prefix}{n + 1}") for n in range(hosts)]
        # As soon as it is added, and not after a second in which nobody else has claimed it.
        self._options = ("nodad",) if ipv6 else ()
        self._length, self._family = (64, "-6") if ipv6 else (24, "-4")

    def __enter__(self) -> Network:
        try:
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
            for n, host in enumerate(self.hosts):
                inside = host.namespace
                _ip("netns", "add", inside)
                # Made inside, so that no name of it can clash with one of the machine's.
                _ip(
                    "-n",
                    inside,
                    "link",
                    "add",
                    "eth0",
                    "type",
                    "veth",
                    "peer",
                    "name",
                    f"port{n}",
                    "netns",
                    self._switch,
                )
                _ip("-n", inside, "address", "add", f"{host.address}/{self._length}", "dev", "eth0", *self._options)
                _ip("-n", inside, "link", "set", "lo", "up")
                _ip("-n", inside, "link", "set", "eth0", "up")
                # Ray asks the system which address leads out.
                _ip("-n", inside, self._family, "route", "add", "default", "dev", "eth0")
                _ip("-n", self._switch, "link", "set", f"port{n}", "master", "bridge")
                _ip("-n", self._switch, "link", "set", f"port{n}", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        there = _ip("netns", "list").split()
        for host in self.hosts:
            if host.namespace in there:
                host.end()
                _ip("netns", "del", host.namespace)
        if self._switch in there:
            _ip("netns", "del", self._switch)
