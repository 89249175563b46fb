"""`dinov3-ray doctor` on a machine without a cluster: each trouble is named, with a remedy."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from commandline import run_command
from diagnosis import Findings, by_subject, doctor, problems
from paths import REPOSITORY

from dinov3_ray.checkpoint import init_checkpoint
from dinov3_ray.doctor.cluster_checks import check_token
from dinov3_ray.doctor.machine_checks import (
    Severity,
    check_descriptors,
    check_model_root,
    check_versions,
    installed_versions,
)


def doctor_here(*arguments: object) -> tuple[int, Findings]:
    """The command in this process, where it needs no other environment: starting one takes seconds."""
    done = run_command("doctor", "--json", *arguments, RAY_ADDRESS=None)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, by_subject(done.stdout)


@pytest.mark.slow
def test_shared_memory_too_small() -> None:
    """In its own mount namespace, whose /dev/shm has Docker's default size."""
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


def test_an_image_size_that_the_patch_does_not_divide(tmp_path: Path) -> None:
    root = init_checkpoint("vit-test", tmp_path / "model", image_size=518)
    found, _ = check_model_root(root)
    assert found.verdict is Severity.WARNING, "it works"
    assert "518 px is the size of DINOv2: 6 px at the right and 6 px below are dropped" in found.message
    assert found.remedy.startswith("--image-size 512 (image_size=512) gives a map of the same 32 x 32, aligned")
    assert check_model_root(root, image_size="input")[0].verdict is Severity.FINE, "that size is not used"
    root = init_checkpoint("vit-test", tmp_path / "fitting", image_size=512)
    assert check_model_root(root)[0].verdict is Severity.FINE


def test_no_gpu_where_one_is_asked_for() -> None:
    status, findings = doctor_here("--gpus", 64)
    assert (status, problems(findings)) == (1, {"GPUs"})
    assert "--gpus 64 asks for more than the" in findings["GPUs"]["message"]
    assert "nvidia-smi" in findings["GPUs"]["remedy"]


def test_old_versions() -> None:
    assert check_versions(installed_versions()).verdict is Severity.FINE
    found = check_versions({**installed_versions(), "ray": "2.57.1"})
    assert (found.verdict, found.message) == (Severity.PROBLEM, "ray is 2.57.1, older than 2.59")
    assert "pip install 'ray>=2.59'" in found.remedy


def test_the_least_versions_are_those_of_the_package() -> None:
    needed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = dict(re.fullmatch(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", one).groups() for one in needed)  # type: ignore[union-attr]
    for name in ("ray", "torch", "transformers"):
        assert check_versions({**installed_versions(), name: bounds[name]}).verdict is Severity.FINE
        assert f"older than {bounds[name]}" in check_versions({**installed_versions(), name: "0.1"}).message


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
    assert verdict(RAY_AUTH_MODE="") == (Severity.FINE, f"in {path}"), "clients show it where they are asked for one"
    assert verdict(RAY_AUTH_MODE="disabled")[0] is Severity.PROBLEM
    assert verdict(RAY_AUTH_MODE="", HOME="/nowhere")[0] is Severity.PROBLEM
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
