"""The part of ``dinov3-ray bench dataset`` that reads rows beside other tools; it needs no Ray."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dinov3_ray.bench.dataset.reading import PeerRead, measure_peers, peers_table


def shown(peers: list[PeerRead]) -> str:
    text = io.StringIO()
    Console(file=text, width=200).print(peers_table(peers))
    return text.getvalue()


@pytest.mark.slow
def test_tools_that_are_not_installed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lance", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    peers = measure_peers(tmp_path, 8, 2)
    assert [len(peer.microseconds) for peer in peers] == [2, 2, 0, 0, 0]
    assert peers[0].times(peers[0]) == 1
    assert "Lance, an export (not installed: pip install 'dinov3-ray[lance]')" in shown(peers)
    assert "format torch (not installed: pip install 'dinov3-ray[datasets]')" in shown(peers)
    assert peers[2].as_dict(peers[0])["times_the_store"] is None


@pytest.mark.slow
@pytest.mark.parametrize("package", ["lance", "datasets"])
def test_tools_that_are_installed_give_the_same_rows(package: str, tmp_path: Path) -> None:
    """A wrong row would be an error."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    peers = [peer for peer in measure_peers(tmp_path, 8, 1) if package in peer.name.lower()]
    assert peers
    assert all(peer.median for peer in peers)
