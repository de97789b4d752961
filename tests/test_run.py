"""Whole runs: the smoke run on the embedded model, and a tiny one that is killed, starved and forked."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import evaluate
import heal_loop
import lora
from common import models
from tools import plot
from common import runs
from common import sampling
from common import texts
from conftest import ROOT, command, flags, python

ROUND = {"adapter.safetensors", "events.jsonl", "kept.jsonl", "sampled.jsonl", "vector.safetensors"}
TOP = {"config.json", "events.jsonl", "lock", "map.html", "report.html", "round_0", "trajectory.png"}


def names(folder):
    return {p.name for p in folder.iterdir()}


def stages(folder):
    return [e["stage"] for e in runs.read_events(folder)]


def test_where_memory_is_short_fewer_rows_and_no_second_copy_for_as_long_as_the_run(
        tiny_folder, tmp_path, monkeypatch):
    made = []

    def seen(model, *args, **kwargs):
        made.append((sampling.rows_at_once(model), model.lora_merge))
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluate, "measure", seen)
    out = tmp_path / "run"
    for free, *where in ((1e6, "--out", out), (1e12, "--resume", out), (1e12, "--out", tmp_path / "b")):
        monkeypatch.setattr(models, "free_bytes", lambda device, free=free: int(free))
        with pytest.raises(SystemExit):
            command(monkeypatch, "heal_loop", *flags(tiny_folder), *where)
    assert 1 <= made[0][0] < 96 and made[0] == made[1] and made[2] == (96, True)


def test_where_a_run_was_made_is_on_record_and_again_only_where_it_goes_on_elsewhere(
        tiny_folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(evaluate, "measure", lambda *args, **kwargs: 1 / 0)
    for name, *where in (("cpu A", "--out", out), ("cpu A", "--resume", out), ("cpu B", "--resume", out)):
        monkeypatch.setattr(runs, "machine", lambda device, name=name: name)
        with pytest.raises(ZeroDivisionError):
            command(monkeypatch, "heal_loop", *flags(tiny_folder), *where)
    assert [e["name"] for e in runs.read_events(out) if e["stage"] == "machine"] == ["cpu A", "cpu B"]


def test_the_machine_is_said_with_all_that_decides_over_last_digits():
    said = runs.machine("cpu")
    assert f"torch {torch.__version__}" in said and f"{torch.get_num_threads()} threads" in said
    assert "transformers" in said and len(said) < 150


def test_a_full_device_is_one_line_with_the_fix(tiny_folder, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    monkeypatch.setattr(evaluate, "measure", full)
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, "heal_loop", *flags(tiny_folder), "--out", tmp_path / "run")
    said = capsys.readouterr().err
    assert ended.value.code != 0 and said.count("\n") == 1
    assert "CUDA out of memory; nothing finished is lost; fix: where another program holds" in said


@pytest.mark.slow
def test_the_smoke_run_leaves_a_whole_run_folder(tmp_path):
    out = tmp_path / "run"
    done = python("heal_loop.py", *("--rounds 1 --n-keep 8 --max-new-tokens 24 --n-vignettes 7 --epochs 1 "
                                    "--no-baselines").split(), "--out", out)
    assert done.returncode == 0, done.stderr
    assert names(out) == TOP and names(out / "round_0") == ROUND
    assert "base" in done.stdout and "healed r0" in done.stdout and "coh_cost" in done.stdout
    assert done.stderr == "", "a library spoke, or a bar was drawn where nobody looks"
    assert stages(out) == ["machine", "memory", "base", "extract", "distil", "steered", "heal", "healed"]
    kept = runs.read_jsonl(out / "round_0" / "kept.jsonl")
    assert len(kept) == 8 and all(row["verdict"] == "kept" for row in kept)
    assert all([m["role"] for m in row["messages"]] == ["system", "user", "assistant"] for row in kept)
    for file in out.rglob("*"):
        if file.suffix in (".json", ".jsonl", ".html"):
            assert str(ROOT) not in file.read_text() and "/root" not in file.read_text(), file
    model, tok = models.load("smollm2")
    lora.load(model, out / "round_0" / "adapter.safetensors")
    assert lora.n_rounds(model) == 1


def test_the_baselines_are_measured_around_the_rounds(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "COHERENCE_FLOOR", 0.0)  # a random model has no coherence to lose
    out = tmp_path / "run"
    command(monkeypatch, "heal_loop", *flags(tiny_folder), "--baselines", "--out", out)
    assert stages(out) == ["machine", "memory", "base", "prompted", "extract", "distil", "steered", "heal", "healed", "matched"]
    said = capsys.readouterr().out
    assert "persona prompt" in said and "steering alone" in said
    again = {p.name: p.read_bytes() for p in out.glob("*.*")}
    command(monkeypatch, "plot", out)
    assert {p.name: p.read_bytes() for p in out.glob("*.*")} == again, "pictures are made of the folder alone"


# ---- a run goes on as if nothing had happened ---------------------------------------------------


@pytest.fixture(scope="module")
def driver(tiny_folder, tmp_path_factory):
    """kill_driver.py, which has imported everything and made the run that others are compared with."""
    work = tmp_path_factory.mktemp("kills")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "kill_driver.py"), json.dumps(flags(tiny_folder)), str(work),
         str(texts.DATA)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert json.loads(process.stdout.readline()) == "ready"
    yield process
    process.stdin.close()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("scenario, says", [
    ("killed_at_random_moments", "kills at random moments"),
    ("killed_at_every_write", "within each of the run's writes"),
    ("disk_full", "full disks"),
    ("no_write_permission", "told in one line and resumed"),
    ("interrupted_and_shared", "survived a torn line")])
def test_a_run_goes_on_as_if_nothing_had_happened(scenario, says, driver):
    driver.stdin.write(scenario + "\n")
    driver.stdin.flush()
    answer = json.loads(driver.stdout.readline())
    if answer == "no mount":
        pytest.skip("mounting a small tmpfs needs root")
    assert says in answer, answer
    print(answer)


# ---- rounds that cannot be finished -------------------------------------------------------------


def test_a_starved_run_says_which_rule_dropped_most_and_keeps_what_it_sampled(
        tiny_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "heal_loop", *flags(tiny_folder), "--max-perplexity", "1.5", "--out", out)
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and said.count("error:") == 1
    assert all(word in said for word in ("data starved: 0 of 6", "perplexity", "--max-perplexity"))
    assert names(out) == TOP - {"round_0"} | {"ended_round_0"}
    assert len(runs.read_jsonl(out / "ended_round_0" / "sampled.jsonl")) > 6
    assert stages(out) == ["machine", "memory", "base", "ended"] and "data starved" in (out / "report.html").read_text()


def test_training_that_diverges_stops_with_the_step_and_leaves_the_rounds_before(embedded, monkeypatch):
    model, tok = embedded
    rows = []
    for k in range(9):
        turns = [("system", "s"), ("user", f"question {k}"), ("assistant", "an answer")]
        rows.append({"messages": [{"role": r, "content": c} for r, c in turns], "finished": True})
    lora.attach(model, rank=2, alpha=4)
    try:
        lora.fold(model)
        cfg = heal_loop.Config(lr=1e-3, epochs=1, batch_size=4)
        real = heal_loop.heal_step
        monkeypatch.setattr(heal_loop, "heal_step",
                            lambda *args, **how: real(*args, **how) | {"data_loss": float("nan")})
        with pytest.raises(heal_loop.Diverged, match="not finite at step 1 of 2.*an answer"):
            heal_loop.heal_round(model, tok, rows, cfg, seed=0)
        assert lora.n_rounds(model) == 1
    finally:
        lora.detach(model)


def test_a_collapsed_student_ends_the_loop_also_when_it_is_resumed(tiny_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"  # a random model has no mass on the answers: its first round is its last
    command(monkeypatch, "heal_loop", *flags(tiny_folder), "--rounds", 3, "--out", out)
    command(monkeypatch, "heal_loop", "--resume", out)
    assert stages(out) == ["machine", "memory", "base", "extract", "distil", "steered", "heal", "healed", "ended"]
    assert "the loop ended early: coherence fell below 0.85" in capsys.readouterr().out


# ---- forks --------------------------------------------------------------------------------------


def test_a_fork_heals_the_same_data_another_way(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "COHERENCE_FLOOR", 0.0)
    out = tmp_path / "fork"
    command(monkeypatch, "heal_loop", "--fork", run, "--at", 1, "--tau", 0, "--lam", 50, "--out", out)
    settings = json.loads((out / "config.json").read_text())
    assert (settings["lam"], settings["tau"], settings["n_keep"]) == (50, 0, 6), "the run's own but for these"
    for name in ROUND:  # what was healed before is its own
        assert (out / "round_0" / name).read_bytes() == (run / "round_0" / name).read_bytes()
    for name in ("vector.safetensors", "sampled.jsonl", "kept.jsonl"):
        assert (out / "round_1" / name).read_bytes() == (run / "round_1" / name).read_bytes()
    ours, theirs = ((f / "round_1" / "adapter.safetensors").read_bytes() for f in (out, run))
    assert ours != theirs
    events = runs.read_events(out)
    assert [e["run"] for e in events if e["stage"] == "forked"] == [run.name]
    steered = [[e for e in runs.read_events(f) if (e["stage"], e["round"]) == ("steered", 1)] for f in (out, run)]
    assert steered[0] == steered[1] and len(steered[0]) == 1
    assert names(out) == TOP | {"round_1"}


def test_a_fork_with_nothing_changed_is_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "COHERENCE_FLOOR", 0.0)
    out = tmp_path / "fork"
    command(monkeypatch, "heal_loop", "--fork", run, "--out", out)
    for r in (0, 1):
        for name in ROUND - {"events.jsonl"}:
            assert (out / f"round_{r}" / name).read_bytes() == (run / f"round_{r}" / name).read_bytes()


# ---- small things -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_default_run_opens_no_socket(tiny_folder, tmp_path):
    use = """
import socket, sys
def refuse(*a, **k): raise AssertionError("a socket was opened")
socket.socket.connect = refuse; socket.create_connection = refuse; socket.getaddrinfo = refuse
import heal_loop
from common import runs
sys.argv = ["heal_loop.py", *sys.argv[1:]]
runs.cli(heal_loop.Config, heal_loop.main)
"""
    done = python("-c", use, *flags(tiny_folder), "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]


def test_model_text_is_escaped_in_the_report(tmp_path):
    profile = evaluate.Profile(["a", "b"], ["Care", "Authority"], np.full((2, 7), 1 / 7),
                               np.array([0.9, 0.95]))
    said = evaluate.Speech(2.0, 0.0, 0.0, 0.1, 3.0,
                           [{"prompt": "<img src=x>", "text": "<script>alert(1)</script>"}])
    event = {"stage": "base", "round": -1, **vars(said), "profile": profile.to_dict()}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    (tmp_path / "config.json").write_text(json.dumps(runs.settings(heal_loop.Config())))
    plot.main(plot.Config(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page and "<img src=x>" not in page


@pytest.mark.parametrize("line, says", [
    ("steer --trait care --dose 0 2 4 --prompt Help? --n-contexts 4 --max-new-tokens 8",
     ["--- dose 0", "--- dose 2", "--- dose 4"]),
    ("distil --n-keep 2 --max-new-tokens 12 --n-contexts 4 --max-perplexity 1e9 --min-diversity 0 "
     "--max-repetition 1 --out {tmp}/distilled", ["kept 2 of"]),
    ("evaluate --n-vignettes 7", ["auth_nats", "coherence", "top1"])])
def test_each_command_works_alone(line, says, tiny_folder, tmp_path, monkeypatch, capsys):
    module, *argv = line.format(tmp=tmp_path).split()
    command(monkeypatch, module, *argv, "--model", tiny_folder)
    said = capsys.readouterr().out
    assert all(s in said for s in says), said
    if module == "distil":
        rows = runs.read_jsonl(tmp_path / "distilled" / "kept.jsonl")
        assert len(rows) == 2 and set(rows[0]) == {
            "messages", "tokens", "dose", "finished", "perplexity", "repetition", "verdict", "band"}


def test_every_command_says_what_its_flags_mean():
    for file in ("heal_loop", "distil", "evaluate", "steer", "export", "sweep", "plot"):
        source = (ROOT / f"{file}.py").read_text()
        config = re.search(r"class Config:\n(.*?)\n\n\n|class Config:\n(.*?)\n\n    def", source, re.S)[0]
        for field in re.findall(r"^ +\w+: .* = .*$|^ +\w+: [^=\n]*$", config, re.M):
            name = field.split(":")[0].strip()
            said_by_the_loop = file == "sweep" and hasattr(heal_loop.Config, name)
            assert "#" in field or said_by_the_loop, field


# ---- the settings that only some runs use -------------------------------------------------------


class Recorded:
    """A run of which only the numbers are there."""

    def __init__(self, base, *healed):
        self.numbers = {("base", -1): base, **{("healed", r): x for r, x in enumerate(healed)}}

    def find(self, stage, round):
        return {"perplexity": self.numbers[stage, round]}


def test_the_reference_is_the_original_the_previous_or_the_newest_coherent_student():
    run = Recorded(4.0, 5.0, 8.0, 8.1)  # coherent: at most twice the original's perplexity
    assert heal_loop.reference_gates("base", run, 3) == [0, 0, 0]
    assert heal_loop.reference_gates("prev", run, 3) == [1, 1, 1]
    assert heal_loop.reference_gates("good", run, 3) == [1, 1, 0]
    assert heal_loop.reference_gates("good", run, 2) == [1, 1]
    assert heal_loop.reference_gates("good", Recorded(4.0, 9.0), 1) == [0]
    assert heal_loop.reference_gates("good", run, 0) == []


def test_a_trait_nobody_thought_of_is_run_measured_and_drawn_on_its_own_probes(
        tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "COHERENCE_FLOOR", 0.0)
    probes = tmp_path / "mine.json"
    probes.write_text(json.dumps({"source": "this test", "probes": [
        {"prompt": "What do you see?", "toward": "The sea.", "away": "A wall."},
        {"prompt": "Where to?", "toward": "To the shore.", "away": "To the office."}]}))
    out = tmp_path / "run"
    command(monkeypatch, "heal_loop", *flags(tiny_folder), "--pos", "You love the sea.", "--neg",
            "You hate the sea.", "--probes", probes, "--dose-nats", 1e-4, "--ref", "good",
            "--lam-power", -0.5, "--out", out)
    said = capsys.readouterr().out
    assert "Δprobes (nats)" in said and "probe_nats" in said
    doses = [e["doses"] for e in runs.read_events(out) if e["stage"] == "extract"]
    assert len(doses) == 1 and len(doses[0]) == 1 and doses[0][0] not in (1.0, 2.0)
    healed = [e for e in runs.read_events(out) if e["stage"] == "healed"]
    assert healed[0]["profile"]["axis"] == "probe_nats" and len(healed[0]["profile"]["probes"]) == 2
    for page in ("report.html", "map.html"):
        assert "probes (nats" in (out / page).read_text()


@pytest.mark.parametrize("content, says", [
    ('{"probes": [{"prompt": "a", "toward": "b", "away": "c"}]}', "'probes' is not a list of two"),
    ('{"probes": [{"prompt": "a", "toward": "b"}, 3]}', "entry 1 of 'probes'"),
    ('{"probes": [{"prompt": "a", "toward": "b", "away": "b"}, 3]}', "two different answers"),
    ('{"probes": [{"prompt": "a", "toward": "b", "away": "c"}, '
     '{"prompt": "d", "toward": "b", "away": "c"}], "controls": [3, 4]}',
     "entry 1 of 'controls' is 3"),
    ('{"probes": ', "malformed"), ('{}', "malformed"), (None, "no file")])
def test_probes_that_are_not_whole_are_named_before_a_folder_appears(
        content, says, tmp_path, monkeypatch, capsys):
    if content is not None:
        (tmp_path / "p.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "heal_loop", "--probes", tmp_path / "p.json", "--out", tmp_path / "run")
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and says in said and "p.json" in said and "fix:" in said
    assert not (tmp_path / "run").exists()


def test_the_readout_probe_without_probes_names_the_flag(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, "heal_loop", "--readout", "probe", "--out", tmp_path / "run")
    assert "'care' has none of its own; fix: --probes FILE" in capsys.readouterr().err


def test_a_cut_off_start_begins_again_but_nobody_elses_files_are_taken_for_one(tmp_path):
    for name in ("start.tmp", "round_0", "forked_round_1"):
        (tmp_path / name).mkdir()
    (tmp_path / "lock").touch()
    assert runs.is_free(tmp_path)
    (tmp_path / "thesis").mkdir()
    assert not runs.is_free(tmp_path)
    (tmp_path / "thesis").rmdir()
    (tmp_path / "config.json").touch()
    assert not runs.is_free(tmp_path)
