"""A cluster of several nodes, each with its own address in a network namespace, run by deploy/ray's scripts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from network import Host, Network, why_not
from paths import DEPLOY, SUPPORT
from waiting import until

from dinov3_ray.pool.address import Address

RAY = DEPLOY / "ray"
TRAINER = SUPPORT / "namespace_trainer.py"
PATIENCE = 240.0  # for a machine that does much else; nothing here takes long by itself

_REASON = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(_REASON is not None, reason=str(_REASON)),
]


class Cluster:
    """Nodes run by the scripts, with a token and TLS; ``hosts[0]`` is the head's."""

    def __init__(self, hosts: list[Host], folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.address = str(Address(hosts[0].address, 6379))
        self.token = folder / "token"
        subprocess.run([RAY / "make-token.sh", self.token], check=True, timeout=60)
        for host in hosts:
            subprocess.run([RAY / "make-certificates.sh", folder / "tls", host.address], check=True, timeout=60)
        self.nodes: dict[Host, subprocess.Popen[str]] = {}

    def env(self, *, host: Host | None = None, token: bool = True) -> dict[str, str]:
        """The environment of a client: on ``host`` with its certificate, and with the token where wanted."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {"PATH": path, "HOME": str(self.folder), "OMP_NUM_THREADS": "1", "RAY_ADDRESS": self.address}
        env["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")  # for those who test a checkout that is not installed
        if token:
            env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        if host is not None:
            files = self.folder / "tls" / host.address
            env |= {"RAY_USE_TLS": "1", "RAY_TLS_CA_CERT": str(files / "ca.crt")}
            env |= {"RAY_TLS_SERVER_CERT": str(files / "node.crt"), "RAY_TLS_SERVER_KEY": str(files / "node.key")}
        return env

    def start(self, number: int) -> None:
        """Start the node of ``hosts[number]``; wait for it with :meth:`joined`."""
        host = self.hosts[number]
        # Paths of Ray's sockets must stay under about 100 characters.
        options = ["--ip", host.address, "--token", self.token, "--object-store", "128M", "--cpus", "1"]
        options += ["--temp-dir", self.folder / str(number), "--label", f"role={'teacher' if number else 'trainer'}"]
        options += ["--tls", self.folder / "tls" / host.address]
        # The dashboard takes seconds of a core to start, and nothing here looks at it.
        script = ["worker.sh", "--head", self.address] if number else ["head.sh"]
        rest = [] if number else ["--", "--include-dashboard", "false"]
        log = self.folder / f"{number}.log"
        env = {name: value for name, value in self.env().items() if not name.startswith("RAY_")}
        # By default Ray takes a quarter of a minute to miss a machine that went without a word.
        env["RAY_health_check_period_ms"] = "500"
        # Workers when they are needed, and not as soon as somebody connects: each takes a second of a core.
        env["RAY_prestart_worker_first_driver"] = "0"
        self.nodes[host] = host.start([RAY / script[0], *script[1:], *options, *rest], env=env, log=log)

    def joined(self, *numbers: int) -> None:
        """Wait until these nodes run."""
        for number in numbers:
            log = self.folder / f"{number}.log"
            node = self.nodes[self.hosts[number]]
            until(
                lambda log=log: "Ray runtime started" in log.read_text(),
                lambda node=node, log=log: f"it joined: exit status {node.poll()}; {log.read_text()[-2000:]}",
                PATIENCE,
            )

    def run(self, *command: object, number: int = 0, timeout: float = PATIENCE) -> str:
        """Run ``dinov3-ray`` on a node; what it wrote."""
        host = self.hosts[number]
        status, text = host.run(["dinov3-ray", *command], env=self.env(host=host), timeout=timeout)
        assert status == 0, text
        return text


@contextmanager
def running(hosts: int, *, nodes: int, ipv6: bool = False) -> Iterator[Cluster]:
    """A cluster of ``nodes`` nodes in a network of ``hosts``."""
    with (
        tempfile.TemporaryDirectory(prefix="dn-", ignore_cleanup_errors=True) as folder,
        Network(f"dn{os.getpid()}", hosts, ipv6=ipv6) as network,
    ):
        cluster = Cluster(network.hosts, Path(folder))
        cluster.start(0)
        cluster.joined(0)
        for number in range(1, nodes):
            cluster.start(number)
        yield cluster  # they join while what follows begins: a pool waits for its places


def train(cluster: Cluster, root: Path, stderr: Path) -> subprocess.Popen[str]:
    host = cluster.hosts[0]
    command = [sys.executable, TRAINER, root, cluster.address]
    return host.start(command, env=cluster.env(host=host), stderr=stderr)


def read_until(
    trainer: subprocess.Popen[str], stderr: Path, wanted: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """The first of the trainer's lines that is ``wanted``."""
    assert trainer.stdout is not None
    for line in trainer.stdout:
        if line.startswith("{") and wanted(told := json.loads(line)):
            return dict(told)
    raise AssertionError(f"the trainer ended with {trainer.wait(30)}: {stderr.read_text()[-3000:]}")


def steps_beyond(trainer: subprocess.Popen[str], stderr: Path, steps: int) -> int:
    return int(read_until(trainer, stderr, lambda told: told["steps"] > steps)["steps"])


def finish(trainer: subprocess.Popen[str], stderr: Path) -> dict[str, Any]:
    assert trainer.stdin is not None
    trainer.stdin.close()
    ended = read_until(trainer, stderr, lambda told: told.get("ended", False))
    assert trainer.wait(60) == 0, stderr.read_text()
    return ended


def test_three_nodes_with_tls_one_lost_one_joined(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with running(4, nodes=3) as cluster:
        head, lost, stays, new = cluster.hosts
        # One has no token; the other has it, and talks in plain text.
        status = ["dinov3-ray", "status"]
        stranger = head.start(status, env=cluster.env(host=head, token=False), log=tmp_path / "stranger")
        plain = head.start(status, env=cluster.env(), log=tmp_path / "plain")

        options = ["--replicas", 2, "--num-gpus", 0, "--num-cpus", 1, "--label", "role=teacher", "--threads", 1]
        assert "2 of 2 ready" in cluster.run("up", "--root", tiny_checkpoint, *options)
        cluster.joined(1, 2)
        trainer = train(cluster, tiny_checkpoint, tmp_path / "trainer")
        steps = steps_beyond(trainer, tmp_path / "trainer", 0)
        # One process that goes on telling: each takes seconds to start.
        watch = ["dinov3-ray", "status", "--watch", "--json", "--interval", "0.5"]
        watcher = head.start(watch, env=cluster.env(host=head), stderr=tmp_path / "watcher")
        before = read_until(watcher, tmp_path / "watcher", lambda told: told["ready"] == 2)
        nodes = {replica["node_id"] for replica in before["replicas"]}
        assert len(nodes) == 2, "the replicas are on the two nodes that are labelled for them"
        ran = {replica["pid"] for replica in before["replicas"]}
        assert ran <= {*lost.pids(), *stays.pids()}
        ran_there = ran & {*lost.pids()}

        # A machine goes: all of its processes at once. Another comes.
        lost.end()
        cluster.start(3)
        steps = steps_beyond(trainer, tmp_path / "trainer", steps + 10)  # what is left goes on alone
        cluster.joined(3)
        after = read_until(
            watcher,
            tmp_path / "watcher",
            lambda told: told["ready"] == 2 and not ran_there & {replica["pid"] for replica in told["replicas"]},
        )
        watcher.send_signal(signal.SIGINT)
        assert {replica["pid"] for replica in after["replicas"]} <= {*stays.pids(), *new.pids()}
        steps_beyond(trainer, tmp_path / "trainer", steps + 20)
        ended = finish(trainer, tmp_path / "trainer")
        assert ended["resends"] > 0, "nothing was in flight on the node that was lost"

        assert "has ended" in cluster.run("down")
        gone = [replica["pid"] for replica in after["replicas"]]
        until(lambda: not {*gone} & {*stays.pids(), *new.pids()}, "no replica outlives its pool", PATIENCE)

        assert stranger.wait(PATIENCE) == 1
        assert "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in (tmp_path / "stranger").read_text()
        assert plain.wait(PATIENCE) == 1
        assert "RAY_USE_TLS=1" in (tmp_path / "plain").read_text()

        for host in (stays, new, head):
            cluster.nodes[host].send_signal(signal.SIGTERM)
        for host in (stays, new, head):
            cluster.nodes[host].wait(60)
            until(lambda host=host: not host.pids(), lambda host=host: f"nothing is left of {host.pids()}", PATIENCE)


def test_two_nodes_that_have_ipv6_alone(tiny_checkpoint: Path) -> None:
    with running(2, nodes=2, ipv6=True) as cluster:
        head, worker = cluster.hosts
        options = ["--replicas", 1, "--num-gpus", 0, "--num-cpus", 1, "--label", "role=teacher", "--threads", 1]
        told = cluster.run("up", "--root", tiny_checkpoint, *options)
        assert f"address='{cluster.address}'" in told
        status = json.loads(cluster.run("status", "--json", "--address", cluster.address, number=1))
        assert status["replicas"][0]["pid"] in worker.pids()
        # Its exit status is about the rest of this machine, too.
        _, told = head.run(["dinov3-ray", "doctor"], env=cluster.env(host=head), timeout=PATIENCE)
        assert f"cluster: {cluster.address} answers" in told
        closed = told.partition("closed to this machine:")[2].partition("\n")[0]
        assert "manager" not in closed, "Ray serves metrics by IPv4 alone (2.60.0), and all else by IPv6"
        assert "round trip: a replica in the cluster" in told
        assert "has ended" in cluster.run("down", number=1)
