"""Measure trait and coherence: how far did the model move, and does it still make sense?

    p_i[f]      probability that foundation f is why vignette i is wrong        (rows sum to 1)
    auth_nats   log mean_i p_i[Authority], and so for each foundation                      (nats)
    probe_nats  mean_j log p(toward_j) − log p(away_j), a trait's own probes                (nats)
    coherence   mean_i of the probability of a valid answer, A to G                 (valid_p)
    coh_cost    |Δ coherence| / |Δ trait|                               (none after a collapse)

One of the first three is the trait's axis. How the model is asked is in common/readouts.py: `cloze`
for the small, `tinymfv` for about 1B and up, `probe` for any trait at all.

    python evaluate.py                                        # the embedded model
    python evaluate.py --adapter runs/X/round_*/adapter.safetensors
    python evaluate.py --trait love --vector runs/X/round_0/vector.safetensors --dose 1
"""
import math
import warnings
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import scipy.stats

from common import texts
from common.generation import generate
from common.prompts import Chat
from common.readouts import cloze, probe, tinymfv
from common.texts import FOUNDATIONS, NATS
from steer import SteeringVector

COHERENCE_FLOOR = 0.85  # below it a model has collapsed, and coh_cost has no value
MIN_SHIFT = 0.05  # nats; where the trait moved less, coh_cost has no value


@dataclass
class Profile:
    """One model's answers on one list of vignettes, on control questions and a trait's probes."""
    ids: list[str]
    labels: list[str]  # foundation of each vignette
    p: np.ndarray  # [vignettes, 7], rows sum to 1, columns as FOUNDATIONS
    valid_p: np.ndarray  # [vignettes], probability that the answer is one of the allowed ones
    constants: np.ndarray | None = None  # [7, wordings] nats, of the original (see cloze)
    probes: np.ndarray | None = None  # [probes] nats, log p(toward) − log p(away)
    controls: np.ndarray | None = None  # [controls] nats, the same for what should stay as it is
    notes: dict[str, float] = field(default_factory=dict)  # what else the readout reports
    axis: str = "auth_nats"  # the metric that is the trait
    direction: str = "down"  # where more of the trait is
    spread: dict[str, list[float]] = field(default_factory=dict)  # a metric by each wording alone

    def __post_init__(self):
        for name in ("p", "valid_p", "constants", "probes", "controls"):  # lists, from a file
            if getattr(self, name) is not None:
                setattr(self, name, np.asarray(getattr(self, name), dtype=float))

    def items(self, metric: str) -> np.ndarray:
        """What a metric is averaged over: per vignette, probe or control."""
        if metric in NATS:
            return self.p[:, NATS.index(metric)]
        return {"coherence": self.valid_p, "probe_nats": self.probes,
                "control_nats": self.controls}[metric]

    def value(self, metric: str) -> float:
        """log mean p of a foundation, mean log-odds of probes (nats); or the mean valid_p."""
        return float(link(metric)(self.items(metric).mean()))

    @property
    def trait(self) -> float:
        """Where the model stands on its axis, nats."""
        return self.value(self.axis)

    def summary(self) -> dict[str, float]:
        """Every metric of the profile, by name."""
        metrics = (*NATS, "coherence", "probe_nats", "control_nats")
        metrics = [m for m in metrics if self.items(m) is not None]
        right = [FOUNDATIONS[k] for k in self.p.argmax(1)] == np.array(self.labels)
        return {**{m: self.value(m) for m in metrics}, "top1": float(right.mean()), **self.notes}

    def to_dict(self) -> dict:
        """For a file; `Profile(**d)` reads it back."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value
                for name, value in asdict(self).items()}


def link(metric: str):
    """How a mean over items becomes the metric: the foundations' are logs of a mean."""
    return np.log if metric in NATS else lambda mean: mean


def evaluate(model, chat: Chat, reading: texts.Texts, readout: str = "cloze", constants=None,
             think_tokens: int = 64, **kwargs) -> Profile:
    """Profile of the model as it stands (its gates and hooks included).

    constants: of the original's Profile. kwargs: system prompt, vector, dose. think_tokens: of
    tinymfv. Under `probe` the foundations and valid_p are cloze's.
    """
    if readout == "tinymfv":
        answers = tinymfv(model, chat, reading.vignettes, think_tokens=think_tokens, **kwargs)
    else:
        answers = cloze(model, chat, reading.vignettes, constants, **kwargs)
    profile = Profile([v["id"] for v in reading.vignettes],
                      [v["foundation"] for v in reading.vignettes],
                      answers.p, answers.valid_p, answers.constants, notes=answers.notes,
                      axis=reading.axis, direction=reading.direction)
    if answers.by_wording is not None:
        profile.spread = {m: row.tolist() for m, row in zip(NATS, answers.by_wording)}
    if readout == "probe":
        profile.probes = probe(model, chat, reading.probes, **kwargs)
        profile.spread["probe_nats"] = profile.probes.tolist()
    if reading.controls:
        profile.controls = probe(model, chat, reading.controls, **kwargs)
    return profile


def measure(model, chat: Chat, reading: texts.Texts, name: str, readout: str = "cloze",
            constants=None, think_tokens: int = 64, max_new_tokens: int = 64, **kwargs) -> dict:
    """Evaluate the model as it stands and let it generate; prints a line; -> one event."""
    profile = evaluate(model, chat, reading, readout, constants, think_tokens, **kwargs)
    generated = generate(model, chat, reading.heldout[:12], reading.plain,
                         max_new_tokens=max_new_tokens, **kwargs)
    print(f"  {name:<12} {profile.axis} {profile.trait:+.2f}  "
          f"coherence {profile.value('coherence'):.4f}  "
          f"perplexity {generated.perplexity:.1f}  drift {generated.drift:.2f}  "
          f"entropy {generated.entropy:.2f}", flush=True)
    return {**profile.summary(), **asdict(generated), "profile": profile.to_dict()}


def matched_dose(model, chat: Chat, reading: texts.Texts, readout: str, base: Profile,
                 student: Profile, think_tokens: int, vector: SteeringVector) -> float:
    """The dose at which `vector` alone moves the trait as far as the student, by secant steps.

    Looked for on the first 28 vignettes, which are balanced over the foundations too.
    """
    few = replace(reading, vignettes=reading.vignettes[:28], controls=[])
    start, wanted = (replace(profile, p=profile.p[:28]).trait for profile in (base, student))
    known, dose = [(0.0, start)], 1.0  # (dose, trait in nats)
    for _ in range(6):
        reached = evaluate(model, chat, few, readout, base.constants, think_tokens, vector=vector,
                           dose=dose).trait
        known = sorted([*known, (dose, reached)], key=lambda point: abs(point[1] - wanted))
        (d1, a1), (d2, a2) = known[:2]
        if abs(a1 - wanted) < 0.05 or a1 == a2:
            break
        # a line through the two nearest points; never more than twice the largest dose so far
        dose = min(max(d1 + (wanted - a1) * (d2 - d1) / (a2 - a1), 0.0), 2 * max(known)[0])
    return known[0][0]


@dataclass
class Estimate:
    """A value with its 95 % bootstrap interval; None where it has no meaning, `why` says so."""
    value: float | None
    low: float = math.nan
    high: float = math.nan
    why: str = ""


def paired(statistic, base: Profile, after: Profile, n: int = 2000) -> Estimate:
    """statistic(change) with its interval; change(metric) is the Δ of that metric.

    Both models' items are resampled together; vignettes, probes, controls are three samples.
    BCa bootstrap, percentile where BCa is undefined. Raises ValueError for different items.
    """
    groups = ["coherence", "probe_nats", "control_nats"]  # one metric of each sample
    groups = [g for g in groups if base.items(g) is not None and after.items(g) is not None]
    lengths = [(len(base.items(g)), len(after.items(g))) for g in groups]
    if base.ids != after.ids or any(a != b for a, b in lengths):
        raise ValueError("profiles on different vignettes or probes cannot be compared; "
                         "fix: evaluate both on the same list")

    def of(*rows, axis=-1):  # rows: the items drawn of each group, [..., items] -> [...]
        def change(metric):  # its Δ on those items; a foundation's are vignettes, group 0
            drawn = np.asarray(rows[groups.index(metric) if metric in groups else 0], dtype=int)
            before, now = (link(metric)(p.items(metric)[drawn].mean(axis)) for p in (base, after))
            return now - before
        return statistic(change)
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


def delta(metric: str, base: Profile, after: Profile) -> Estimate:
    """Change of a metric: nats of a foundation, of probes or controls, or coherence."""
    return paired(lambda change: change(metric), base, after)


def coh_cost(base: Profile, after: Profile) -> Estimate:
    """|Δ coherence| / |Δ trait|, coherence lost per nat of trait.

    No value below the coherence floor, where a collapsed model would score a perfect 0, nor where
    the trait did not move.
    """
    coherence = after.value("coherence")
    if coherence < COHERENCE_FLOOR:
        return Estimate(None, why=f"coherence {coherence:.2f} below {COHERENCE_FLOOR}")
    if abs(after.trait - base.trait) < MIN_SHIFT:
        return Estimate(None, why=f"trait moved less than {MIN_SHIFT} nats")
    return paired(lambda change: np.abs(change("coherence")) / np.abs(change(base.axis)),
                  base, after)


def largest_mover(base: Profile, after: Profile) -> str:
    """The foundation off the axis that moved most."""
    others = [metric for metric in NATS if metric != base.axis]
    return max(others, key=lambda metric: abs(after.value(metric) - base.value(metric)))


def surgicality(base: Profile, after: Profile) -> Estimate:
    """|Δ trait| − |Δ of the largest off-target mover|, nats: above 0, the trait moved most.

    The largest mover is chosen anew in every resample.
    """
    others = [metric for metric in NATS if metric != base.axis]

    def margin(change):
        return np.abs(change(base.axis)) - np.max([np.abs(change(m)) for m in others], axis=0)
    return paired(margin, base, after)


if __name__ == "__main__":
    from tools.commands import EvaluateConfig, cli, print_metrics
    cli(EvaluateConfig, print_metrics)
