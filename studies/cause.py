"""Is the student its own shift? Add the shift to the original, take it out of the student.

    s_l        = mean over contexts of h_l(student) − h_l(original), neutral prompt, assistant tag
    sufficient = moved by the original + s                        / moved by the student
    necessary  = 1 − moved by the student with s projected out    / moved by the student

    python -m studies.cause runs/eight/kl_rev_rmse_s?      # results/cause.md; a minute a run

h ← h + s, and h ← h − (h · u) u with u = s / |s|, after the last of the steered blocks (at several,
the sums would add up) and from the assistant tag on. The control is a random direction of the same
length. After Blank et al. 2026 (arXiv 2606.00995), who ask it of subliminal students.
"""
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

import heal_loop
import lora
from common import models
from common import runs
from common import texts
from evaluate import MIN_SHIFT, evaluate, shift
from studies.frontier import over_seeds
from steer import SteeringVector, band
from studies.readout import markdown, ran_on


@dataclass
class Config:
    run: tyro.conf.Positional[tuple[Path, ...]]  # run folders, one arm over seeds
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"  # auto: bfloat16 where native
    out: Path = Path("results")  # folder for cause.md


class Projection(SteeringVector):
    """Takes its directions out of the residual stream, where a steering vector would add them."""

    def step(self, h, v, doses):
        """Minus what h [batch, n, d_model] has along v; dose 1 takes all of it out."""
        u = v / v.norm()
        along = h.float() @ u  # [batch, n]
        return -doses * along[..., None] * u


def of_run(model, tok, settings: heal_loop.Config) -> dict[str, float]:
    """How far each of six models moved the trait from the original, nats."""
    reading = texts.read(settings)
    s = shift(model, tok, reading.contexts, band(model, settings.steer_layers)[-1:])
    [(layer, v)] = s.layers.items()
    noise = torch.randn(len(v), generator=torch.Generator().manual_seed(settings.seed))
    noise = SteeringVector({layer: noise * v.norm() / noise.norm()})

    # the gates (0: original, 1: student), and what is done to the stream
    cases = {"student": (1, None), "original + s": (0, s), "original + random": (0, noise),
             "student without s": (1, Projection(s.layers)),
             "student without random": (1, Projection(noise.layers)),
             "original without s": (0, Projection(s.layers))}
    sign = -1 if reading.direction == "down" else 1
    how = {"think_tokens": settings.think_tokens} if settings.readout == "tinymfv" else {}
    with lora.gates(model, history=0, live=0):
        base = evaluate(model, tok, reading, settings.readout, **how)
    moved = {}
    for name, (gate, vector) in cases.items():
        with lora.merged(model), lora.gates(model, history=gate, live=0):
            profile = evaluate(model, tok, reading, settings.readout, base.constants,
                               vector=vector, dose=1.0, **how)
        moved[name] = sign * (profile.trait - base.trait)
    return moved


def shares(moved: dict[str, float]) -> dict[str, float | None]:
    """What the module's head defines, of one run; None where the student hardly moved."""
    if abs(moved["student"]) < MIN_SHIFT:
        return dict.fromkeys(("sufficient", "sufficient, random direction",
                              "necessary", "necessary, random direction"))
    part = {name: value / moved["student"] for name, value in moved.items()}
    return {"sufficient": part["original + s"],
            "sufficient, random direction": part["original + random"],
            "necessary": 1 - part["student without s"],
            "necessary, random direction": 1 - part["student without random"]}


def main(cfg: Config) -> None:
    # 1. measure
    cfg.out.mkdir(parents=True, exist_ok=True)
    first = runs.read_config(heal_loop.Config, cfg.run[0])
    for folder in cfg.run:  # a mean over different arms would be one of nothing
        runs.refuse_other_settings(first, folder, free=("seed",), fix="runs of one arm")
    found = []
    for folder in tqdm(cfg.run, "runs", leave=False, disable=None):
        settings = runs.read_config(heal_loop.Config, folder)
        model, tok = models.load(settings.model, cfg.device, cfg.dtype)
        tok.chat_date = date.fromisoformat(settings.date)
        rounds = runs.rounds_done(folder)
        if not rounds:
            raise ValueError(f"{folder} has no finished round; fix: give a run that has one")
        lora.load(model, [folder / f"round_{r}/adapter.safetensors" for r in range(rounds)])
        found.append(of_run(model, tok, settings))

    # 2. write: each run, the mean over runs, and the two shares
    rows = [[folder.name, *(f"{x:.2f}" for x in moved.values())]
            for folder, moved in zip(cfg.run, found)]
    rows.append(["all", *(over_seeds([moved[name] for moved in found], 2) for name in found[0])])
    parts = [shares(moved) for moved in found]
    said = "\n".join(f"- {name}: {over_seeds([part[name] for part in parts], 2)}"
                     for name in parts[0])
    text = f"""# The student's shift: added to the original, taken out of the student

`python -m studies.cause {" ".join(folder.name for folder in cfg.run)}` · {ran_on(model)} ·
{settings.n_vignettes or "all"} vignettes · moved: Δ of the trait in its own direction, nats; in
brackets, from three runs on, the 95 % t-interval over runs

{markdown(rows, ["run", *found[0]])}

{said}
"""
    runs.write_text(cfg.out / "cause.md", text)
    print(text)


if __name__ == "__main__":
    runs.cli(Config, main)
