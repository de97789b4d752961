"""A sweep on a real SLURM of one node: a job is killed, the same command goes on, same records.

Needs root, and of Debian: apt-get install slurm-wlm munge. Skipped elsewhere. The cluster's files
are in a temporary folder, and its daemons are stopped at the end.
"""
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT
from test_executors import events, flags, swept

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scancel")
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


def job_of(out: Path, run: str) -> str:
    """The job that makes a run, once the first round is under way."""
    log = out / "sweep" / "jobs" / f"{run}.log"
    for _ in range(3000):
        if (out / "sweep" / run / "round_0.tmp").exists():
            return re.search(r"Submitted batch job (\d+)", log.read_text())[1]
        time.sleep(0.1)
    raise AssertionError(f"{run} was never seen under way: {log.read_text()}")


def test_a_killed_job_is_told_and_the_same_command_goes_on(slurm, tiny_folder, tmp_path):
    # 1. what sbatch refuses is told in its own words
    out, long = tmp_path / "cluster", ("--epochs", 20)
    refused = swept(tiny_folder, out, *long, "--executor", "slurm", "--sbatch=--partition none")
    assert refused.returncode == 1 and "Invalid partition name specified" in refused.stdout

    # 2. a job that is killed in the middle of a round
    slurm_flags = (*long, "--executor", "slurm", "--sbatch=--time 60")
    command = [sys.executable, "-m", "tools.sweep", *flags(tiny_folder, out), *slurm_flags]
    first = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    subprocess.run(["scancel", job_of(out, "kl_rev_rmse_s0")], check=True)
    told, error = first.communicate(timeout=1800)
    assert first.returncode == 1 and "did not finish: kl_rev_rmse_s0; fix: " in error
    assert re.search(r"kl_rev_rmse_s0 failed: .*CANCELLED AT", told), told
    assert "waiting for kl_rev_rmse_s0, " in told and not (out / "records").exists()

    # 3. the same command again, and in one process
    done_before = (out / "sweep" / "nll_s0" / "events.jsonl").stat().st_mtime
    again = swept(tiny_folder, out, *slurm_flags)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "2 runs in" in again.stdout and ", 1 to do" in again.stdout
    assert (out / "sweep" / "nll_s0" / "events.jsonl").stat().st_mtime == done_before
    here = swept(tiny_folder, tmp_path / "here", *long)
    assert here.returncode == 0 and events(out) == events(tmp_path / "here")
