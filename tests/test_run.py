"""Whole runs: the smoke run on the embedded model, and a tiny one that is killed, starved of disk and resumed."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import distil
import heal_loop
import lora
import models
import plot
from conftest import ROOT, tiny
from steer import SteeringVector

SMOKE = "--rounds 1 --n-keep 8 --max-new-tokens 24 --n-vignettes 14 --epochs 1"
FILES = ["adapter.safetensors", "config.json", "events.jsonl", "kept_r0.jsonl", "map.html", "report.html", "sampled_r0.jsonl", "trajectory.png",
         "vector_r0.safetensors"]


def python(*args, cwd=ROOT, **kw):
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, **kw)


def test_the_smoke_run_leaves_a_whole_run_folder(tmp_path):
    out = tmp_path / "run"
    done = python("heal_loop.py", *SMOKE.split(), "--out", out)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in out.iterdir()} == {*FILES, "lock"}
    assert "base" in done.stdout and "healed r0" in done.stdout and "coh_cost" in done.stdout
    said = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "it/s" not in line and "/" not in line]
    assert said == [], "a library spoke"
    events = distil.read_jsonl(out / "events.jsonl")
    assert [e["stage"] for e in events] == ["base", "prompted", "extract", "distil", "steered", "heal", "healed", "matched"]
    kept = distil.read_jsonl(out / "kept_r0.jsonl")
    assert len(kept) == 8 and all([m["role"] for m in k["messages"]] == ["system", "user", "assistant"] and k["verdict"] == "kept" for k in kept)
    assert "/root" not in (out / "config.json").read_text() and str(ROOT) not in "".join((out / f).read_text() for f in FILES if f.endswith(("json", "jsonl", "html")))
    again = python("plot.py", out)
    assert again.returncode == 0, again.stderr
    model, tok = models.load("smollm2")
    lora.load(model, out / "adapter.safetensors")
    assert lora.n_rounds(model) == 1


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A random Llama with the embedded model's tokenizer: the loop's every stage in about two seconds."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tiny("llama", vocab_size=49152, max_position_embeddings=512, eos_token_id=2).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(models.embedded_folder() / name, folder)
    return folder


def flags(folder):
    return ["--model", str(folder), *("--rounds 1 --n-keep 6 --max-new-tokens 12 --n-vignettes 14 --epochs 2 --batch-size 2 --n-contexts 4 "
            "--max-perplexity 1e9 --min-diversity 0 --max-repetition 1 --dtype float32 --no-baselines").split()]


# One process that has imported everything forks a child per attempt; one thread, since a forked OpenMP pool is dead.
DRIVER = """
import json, os, random, shutil, signal, sys, time
import torch
torch.set_num_threads(1)
import heal_loop, lora, models, steer
from pathlib import Path
flags, work = json.loads(sys.argv[1]), Path(sys.argv[2])

def attempt(flags, before=lambda: None):
    pid = os.fork()
    if pid == 0:
        devnull = os.open(os.devnull, os.O_WRONLY); os.dup2(devnull, 1)
        err = os.open(work / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC); os.dup2(err, 2)
        code = 70
        try:
            before(); sys.argv = ["heal_loop.py", *flags]
            models.cli(heal_loop.Config, heal_loop.main); code = 0
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            import traceback; traceback.print_exc()
        finally:
            sys.stderr.flush(); os._exit(code)
    return pid

def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def contents(folder):
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "lock"}
    events = [json.loads(l) for l in files["events.jsonl"].splitlines()]
    for e in events: e.pop("seconds", None)
    return files | {"events.jsonl": json.dumps(events).encode()}

def same(folder):
    a, b = contents(work / "whole"), contents(folder)
    assert a.keys() == b.keys(), (sorted(a), sorted(b))
    different = [k for k in a if a[k] != b[k]]
    assert not different, different

def begin(out):
    return ["--resume", str(out)] if (out / "config.json").exists() else [*flags, "--out", str(out)]

assert wait(attempt([*flags, "--out", str(work / "whole")])) == 0, (work / "stderr").read_text()
"""

RANDOM_KILLS = DRIVER + """
random.seed(0)
start = time.time(); shutil.rmtree(work / "again", ignore_errors=True)
assert wait(attempt([*flags, "--out", str(work / "again")])) == 0
span = time.time() - start
same(work / "again")
kills, runs = 0, 0
while kills < 20:
    out = work / f"killed{runs}"; runs += 1
    while True:
        pid = attempt(begin(out))
        time.sleep(random.uniform(0.05, 0.6) * span)
        os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        if code == 0:
            break
        assert code == -signal.SIGKILL, (code, (work / "stderr").read_text())
        kills += 1
        if not out.exists() or not (out / "config.json").exists(): shutil.rmtree(out, ignore_errors=True)
        if kills >= 20 + 5 * runs:
            assert wait(attempt(begin(out))) == 0, (work / "stderr").read_text(); break
    same(out)
print(f"{kills} kills at random moments, {runs} runs, all equal")
"""

WRITE_KILLS = DRIVER + """
def kill_at(n):
    def install():
        real, seen = os.replace, [0]
        def replace(src, dst):
            seen[0] += 1
            if seen[0] == n: os.kill(os.getpid(), signal.SIGKILL)
            real(src, dst)
        os.replace = replace
    return install
n, kinds = 0, set()
while True:
    n += 1
    out = work / f"write{n}"
    code = wait(attempt([*flags, "--out", str(out)], kill_at(n)))
    if code == 0: break
    assert code == -signal.SIGKILL, (code, (work / "stderr").read_text())
    kinds |= {p.name.removesuffix(".tmp") for p in out.glob("*.tmp")}
    if not (out / "config.json").exists(): shutil.rmtree(out)
    assert wait(attempt(begin(out))) == 0, (work / "stderr").read_text()
    for left in out.glob("*.tmp"): left.unlink()
    same(out)
    shutil.rmtree(out)
assert n > 15 and len(kinds) >= 10, (n, kinds)
print(f"{n - 1} kills, within each of the run's writes, {len(kinds)} kinds of file not yet in place, all equal")
"""

FULL_DISK = DRIVER + """
import subprocess
disk = work / "disk"; disk.mkdir()
full = 0
size = sum(len(v) for v in contents(work / "whole").values())
for share in (0.002, 0.005, 0.01, 0.02, 0.03):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(share * size) // 4096 * 4096 or 4096}", "tmpfs", str(disk)], capture_output=True).returncode:
        print("no mount"); break
    try:
        out = disk / "run"
        code = wait(attempt([*flags, "--out", str(out)]))
        said = (work / "stderr").read_text()
        assert code == 1 and said.count("error:") == 1 and "Traceback" not in said and "o space" in said, (code, said)
        full += 1
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        assert wait(attempt(begin(out))) == 0, (work / "stderr").read_text()
        for left in out.glob("*.tmp"): left.unlink()
        same(out)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
print(f"{full} full disks, all told in one line and resumed equal")
"""

NO_PERMISSION = DRIVER + """
os.chmod(work, 0o755)
out = work / "run"
pid = attempt([*flags, "--out", str(out)])
while not (out / "vector_r0.safetensors").exists(): time.sleep(0.005)
os.kill(pid, signal.SIGKILL); wait(pid)
def unprivileged():
    if os.getuid() == 0: os.setuid(65534)
os.chmod(out, 0o555)
(work / "stderr").touch(); os.chmod(work / "stderr", 0o666)
code = wait(attempt(["--resume", str(out)], unprivileged))
said = (work / "stderr").read_text()
assert code == 1 and said.count("error:") == 1 and "Traceback" not in said and "ermission" in said, (code, said)
os.chmod(out, 0o755)
assert wait(attempt(["--resume", str(out)])) == 0, (work / "stderr").read_text()
for left in out.glob("*.tmp"): left.unlink()
same(out)
print("no write permission told and resumed")
"""

INTERRUPTED = DRIVER + """
out = work / "run"
pid = attempt([*flags, "--out", str(out)])
while not (out / "vector_r0.safetensors").exists(): time.sleep(0.005)
os.kill(pid, signal.SIGSTOP)
second = wait(attempt(["--resume", str(out)]))
said = (work / "stderr").read_text()
assert second == 1 and "another process is at work" in said, (second, said)
os.kill(pid, signal.SIGCONT); os.kill(pid, signal.SIGINT)
code = wait(pid)
assert code == 130, (code, (work / "stderr").read_text())
assert wait(attempt(["--resume", str(out), "--lam", "7"])) == 1
said = (work / "stderr").read_text()
assert "--lam 7.0 was 2.0" in said and "Traceback" not in said, said
(out / "events.jsonl").write_bytes((out / "events.jsonl").read_bytes()[:-20])  # a torn last line
assert wait(attempt(["--resume", str(out)])) == 0, (work / "stderr").read_text()
same(out)
print("interrupted, refused a second process and a changed setting, survived a torn line")
"""


@pytest.mark.parametrize("script, says", [(RANDOM_KILLS, "kills at random moments"), (WRITE_KILLS, "each of the run's writes"), (FULL_DISK, "full disks"),
                                          (NO_PERMISSION, "told and resumed"), (INTERRUPTED, "survived a torn line")],
                         ids=["killed_at_random_moments", "killed_at_every_write", "disk_full", "no_write_permission", "ctrl_c_and_second_process"])
def test_a_run_goes_on_as_if_nothing_had_happened(script, says, tiny_folder, tmp_path):
    done = python("-c", script, json.dumps(flags(tiny_folder)), tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    if "no mount" in done.stdout:
        pytest.skip("mounting a small tmpfs needs root")
    print(done.stdout)
    assert says in done.stdout


def test_a_default_run_opens_no_socket(tiny_folder, tmp_path):
    use = """
import socket, sys
def refuse(*a, **k): raise AssertionError("a socket was opened")
socket.socket.connect = refuse; socket.create_connection = refuse; socket.getaddrinfo = refuse
import heal_loop, models
sys.argv = ["heal_loop.py", *sys.argv[1:]]
models.cli(heal_loop.Config, heal_loop.main)
"""
    done = python("-c", use, *flags(tiny_folder), "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_starved_run_says_which_rule_dropped_most_and_keeps_what_it_has(tiny_folder, tmp_path):
    strict = [f for f in flags(tiny_folder) if f not in ("--max-perplexity", "1e9")] + ["--max-perplexity", "1.5"]
    done = python("heal_loop.py", *strict, "--out", tmp_path / "run")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "data starved: 0 of 6" in done.stderr and "perplexity" in done.stderr and "--max-perplexity" in done.stderr
    assert (tmp_path / "run/report.html").exists() and "data starved" in (tmp_path / "run/report.html").read_text()


def test_training_that_diverges_stops_with_the_step_and_keeps_the_adapter(embedded):
    model, tok = embedded
    rows = [{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": f"question {k}"}, {"role": "assistant", "content": "an answer"}],
             "finished": True} for k in range(9)]
    lora.attach(model, rank=2, alpha=4)
    try:
        lora.fold(model)
        cfg = heal_loop.Config(lr=1e-3, epochs=1, batch_size=4)
        real = heal_loop.heal_step
        def broken(*args):
            return real(*args) | {"data_loss": float("nan")}
        heal_loop.heal_step = broken
        with pytest.raises(heal_loop.Diverged, match="not finite at step 1 of 2.*an answer"):
            heal_loop.heal_round(model, tok, rows, cfg, seed=0)
        assert lora.n_rounds(model) == 1
    finally:
        heal_loop.heal_step = real
        lora.detach(model)


def test_model_text_is_escaped_in_the_report(tmp_path):
    profile = {"ids": ["a", "b"], "labels": ["Care", "Authority"], "p": [[1 / 7] * 7] * 2, "mass": [0.9, 0.95], "constants": None}
    event = {"stage": "base", "round": -1, "perplexity": 2.0, "repetition": 0.1, "profile": profile,
             "texts": [{"prompt": "<img src=x>", "text": "<script>alert(1)</script>"}]}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    (tmp_path / "config.json").write_text(json.dumps(heal_loop.recorded(heal_loop.Config())))
    plot.main(plot.Config(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page and "<img src=x>" not in page


@pytest.mark.parametrize("command, says", [
    ("steer.py --trait care --dose 0 2 4 --prompt Help? --n-contexts 4 --max-new-tokens 8", ["--- dose 0", "--- dose 2", "--- dose 4", "perplexity"]),
    ("distil.py --n-keep 2 --max-new-tokens 24 --n-contexts 4 --out {tmp}/kept.jsonl", ["kept 2 of"]),
    ("evaluate.py --n-vignettes 7", ["auth_nats", "coherence", "top1"])])
def test_each_command_works_alone(command, says, tmp_path):
    done = python(*command.format(tmp=tmp_path).split())
    assert done.returncode == 0, done.stderr
    assert all(s in done.stdout for s in says), done.stdout
    if "distil" in command:
        rows = distil.read_jsonl(tmp_path / "kept.jsonl")
        assert len(rows) == 2 and set(rows[0]) == {"messages", "dose", "finished", "perplexity", "repetition", "verdict", "band"}
