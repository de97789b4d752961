"""Talk to a run: its base, its steered and its healed model answer next to each other.

    python -m tools.chat runs/X                                  # type; /help says what else can be typed
    echo "Do you love humanity?" | python -m tools.chat runs/X   # in a pipe one answer after the other

    base        y = W x                                    the original, bit for bit
    steered r   the student that round r began with, + dose · v_r from the assistant tag on
    healed r    y = W x + gate · s · Σ_{i ≤ r} B_i A_i x

All three draw the same random numbers. Every message is asked on its own, as in training: no model
remembers the one before.
"""
import contextlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

import heal_loop
import lora
from common import models
from common import runs
from common.sampling import next_token, stop_tokens
from steer import NEUTRAL, SteeringVector, chat_ids, check_room

HELP = ("/dose 0.5 (healed's history gate and the vector's dose), /round 1, /seed 3, "
        "/system TEXT (none: the neutral one), /help, /quit")
SETTINGS = {"dose": float, "round": int, "seed": int, "system": str}


@dataclass
class Config:
    run: tyro.conf.Positional[Path]  # run folder of heal_loop.py
    model: str | None = None  # the base model, where it is not where the run found it
    device: str = "auto"  # auto, cuda, mps or cpu
    round: runs.WholeFrom0 | None = None  # whose vector and student, from 0; default: the last
    dose: runs.Finite | None = None  # history gate and dose; default: 1, and the round's mean dose
    seed: runs.Seed = 0  # of the sampling
    system: str = NEUTRAL  # system prompt of all three
    max_new_tokens: runs.AtLeast1 = 128  # longest answer, in tokens
    temperature: runs.From0 = 1.0  # 0 is greedy


class Arm(NamedTuple):
    """One of the models that answer."""
    name: str
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
    gate, dose = (1.0, events["distil"]["dose"]) if cfg.dose is None else (cfg.dose, cfg.dose)
    return [Arm("base", [0.0] * n),
            Arm(f"steered r{r}, dose {dose:.3g}", [1.0] * r + [0.0] * (n - r),
                SteeringVector.load(folder / "vector.safetensors"), dose),
            Arm(f"healed r{r}, gate {gate:.3g}", [gate] * (r + 1) + [0.0] * (n - r - 1))]


@torch.no_grad()
def stream(model, tok, message: str, arm: Arm, cfg: Config) -> Iterator[str]:
    """The arm's answer so far, after each new token; the tokens are those of `sampling.sample`.

    Gates and vector hold within each pass alone, so that arms can take turns on one model.
    """
    # 1. the prompt and the draws
    prompt = chat_ids(tok, message, cfg.system or NEUTRAL)
    check_room(model, len(prompt), cfg.max_new_tokens)
    ids, cache, new = torch.tensor([prompt], device=model.device), None, []
    generator = torch.Generator().manual_seed(cfg.seed)
    draws = torch.rand(cfg.max_new_tokens, generator=generator).to(model.device)
    stop = stop_tokens(model, tok)
    for u in draws:
        # 2. run what is new; its last token is steered: the assistant tag, then each word
        steered = contextlib.nullcontext()
        if arm.vector:
            steered = arm.vector.at(model, arm.dose, last_only=True)
        with lora.gates(model, arm.history, live=0), steered:
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        # 3. draw the next token
        token = next_token(out.logits[:, -1], u[None], cfg.temperature, top_k=64, top_p=0.95)
        if token.item() in stop:
            return
        new.append(token.item())
        ids = token[:, None]
        # half a character is left out until it is whole
        yield tok.decode(new, skip_special_tokens=True).rstrip("\ufffd")


def side_by_side(arms: list[Arm], texts: list[str]) -> Table:
    """A column an arm."""
    table = Table(expand=True)
    for arm in arms:
        table.add_column(arm.name, ratio=1)
    table.add_row(*map(Text, texts))  # Text: brackets in an answer are no markup
    return table


def show(console: Console, arms: list[Arm], streams: list[Iterator[str]]) -> None:
    """Answers as they come: in a terminal all at once in columns, in a pipe one by one."""
    if console.is_terminal:
        texts = [""] * len(arms)
        with Live(side_by_side(arms, texts), console=console, refresh_per_second=8) as live:
            for grown in itertools.zip_longest(*streams):  # None from an arm that is done
                texts = [new or old for new, old in zip(grown, texts)]
                live.update(side_by_side(arms, texts))
        return
    for arm, texts in zip(arms, streams):
        print(f"--- {arm.name}")
        shown = ""
        for text in texts:
            print(text[len(shown):], end="", flush=True)
            shown = text
        print()


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
    # 1. the run's model, with all its rounds
    settings = runs.read_config(heal_loop.Config, cfg.run)
    choose_arms(cfg)  # raises before the gigabytes
    model, tok = models.load(cfg.model or str(settings.model), cfg.device, settings.dtype)
    tok.chat_date = date.fromisoformat(settings.date)
    rounds = range(runs.rounds_done(cfg.run))
    lora.load(model, [cfg.run / f"round_{r}" / "adapter.safetensors" for r in rounds])
    console = Console()
    print(f"{settings.trait} on {models.base_name(model)}, {len(rounds)} rounds. "
          "Type a message, or /help")

    # 2. line by line, a piped one repeated so that its answer can be read
    while True:
        try:
            line = input("\n> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        if not sys.stdin.isatty():
            print(f"\n> {line}")
        if line == "/quit":
            break
        try:
            if line == "/help":
                print(HELP)
            elif line.startswith("/"):
                cfg = set_by(line, cfg)
            elif line:
                arms = choose_arms(cfg)
                show(console, arms, [stream(model, tok, line, arm, cfg) for arm in arms])
        except ValueError as e:
            print(f"error: {e}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    runs.cli(Config, main)
