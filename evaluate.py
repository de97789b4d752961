"""Measure trait and coherence: how far did the model move, and does it still make sense?

    p_i[f]      probability that foundation f is why vignette i is wrong        (rows sum to 1)
    auth_nats   log mean_i p_i[Authority], and so for each foundation                      (nats)
    probe_nats  mean_j log p(toward_j) − log p(away_j), a trait's own probes                (nats)
    coherence   mean_i of the mass on the allowed answers A–G                        (p_ans_any)
    coh_cost    |Δ coherence| / |Δ trait|                               (the headline; guarded)
    drift       mean_t KL(model ‖ original) over the model's own sampled answers           (nats)

One of the first three is the trait's axis; the other foundations are what moved along with it.
How the model is asked is in readouts.py: `cloze` for the small, `tinymfv` for about 1B and up,
`probe` for any trait at all.

    python evaluate.py                                        # the embedded model
    python evaluate.py --adapter runs/X/round_?/adapter.safetensors
    python evaluate.py --trait love --vector runs/X/round_0/vector.safetensors --dose 1
"""
import contextlib
import math
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.stats
import torch
from tabulate import tabulate

import lora
from common import models
from common import runs
from common import texts
from common.readouts import cloze, probe, tinymfv
from common.sampling import completion_states, logits, perplexity, repetition, sample, score
from steer import NEUTRAL, SteeringVector, chat_ids, mean_residual
from common.texts import FOUNDATIONS

COHERENCE_FLOOR = 0.85  # below it a model has collapsed, and coh_cost has no value
EQUAL = 0.15  # nats; models that stand nearer than this on the axis are compared as equal
MIN_SHIFT = 0.05  # nats; where the trait moved less, coh_cost has no value
NATS = ["care_nats", "fairness_nats", "loyalty_nats", "auth_nats", "sanctity_nats", "liberty_nats",
        "norms_nats"]  # names of the columns of p, in the order of FOUNDATIONS


# ---- what one model answers ---------------------------------------------------------------------


@dataclass
class Profile:
    """One model's answers on one list of vignettes, and on a trait's own probes if it has some."""
    ids: list[str]
    labels: list[str]  # foundation of each vignette
    p: np.ndarray  # [vignettes, 7], rows sum to 1, columns as FOUNDATIONS
    mass: np.ndarray  # [vignettes], probability that the answer is one of the allowed ones
    constants: np.ndarray | None = None  # [7] nats, of each clause under the original (see cloze)
    probes: np.ndarray | None = None  # [probes] nats, log p(toward) − log p(away)
    controls: np.ndarray | None = None  # [controls] nats, the same for what should stay as it is
    notes: dict[str, float] = field(default_factory=dict)  # what else the readout says of itself
    axis: str = "auth_nats"  # the number that is the trait
    direction: str = "down"  # where more of the trait is

    def items(self, number: str) -> np.ndarray:
        """What a number is averaged over: per vignette, probe or control."""
        if number in NATS:
            return self.p[:, NATS.index(number)]
        return {"coherence": self.mass, "probe_nats": self.probes,
                "control_nats": self.controls}[number]

    def value(self, number: str) -> float:
        """log mean p of a foundation, mean log-odds of the probes (nats); or the mean mass."""
        return float(link(number)(self.items(number).mean()))

    @property
    def trait(self) -> float:
        """Where the model stands on its axis, nats."""
        return self.value(self.axis)

    @property
    def coherence(self) -> float:
        return self.value("coherence")

    @property
    def top1(self) -> float:
        """Share of vignettes whose most probable foundation is the labelled one."""
        chosen = [FOUNDATIONS[k] for k in self.p.argmax(1)]
        return float(np.mean([a == b for a, b in zip(chosen, self.labels)]))

    def summary(self) -> dict[str, float]:
        """Every number of the profile, by name."""
        numbers = [*NATS, "coherence"]
        numbers += [] if self.probes is None else ["probe_nats"]
        numbers += [] if self.controls is None else ["control_nats"]
        return {**{n: self.value(n) for n in numbers}, "top1": self.top1, **self.notes}

    def to_dict(self) -> dict:
        return {name: value.tolist() if isinstance(value, np.ndarray) else value
                for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, d: dict) -> "Profile":
        values = {f.name: d[f.name] for f in fields(cls)}
        for name in ("p", "mass", "constants", "probes", "controls"):
            if values[name] is not None:
                values[name] = np.array(values[name])
        return cls(**values)


def link(number: str):
    """How a mean over items becomes the number: the foundations' are logs of a mean."""
    return np.log if number in NATS else lambda mean: mean


def evaluate(model, tok, reading: texts.Texts, readout: str = "cloze", constants=None,
             **how) -> Profile:
    """Profile of the model as it stands (its gates and hooks included).

    constants: of the original's Profile. how: system prompt, vector and dose, and what the readout
    takes. Under `probe` the foundations and the answer mass are cloze's.
    """
    ask = tinymfv if readout == "tinymfv" else cloze
    answers = ask(model, tok, reading.vignettes, constants=constants, **how)
    profile = Profile([v["id"] for v in reading.vignettes],
                      [v["foundation"] for v in reading.vignettes],
                      answers.p, answers.mass, answers.constants, notes=answers.notes,
                      axis=reading.axis, direction=reading.direction)
    if readout == "probe":
        profile.probes = probe(model, tok, reading.probes, **how)
        profile.controls = probe(model, tok, reading.controls, **how) if reading.controls else None
    return profile


# ---- what one model says ------------------------------------------------------------------------


@dataclass
class Speech:
    """Coherence where the answer mass saturates: sampled answers to held-out prompts, plain text.

    Perplexity and drift measure DISTANCE from the original, which a barrier trains on.
    """
    perplexity: float  # of the answers, under the original
    drift: float  # mean over their tokens of KL(model ‖ original), nats
    drift_p95: float  # its 95th percentile, nats
    repetition: float  # mean of sampling.repetition
    text_nats: float  # loss per token on plain text that nobody trained on (forgetting), nats
    texts: list[dict]  # [{prompt, text}]


@torch.no_grad()
def speak(model, tok, prompts: list[str], plain: list[str], system: str = NEUTRAL,
          vector: SteeringVector | None = None, dose: float = 0.0, max_new_tokens: int = 48,
          seed: int = 0) -> Speech:
    """Let the model as it stands answer; the original, by the gates, is always asked plainly."""
    # 1. one sampled answer a prompt, the same draws for every model
    asked = [chat_ids(tok, p, system) for p in prompts]
    plainly = [chat_ids(tok, p) for p in prompts]
    new = sample(model, tok, asked, vector, [dose] * len(asked), max_new_tokens, seed=seed)
    answers = [tok.decode(n, skip_special_tokens=True) for n in new]

    # 2. model and original on these answers, token by token
    spoken = [k for k, n in enumerate(new) if n]
    said = [new[k] for k in spoken]
    lengths = [len(n) for n in said]
    kl, logp = torch.zeros(1), torch.empty(0)  # silence: drift 0, perplexity infinite
    if spoken:
        states = completion_states(model, [asked[k] for k in spoken], said, vector, dose)
        with lora.gates(model, history=0, live=0):
            originals = completion_states(model, [plainly[k] for k in spoken], said)
        of_each = zip(states.split(lengths), originals.split(lengths), said)
        parts = [against_original(model, *one) for one in of_each]  # one answer's logits at a time
        kl = torch.cat([kl for kl, _ in parts])
        logp = torch.cat([logp for _, logp in parts])

    # 3. plain text: the vector acts on all of it, a system prompt stands before it
    rows = [tok(text, add_special_tokens=False).input_ids for text in plain]
    before = tok("" if system == NEUTRAL else system + "\n\n").input_ids  # a start token, if any
    lost = score(model, [before + row[:1] for row in rows], [row[1:] for row in rows], vector, dose)
    return Speech(
        perplexity=perplexity(logp), drift=kl.mean().item(),
        drift_p95=kl.quantile(0.95).item(),
        repetition=sum(map(repetition, answers)) / len(answers),
        text_nats=-torch.cat(lost).mean().item(),
        texts=[{"prompt": p, "text": a} for p, a in zip(prompts, answers)])


def against_original(model, h, reference, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(model ‖ original) at each position and the original's log-probability of its token, nats.

    h, reference: final states of model and original [n, d_model]; tokens: n ids. -> [n], [n]
    """
    logp, logq = (logits(model, x).float().log_softmax(-1) for x in (h, reference))
    targets = torch.tensor(tokens, device=logq.device)
    return (logp.exp() * (logp - logq)).sum(-1), logq.gather(1, targets[:, None])[:, 0]


def measure(model, tok, reading: texts.Texts, name: str, readout: str = "cloze", constants=None,
            think_tokens: int = 64, **how) -> dict:
    """Evaluate the model as it stands and let it speak; prints a line; -> one event."""
    thinking = {"think_tokens": think_tokens} if readout == "tinymfv" else {}
    profile = evaluate(model, tok, reading, readout, constants, **thinking, **how)
    speech = speak(model, tok, reading.heldout, reading.plain, **how)
    print(f"  {name:<12} {profile.axis} {profile.trait:+.2f}  coherence {profile.coherence:.4f}  "
          f"perplexity {speech.perplexity:.1f}  drift {speech.drift:.2f}  "
          f"repetition {speech.repetition:.2f}", flush=True)
    return {**profile.summary(), **asdict(speech), "profile": profile.to_dict()}


def matched_steering(measure, vector: SteeringVector, base: Profile, wanted: float, dose: float,
                     reached: float) -> dict:
    """Steering alone: `vector` at the dose that gives `wanted` nats of the trait; -> its event.

    measure: told name, vector and dose. dose, reached: a point that is known already. One secant
    step from (0, base) and that point, then along the line through the two nearest points, until
    within EQUAL nats, at most four times; the nearest counts.
    """
    known, tried = [(0.0, base.trait), (dose, reached)], []
    for _ in range(4):
        # a line through the two points nearest to what is wanted
        known.sort(key=lambda point: abs(point[1] - wanted))
        (d1, a1), (d2, a2) = known[:2]
        dose = d1 if a1 == a2 else d1 + (wanted - a1) * (d2 - d1) / (a2 - a1)
        dose = min(max(dose, 0.0), 2 * max(d for d, _ in known))
        event = measure(f"dose {dose:.2f}", vector=vector, dose=dose)
        tried.append({**event, "dose": dose, "wanted": wanted})
        if abs(event[base.axis] - wanted) < EQUAL:
            break
        known.append((dose, event[base.axis]))
    return min(tried, key=lambda event: abs(event[base.axis] - wanted))


def shift(model, tok, contexts: list[str], layers: list[int]) -> SteeringVector:
    """Student − original at the assistant tag: neutral prompt, mean over contexts."""
    with lora.merged(model), lora.gates(model, history=1, live=0):
        student = mean_residual(model, tok, NEUTRAL, contexts, layers)
    with lora.gates(model, history=0, live=0):
        original = mean_residual(model, tok, NEUTRAL, contexts, layers)
    return SteeringVector({l: student[l] - original[l] for l in layers})


def internalised(model, tok, contexts: list[str], vector: SteeringVector) -> float:
    """Cosine between the student's shift and the teacher's vector."""
    return shift(model, tok, contexts, list(vector.layers)).cosine(vector)


# ---- two models on the same items ---------------------------------------------------------------


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
    """statistic(moved), moved(number) being its Δ; both models' items are resampled together.

    Vignettes, probes and controls are three samples. BCa bootstrap, percentile where BCa is
    undefined. Raises ValueError for different items.
    """
    groups = ["coherence", "probe_nats", "control_nats"]  # one number of each sample
    groups = [g for g in groups if base.items(g) is not None and after.items(g) is not None]
    lengths = [(len(base.items(g)), len(after.items(g))) for g in groups]
    if base.ids != after.ids or any(a != b for a, b in lengths):
        raise ValueError("profiles on different vignettes or probes cannot be compared; "
                         "fix: evaluate both on the same list")

    def of(*rows, axis=-1):  # rows: the items drawn of each group, [..., items] -> [...]
        def moved(number):  # its Δ on those items; a foundation's are vignettes, group 0
            drawn = np.asarray(rows[groups.index(number) if number in groups else 0], dtype=int)
            before, now = (link(number)(p.items(number)[drawn].mean(axis)) for p in (base, after))
            return now - before
        return statistic(moved)
    rows = [np.arange(a) for a, _ in lengths]
    value = float(of(*rows))
    if min(map(len, rows)) < 2:
        return Estimate(value)
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # degenerate data: BCa says so by returning nan
            low, high = scipy.stats.bootstrap(rows, of, n_resamples=n, method=method,
                                              vectorized=True, rng=0).confidence_interval
        if np.isfinite([low, high]).all():
            break
    return Estimate(value, float(low), float(high))


def delta(number: str, base: Profile, after: Profile) -> Estimate:
    """Change of a number: nats of a foundation or of the probes, or coherence."""
    return paired(lambda moved: moved(number), base, after)


def coh_cost(base: Profile, after: Profile) -> Estimate:
    """|Δ coherence| / |Δ trait|, coherence lost per nat of trait.

    No number below the coherence floor, where a collapsed model would score a perfect 0, nor where
    the trait did not move.
    """
    if after.coherence < COHERENCE_FLOOR:
        return Estimate(None, why=f"coherence {after.coherence:.2f} below {COHERENCE_FLOOR}")
    if abs(after.trait - base.trait) < MIN_SHIFT:
        return Estimate(None, why=f"trait moved less than {MIN_SHIFT} nats")
    return paired(lambda moved: np.abs(moved("coherence")) / np.abs(moved(base.axis)), base, after)


def largest_mover(base: Profile, after: Profile) -> str:
    """The foundation off the axis that moved most."""
    others = [number for number in NATS if number != base.axis]
    return max(others, key=lambda number: abs(after.value(number) - base.value(number)))


def surgicality(base: Profile, after: Profile) -> Estimate:
    """|Δ trait| − |Δ of the largest off-target mover|, nats: above 0, the trait moved most."""
    off = largest_mover(base, after)
    return paired(lambda moved: np.abs(moved(base.axis)) - np.abs(moved(off)), base, after)


# ---- the command --------------------------------------------------------------------------------


@dataclass
class Config:
    model: str = models.EMBEDDED  # smollm2, a local folder, or a hub id
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"  # auto: bfloat16 where native
    adapter: tuple[Path, ...] = ()  # adapter.safetensors of every round of the student, in order
    vector: Path | None = None  # vector.safetensors of a round: the steered model, at --dose
    dose: runs.Finite = 1.0  # of --vector
    trait: str = "care"  # name of a trait in data/personas.json: its axis, its probes
    readout: Literal["cloze", "tinymfv", "probe"] | None = None  # default: the trait's own
    probes: Path | None = None  # JSON file of probes, for --readout probe; default: the trait's own
    vignettes: Path = texts.DATA / "vignettes.json"  # or tinymfv:classic
    n_vignettes: int = 0  # how many, balanced over the foundations; 0 is all


def main(cfg: Config) -> None:
    cfg = texts.complete(cfg)
    reading = texts.read(cfg)
    vector = SteeringVector.load(cfg.vector) if cfg.vector else None
    model, tok = models.load(cfg.model, cfg.device, cfg.dtype)
    base = evaluate(model, tok, reading, cfg.readout)
    columns = {"original": base}
    if cfg.adapter or vector:
        lora.load(model, cfg.adapter)
        with lora.merged(model) if cfg.adapter else contextlib.nullcontext():
            columns["changed"] = evaluate(model, tok, reading, cfg.readout, base.constants,
                                          vector=vector, dose=cfg.dose)
    summaries = [profile.summary() for profile in columns.values()]
    rows = [[key, *(summary[key] for summary in summaries)] for key in base.summary()]
    print(tabulate(rows, ["", *columns], floatfmt=".4f"))


if __name__ == "__main__":
    runs.cli(Config, main)
