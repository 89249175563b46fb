"""`dinov3-ray doctor` on a healthy cluster, and on broken ones: each trouble is named, with a remedy."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from diagnosis import doctor, problems
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from dinov3_ray.doctor.cluster_checks import check_packages
from dinov3_ray.doctor.machine_checks import Severity, installed_versions


@pytest.fixture
def token(ray_cluster: str) -> str:
    return os.environ["RAY_AUTH_TOKEN_PATH"]


def test_healthy(ray_cluster: str, token: str, tiny_checkpoint: Path) -> None:
    status, findings = doctor("--address", ray_cluster, "--root", tiny_checkpoint, token=token)
    assert problems(findings) == set(), findings
    assert status == 0
    assert str(tiny_checkpoint) in findings["model"]["message"]
    assert "a replica in the cluster was up" in findings["round trip"]["message"]
    assert "dinov3-ray, ray, torch, transformers have the same versions" in findings["nodes' packages"]["message"]
    assert findings["resources"]["message"].startswith("nodes: 1, with 4 CPUs")
    assert findings["object store"]["verdict"] == Severity.WARNING, "the tests' store is small"


def test_no_token(ray_cluster: str) -> None:
    status, findings = doctor("--address", ray_cluster)
    assert status == 1
    assert problems(findings) == {"token", "cluster"}
    assert "RAY_AUTH_MODE=token" in findings["token"]["remedy"]
    assert findings["round trip"]["verdict"] == Severity.SKIPPED


def test_wrong_token(ray_cluster: str, tmp_path: Path) -> None:
    other = tmp_path / "token"
    other.touch(mode=0o600)
    other.write_text("0" * 64)
    status, findings = doctor("--address", ray_cluster, token=str(other))
    assert (status, problems(findings)) == (1, {"cluster"})
    assert "refuses this process's token" in findings["cluster"]["message"]


@pytest.fixture
def cluster_of_another_version(ray_cluster: str) -> Iterator[str]:
    """The tests' Ray, which says of itself that it is older: what a client compares itself with."""
    key, namespace = b"CLUSTER_METADATA", b"cluster"
    metadata = _internal_kv_get(key, namespace=namespace)
    other = json.dumps({**json.loads(metadata), "ray_version": "2.55.0"})
    _internal_kv_put(key, other.encode(), overwrite=True, namespace=namespace)
    yield ray_cluster
    _internal_kv_put(key, metadata, overwrite=True, namespace=namespace)


def test_version_mismatch(cluster_of_another_version: str, token: str) -> None:
    status, findings = doctor("--address", cluster_of_another_version, token=token)
    assert (status, problems(findings)) == (1, {"cluster's versions"})
    message = findings["cluster's versions"]["message"]
    assert "2.55.0" in message
    assert ray.__version__ in message


def test_other_packages_on_a_node(ray_cluster: str) -> None:
    found = check_packages({**installed_versions(), "dinov3-ray": "0.0.9", "no-such-package": "1"}, 60)
    assert found.verdict is Severity.PROBLEM
    version = installed_versions()["dinov3-ray"]
    assert f"has dinov3-ray {version} (here 0.0.9), no-such-package missing (here 1)" in found.message


def test_token_file_missing(ray_cluster: str) -> None:
    status, findings = doctor("--address", ray_cluster, token="/nowhere")
    assert (status, problems(findings)) == (1, {"token", "cluster"})
    assert "/nowhere" in findings["cluster"]["message"]
    assert "RAY_AUTH_TOKEN_PATH" in findings["cluster"]["remedy"]


def test_nothing_listens() -> None:
    status, findings = doctor("--address", "127.0.0.1:1", token="/nowhere")
    assert (status, problems(findings)) == (1, {"token", "cluster"})
    assert "no Ray answers at address 127.0.0.1:1" in findings["cluster"]["message"]
