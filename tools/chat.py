"""Talk to a run: its base, its steered and its healed model answer next to each other.

    python -m tools.chat runs/X                                  # type messages
    echo "Do you love humanity?" | python -m tools.chat runs/X   # or give them in a pipe

    base        y = W x                                    the original, bit for bit
    steered r   the student that round r began with, + dose · v_r from the assistant tag on
    healed r    y = W x + gate · s · Σ_{i ≤ r} B_i A_i x

All three draw the same random numbers. Every message is asked on its own.
"""
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

import heal_loop
import lora
from common import checks, runs
from common.prompts import NEUTRAL
from common.sampling import stream
from steer import SteeringVector

HELP = "/dose 0.5 (healed's gate, the vector's dose), /round 1, /seed 3, /system [TEXT], /quit"
SETTINGS = {"dose": float, "round": int, "seed": int, "system": str}


@dataclass
class Config:
    run: tyro.conf.Positional[Path]  # run folder of heal_loop.py
    model: str | None = None  # the base model, if it has moved since the run
    device: str = "auto"  # auto, cuda, mps or cpu
    round: runs.WholeFrom0 | None = None  # whose vector and student, from 0; default: the last
    dose: runs.Finite | None = None  # of history (a gate) and vector; default: 1, mean
    seed: runs.Seed = 0  # of the sampling
    system: str = NEUTRAL  # system prompt of all three
    max_new_tokens: runs.AtLeast1 = 128  # longest answer, in tokens
    temperature: runs.From0 = 1.0  # 0 is greedy


class Arm(NamedTuple):
    name: str  # of one of the models that answer
    history: list[float]  # the gate of every round
    vector: SteeringVector | None = None
    dose: float = 0.0


def choose_arms(cfg: Config) -> list[Arm]:
    """Base, steered and healed as set. Raises ValueError for a round that the run lacks."""
    n = runs.rounds_done(cfg.run)
    r = n - 1 if cfg.round is None else cfg.round
    if not 0 <= r < n:
        raise ValueError(f"{cfg.run} has {n} finished rounds, counted from 0, and no round {r}; "
                         f"fix: {f'0 to {n - 1}' if n else 'finish one with --resume'}")
    folder = cfg.run / f"round_{r}"
    events = {e["stage"]: e for e in runs.read_jsonl(folder / "events.jsonl")}
    mean = events["distil"]["dose"] or 1.0  # 0: the teacher was prompted
    gate, dose = (1.0, mean) if cfg.dose is None else (cfg.dose, cfg.dose)
    return [Arm("base", [0.0] * n),
            Arm(f"steered r{r}, dose {dose:.3g}", [1.0] * r + [0.0] * (n - r),
                SteeringVector.load(folder / "vector.safetensors"), dose),
            Arm(f"healed r{r}, gate {gate:.3g}", [gate] * (r + 1) + [0.0] * (n - r - 1))]


def answer(model, chat, message: str, arm: Arm, cfg: Config) -> Iterator[str]:
    """The arm's answer so far, after each new token; the tokens are those of `sampling.sample`."""
    tokens = stream(model, chat, chat.ids(message, cfg.system or NEUTRAL), arm.vector, arm.dose,
                    cfg.max_new_tokens, cfg.temperature, seed=cfg.seed)
    new = []
    while True:
        with lora.gates(model, arm.history, live=0):  # for one token: arms take turns on a model
            token = next(tokens, None)
        if token is None:
            return
        new.append(token)
        yield chat.decode(new).rstrip("\ufffd")  # half a character waits until it is whole


def show(console: Console, arms: list[Arm], answers: list[Iterator[str]]) -> None:
    """In a terminal all answers at once, in columns as they come; in a pipe one after the other."""
    if not console.is_terminal:
        for arm, answer_so_far in zip(arms, answers):
            *_, text = "", *answer_so_far
            print(f"--- {arm.name}\n{text}", flush=True)
        return
    texts = [""] * len(arms)
    with Live(console=console, refresh_per_second=8) as live:
        for grown in itertools.zip_longest(*answers):  # None from an arm that is done
            texts = [new or old for new, old in zip(grown, texts)]
            table = Table(*(Column(arm.name, ratio=1) for arm in arms), expand=True)
            table.add_row(*map(Text, texts))  # Text: brackets in an answer are no markup
            live.update(table)


def set_by(line: str, cfg: Config) -> Config:
    """The settings after a line such as `/seed 3`. Raises ValueError for one that sets nothing."""
    name, _, value = line.removeprefix("/").partition(" ")
    try:
        cfg = replace(cfg, **{name: SETTINGS[name](value.strip())})
    except (KeyError, ValueError):
        raise ValueError(f"'{line}' sets nothing; fix: one of {HELP}") from None
    runs.check_ranges(cfg)
    print(*(arm.name for arm in choose_arms(cfg)), f"seed {cfg.seed}", sep=", ")
    return cfg


def main(cfg: Config) -> None:
    """Read lines until the input ends; a mistake in one is told and changes nothing."""
    trained = runs.read_config(heal_loop.Config, cfg.run)
    choose_arms(cfg)  # raises before the gigabytes
    model, chat = checks.load(cfg.model or trained.model, cfg.device, trained.dtype, trained.date)
    lora.load(model, [cfg.run / f"round_{r}" / "adapter.safetensors"
                      for r in range(runs.rounds_done(cfg.run))])
    console, piped = Console(), not sys.stdin.isatty()
    # a pipe is UTF-8 whatever the locale; a byte that is none is shown as � and asked so
    sys.stdin.reconfigure(encoding="utf-8" if piped else None, errors="replace")
    print(f"{trained.trait}, {lora.n_rounds(model)} rounds. Type a message, or {HELP}")
    while True:  # a piped line is repeated so that its answer can be read
        try:
            line = input("" if piped else "\n> ").strip()
            if piped:
                print(f"\n> {line}")
            if line == "/quit":
                break
            if line.startswith("/"):
                cfg = set_by(line, cfg)
            elif line:
                arms = choose_arms(cfg)
                show(console, arms, [answer(model, chat, line, arm, cfg) for arm in arms])
        except EOFError:
            break
        except ValueError as e:
            print(f"error: {e}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    runs.cli(Config, main)
