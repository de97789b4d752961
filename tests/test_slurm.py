"""A sweep on a real SLURM of one node: a job is killed, the same command goes on, same table.

    pytest -s tests/test_slurm.py

Needs root, and of Debian: apt-get install slurm-wlm munge. Skipped elsewhere. The cluster's files
are in a temporary folder, and its daemons are stopped at the end.
"""
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import runs
from test_executors import flags, swept

pytest.importorskip("submitit")
PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "squeue", "scancel")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)),
    reason="needs root, and the packages slurm-wlm and munge")]

CONF = """ClusterName=try
SlurmctldHost={host}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={port}
SlurmdPort={next_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
KillWait=1
NodeName={host} CPUs=2 RealMemory=1000
PartitionName=all Nodes=ALL Default=YES
"""


@contextlib.contextmanager
def started(folder: Path, *command):
    """A daemon in the foreground, as long as the block lasts."""
    log = (folder / f"{Path(command[0]).name}.log").open("w")
    process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


@pytest.fixture
def slurm(monkeypatch):
    """One node, ready for jobs."""
    folder = Path("/tmp") / f"slurm_{os.getpid()}"  # a socket's path is at most 107 characters
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    conf = folder / "slurm.conf"
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, port=port,
                                next_port=port + 1))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    munge = [f"--{name}={folder / 'munge' / name}" for name in ("socket", "pid-file", "log-file",
                                                                "seed-file")]
    try:
        with started(folder, "munged", "--foreground", "--force", f"--key-file={key}", *munge), \
             started(folder, "slurmctld", "-D"), started(folder, "slurmd", "-D"):
            for _ in range(60):
                answer = subprocess.run(["srun", "--immediate=5", "true"], capture_output=True)
                if answer.returncode == 0:
                    break
                time.sleep(1)
            assert answer.returncode == 0, answer.stderr
            yield
    finally:
        shutil.rmtree(folder)


def job_of(run: Path) -> str | None:
    """The id of the job that works on a run, which its log names."""
    for log in (run.parent / "jobs").glob("*_0_log.out"):
        if str(run) in log.read_text():
            return log.name.removesuffix("_0_log.out")


def kill_when_under_way(run: Path, sweep: subprocess.Popen) -> str:
    """Kill the job of a run whose first round is being made; -> its id."""
    while sweep.poll() is None:
        if (run / "round_0.tmp").exists() and job_of(run):
            job = job_of(run)
            subprocess.run(["scancel", job], check=True)
            return job
        time.sleep(0.1)
    raise AssertionError(f"{run} was never seen under way: {sweep.communicate()}")


def test_a_killed_job_is_made_up_for_by_the_same_command_and_the_table_is_the_local_one(
        slurm, tiny_folder, tmp_path):
    # 1. the sweep, and a job of it killed in the middle of a round
    out, long = tmp_path / "cluster", ("--epochs", "20")
    how = (*long, "--executor", "slurm", "--hours", "1")
    out.mkdir()
    command = [sys.executable, "-m", "tools.sweep", *flags(tiny_folder, out), *how]
    first = subprocess.Popen([str(word) for word in command], cwd=out, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    job = kill_when_under_way(out / "sweep" / "kl_rev_rmse_s0", first)
    _, said = first.communicate(timeout=1800)
    log = (out / "sweep" / "jobs" / f"{job}_0_log.err").read_text()
    print(f"\njob {job} killed; the sweep ends with:\n  {said.strip()}\nits log:\n  {log.strip()}")
    assert first.returncode == 1 and "did not finish: kl_rev_rmse_s0; fix: " in said
    assert not (out / "arms.md").exists()

    # 2. the same command again
    done_before = (out / "sweep" / "nll_s0" / "events.jsonl").stat().st_mtime
    again = swept(tiny_folder, out, *how)
    print("the same command again:\n  " + again.stdout.split("\n")[0])
    assert again.returncode == 0, again.stderr
    assert "2 runs in" in again.stdout and ", 1 to do" in again.stdout
    assert (out / "sweep" / "nll_s0" / "events.jsonl").stat().st_mtime == done_before

    # 3. and in one process
    here = swept(tiny_folder, tmp_path / "here", *long)
    assert here.returncode == 0, here.stderr
    table = (out / "arms.md").read_text()
    assert table == (tmp_path / "here" / "arms.md").read_text()
    print("the same table as in one process:\n" + table)
