"""`dinov3-ray doctor` on a healthy machine and cluster, and on broken ones: each trouble named, with a remedy."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from commandline import run_command
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from dinov3_ray.doctor.cluster_checks import check_packages, check_token
from dinov3_ray.doctor.machine_checks import Severity, check_descriptors, check_versions, installed_versions

Findings = dict[str, dict[str, str]]


def doctor(*arguments: object, prefix: tuple[str, ...] = (), token: str | None = None) -> tuple[int, Findings]:
    """The command in a process of its own: (exit status, findings by subject)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["OMP_NUM_THREADS"] = "1"
    if token is not None:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
    command = [*prefix, sys.executable, "-m", "dinov3_ray", "doctor", "--json", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, by_subject(done.stdout)


def doctor_here(*arguments: object) -> tuple[int, Findings]:
    """The command in this process, where it needs no other environment: starting one takes seconds."""
    done = run_command("doctor", "--json", *arguments, RAY_ADDRESS=None)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, by_subject(done.stdout)


def by_subject(text: str) -> Findings:
    findings = [json.loads(line) for line in text.splitlines()]
    for finding in findings:
        needs_one = finding["verdict"] in (Severity.PROBLEM, Severity.WARNING)
        assert bool(finding["remedy"]) == needs_one, finding
    return {finding["subject"]: finding for finding in findings}


def problems(findings: Findings) -> set[str]:
    return {subject for subject, finding in findings.items() if finding["verdict"] == Severity.PROBLEM}


@pytest.fixture
def token(ray_cluster: str) -> str:
    return os.environ["RAY_AUTH_TOKEN_PATH"]


def test_healthy(ray_cluster: str, token: str, tiny_checkpoint: Path) -> None:
    status, findings = doctor("--address", ray_cluster, "--root", tiny_checkpoint, token=token)
    assert problems(findings) == set(), findings
    assert status == 0
    assert str(tiny_checkpoint) in findings["model"]["message"]
    assert "a replica in the cluster was up" in findings["round trip"]["message"]
    assert "dinov3-ray, ray, torch, transformers are the same" in findings["nodes' packages"]["message"]
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


def test_shared_memory_too_small() -> None:
    """In a mount namespace of its own, whose /dev/shm is what Docker gives by default."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("mount namespaces cannot be made here")
    script = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    status, findings = doctor(prefix=("unshare", "-m", "sh", "-c", script, "sh"))
    assert (status, problems(findings)) == (1, {"shared memory"})
    assert "0.1 GiB" in findings["shared memory"]["message"]
    assert "--shm-size" in findings["shared memory"]["remedy"]


def test_root_missing(tmp_path: Path) -> None:
    status, findings = doctor_here("--root", tmp_path / "nowhere")
    assert (status, problems(findings)) == (1, {"model"})
    assert "nowhere is missing" in findings["model"]["message"]
    assert findings["round trip"]["verdict"] == Severity.SKIPPED


def test_no_gpu_where_one_is_asked_for() -> None:
    status, findings = doctor_here("--gpus", 64)
    assert (status, problems(findings)) == (1, {"GPUs"})
    assert "64 asked for with --gpus" in findings["GPUs"]["message"]
    assert "nvidia-smi" in findings["GPUs"]["remedy"]


@pytest.fixture
def cluster_of_another_version(ray_cluster: str) -> Iterator[str]:
    """The tests' Ray, which says of itself that it is older: what a client compares itself with."""
    key, namespace = b"CLUSTER_METADATA", b"cluster"
    told = _internal_kv_get(key, namespace=namespace)
    other = json.dumps({**json.loads(told), "ray_version": "2.55.0"})
    _internal_kv_put(key, other.encode(), overwrite=True, namespace=namespace)
    yield ray_cluster
    _internal_kv_put(key, told, overwrite=True, namespace=namespace)


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


def test_old_versions() -> None:
    assert check_versions(installed_versions()).verdict is Severity.FINE
    found = check_versions({**installed_versions(), "ray": "2.53.1"})
    assert (found.verdict, found.message) == (Severity.PROBLEM, "ray is 2.53.1, older than 2.54")
    assert "pip install 'ray>=2.54'" in found.remedy


def test_tokens_that_will_not_do(tmp_path: Path) -> None:
    path = tmp_path / ".ray" / "auth_token"
    environment = {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}

    def verdict(**more: str) -> tuple[Severity, str]:
        found = check_token(environment | more, "head:6379")
        return found.verdict, found.message

    assert verdict() == (Severity.PROBLEM, f"{path} cannot be read: No such file or directory")
    path.parent.mkdir()
    path.touch(mode=0o644)
    assert verdict() == (Severity.PROBLEM, f"{path} is empty")
    path.write_text("secret")
    assert verdict() == (Severity.WARNING, f"others may read {path} (mode 644)")
    path.chmod(0o600)
    assert verdict() == (Severity.FINE, f"in {path}")
    assert verdict(RAY_AUTH_TOKEN="secret")[0] is Severity.WARNING
    assert check_token({}, None).verdict is Severity.SKIPPED


def test_file_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for limit, verdict in ((512, Severity.PROBLEM), (4096, Severity.WARNING)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            found = check_descriptors()
            assert found.verdict is verdict
            assert "ulimit -n" in found.remedy
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
