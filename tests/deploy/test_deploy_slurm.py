"""The Slurm script: its directives, and a run of it with programs of the tests' own in Slurm's and Ray's place."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
from paths import DEPLOY

SCRIPT = DEPLOY / "slurm" / "pool.sbatch"
DIRECTIVE = re.compile(r"#SBATCH --([a-z-]+)(?:=(\S+))?$")
KNOWN = {  # sbatch's own, of those that a pool may need
    "job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "mem", "exclusive", "time", "signal",
    "partition", "account", "output", "constraint",
}  # fmt: skip


def test_directives() -> None:
    lines = SCRIPT.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    found = {}
    for number, line in enumerate(lines):
        if line.startswith("#SBATCH"):
            match = DIRECTIVE.match(line)
            assert match, line
            found[match[1]] = match[2]
            assert all(earlier.startswith("#") for earlier in lines[:number]), (
                "sbatch stops reading at the first command"
            )
    assert found.keys() <= KNOWN
    assert found["ntasks-per-node"] == "1"
    assert re.fullmatch(r"(\d+-)?\d{1,2}:\d\d:\d\d", found["time"])
    assert found["signal"] == "B:TERM@120", "the shell is told before Slurm kills all"


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment in which srun runs what it is given here, and nodes note what they were started with."""
    programs = {
        "scontrol": "printf 'n0\\nn1\\nn2\\n'",
        "hostname": "echo 127.0.0.1",
        # By which the nodes look whether their ports are free: whatever runs on this machine does not matter here.
        "grep": 'exit "${PORT_IN_USE:-1}"',
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        # A node: runs until it is told to end.
        "ray": 'trap "echo ended >>$NOTES/nodes; exit" TERM; echo "$@" >>"$NOTES/nodes"; while :; do sleep 0.1; done',
        # As the real one does, it waits for the nodes.
        "dinov3-ray": 'until [[ $(wc -l <"$NOTES/nodes") -ge 3 ]]; do sleep 0.1; done 2>/dev/null\n'
        'echo "$@ $RAY_ADDRESS $RAY_AUTH_MODE" >>"$NOTES/pools"; exit "${UP_STATUS:-0}"',
        "train": 'cat "$RAY_AUTH_TOKEN_PATH" >"$NOTES/token"; exit 7',
    }
    for name, body in programs.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/usr/bin/env bash\n{body}\n")
        program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY", "SLURM"))}
    return kept | {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "NOTES": str(tmp_path),
        "HOME": str(tmp_path),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "n[0-2]",
        "SLURM_SUBMIT_DIR": str(DEPLOY.parent),
    }


def submit(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def head() -> object:
    """Something that listens at the head's port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", 6379))
        except OSError:
            yield None  # somebody else listens there: as good
            return
        listener.listen()
        yield None


def test_a_run(slurm: dict[str, str], head: object, tmp_path: Path) -> None:
    done = submit(slurm, "pool.yaml", "train")
    assert done.returncode == 7, f"the command's status is the job's: {done.stderr}"
    nodes = (tmp_path / "nodes").read_text().splitlines()
    started = [line for line in nodes if line != "ended"]
    assert len(started) == 3
    assert nodes.count("ended") == 3, "each node was told to end, and did"
    (first,) = [line for line in started if "--head" in line.split()]
    assert "--labels role=trainer" in first
    for line in started:
        assert line == first or "--address 127.0.0.1:6379" in line
        assert line == first or "--labels role=teacher" in line
        assert "--temp-dir /tmp/dinov3-42" in line
    assert (tmp_path / "pools").read_text() == "up --config pool.yaml 127.0.0.1:6379 token\n"
    assert re.fullmatch(r"[0-9a-f]{64}", (tmp_path / "token").read_text())
    assert not (tmp_path / ".dinov3-ray" / "42" / "token").exists()


def test_a_pool_that_does_not_start_ends_the_job(slurm: dict[str, str], head: object, tmp_path: Path) -> None:
    done = submit({**slurm, "UP_STATUS": "3"}, "pool.yaml", "train")
    assert done.returncode == 3
    assert not (tmp_path / "token").exists(), "nothing was trained"
    assert (tmp_path / "nodes").read_text().splitlines().count("ended") == 3


def test_a_head_that_ends_ends_the_job_and_says_why(slurm: dict[str, str], tmp_path: Path) -> None:
    done = submit({**slurm, "PORT_IN_USE": "0"}, "pool.yaml", "train")
    assert done.returncode == 1
    assert "the head node ended" in done.stderr
    assert "head.sh: port 6379 is in use" in done.stderr
    assert not (tmp_path / "pools").exists()


def test_usage(slurm: dict[str, str], tmp_path: Path) -> None:
    done = submit(slurm, "pool.yaml")
    assert done.returncode == 2
    assert "usage: sbatch pool.sbatch POOL_FILE COMMAND" in done.stderr
    assert not (tmp_path / "nodes").exists()
