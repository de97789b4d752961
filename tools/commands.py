"""The commands of steer.py, distil.py and evaluate.py: their flags, and what they print.

    python steer.py --trait care --dose 0 2 4 --prompt "My boss told me to ignore a customer."
    python distil.py --trait love --n-keep 16 --out love       # heal_loop.py's flags, by name
    python evaluate.py --adapter runs/X/round_*/adapter.safetensors
"""
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from tabulate import tabulate

import distil
import evaluate
import lora
from common import checks, models, runs, texts
from common.runs import cli  # noqa: F401  what runs each of them
from common.sampling import sample
from heal_loop import Config as RunConfig
from steer import SteeringVector


@dataclass
class SteerConfig:
    prompt: str  # what to ask
    model: str = models.EMBEDDED  # smollm2, a local folder, or a hub id
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"  # auto: bf16 where native
    seed: runs.Seed = 0  # of the sampling; every dose draws the same numbers
    trait: str = "care"  # a trait of data/traits, or a file such as my.json
    pos: str | None = None  # system prompt of the trait, instead of --trait
    neg: str | None = None  # system prompt of its opposite
    n_contexts: runs.AtLeast1 = 128  # contexts the vector is averaged over
    steer_layers: runs.DepthRange = (0.45, 0.55)  # depth range that is steered, as fractions
    dose: runs.Doses = (0.0, 2.0, 4.0)  # doses to compare, one answer each
    max_new_tokens: runs.AtLeast1 = 64  # longest answer, in tokens
    temperature: runs.From0 = 1.0  # 0 is greedy


def compare_doses(cfg: SteerConfig) -> None:
    """One answer at each dose, drawn with the same numbers."""
    reading = texts.read(cfg)
    model, chat = checks.load(cfg.model, cfg.device, cfg.dtype)
    vector = distil.trait_vector(model, chat, reading, cfg.steer_layers)
    for dose in cfg.dose:
        [answer] = sample(model, chat, [chat.ids(cfg.prompt)], vector, [dose], seed=cfg.seed,
                          max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
        print(f"\n--- dose {dose:g}\n{chat.decode(answer)}")


def write_data(cfg: RunConfig) -> None:
    """Round 0's training data of the run that these flags would make, in the folder --out."""
    cfg = texts.complete(cfg)
    reading = texts.read(cfg)
    model, chat = checks.load(cfg.model, cfg.device, cfg.dtype, cfg.date)
    lora.attach(model)
    out = Path(cfg.out or "distilled")
    out.mkdir(parents=True, exist_ok=True)
    (out / "kept.jsonl").unlink(missing_ok=True)  # of an earlier call
    data = distil.make_data(cfg, model, chat, reading, 0, out)
    print(f"kept {data['kept']} of {data['sampled']} -> {out}   {data['reject_reasons']}")


@dataclass
class EvaluateConfig:
    model: str = models.EMBEDDED  # smollm2, a local folder, or a hub id
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"  # auto: bf16 where native
    adapter: tuple[Path, ...] = ()  # adapter.safetensors of every round of the student
    vector: Path | None = None  # vector.safetensors of a round: the steered model, at --dose
    dose: runs.Finite = 1.0  # of --vector
    trait: str = "care"  # a trait of data/traits, or a file such as my.json
    readout: Literal["cloze", "tinymfv", "probe"] | None = None  # default: the trait's own
    think_tokens: runs.AtLeast1 = 64  # tinymfv's thinking before it answers
    vignettes: Path = texts.DATA / "vignettes.json"  # or tinymfv:classic
    n_vignettes: int = 42  # how many, balanced over the foundations; 0 is all
    max_new_tokens: runs.AtLeast1 = 64  # longest answer of the generation metrics, in tokens
    prompt_suffix: str = texts.SUFFIX  # appended to each prompt that is answered


def print_metrics(cfg: EvaluateConfig) -> None:
    """Every metric of the original, and of what --adapter and --vector make of it."""
    cfg = texts.complete(cfg)
    reading = texts.read(cfg)
    vector = SteeringVector.load(cfg.vector) if cfg.vector else None
    model, chat = checks.load(cfg.model, cfg.device, cfg.dtype)
    measure = partial(evaluate.measure, model, chat, reading, readout=cfg.readout,
                      think_tokens=cfg.think_tokens, max_new_tokens=cfg.max_new_tokens)
    lora.load(model, cfg.adapter)
    with lora.gates(model, history=0, live=0):
        events = {"original": measure("original")}
    if cfg.adapter or vector:
        constants = evaluate.Profile(**events["original"]["profile"]).constants
        events["changed"] = measure("changed", constants=constants, vector=vector, dose=cfg.dose)
    names = [name for name, value in events["original"].items() if isinstance(value, float)]
    print(tabulate({"": names, **{arm: [event[name] for name in names]
                                  for arm, event in events.items()}},
                   headers="keys", floatfmt=".4f"))
