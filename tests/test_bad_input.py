"""A user's mistake, of ten kinds: exit code 1 and one line that names value or file, and the fix.

Never a traceback, never a run on wrong input, and a refused command leaves nothing behind.
"""
import functools
import json
import os
import resource
import shutil

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common import models, texts
from conftest import command, python
from steer import SteeringVector

ADAPTER, VECTOR = "round_0/adapter.safetensors", "round_0/vector.safetensors"
FILE_SIZE = resource.getrlimit(resource.RLIMIT_FSIZE)


class Place:
    """An empty folder `tmp`; copies in it of a good tiny model, a good run, the data: as asked."""

    def __init__(self, tmp, model, run, monkeypatch):
        self.tmp, self.good, self.good_run, self.monkeypatch = tmp, model, run, monkeypatch

    @functools.cached_property
    def model(self):
        return shutil.copytree(self.good, self.tmp / "model")

    @functools.cached_property
    def run(self):
        return shutil.copytree(self.good_run, self.tmp / "run")

    @functools.cached_property
    def data(self):
        folder = shutil.copytree(texts.DATA, self.tmp / "data")
        self.monkeypatch.setattr(texts, "DATA", folder)
        return folder

    def file(self, name, content=""):
        path = self.tmp / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def forget(path, key):
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))


def with_line(path, n, line):
    lines = path.read_text("utf-8").splitlines()
    path.write_text("\n".join([*lines[:n - 1], line, *lines[n - 1:]]) + "\n", "utf-8")


def answer(run, content="Yes.", **row):
    """Row 2 of the run's kept data becomes this answer."""
    turns = zip(("system", "user", "assistant"), ("Be kind.", "May I?", content))
    row = {"messages": [{"role": role, "content": text} for role, text in turns]} | row
    with_line(run / "round_0/kept.jsonl", 2, json.dumps(row))


def add(path, number):
    """Add it to a tensor of layer 2 in a safetensors file."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[min(key for key in tensors if "layers.2.mlp" in key)] += number
    save_file(tensors, path, metadata)


def pickled(model):
    (model / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": torch.zeros(2)}, model / "pytorch_model.bin")


def encoder_decoder(model):
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=2,
                                   num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(model)


def full_disk(at):
    """Files stop growing at so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, FILE_SIZE[1]))


LOOP = "heal_loop --model {p.good} --out {p.tmp}/new"
EVALUATE = "evaluate --model {p.good} --n-vignettes 7"
VIGNETTE = {"id": "a", "foundation": "Care", "text": "She kicked the dog."}
VIGNETTES = "evaluate --model {p.good} --vignettes {p.tmp}/v.json"
TRAIT = LOOP + " --trait {p.data}/traits/care.json"
RESUME, FORK = "heal_loop --resume {p.run}", "heal_loop --fork {p.run} --out {p.tmp}/new"


def vignettes(p, *entries):
    p.file("v.json", json.dumps({"vignettes": [VIGNETTE | entry for entry in entries]}))


KINDS = {  # kind: (command, what its line must name, what is spoilt before)
    "a number out of range": [
        ("heal_loop --rounds 0", "--rounds 0"), ("heal_loop --seed 4294967296", "--seed"),
        ("heal_loop --tau nan", "--tau nan"), ("heal_loop --lam inf", "--lam inf"),
        ("heal_loop --steer-layers 0.6 0.4", "--steer-layers 0.6 0.4"),
        ("heal_loop --doses", "--doses"), ("heal_loop --doses 2 nan", "--doses nan"),
        ("heal_loop --n-keep 1", "--n-keep 1"), ("heal_loop --date today", "--date today"),
        ("heal_loop --n-vignettes 9999", "--n-vignettes 9999 vignettes.json"),
        ("heal_loop --reg wd --weight-decay 1e5", "--weight-decay 100000.0 lr"),
        ("steer --prompt Hi. --dose inf", "--dose inf"), ("evaluate --dose nan", "--dose nan"),
        ("sweep --tau -1", "--tau -1.0"), ("export X --dose inf", "--dose inf")],
    "flags that do not go together": [
        ("heal_loop --at 2", "--at 2 --fork"), ("heal_loop --pos care", "--pos --neg"),
        ("heal_loop --trait bravery", "bravery care"),
        (FORK + " --resume {p.run}", "--resume --fork"),
        (FORK + " --doses 5", "--doses [5.0] healing"), (RESUME + " --lam 9", "--lam 9.0 2.0"),
        (FORK + " --at 2 --rounds 4", "--at 2"), (FORK + " --at 1 --rounds 1", "--rounds 1")],
    "text that is not Unicode": [
        ("heal_loop --pos fr\udcf6hlich --neg sad", "--pos"),
        ("steer --prompt fr\udcf6hlich", "--prompt"),
        (FORK, "kept.jsonl 2 content", lambda p: answer(p.run, "half \ud83d")),
        (VIGNETTES, "v.json", lambda p: vignettes(p, {"text": "half \ud83d"}))],
    "a file that cannot be read as it should": [
        (VIGNETTES, "v.json"), (VIGNETTES, "v.json", lambda p: p.file("v.json", "{")),
        (VIGNETTES, "v.json UTF-8", lambda p: p.file("v.json", '"fröhlich"'.encode("latin1"))),
        (VIGNETTES, "v.json UTF-8", lambda p: p.file("v.json", '{"vignettes"'.encode("utf-16"))),
        (TRAIT, "care.json", lambda p: (p.data / "traits/care.json").write_text("[")),
        (LOOP, "contexts.json", lambda p: (p.data / "contexts.json").unlink())],
    "an entry of a data file that is not whole": [
        (VIGNETTES, "v.json Honour Care", lambda p: vignettes(p, {"foundation": "Honour"})),
        (VIGNETTES, "v.json a", lambda p: vignettes(p, {}, {})),
        (VIGNETTES, "v.json 2", lambda p: vignettes(p, {}, {"id": "b", "text": ""})),
        (TRAIT, "care.json readout",
         lambda p: change(p.data / "traits/care.json", readout="multi")),
        (TRAIT, "care.json train", lambda p: change(p.data / "traits/care.json", train=["Hi.", 3])),
        (TRAIT, "care.json neg", lambda p: forget(p.data / "traits/care.json", "neg"))],
    "an adapter or a vector that does not fit": [
        (EVALUATE + " --adapter {p.tmp}/none.safetensors", "none.safetensors"),
        (EVALUATE + " --adapter {p.run}/round_1/adapter.safetensors", "round_1"),
        (EVALUATE + " --adapter {p.run}/" + ADAPTER, ADAPTER, lambda p: cut(p.run / ADAPTER)),
        (EVALUATE + " --adapter {p.run}/" + ADAPTER, f"{ADAPTER} finite",
         lambda p: add(p.run / ADAPTER, float("nan"))),
        ("export {p.run} --model {p.good} --out {p.tmp}/new", ADAPTER,
         lambda p: cut(p.run / ADAPTER)),
        (EVALUATE + " --vector {p.run}/" + VECTOR, VECTOR, lambda p: cut(p.run / VECTOR)),
        (EVALUATE + " --vector {p.tmp}/wide", "64 32",
         lambda p: SteeringVector({2: torch.ones(64)}, {}).save(p.tmp / "wide")),
        (RESUME + " --model {p.model}", "adapter.safetensors base",
         lambda p: add(p.model / "model.safetensors", 1))],
    "settings or events of a run that are none": [
        ("heal_loop --resume {p.tmp}", "config.json"), ("plot {p.tmp}", "events.jsonl"),
        (RESUME, "config.json", lambda p: cut(p.run / "config.json")),
        (RESUME, "config.json reg l2 kl_rev", lambda p: change(p.run / "config.json", reg="l2")),
        (RESUME, "config.json rank", lambda p: change(p.run / "config.json", rank="many")),
        (RESUME, "config.json lam", lambda p: forget(p.run / "config.json", "lam")),
        (RESUME, "events.jsonl 1", lambda p: with_line(p.run / "events.jsonl", 1, "{oops}")),
        (RESUME, "events.jsonl 1", lambda p: with_line(p.run / "events.jsonl", 1, '{"a": 1}')),
        (RESUME, "events.jsonl base", lambda p: (p.run / "events.jsonl").write_text("")),
        ("plot {p.run}", "round_1/events.jsonl 2",
         lambda p: with_line(p.run / "round_1/events.jsonl", 2, "{oops}"))],
    "kept data that was edited": [
        (FORK, "kept.jsonl 2 content", lambda p: answer(p.run, None)),
        (FORK, "kept.jsonl 2 content", lambda p: answer(p.run, ["Yes."])),
        (FORK, "kept.jsonl 2 empty", lambda p: answer(p.run, " ")),
        (FORK, "kept.jsonl 2 tokens", lambda p: answer(p.run, tokens=[])),
        (FORK, "kept.jsonl 2 messages", lambda p: answer(p.run, messages=[])),
        (FORK, "kept.jsonl 2", lambda p: with_line(p.run / "round_0/kept.jsonl", 2, "[1]")),
        (FORK, "kept.jsonl 2", lambda p: with_line(p.run / "round_0/kept.jsonl", 2, '{"a": 1}')),
        (FORK, "kept.jsonl 0", lambda p: (p.run / "round_0/kept.jsonl").write_text(""))],
    "a folder that is taken, or a disk that is full": [
        ("heal_loop --out {p.tmp}", "not empty", lambda p: p.file("thesis.txt")),
        ("heal_loop --out {p.tmp}/a", "a not empty", lambda p: p.file("a")),
        ("heal_loop --model {p.good} --out {p.tmp}/a/b", "a/b", lambda p: p.file("a")),
        ("export {p.run} --out {p.tmp}", "--out exists", lambda p: p.file("thesis.txt")),
        (LOOP, "large disk", lambda p: full_disk(10)),
        (LOOP + " --no-baselines --n-vignettes 7", "large --resume", lambda p: full_disk(4000))],
    "a model that is none": [
        ("evaluate --model smollm3", "smollm3 smollm2"),
        ("evaluate --model {p.tmp}", "config.json"),
        (EVALUATE + " --device tpu", "--device tpu"),
        ("evaluate --model {p.model}", "model", lambda p: cut(p.model / "model.safetensors")),
        ("evaluate --model {p.model}", "pickle", lambda p: pickled(p.model)),
        ("evaluate --model {p.model}", "decoder-only", lambda p: encoder_decoder(p.model)),
        ("evaluate --model {p.model}", "chat template",
         lambda p: (p.model / "chat_template.jinja").write_text("{% for m in %}"))],
}
CASES = [(kind, *case) for kind, cases in KINDS.items() for case in cases]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}: {case[1]}, {case[2]}")
def test_a_mistake_is_one_line_and_leaves_nothing(
        case, run, tiny_folder, tmp_path, monkeypatch, capsys):
    kind, line, names, *spoil = case
    place = Place(tmp_path, tiny_folder, run, monkeypatch)
    argv = [word.format(p=place) for word in line.split()]
    monkeypatch.chdir(tmp_path)
    for prepare in spoil:
        prepare(place)
    if not {"--model", "--resume", "--fork"} & set(argv):
        monkeypatch.setattr(models, "load", None)  # it is said before anything is loaded
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as stopped:
            command(monkeypatch, *argv)
    finally:  # before pytest writes to its own log
        resource.setrlimit(resource.RLIMIT_FSIZE, FILE_SIZE)
    stderr = capsys.readouterr().err
    assert stopped.value.code == 1
    assert stderr.count("\n") == 1 and stderr.startswith("error: "), stderr
    missing = [name for name in [*names.split(), "fix:"] if name not in stderr]
    assert not missing, f"{missing} not in: {stderr}"
    if "full" not in kind and "--resume" not in line:
        assert sorted(tmp_path.rglob("*")) == before, "a refused command left something"


@pytest.mark.parametrize("line, names", [
    ("heal_loop --rank high", "--rank high"), ("heal_loop --reg l2", "--reg l2 kl_rev"),
    ("heal_loop --rankk 3", "--rankk --rank"), ("heal_loop please", "please"),
    ("export X --to onnx", "--to onnx peft"), ("steer", "--prompt"), ("plot", "PATH"),
    ("sweep --rank high", "--rank high")])
def test_a_flag_that_does_not_parse_is_named_by_tyro(line, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, *line.split())
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == "" and not list(tmp_path.iterdir())
    assert all(name in captured.err for name in [*names.split(), "--help"]), captured.err


@pytest.mark.slow
@pytest.mark.parametrize("line, code, names", [
    ("steer.py --model no-such/model --prompt Hi.", 1, "no-such/model fix:"),
    ("steer.py --onto X", 2, "--onto --help")])
def test_the_command_itself_reports_without_network_or_utf8(line, code, names, tmp_path):
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONIOENCODING": "ascii"}
    done = python(*line.split(), env=os.environ | env)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert all(name in done.stderr for name in names.split()), done.stderr
