"""The address of a Ray's head: what is read, and what is refused at every entrance, with what to use."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from commandline import run_command

from dinov3_ray import RemoteTeacher, TeacherPool
from dinov3_ray.datasets import extract
from dinov3_ray.errors import ConfigError
from dinov3_ray.pool.address import Address
from dinov3_ray.pool.cluster import connect
from dinov3_ray.pool.probe import answers, find_obstacle
from dinov3_ray.testing import FakeTeacher

READ = {
    "10.1.2.3:6379": ("10.1.2.3", 6379),
    "head:6379": ("head", 6379),
    "Node_1.cluster-a.local.:1": ("Node_1.cluster-a.local.", 1),
    "localhost:65535": ("localhost", 65535),
    "[::1]:6379": ("::1", 6379),
    "[fd00:77::1]:6400": ("fd00:77::1", 6400),
    "[fe80::1%eth0]:6379": ("fe80::1%eth0", 6379),
}
# What is refused: the reason, and what to use.
REFUSED = {
    "ray://head:10001": ("over Ray Client pools do not work", "head:6379"),
    "ray://[fd00::1]:10001": ("over Ray Client pools do not work", "[fd00::1]:6379"),
    "ray://10.1.2.3": ("over Ray Client pools do not work", "10.1.2.3:6379"),
    "ray://": ("over Ray Client pools do not work", "HOST:6379"),
    "http://[::1]:8265": ("the dashboard takes jobs only", "[::1]:6379"),
    "https://head/": ("the dashboard takes jobs only", "head:6379"),
    "redis://head:6379": ("that names no running Ray", "head:6379"),
    "ray://[::1": ("over Ray Client pools do not work", "HOST:6379"),
    "local": ("that names no running Ray", "HOST:6379"),
    "::1": ("an IPv6 address stands in brackets, and a port follows it", "[::1]:6379"),
    "[fd00::1]": ("an IPv6 address stands in brackets, and a port follows it", "[fd00::1]:6379"),
    "head": ("it has no port", "head:6379"),
    "10.1.2.3": ("it has no port", "10.1.2.3:6379"),
}
NO_PLACE = [
    "head:", ":6379", "head:0", "head:65536", "head:ray", "head:-1", "head:\u0661", "head:6379 ", "he ad:1", "[]:1",
    "[head]:1", "[10.1.2.3]:1", "10.1.2.300:6379", "a:b:6379", "[fd00::1]6379", "me@head:6379", "head:6379/x",
]  # fmt: skip
REFUSED |= dict.fromkeys(NO_PLACE, ("that is not a host with a port from 1 to 65535", "HOST:6379"))


@pytest.mark.parametrize("text", READ)
def test_what_is_read(text: str) -> None:
    address = Address.parse(text)
    assert address == Address(*READ[text])
    assert str(address) == text


def test_auto_is_left_to_ray() -> None:
    assert Address.parse("auto") is None


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_refused(text: str) -> None:
    reason, instead = REFUSED[text]
    with pytest.raises(ConfigError) as caught:
        Address.parse(text, name="RAY_ADDRESS")
    message = str(caught.value)
    assert message.startswith(
        f"RAY_ADDRESS must be HOST:PORT of a running Ray's head, or auto; got {text!r} ({reason})"
    )
    assert f"use '{instead}'" in message


def own_addresses() -> list[str]:
    found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    return [place[0] for *_, place in found if not place[0].startswith("127.")]


def test_one_head_has_several_addresses() -> None:
    loopback = Address("127.0.0.1", 6379)
    assert loopback.is_same(Address("localhost", 6379))
    assert Address("nowhere.invalid", 1).is_same(Address("Nowhere.invalid", 1))
    assert not loopback.is_same(Address("127.0.0.1", 6380))
    assert not loopback.is_same(Address("192.0.2.1", 6379)), "that is another machine's"
    assert not Address("192.0.2.1", 1).is_same(Address("192.0.2.2", 1))
    for number in own_addresses():
        assert loopback.is_same(Address(number, 6379))
        assert Address(number, 6379).is_same(Address("localhost", 6379))


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_the_probe_speaks_ipv6() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        address = Address("::1", server.getsockname()[1])
        assert answers(address)
    assert not answers(address)
    obstacle = find_obstacle(address)
    assert obstacle is not None
    assert obstacle.message.startswith(f"no Ray answers at address {address}: [Errno {errno.ECONNREFUSED}]")


ENTRANCES: dict[str, Callable[[str], object]] = {
    "RemoteTeacher": lambda address: RemoteTeacher(address=address),
    "connect": lambda address: TeacherPool.connect(address=address),
    "start": lambda address: TeacherPool.start(FakeTeacher.factory(), address=address),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265", "https://head:8265/", "head"])
def test_another_kind_of_address(entrance: str, address: str) -> None:
    with pytest.raises(ConfigError, match=r"address must be HOST:PORT of a running Ray's head.*'head:6379'") as caught:
        ENTRANCES[entrance](address)
    assert repr(address) in str(caught.value)


def test_one_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests of this process may be connected
    with pytest.raises(ConfigError, match="RAY_ADDRESS must be HOST:PORT"):
        RemoteTeacher().info  # noqa: B018 - it connects
    assert "RAY_ADDRESS must be HOST:PORT" in run_command("status").output
    checked = run_command("doctor")
    assert checked.exit_code == 1
    assert checked.output.startswith("Error: address must be HOST:PORT"), "before anything is checked"
    (tmp_path / "image.png").touch()
    with pytest.raises(ConfigError, match="RAY_ADDRESS must be HOST:PORT"):
        extract(tmp_path, tmp_path / "out", pool="dinov3")


def test_a_new_ray_is_none_that_a_pool_runs_in() -> None:
    with pytest.raises(ConfigError, match="that names no running Ray"):
        connect("local")
