"""Kills, full disks and interruptions of a tiny run, each compared with a run that was left alone.

One process that has imported everything forks a child per attempt; on one thread, for threads do
not live on in a child. test_run.py writes a scenario's name to stdin, and reads what came of it.
"""
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path.insert(0, str(Path(__file__).parent.parent))
import heal_loop  # noqa: E402
from common import runs, texts  # noqa: E402

FLAGS, WORK, texts.DATA = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
WHOLE, ERRORS = WORK / "whole", WORK / "stderr"


def attempt(flags, before=lambda: None) -> int:
    """Start `python heal_loop.py flags` in a forked child; -> its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(ERRORS, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    code = 70
    try:
        before()
        sys.argv = ["heal_loop.py", *flags]
        runs.cli(heal_loop.Config, heal_loop.main)
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def stderr() -> str:
    return ERRORS.read_text()


def begin(out):
    """The flags that go on with a run, or start it where it never got as far as its settings."""
    if (out / "config.json").exists():
        return ["--resume", str(out)]
    return [*FLAGS, "--out", str(out)]


def finish(out) -> None:
    assert wait(attempt(begin(out))) == 0, stderr()


def contents(folder) -> dict:
    """Every file of a run but the lock and half-written ones; events without their seconds."""
    found = {}
    for file in folder.rglob("*"):
        if not file.is_file() or file.name == "lock" or ".tmp" in str(file):
            continue
        data = file.read_bytes()
        if file.name == "events.jsonl":
            events = [json.loads(line) for line in data.splitlines()]
            data = [{k: v for k, v in e.items() if k != "seconds"} for e in events]
        found[str(file.relative_to(folder))] = data
    return found


def assert_same_as_whole(folder) -> None:
    a, b = contents(WHOLE), contents(folder)
    assert a.keys() == b.keys(), (sorted(a), sorted(b))
    different = [name for name in a if a[name] != b[name]]
    assert not different, different


def one_line(*words) -> None:
    text = stderr()
    assert text.count("error:") == 1 and "Traceback" not in text, text
    assert all(word in text for word in words), text


# ---- scenarios ----------------------------------------------------------------------------------


def killed_at_random_moments() -> str:
    random.seed(0)
    start = time.time()
    finish(WORK / "again")
    span = time.time() - start
    assert_same_as_whole(WORK / "again")
    kills = 0
    for n in range(3):
        out = WORK / f"killed{n}"
        for _ in range(4):
            pid = attempt(begin(out))
            time.sleep(random.uniform(0.05, 0.9) * span)
            os.kill(pid, signal.SIGKILL)
            kills += wait(pid) == -signal.SIGKILL
        finish(out)
        assert_same_as_whole(out)
    assert kills > 6
    return f"{kills} kills at random moments, all equal"


def kill_at(n):
    """-> a function after which this process kills itself within its n-th write."""
    def install():
        seen, replace, record = itertools.count(1), os.replace, runs.Run.record

        def killed_replace(source, target):
            if next(seen) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        def killed_record(run, *args, **kwargs):
            if next(seen) == n:  # half a line
                with open(run.under_way / "events.jsonl", "ab") as file:
                    file.write(b'{"stage": "he')
                os.kill(os.getpid(), signal.SIGKILL)
            return record(run, *args, **kwargs)
        os.replace, runs.Run.record = killed_replace, killed_record
    return install


def killed_at_every_write() -> str:
    left = set()
    for n in itertools.count(1):
        out = WORK / f"write{n}"
        code = wait(attempt([*FLAGS, "--out", str(out)], kill_at(n)))
        if code == 0:
            break
        assert code == -signal.SIGKILL, (code, stderr())
        left |= {path.name for path in out.rglob("*.tmp")}
        finish(out)
        assert_same_as_whole(out)
    assert n > 10 and {"start.tmp", "round_0.tmp", "report.html.tmp"} <= left, (n, left)
    return f"{n - 1} kills, within each of the run's writes, all equal"


def disk_full() -> str:
    disk = WORK / "disk"
    disk.mkdir()
    size = sum(len(data) for data in contents(WHOLE).values())
    full = 0
    for share in (0.002, 0.01, 0.03):
        room = int(share * size) // 4096 * 4096 or 4096
        mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            return "no mount"
        try:
            out = disk / "run"
            assert wait(attempt([*FLAGS, "--out", str(out)])) == 1
            one_line("o space")
            full += 1
            subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
            finish(out)
            assert_same_as_whole(out)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return f"{full} full disks, all told in one line and resumed equal"


def in_first_round(out, sign) -> int:
    """Start a run and send it a signal once its first round is under way; -> its process id."""
    pid = attempt([*FLAGS, "--out", str(out)])
    while not (out / "round_0.tmp" / "vector.safetensors").exists():
        time.sleep(0.005)
    os.kill(pid, sign)
    return pid


def no_write_permission() -> str:
    out = WORK / "locked"
    wait(in_first_round(out, signal.SIGKILL))

    def unprivileged():
        if os.getuid() == 0:
            os.setuid(65534)
    for path, mode in ((WORK, 0o755), (out, 0o555), (ERRORS, 0o666)):
        os.chmod(path, mode)
    assert wait(attempt(["--resume", str(out)], unprivileged)) == 1
    one_line("ermission")
    os.chmod(out, 0o755)
    finish(out)
    assert_same_as_whole(out)
    return "no write permission: told in one line and resumed equal"


def interrupted_and_shared() -> str:
    out = WORK / "stopped"
    pid = in_first_round(out, signal.SIGSTOP)
    assert wait(attempt(["--resume", str(out)])) == 1
    one_line("another process is at work")
    os.kill(pid, signal.SIGCONT)
    os.kill(pid, signal.SIGINT)
    code = wait(pid)
    assert code == 130, f"exit code {code}: {stderr()}"
    assert "--resume" in stderr() and not list(out.glob("round_0*"))
    assert wait(attempt(["--resume", str(out), "--lam", "7"])) == 1
    one_line("--lam 7.0 was 2.0")
    events = out / "events.jsonl"
    events.write_bytes(events.read_bytes()[:-20])  # a torn last line
    finish(out)
    assert_same_as_whole(out)
    return "interrupted, refused a second process and a changed setting, survived a torn line"


if __name__ == "__main__":
    finish(WHOLE)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        try:
            answer = globals()[line.strip()]()
        except BaseException:
            answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)
