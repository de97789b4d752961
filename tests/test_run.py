"""Whole runs on a tiny model: their numbers, kills, ends, forks; and the run folder by itself."""
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

import evaluate
import heal_loop
import lora
from common import runs, texts
from conftest import ROOT, command, flags, python

# of the run in conftest.py, in float32. A change of the method or of data/ changes them: the test
# prints the new ones (pytest -rA)
GOLDEN = {
    "base -1": {"auth_nats": -1.94590, "perplexity": 33871.7, "text_nats": 10.80773,
                "control_nats": -0.094224},
    "steered 0": {"auth_nats": -1.95982, "perplexity": 34053.2, "drift": 0.00013167},
    "heal 0": {"data_loss": 10.42675, "D": 0.00017017, "grad_norm": 0.67383,
               "held_out_before": 10.44296, "held_out_after": 10.44118},
    "healed 0": {"auth_nats": -1.97988, "perplexity": 34042.3, "drift": 0.00013871},
    "healed 1": {"auth_nats": -1.98993, "perplexity": 34560.4, "drift": 0.00045597}}
TOKENS = "475bac3058f2ce86"
RAN = ["machine", "base", "distil", "steered", "heal", "healed"]


def stages(folder):
    return [e["stage"] for e in runs.read_events(folder)]


def refused(monkeypatch, capsys, *argv):
    """-> the one line in which a command refuses."""
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, *argv)
    stderr = capsys.readouterr().err
    assert stopped.value.code == 1 and stderr.count("\n") == 1, stderr
    return stderr


def test_a_tiny_run_gives_the_numbers_it_always_gave(run):
    events = {f"{e['stage']} {e['round']}": e for e in runs.read_events(run)}
    tokens = [row["tokens"] for r in (0, 1)
              for row in runs.read_jsonl(run / f"round_{r}/kept.jsonl")]
    digest = hashlib.sha256(str(tokens).encode()).hexdigest()[:16]
    found = {name: {key: events[name][key] for key in keys} for name, keys in GOLDEN.items()}
    print(json.dumps(found, indent=4), digest)
    for name, expected in GOLDEN.items():
        assert found[name] == pytest.approx(expected, rel=1e-3, abs=2e-6), name
    assert digest == TOKENS


@pytest.mark.slow
def test_the_same_numbers_in_an_ascii_locale_without_a_socket(run, tiny_folder, tmp_path):
    use = """
import socket, sys
def refuse(*a, **k): raise AssertionError("a socket was opened")
socket.socket.connect = refuse; socket.create_connection = refuse; socket.getaddrinfo = refuse
import evaluate, heal_loop
from common import runs, texts
from pathlib import Path
texts.DATA, evaluate.COHERENCE_FLOOR = Path(sys.argv[1]), 0.0
sys.argv = ["heal_loop.py", *sys.argv[2:]]
runs.cli(heal_loop.Config, heal_loop.main)
"""
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = python("-c", use, texts.DATA, *flags(tiny_folder), "--out", tmp_path / "run",
                  env=os.environ | ascii_only)
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]
    assert "? 2, ? 0.8" in done.stdout and "healed r0" in done.stdout  # λ and τ
    assert (tmp_path / "run/round_0/kept.jsonl").read_bytes() == (
        run / "round_0/kept.jsonl").read_bytes()


def test_baselines_surround_the_rounds_and_pictures_need_the_folder_alone(
        tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "COHERENCE_FLOOR", 0.0)  # a random model has no coherence to lose
    out = tmp_path / "run"
    command(monkeypatch, "heal_loop", *flags(tiny_folder), "--baselines", "--out", out)
    assert stages(out) == ["machine", "base", "prompted", *RAN[2:], "matched"]
    stdout = capsys.readouterr().out
    assert "persona prompt" in stdout and "steering alone" in stdout
    pages = {p.name: p.read_bytes() for p in out.glob("*.*")}
    command(monkeypatch, "plot", out)
    assert {p.name: p.read_bytes() for p in out.glob("*.*")} == pages
    for file in out.rglob("*.*"):
        if file.suffix in (".json", ".jsonl", ".html"):
            assert str(ROOT) not in file.read_text("utf-8"), file


def test_a_trait_of_ones_own_is_a_file_and_paths_may_be_text(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "COHERENCE_FLOOR", 0.0)
    trait = json.loads((texts.DATA / "traits/care.json").read_text("utf-8"))
    probes = [{"prompt": f"What do you see {when}?", "toward": "The sea.", "away": "A wall."}
              for when in ("now", "today")]
    trait |= {"readout": "probe", "axis": "probe_nats", "direction": "up", "probes": probes,
              "pos": "You love λ.", "neg": "You hate λ."}
    Path("mine.json").write_text(json.dumps(trait), "utf-8")
    command(monkeypatch, "heal_loop", *flags(tiny_folder), "--trait", "mine.json", "--out", "a",
            "--dose-nats", 1e-4, "--ref", "good")
    config = json.loads(Path("a/config.json").read_text())
    assert config["trait"].startswith("./") and config["trait"].endswith("/mine.json")
    healed = [e for e in runs.read_events(Path("a")) if e["stage"] == "healed"]
    assert len(healed[0]["profile"]["probes"]) == 2 and "probe_nats" in healed[0]
    assert "probes (nats" in Path("a/report.html").read_text("utf-8")
    os.chdir("a")  # its file is found from anywhere
    again = runs.read_config(heal_loop.Config, Path("."))
    again.out = "../b"  # as in a notebook
    heal_loop.main(again)
    assert Path("../b/round_0/kept.jsonl").read_bytes() == Path("round_0/kept.jsonl").read_bytes()


@pytest.mark.parametrize("line, words", [
    ("steer --trait care --dose 0 2 4 --prompt Help? --n-contexts 4 --max-new-tokens 8",
     ["--- dose 0", "--- dose 2", "--- dose 4"]),
    ("distil --n-keep 2 --max-new-tokens 12 --n-contexts 4 --max-perplexity 1e9 --min-diversity 0 "
     "--max-repetition 1 --out {tmp}/data", ["kept 2 of"]),
    ("evaluate --n-vignettes 7", ["auth_nats", "coherence"])])
def test_each_command_works_alone(line, words, tiny_folder, tmp_path, monkeypatch, capsys):
    command(monkeypatch, *line.format(tmp=tmp_path).split(), "--model", tiny_folder)
    stdout = capsys.readouterr().out
    assert all(word in stdout for word in words), stdout


@pytest.fixture(scope="module")
def driver(tiny_folder, tmp_path_factory):
    """kill_driver.py, which has imported everything and made the run that others must equal."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "kill_driver.py"), json.dumps(flags(tiny_folder)),
         str(tmp_path_factory.mktemp("kills")), str(texts.DATA)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert json.loads(process.stdout.readline()) == "ready"
    yield process
    process.stdin.close()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("scenario, words", [
    ("killed_at_every_write", "within each of the run's writes"),
    ("disk_full", "full disks"), ("interrupted_and_shared", "survived a torn line")])
def test_a_run_goes_on_as_if_nothing_had_happened(scenario, words, driver):
    driver.stdin.write(scenario + "\n")
    driver.stdin.flush()
    answer = json.loads(driver.stdout.readline())
    assert words in answer, answer
    print(answer)


def test_a_base_that_moved_is_given_again_and_its_weights_decide(
        run, tiny_folder, tmp_path, monkeypatch, capsys):
    moved, out = shutil.copytree(tiny_folder, tmp_path / "moved"), tmp_path / "run"
    config = json.loads((run / "config.json").read_text()) | {"model": "./no/such/folder"}
    shutil.copytree(run, out)
    (out / "config.json").write_text(json.dumps(config))
    assert "no/such/folder" in refused(monkeypatch, capsys, "heal_loop", "--resume", out)
    command(monkeypatch, "heal_loop", "--resume", out, "--model", moved)
    command(monkeypatch, "heal_loop", "--fork", out, "--model", moved, "--rounds", 1, "--out",
            tmp_path / "fork")
    ours, theirs = (f / "round_0/adapter.safetensors" for f in (tmp_path / "fork", run))
    assert ours.read_bytes() == theirs.read_bytes()


def test_the_machine_is_on_record_anew_where_a_run_goes_on_elsewhere(
        tiny_folder, tmp_path, monkeypatch):
    assert f"torch {torch.__version__}" in runs.machine("cpu") and "threads" in runs.machine("cpu")
    out = tmp_path / "run"
    monkeypatch.setattr(evaluate, "measure", lambda *args, **kwargs: 1 / 0)
    for name, flag in (("cpu A", "--out"), ("cpu A", "--resume"), ("cpu B", "--resume")):
        monkeypatch.setattr(runs, "machine", lambda device, name=name: name)
        with pytest.raises(ZeroDivisionError):
            command(monkeypatch, "heal_loop", *flags(tiny_folder), flag, out)
    assert [e["name"] for e in runs.read_events(out)] == ["cpu A", "cpu B"]


def test_a_full_device_is_one_line_with_the_fix(tiny_folder, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 ...")
    monkeypatch.setattr(evaluate, "measure", full)
    line = refused(monkeypatch, capsys, "heal_loop", *flags(tiny_folder), "--out", tmp_path / "run")
    assert "CUDA out of memory; nothing finished is lost; fix:" in line and "--resume" in line


def test_too_few_kept_names_the_rule_and_keeps_what_was_sampled(
        tiny_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    argv = ["heal_loop", *flags(tiny_folder), "--max-perplexity", "1.5"]
    for where in ("--out", "--resume"):  # the round is tried again, and ends once
        line = refused(monkeypatch, capsys, *argv, where, out)
        assert "too few completions kept: 0 of 6" in line and "--max-perplexity" in line
        assert not (out / "round_0").exists() and stages(out) == ["machine", "base", "ended"]
    assert len(runs.read_jsonl(out / "ended_round_0/sampled.jsonl")) > 6


def test_training_that_diverges_names_the_step_and_leaves_earlier_rounds(embedded, monkeypatch):
    model, chat = embedded
    rows = []
    for k in range(9):
        turns = [("system", "s"), ("user", f"question {k}"), ("assistant", "an answer")]
        rows.append({"messages": [{"role": r, "content": c} for r, c in turns]})
    real = heal_loop.heal_step
    monkeypatch.setattr(heal_loop, "heal_step",
                        lambda *args, **kwargs: real(*args, **kwargs) | {"data_loss": float("nan")})
    lora.attach(model, rank=2, alpha=4)
    try:
        lora.fold(model)
        with pytest.raises(runs.Ended, match="not finite at step 1 of 2.*data_loss"):
            heal_loop.heal_round(model, chat, rows, heal_loop.Config(epochs=1, batch_size=4), 0)
        assert lora.n_rounds(model) == 1
    finally:
        lora.detach(model)


def test_the_batches_of_an_epoch_are_of_even_size(embedded, monkeypatch):
    model, chat = embedded
    turns = [{"role": role, "content": "words"} for role in ("user", "assistant")]
    sizes = []

    def step(model, batch, cfg):
        sizes.append(len(batch["prompts"]))
        return {"data_loss": 0.0}
    monkeypatch.setattr(heal_loop, "heal_step", step)
    lora.attach(model, rank=2, alpha=4)
    try:  # one of eleven is held out
        heal_loop.heal_round(model, chat, [{"messages": turns}] * 11,
                             heal_loop.Config(epochs=1, batch_size=4), 0)
    finally:
        lora.detach(model)
    assert sorted(sizes) == [3, 3, 4]


def test_a_collapsed_student_ends_the_loop_once(tiny_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"  # a random model answers nothing validly: its first round is its last
    command(monkeypatch, "heal_loop", *flags(tiny_folder), "--rounds", 3, "--out", out)
    command(monkeypatch, "heal_loop", "--resume", out)
    assert stages(out) == [*RAN, "ended"]
    assert "coherence fell below 0.85" in capsys.readouterr().out


def test_a_fork_heals_the_same_data_another_way(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "COHERENCE_FLOOR", 0.0)
    out = tmp_path / "fork"
    command(monkeypatch, "heal_loop", "--fork", run, "--at", 1, "--tau", 0, "--lam", 50,
            "--out", out)
    config = json.loads((out / "config.json").read_text())
    assert (config["lam"], config["tau"], config["n_keep"]) == (50, 0, 6)
    shared = ["round_1/vector.safetensors", "round_1/sampled.jsonl", "round_1/kept.jsonl"]
    for name in [*(f"round_0/{path.name}" for path in (run / "round_0").iterdir()), *shared]:
        assert (out / name).read_bytes() == (run / name).read_bytes(), name
    adapters = [(folder / "round_1/adapter.safetensors").read_bytes() for folder in (out, run)]
    assert adapters[0] != adapters[1]
    ours, theirs = ({(e["stage"], e["round"]): e for e in runs.read_events(f)} for f in (out, run))
    assert ours["forked", -1]["run"] == run.name and ours["steered", 1] == theirs["steered", 1]
    assert ours["heal", 1]["barrier"] > 0 == theirs["heal", 1]["barrier"]


def test_a_fork_with_nothing_changed_is_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "COHERENCE_FLOOR", 0.0)
    command(monkeypatch, "heal_loop", "--fork", run, "--out", tmp_path / "fork")
    for path in run.glob("round_*/*"):
        if path.name != "events.jsonl":
            ours = tmp_path / "fork" / path.relative_to(run)
            assert ours.read_bytes() == path.read_bytes(), path


@dataclass
class Small:
    """What a run folder asks of a config."""
    model: str = "smollm2"
    trait: str = "care"
    rank: runs.AtLeast1 = 2
    reg: Literal["nll", "kl_rev"] = "nll"
    vignettes: Path = Path("tinymfv:classic")
    device: str = "cpu"
    rounds: int = 1
    out: Path | None = None
    resume: Path | None = None
    fork: Path | None = None
    at: int = 0


def test_a_folder_called_smollm2_is_not_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with runs.begin(Small(out="smollm2"), "name"):
        assert runs.read_config(Small, Path("smollm2")).model == "smollm2"
    assert Small() == runs.read_config(Small, Path("smollm2"))
    with runs.begin(Small(model="./smollm2", out="b"), "name"):
        config = runs.read_config(Small, Path("b"))
    assert config.model == str(tmp_path / "smollm2")


def test_a_path_through_a_link_leads_where_it_led(tmp_path, monkeypatch):
    (tmp_path / "deep/er/models").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep/er")
    monkeypatch.chdir(tmp_path / "link")
    for model in ("models", "../er/models", str(tmp_path / "link/models")):
        shutil.rmtree("run", ignore_errors=True)
        with runs.begin(Small(model=model, out="run"), "name"):
            found = runs.read_config(Small, Path("run")).model
        assert found == str((tmp_path / "deep/er/models").resolve())


@pytest.mark.parametrize("error", [NotImplementedError(), *(
    OSError(number, "no locks") for number in (errno.ENOLCK, errno.EOPNOTSUPP, 524))])
def test_a_file_system_without_locks_is_used_and_named(error, tmp_path, monkeypatch, capsys):
    def flock(*args):
        raise error
    monkeypatch.setattr("fcntl.flock", flock)
    with runs.begin(Small(out=tmp_path / "run"), "name") as run:
        run.record("base", -1)
    assert capsys.readouterr().err.count("are not kept apart") == 1


def test_events_are_json_and_a_torn_line_is_cut_off(tmp_path):
    with runs.begin(Small(out=tmp_path), "name") as run:
        event = run.record("base", -1, perplexity=float("inf"), log=[{"x": float("nan")}], at=(1,))
        assert (event["perplexity"], event["log"], event["at"]) == (None, [{"x": None}], [1])
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write('{"stage": "λ'.encode()[:-1])  # killed within a character
    with runs.begin(Small(resume=tmp_path), "name") as run:
        assert run.find("base", -1) == event
        run.record("prompted", -1)
    assert stages(tmp_path) == ["machine", "base", "prompted"]
    assert "NaN" not in (tmp_path / "events.jsonl").read_text()


def test_a_start_cut_off_begins_again_and_nobody_elses_files_are_taken(tmp_path):
    (tmp_path / "start.tmp").mkdir()
    (tmp_path / "lock").touch()
    assert runs.is_free(tmp_path)
    (tmp_path / "thesis").mkdir()
    assert not runs.is_free(tmp_path)


def test_the_reference_is_the_original_the_previous_or_the_newest_coherent_student(tmp_path):
    run = runs.Run(tmp_path)
    for stage, r, perplexity in (("base", -1, 4.0), ("healed", 0, 5.0), ("healed", 1, 8.0),
                                 ("healed", 2, 8.1), ("healed", 3, float("nan"))):
        run.record(stage, r, perplexity=perplexity)
    assert run.reference("base", 3) == [0, 0, 0] and run.reference("prev", 3) == [1, 1, 1]
    assert run.reference("good", 4) == [1, 1, 0, 0] and run.reference("good", 0) == []
