"""A cluster that asks for a token, and clients that were not told to show one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from script_process import run_script


def environment(home: Path, **more: str) -> dict[str, str]:
    """That of a user at ``home``, who has set nothing for Ray but ``more``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    return {**kept, "HOME": str(home), **more}


def client(address: str, given: dict[str, str]) -> dict[str, object]:
    return run_script("token_client.py", address, env=given, timeout=200)[0]


def put_token(home: Path, text: str) -> Path:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.touch(mode=0o600)
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def token(ray_cluster: str) -> str:
    return Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()


def test_rays_own_token_is_used_where_one_is_asked_for(ray_cluster: str, token: str, tmp_path: Path) -> None:
    path = put_token(tmp_path, token)
    seen = client(ray_cluster, environment(tmp_path))
    assert (seen["error"], seen["ready"]) == ("", 1)
    assert seen["heard"] == [f"the Ray at {ray_cluster} asks for a token: the one in {path} is used"], "once"
    assert seen["mode"] is None, "the environment is left as it was"


def test_a_command_uses_it_too(ray_cluster: str, token: str, tmp_path: Path) -> None:
    put_token(tmp_path, token)
    command = [sys.executable, "-m", "dinov3_ray", "status", "--name", "nobody", "--address", ray_cluster]
    given = environment(tmp_path)
    ran = subprocess.run(command, env=given, capture_output=True, text=True, timeout=200, check=False)
    assert "asks for a token" in ran.stderr
    assert "Error: no pool named 'nobody'" in ran.stderr


@pytest.mark.parametrize("case", ["none", "another", "turned off"])
def test_where_it_does_not_fit_the_error_says_what_to_do(
    ray_cluster: str, token: str, tmp_path: Path, case: str
) -> None:
    if case != "none":
        put_token(tmp_path, "0" * 64 if case == "another" else token)
    given = environment(tmp_path, **({"RAY_AUTH_MODE": "disabled"} if case == "turned off" else {}))
    seen = client(ray_cluster, given)
    assert "refuses this process's token, or its lack" in str(seen["error"])
    assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in str(seen["error"])
    assert seen["heard"] == []
    assert seen["mode"] == given.get("RAY_AUTH_MODE")
