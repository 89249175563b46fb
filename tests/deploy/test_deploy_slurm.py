"""The Slurm script: its directives, and a run of it with programs of the tests' own in Slurm's and Ray's place."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
from paths import DEPLOY
from waiting import until

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


# Knows what the steps here may ask for, and gives them no more, as Slurm does from 22.05 on: one CPU if they ask for
# none. A step without --overlap would wait until all others have ended.
SRUN = """
overlaps= cpus=1 node= nodes= tasks=
while [[ $1 == -* ]]; do
    case $1 in
        --overlap) overlaps=1 ;;
        --nodes=*) nodes=${1#*=} ;;
        --ntasks=*) tasks=${1#*=} ;;
        --cpus-per-task=*) cpus=${1#*=} ;;
        --nodelist=*) node=${1#*=} ;;
        *) echo "srun: unrecognized option '$1'" >&2; exit 1 ;;
    esac
    shift
done
[[ $nodes == 1 && $tasks == 1 && $node == n[0-2] ]] ||
    { echo "srun: Requested node configuration is not available: '$nodes' '$tasks' '$node'" >&2; exit 1; }
[[ $overlaps ]] || { echo "srun: Step creation temporarily disabled (Requested nodes are busy)" >&2; exit 1; }
[[ $cpus -ge 1 && $cpus -le $SLURM_CPUS_ON_NODE ]] ||
    { echo "srun: More processors requested than permitted: '$cpus'" >&2; exit 1; }
export SLURMD_NODENAME=$node STEP_CPUS=$cpus
exec "$@"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment in which srun runs what it is given here, and nodes note what they were started with."""
    programs = {
        "scontrol": "printf 'n0\\nn1\\nn2\\n'",
        # How each node sees the first one, and the first one itself.
        "getent": '[[ $1 == ahosts && $2 == n0 ]] && cat "$NOTES/seen-from-$SLURMD_NODENAME"',
        "hostname": '[[ $1 == --all-ip-addresses ]] && cat "$NOTES/addresses-of-$SLURMD_NODENAME"',
        # By which the nodes look whether their ports are free: whatever runs on this machine does not matter here.
        "grep": 'exit "${PORT_IN_USE:-1}"',
        "srun": SRUN,
        # A node: runs until it is told to end.
        "ray": 'trap "echo ended >>$NOTES/nodes; exit" TERM; echo "$SLURMD_NODENAME $STEP_CPUS $*" >>"$NOTES/nodes"\n'
        "while [[ -z ${RAY_FAILS:-} ]]; do sleep 0.1; done",
        # As the real one does, it waits for the nodes.
        "dinov3-ray": 'until [[ $(wc -l <"$NOTES/nodes") -ge 3 ]]; do sleep 0.1; done 2>/dev/null\n'
        'echo "$@ $RAY_ADDRESS $RAY_AUTH_MODE" >>"$NOTES/pools"; exit "${UP_STATUS:-0}"',
        "train": 'cat "$RAY_AUTH_TOKEN_PATH" >"$NOTES/token"; exit 7',
    }
    for name, body in programs.items():
        write_program(tmp_path, name, body)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY", "SLURM"))}
    return kept | {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "NOTES": str(tmp_path),
        "HOME": str(tmp_path),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "n[0-2]",
        "SLURM_SUBMIT_DIR": str(DEPLOY.parent),
        "SLURM_CPUS_ON_NODE": "64",
        "SLURM_CPUS_PER_TASK": "16",
        "DINOV3_HEAD_IP": "127.0.0.1",
    }


def write_program(folder: Path, name: str, body: str) -> None:
    program = folder / "bin" / name
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/usr/bin/env bash\n{body}\n")
    program.chmod(0o755)


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
    assert sorted(line.split()[0] for line in started) == ["n0", "n1", "n2"]
    (first,) = [line for line in started if "--head" in line.split()]
    assert first.startswith("n0 ")
    assert "--node-ip-address 127.0.0.1" in first
    assert "--labels role=trainer" in first
    for line in started:
        assert line == first or "--address 127.0.0.1:6379" in line
        assert line == first or "--labels role=teacher" in line
        assert "--temp-dir /tmp/dinov3-42" in line
        assert line.split()[1] == "16", "a step has the CPUs that it asks for"
        assert "--num-cpus 16" in line
    assert (tmp_path / "pools").read_text() == "up --config pool.yaml 127.0.0.1:6379 token\n"
    assert re.fullmatch(r"[0-9a-f]{64}", (tmp_path / "token").read_text())
    assert not (tmp_path / ".dinov3-ray" / "42" / "token").exists()


def test_a_pool_that_does_not_start_ends_the_job(slurm: dict[str, str], head: object, tmp_path: Path) -> None:
    done = submit({**slurm, "UP_STATUS": "3"}, "pool.yaml", "train")
    assert done.returncode == 3
    assert not (tmp_path / "token").exists(), "nothing was trained"
    assert (tmp_path / "nodes").read_text().splitlines().count("ended") == 3


@pytest.mark.slow
def test_a_head_that_ends_ends_the_job_and_says_why(slurm: dict[str, str], tmp_path: Path) -> None:
    done = submit({**slurm, "PORT_IN_USE": "0"}, "pool.yaml", "train")
    assert done.returncode == 1
    assert "the head node ended" in done.stderr
    assert "head.sh: port 6379 is in use" in done.stderr
    assert not (tmp_path / "pools").exists()


FAR = "10.77.0.1 STREAM n0\n10.77.0.1 DGRAM\n"
ADDRESSES: dict[str, tuple[str, str, str]] = {  # n0 as n2 sees it, what n0 says of itself, what is taken
    "the first word is IPv6": ("fd00::9 STREAM n0\n" + FAR, "", "10.77.0.1"),
    "the first word is loopback": ("127.0.1.1 STREAM n0.cluster.local\n" + FAR, "", "10.77.0.1"),
    "link-local ones": ("fe80::1%2 STREAM n0\n169.254.3.4 STREAM\n" + FAR, "", "10.77.0.1"),
    "IPv6 alone": ("::1 STREAM n0\nfd00:77::1 STREAM\nfd00:77::2 STREAM\n", "", "fd00:77::1"),
    "loopback alone": ("127.0.1.1 STREAM n0\n::1 STREAM\n", "fd00::9 10.77.0.8 172.17.0.1 \n", "10.77.0.8"),
    "a name that nobody knows": ("", "fd00::9 \n", "fd00::9"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ADDRESSES)
def test_the_head_has_an_address_that_other_nodes_reach(case: str, slurm: dict[str, str], tmp_path: Path) -> None:
    seen, own, taken = ADDRESSES[case]
    (tmp_path / "seen-from-n2").write_text(seen)
    (tmp_path / "addresses-of-n0").write_text(own)
    write_program(tmp_path, "timeout", "exit 1")  # nothing is there
    del slurm["DINOV3_HEAD_IP"]
    assert submit({**slurm, "RAY_FAILS": "1"}, "pool.yaml", "train").returncode == 1
    started = (tmp_path / "nodes").read_text().splitlines()
    (head,) = [line for line in started if "--head" in line.split()]
    assert f"--node-ip-address {taken} " in f"{head} "
    at = f"[{taken}]:6379" if ":" in taken else f"{taken}:6379"
    assert all(f"--address {at} " in f"{line} " for line in started if line != head)


def test_no_address_ends_the_job(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "addresses-of-n0").write_text("127.0.0.1 ::1\n")
    del slurm["DINOV3_HEAD_IP"]
    done = submit(slurm, "pool.yaml", "train")
    assert done.returncode == 1
    assert "name it in DINOV3_HEAD_IP" in done.stderr
    assert not (tmp_path / "nodes").exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["up", "train"])
def test_a_preempted_job_ends_its_command_before_its_nodes(
    moment: str, slurm: dict[str, str], head: object, tmp_path: Path
) -> None:
    # It saves its state, as a trainer would, and needs the nodes for that.
    saves = (
        'trap \'[[ $(<"$NOTES/nodes") == *ended* ]] || touch "$NOTES/saved"; exit 0\' TERM\n'
        'touch "$NOTES/begun"; while :; do sleep 0.1; done'
    )
    name = {"up": "dinov3-ray", "train": "train"}[moment]
    write_program(tmp_path, name, f'until [[ $(wc -l <"$NOTES/nodes") -ge 3 ]]; do sleep 0.1; done\n{saves}')
    with subprocess.Popen([SCRIPT, "pool.yaml", "train"], env=slurm) as job:
        until(lambda: (tmp_path / "begun").exists(), f"{name} runs")
        job.terminate()
        assert job.wait(60) == 143
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "nodes").read_text().splitlines().count("ended") == 3
    assert not (tmp_path / ".dinov3-ray" / "42" / "token").exists()


def test_usage(slurm: dict[str, str], tmp_path: Path) -> None:
    done = submit(slurm, "pool.yaml")
    assert done.returncode == 2
    assert "usage: sbatch pool.sbatch POOL_FILE COMMAND" in done.stderr
    assert not (tmp_path / "nodes").exists()
