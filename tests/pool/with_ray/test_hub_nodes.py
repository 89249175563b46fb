"""Nodes that have a cache of the hub each serve the same commit, and say what they lack."""

from __future__ import annotations

import os

import pytest
from script_process import run_script


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_node_finds_the_commit_of_the_configuration() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_A", "HF_"))}
    seen, _ = run_script("hub_nodes.py", env=environment, timeout=580)
    commit, made = seen["commit"], seen["fingerprint"]
    # `main` moved before the pool was started.
    assert seen["origin"] == f"facebook/dinov3-tiny@{commit}"
    assert seen["nodes"] == 2
    assert seen["served"] == [made, made]
    described = ["config.json", "preprocessor_config.json"]
    complete = {commit: sorted([*described, "model.safetensors"])}
    assert seen["held"] == {"a": complete, "b": complete, "driver": {commit: described}}
    # A commit that the nodes may not download.
    assert seen["doctor"].count("is gated: the hub gives it to those whom its owners let in") == 3
    assert "CheckpointError: facebook/dinov3-tiny is gated" in seen["refused"]
    assert "(on node " in seen["refused"]
    # The hub is gone: both nodes have the model, the head has not, and a replica that was killed is back.
    assert seen["doctor, later"].count("ConnectError") == 1
    assert "a part of it, without model.safetensors" in seen["doctor, later"]
    assert seen["served, later"] == [made, made]
    assert seen["manifest"] == [made, f"facebook/dinov3-tiny@{commit}"]
