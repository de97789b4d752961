"""Measure trait and coherence: which moral foundation does the model blame, does it still answer?

    p_i[f]      probability that foundation f is why vignette i is wrong       (rows sum to 1)
    auth_nats   log mean_i p_i[Authority]                              (nats; down = more trait)
    coherence   mean_i of the mass on the allowed answers A–G          (p_ans_any)
    coh_cost    |Δ coherence| / |Δ auth_nats|                          (the headline; guarded)

How the model is asked is in readouts.py: `cloze` for the small, `tinymfv` for about 1B and up.

    python evaluate.py                                        # the embedded model
    python evaluate.py --adapter runs/X/round_?/adapter.safetensors
    python evaluate.py --vector runs/X/round_0/vector.safetensors --dose 4
"""
import contextlib
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.stats
from tabulate import tabulate

import lora
import models
import runs
import texts
from readouts import READOUTS
from sampling import repetition, sample, score
from steer import NEUTRAL, SteeringVector, chat_ids, mean_residual
from texts import FOUNDATIONS

COHERENCE_FLOOR = 0.85  # below it a model has collapsed, and coh_cost has no value
MIN_SHIFT = 0.05  # nats; where the trait moved less, coh_cost has no value


# ---- one model ----------------------------------------------------------------------------------


def short(foundation: str) -> str:
    return {"Authority": "auth", "SocialNorms": "norms"}.get(foundation, foundation.lower())


@dataclass
class Profile:
    """One model's answers on one list of vignettes."""
    ids: list[str]
    labels: list[str]  # foundation of each vignette
    p: np.ndarray  # [vignettes, 7], rows sum to 1, columns as FOUNDATIONS
    mass: np.ndarray  # [vignettes], probability that the answer is one of the allowed ones
    constants: np.ndarray | None = None  # [7] nats, of each clause under the original (see cloze)

    def nats(self, foundation: str) -> float:
        """log mean_i p_i[foundation], in nats."""
        return math.log(self.p[:, FOUNDATIONS.index(foundation)].mean())

    @property
    def auth_nats(self) -> float:
        return self.nats("Authority")

    @property
    def care_nats(self) -> float:
        return self.nats("Care")

    @property
    def coherence(self) -> float:
        return float(self.mass.mean())

    @property
    def top1(self) -> float:
        """Share of vignettes whose most probable foundation is the labelled one."""
        chosen = [FOUNDATIONS[k] for k in self.p.argmax(1)]
        return float(np.mean([a == b for a, b in zip(chosen, self.labels)]))

    def summary(self) -> dict[str, float]:
        by_foundation = {f"{short(f)}_nats": self.nats(f) for f in FOUNDATIONS}
        return {**by_foundation, "coherence": self.coherence, "top1": self.top1}

    def to_dict(self) -> dict:
        constants = None if self.constants is None else self.constants.tolist()
        return {"ids": self.ids, "labels": self.labels, "p": self.p.tolist(),
                "mass": self.mass.tolist(), "constants": constants}

    @classmethod
    def from_dict(cls, d: dict) -> "Profile":
        constants = None if d["constants"] is None else np.array(d["constants"])
        return cls(d["ids"], d["labels"], np.array(d["p"]), np.array(d["mass"]), constants)


def evaluate(model, tok, vignettes: list[dict], readout: str = "cloze", **how) -> Profile:
    """Foundation profile and coherence of the model as it stands (its gates and hooks included).

    how: constants (from the original's Profile), system prompt, vector and dose, batch_size.
    Raises ValueError for an unknown readout.
    """
    if readout not in READOUTS:
        raise ValueError(f"unknown readout '{readout}'; fix: one of {', '.join(READOUTS)}")
    answers = READOUTS[readout](model, tok, vignettes, **how)
    ids, labels = [v["id"] for v in vignettes], [v["foundation"] for v in vignettes]
    return Profile(ids, labels, answers.p, answers.mass, answers.constants)


def speak(model, tok, prompts: list[str], system: str = NEUTRAL, dose: float = 0.0,
          vector: SteeringVector | None = None, max_new_tokens: int = 48) -> dict:
    """Greedy completions of the model as it stands; coherence where the answer mass saturates.

    -> perplexity: exp of the mean over completions of their mean negative log-probability under the
    original; repetition: mean of `sampling.repetition`; texts: [{prompt, text}].
    """
    ids = [chat_ids(tok, p, system) for p in prompts]
    new = sample(model, tok, ids, vector, [dose] * len(ids), max_new_tokens, temperature=0)
    with lora.gates(model, history=0, live=0):
        logp = [lp.mean().item() for lp in score(model, ids, new) if len(lp)]
    answers = [tok.decode(n, skip_special_tokens=True) for n in new]
    return {"perplexity": math.exp(-sum(logp) / max(1, len(logp))),
            "repetition": sum(map(repetition, answers)) / len(answers),
            "texts": [{"prompt": p, "text": a} for p, a in zip(prompts, answers)]}


def measure(model, tok, reading: texts.Texts, name: str, readout: str = "cloze", constants=None,
            **how) -> dict:
    """Evaluate the model as it stands and let it speak; prints a line; -> one event."""
    profile = evaluate(model, tok, reading.vignettes, readout, constants=constants, **how)
    said = speak(model, tok, reading.heldout, **how)
    print(f"  {name:<12} auth {profile.auth_nats:+.2f}  care {profile.care_nats:+.2f}  "
          f"coherence {profile.coherence:.4f}  perplexity {said['perplexity']:.1f}  "
          f"repetition {said['repetition']:.2f}", flush=True)
    return {**profile.summary(), **said, "profile": profile.to_dict()}


def matched_steering(measure, vector: SteeringVector, base: Profile, wanted: float, dose: float,
                     auth: float) -> dict:
    """Steering alone: `vector` at the dose that gives `wanted` auth_nats; -> its event.

    measure: told name, vector and dose. dose, auth: a point that is known already. One secant step
    from (0, base) and that point, then regula falsi to within 0.15 nats, at most four evaluations.
    """
    known = [(0.0, base.auth_nats), (dose, auth)]
    for _ in range(4):
        # a line through the two points nearest to what is wanted
        known.sort(key=lambda point: abs(point[1] - wanted))
        (d1, a1), (d2, a2) = known[:2]
        dose = d1 if a1 == a2 else d1 + (wanted - a1) * (d2 - d1) / (a2 - a1)
        dose = min(max(dose, 0.0), 2 * max(d for d, _ in known))
        event = measure(f"dose {dose:.2f}", vector=vector, dose=dose)
        if abs(event["auth_nats"] - wanted) < 0.15:
            break
        known.append((dose, event["auth_nats"]))
    return {**event, "dose": dose, "wanted": wanted}


def internalised(model, tok, contexts: list[str], vector: SteeringVector) -> float:
    """Cosine between what the student moved at the assistant tag and the teacher's vector.

    Both under the neutral prompt, averaged over contexts.
    """
    layers = list(vector.layers)
    with lora.merged(model), lora.gates(model, live=0):
        student = mean_residual(model, tok, NEUTRAL, contexts, layers)
    with lora.gates(model, history=0, live=0):
        original = mean_residual(model, tok, NEUTRAL, contexts, layers)
    moved = SteeringVector({l: student[l] - original[l] for l in layers})
    return moved.cosine(vector)


# ---- two models on the same vignettes -----------------------------------------------------------


@dataclass
class Estimate:
    """A value with its 95 % bootstrap interval; None where it has no meaning, `why` says so."""
    value: float | None
    low: float = math.nan
    high: float = math.nan
    why: str = ""

    @property
    def holds_zero(self) -> bool:
        return self.value is None or self.low <= 0 <= self.high


def paired(statistic, base: Profile, after: Profile, n: int = 2000) -> Estimate:
    """statistic(p0, m0, p1, m1) over the same vignettes resampled together, p [vignettes, ..., 7].

    BCa bootstrap, percentile where BCa is undefined. Raises ValueError for different vignettes.
    """
    if base.ids != after.ids:
        raise ValueError("profiles on different vignettes cannot be compared; "
                         "fix: evaluate both on the same list")

    def of(rows, axis=-1):  # rows [..., vignettes] -> [...]
        rows = np.moveaxis(np.asarray(rows, dtype=int), axis, 0)
        return statistic(base.p[rows], base.mass[rows], after.p[rows], after.mass[rows])
    rows = np.arange(len(base.ids))
    value = float(of(rows))
    if len(rows) < 2:
        return Estimate(value)
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # degenerate data: BCa says so by returning nan
            low, high = scipy.stats.bootstrap((rows,), of, n_resamples=n, method=method,
                                              vectorized=True, rng=0).confidence_interval
        if np.isfinite([low, high]).all():
            break
    return Estimate(value, float(low), float(high))


def shift(p0, p1, foundation: str):
    """Δ log mean p[foundation], nats: [vignettes, ..., 7] -> [...]."""
    f = FOUNDATIONS.index(foundation)
    return np.log(p1[..., f].mean(0)) - np.log(p0[..., f].mean(0))


def delta_nats(foundation: str, base: Profile, after: Profile) -> Estimate:
    """Change of log mean p[foundation], nats."""
    return paired(lambda p0, m0, p1, m1: shift(p0, p1, foundation), base, after)


def delta_coherence(base: Profile, after: Profile) -> Estimate:
    return paired(lambda p0, m0, p1, m1: m1.mean(0) - m0.mean(0), base, after)


def coh_cost(base: Profile, after: Profile) -> Estimate:
    """|Δ coherence| / |Δ auth_nats|, coherence lost per nat of trait.

    No number below the coherence floor, where a collapsed model would score a perfect 0, nor where
    the trait did not move.
    """
    if after.coherence < COHERENCE_FLOOR:
        return Estimate(None, why=f"coherence {after.coherence:.2f} below {COHERENCE_FLOOR}")
    if abs(after.auth_nats - base.auth_nats) < MIN_SHIFT:
        return Estimate(None, why=f"trait moved less than {MIN_SHIFT} nats")

    def ratio(p0, m0, p1, m1):
        return np.abs(m1.mean(0) - m0.mean(0)) / np.abs(shift(p0, p1, "Authority"))
    return paired(ratio, base, after)


def surgicality(base: Profile, after: Profile) -> Estimate:
    """|Δ auth| − max(|Δ care|, |Δ fairness|), nats: above 0, Authority moved most of the three."""
    def margin(p0, m0, p1, m1):
        care, fairness = (np.abs(shift(p0, p1, f)) for f in ("Care", "Fairness"))
        return np.abs(shift(p0, p1, "Authority")) - np.maximum(care, fairness)
    return paired(margin, base, after)


# ---- the command --------------------------------------------------------------------------------


@dataclass
class Config:
    model: str = models.EMBEDDED  # smollm2, a local folder, or a hub id
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"  # auto: bfloat16 where native
    adapter: tuple[Path, ...] = ()  # adapter.safetensors of every round of the student, in order
    vector: Path | None = None  # vector.safetensors of a round: the steered model, at --dose
    dose: runs.Finite = 1.0  # of --vector
    readout: Literal["cloze", "tinymfv"] = "cloze"  # tinymfv suits models of about 1B and up
    vignettes: Path = texts.DATA / "vignettes.json"  # or tinymfv:classic
    n_vignettes: int = 0  # how many, balanced over the foundations; 0 is all


def main(cfg: Config) -> None:
    vignettes = texts.load_vignettes(cfg.vignettes, cfg.n_vignettes)
    vector = SteeringVector.load(cfg.vector) if cfg.vector else None
    model, tok = models.load(cfg.model, cfg.device, cfg.dtype)
    base = evaluate(model, tok, vignettes, cfg.readout)
    columns = {"original": base}
    if cfg.adapter or vector:
        lora.load(model, cfg.adapter)
        with lora.merged(model) if cfg.adapter else contextlib.nullcontext():
            columns["changed"] = evaluate(model, tok, vignettes, cfg.readout, vector=vector,
                                          constants=base.constants, dose=cfg.dose)
    summaries = [profile.summary() for profile in columns.values()]
    rows = [[key, *(summary[key] for summary in summaries)] for key in base.summary()]
    print(tabulate(rows, ["", *columns], floatfmt=".4f"))


if __name__ == "__main__":
    runs.cli(Config, main)
