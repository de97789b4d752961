"""Kills, full disks and interruptions of a tiny run, each compared with a run that was left alone.

One process that has imported everything forks a child per attempt; on one thread, for threads do
not live on in a child. test_run.py writes a scenario's name to stdin, and reads what came of it.
"""
import itertools
import json
import os
import resource
import signal
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
    """Start `python heal_loop.py flags` in a forked child, after `before()`; -> its process id."""
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


def finish(out) -> None:
    """Go on with a run, or start it where it never got as far as its settings."""
    begun = (out / "config.json").exists()
    flags = ["--resume", str(out)] if begun else [*FLAGS, "--out", str(out)]
    assert wait(attempt(flags)) == 0, stderr()


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
    sizes = (1_500, 6_000, 40_000)  # of a file, in bytes: events, sampled rows, the adapter
    for size in sizes:
        out, limit = WORK / f"full{size}", (size, size)
        full = attempt([*FLAGS, "--out", str(out)],
                       lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
        assert wait(full) == 1
        one_line("large", "--resume")
        finish(out)
        assert_same_as_whole(out)
    return f"{len(sizes)} full disks, all reported in one line and resumed equal"


def interrupted_and_shared() -> str:
    out = WORK / "stopped"
    pid = attempt([*FLAGS, "--out", str(out)])
    while not (out / "round_0.tmp" / "vector.safetensors").exists():
        time.sleep(0.005)
    os.kill(pid, signal.SIGSTOP)
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
