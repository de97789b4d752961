"""Does the student's shift carry the trait? Add it to the original, take it out of the student.

    s_l        = mean over contexts of h_l(student) − h_l(original), neutral prompt, assistant tag
    sufficient = Δtrait of the original + s                       / Δtrait of the student
    necessary  = 1 − Δtrait of the student with s projected out   / Δtrait of the student

    python -m studies.cause runs/eight/kl_rev_rmse_s?      # results/cause.md; a minute a run

h ← h + s, and h ← h − (h · u) u with u = s / |s|, after the last of the steered blocks (at several,
the sums would add up) and from the assistant tag on. The control is a random direction of the same
length. After Blank et al. 2026 (arXiv 2606.00995), who ask it of subliminal students.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

import heal_loop
import lora
from common import checks, runs, texts
from evaluate import MIN_SHIFT, evaluate
from steer import SteeringVector, band, mean_residual
from studies.frontier import over_seeds
from studies.tables import Study, markdown, publish, ran_on


@dataclass(kw_only=True)
class Config(Study):
    run: tyro.conf.Positional[tuple[Path, ...]]  # run folders, one arm over seeds


class Projection(SteeringVector):
    """Takes its directions out of the residual stream, where a steering vector would add them."""

    def step(self, h, v, doses):
        """Minus what h [batch, n, d_model] has along v; dose 1 takes all of it out."""
        u = v / v.norm()
        return -doses * (h.float() @ u)[..., None] * u


def shift(model, prompts: list[list[int]], layers: list[int]) -> SteeringVector:
    """Student − original at the assistant tag, mean over prompts."""
    with lora.gates(model, history=1, live=0):
        student = mean_residual(model, prompts, layers)
    with lora.gates(model, history=0, live=0):
        original = mean_residual(model, prompts, layers)
    return SteeringVector({l: student[l] - original[l] for l in layers})


def trait_changes(model, chat, cfg: heal_loop.Config) -> dict[str, float]:
    """Δtrait of six models from the original, in the trait's own direction, nats. cfg: the run's"""
    reading = replace(texts.read(cfg), controls=[])  # they are no part of the trait
    prompts = [chat.ids(context) for context in reading.contexts]
    s = shift(model, prompts, band(model, cfg.steer_layers)[-1:])
    [(layer, v)] = s.layers.items()
    noise = torch.randn(len(v), generator=torch.Generator().manual_seed(cfg.seed))
    noise = SteeringVector({layer: noise * v.norm() / noise.norm()})
    # the history's gate (0: original, 1: student), and what is done to the residual stream
    cases = {"student": (1, None), "original + s": (0, s), "original + random": (0, noise),
             "student without s": (1, Projection(s.layers)),
             "student without random": (1, Projection(noise.layers)),
             "original without s": (0, Projection(s.layers))}
    sign = -1 if reading.direction == "down" else 1
    with lora.gates(model, history=0, live=0):
        base = evaluate(model, chat, reading, cfg.readout, think_tokens=cfg.think_tokens)
    changes = {}
    for name, (gate, vector) in cases.items():
        with lora.gates(model, history=gate, live=0):
            after = evaluate(model, chat, reading, cfg.readout, base.constants, cfg.think_tokens,
                             vector=vector, dose=1.0)
        changes[name] = sign * (after.trait - base.trait)
    return changes


def shares(changes: dict[str, float]) -> dict[str, float | None]:
    """What this file's head defines, of one run; None where the student's trait hardly changed."""
    student = changes["student"]
    kept = {"sufficient": changes["original + s"],
            "sufficient, random direction": changes["original + random"],
            "necessary": student - changes["student without s"],
            "necessary, random direction": student - changes["student without random"]}
    return {name: value / student if abs(student) >= MIN_SHIFT else None
            for name, value in kept.items()}


def main(cfg: Config) -> None:
    names = ["/".join(folder.resolve().parts[-2:]) for folder in cfg.run]  # as in eight/nll_s0
    first = runs.read_config(heal_loop.Config, cfg.run[0])
    for folder in cfg.run:  # a mean over different arms would mean nothing
        runs.refuse_other_settings(first, folder, free=("seed",), fix="runs of one arm")
    by_run = []
    for folder in tqdm(cfg.run, "runs", leave=False, disable=None):
        settings = runs.read_config(heal_loop.Config, folder)
        model, chat = checks.load(settings.model, cfg.device, cfg.dtype, settings.date)
        rounds = range(runs.rounds_done(folder))
        if not rounds:
            raise ValueError(f"{folder} has no finished round; fix: give a run that has one")
        lora.load(model, [folder / f"round_{r}/adapter.safetensors" for r in rounds])
        by_run.append(trait_changes(model, chat, settings))
    rows = [[folder.name, *(f"{x:.2f}" for x in changes.values())]
            for folder, changes in zip(cfg.run, by_run)]
    rows.append(["all", *(over_seeds([c[name] for c in by_run], 2) for name in by_run[0])])
    over_runs = [[name, over_seeds([shares(changes)[name] for changes in by_run], 2)]
                 for name in shares(by_run[0])]
    publish(f"""# The student's shift: added to the original, taken out of the student

`python -m studies.cause {" ".join(f"runs/{name}" for name in names)}` · {ran_on(model)} ·
{first.n_vignettes or "all"} vignettes · Δtrait in its own direction, nats; in brackets, from three
runs on, the 95 % t-interval over runs

{markdown(rows, ["run", *by_run[0]])}

{markdown(over_runs, ["share of the student's Δtrait", "all"])}
""", cfg.out / "cause.md")


if __name__ == "__main__":
    runs.cli(Config, main)
