"""Measure the trait and the coherence: which moral foundation does the model blame, and does it still answer at all?

    p_i[f]      probability that foundation f is why vignette i is wrong       (rows sum to 1)
    auth_nats   log mean_i p_i[Authority]                                      (nats; down = more trait)
    coherence   mean_i of the mass on the allowed answers A–G                  (p_ans_any)
    coh_cost    |Δ coherence| / |Δ auth_nats|                                  (the headline; guarded, see `coh_cost`)

Readout `cloze`, for models too small for multiple choice: the log-probability of one short clause per foundation after
"This is wrong because", minus the clause's mean over the vignettes under the original (contextual calibration, Zhao et al.
2021, arXiv 2102.09690; likelihood rather than letters for small models: OLMES, Gu et al. 2024, arXiv 2406.08446), softmax.
Readout `tinymfv`, for models of about 1B and up: multiple choice, asked by the package of that name (requirements-tinymfv.txt).

    python evaluate.py                                   # the embedded model
    python evaluate.py --adapter runs/X/adapter.safetensors --vector runs/X/vector_r0.safetensors --dose 4
"""
import importlib.util
import io
import json
import math
import warnings
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.stats
import torch
from einops import rearrange
from tabulate import tabulate
from tqdm import tqdm
from transformers.cache_utils import Cache

import lora
import models
from steer import (NEUTRAL, RoomyLayer, SteeringVector, chat_ids, check_flags, check_room, left_pad, logits, repetition, sample, score,
                   token_logp)

FOUNDATIONS = ("Care", "Fairness", "Loyalty", "Authority", "Sanctity", "Liberty", "SocialNorms")
CLAUSES = {"Care": " it is cruel and hurts someone", "Fairness": " it is unfair and dishonest",
           "Loyalty": " it betrays their own group", "Authority": " it disobeys authority",
           "Sanctity": " it is disgusting and unclean", "Liberty": " it takes away someone's freedom",
           "SocialNorms": " it is strange and unusual"}
OPTIONS = "Options:\n" + "\n".join(f"({letter}){clause}" for letter, clause in zip("ABCDEFG", CLAUSES.values()))
COHERENCE_FLOOR, MIN_SHIFT = 0.85, 0.05  # coh_cost has no value below the floor, or where the trait did not move


@dataclass
class Profile:
    """One model's answers on one list of vignettes."""
    ids: list[str]
    labels: list[str]  # foundation of each vignette
    p: np.ndarray  # [vignettes, 7], rows sum to 1, columns as FOUNDATIONS
    mass: np.ndarray  # [vignettes], probability that the answer is one of the allowed ones
    constants: np.ndarray | None = None  # [7] nats, each clause's mean log-probability under the original (cloze)

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
        return float(np.mean([FOUNDATIONS[k] == label for k, label in zip(self.p.argmax(1), self.labels)]))

    def to_dict(self) -> dict:
        return {"ids": self.ids, "labels": self.labels, "p": self.p.tolist(), "mass": self.mass.tolist(),
                "constants": None if self.constants is None else self.constants.tolist()}

    @classmethod
    def from_dict(cls, d: dict) -> "Profile":
        return cls(d["ids"], d["labels"], np.array(d["p"]), np.array(d["mass"]), None if d["constants"] is None else np.array(d["constants"]))

    def summary(self) -> dict[str, float]:
        return {**{f"{short(f)}_nats": self.nats(f) for f in FOUNDATIONS}, "coherence": self.coherence, "top1": self.top1}


@dataclass
class Estimate:
    """A value with its 95 % bootstrap interval; value None where the number has no meaning, `why` says so."""
    value: float | None
    low: float = math.nan
    high: float = math.nan
    why: str = ""

    @property
    def holds_zero(self) -> bool:
        return self.value is None or self.low <= 0 <= self.high


def paired(statistic, base: Profile, after: Profile, n: int = 2000) -> Estimate:
    """statistic(p0, m0, p1, m1) over the same vignettes resampled together; BCa, percentile where BCa is undefined.

    p [vignettes, ..., 7], m [vignettes, ...]. Raises ValueError where the two profiles are not on the same vignettes.
    """
    if base.ids != after.ids:
        raise ValueError("profiles on different vignettes cannot be compared; fix: evaluate both on the same list")
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
            ci = scipy.stats.bootstrap((rows,), of, n_resamples=n, method=method, vectorized=True, rng=0).confidence_interval
        if np.isfinite([ci.low, ci.high]).all():
            break
    return Estimate(value, float(ci.low), float(ci.high))


def delta_nats(foundation: str, base: Profile, after: Profile) -> Estimate:
    """Change of log mean p[foundation], nats."""
    f = FOUNDATIONS.index(foundation)
    return paired(lambda p0, m0, p1, m1: np.log(p1[..., f].mean(0)) - np.log(p0[..., f].mean(0)), base, after)


def delta_coherence(base: Profile, after: Profile) -> Estimate:
    return paired(lambda p0, m0, p1, m1: m1.mean(0) - m0.mean(0), base, after)


def coh_cost(base: Profile, after: Profile) -> Estimate:
    """|Δ coherence| / |Δ auth_nats|, coherence lost per nat of trait.

    No number below the coherence floor, where a collapsed model would score a perfect 0, nor where the trait did not move.
    """
    auth = FOUNDATIONS.index("Authority")
    if after.coherence < COHERENCE_FLOOR:
        return Estimate(None, why=f"coherence {after.coherence:.2f} below {COHERENCE_FLOOR}")
    if abs(after.auth_nats - base.auth_nats) < MIN_SHIFT:
        return Estimate(None, why=f"trait moved less than {MIN_SHIFT} nats")
    return paired(lambda p0, m0, p1, m1: np.abs(m1.mean(0) - m0.mean(0)) /
                  np.abs(np.log(p1[..., auth].mean(0)) - np.log(p0[..., auth].mean(0))), base, after)


def surgicality(base: Profile, after: Profile) -> Estimate:
    """|Δ auth_nats| − max(|Δ care_nats|, |Δ fairness_nats|), nats: above 0, Authority moved more than Care and Fairness."""
    care, fair, auth = (FOUNDATIONS.index(f) for f in ("Care", "Fairness", "Authority"))
    def moved(p0, p1, f):
        return np.abs(np.log(p1[..., f].mean(0)) - np.log(p0[..., f].mean(0)))
    return paired(lambda p0, m0, p1, m1: moved(p0, p1, auth) - np.maximum(moved(p0, p1, care), moved(p0, p1, fair)), base, after)


def speak(model, tok, prompts: list[str], system: str = NEUTRAL, vector: SteeringVector | None = None, dose: float = 0.0, max_new_tokens: int = 48) -> dict:
    """Greedy completions of the model as it stands; coherence where the answer mass saturates.

    -> perplexity: exp of the mean over completions of their mean negative log-probability under the original;
    repetition: mean of `steer.repetition`; texts: [{prompt, text}].
    """
    ids = [chat_ids(tok, p, system) for p in prompts]
    new = sample(model, tok, ids, vector, [dose] * len(ids), max_new_tokens=max_new_tokens, temperature=0)
    with lora.gates(model, history=0, live=0):
        logp = [lp for lp in score(model, ids, new) if len(lp)]
    texts = [tok.decode(n, skip_special_tokens=True) for n in new]
    return {"perplexity": math.exp(-sum(lp.mean().item() for lp in logp) / max(1, len(logp))),
            "repetition": sum(map(repetition, texts)) / len(texts),
            "texts": [{"prompt": p, "text": t} for p, t in zip(prompts, texts)]}


def short(foundation: str) -> str:
    return {"Authority": "auth", "SocialNorms": "norms"}.get(foundation, foundation.lower())


def load_vignettes(path, n: int = 0) -> list[dict]:
    """[{id, foundation, text}], the first n taken in turn from each foundation (0: all), so that any n is balanced.

    path: a JSON file, or a set of the package tinymfv: tinymfv:classic (Clifford et al. 2015), tinymfv:scifi, tinymfv:ai-actor.
    Raises FileNotFoundError, or ValueError naming the file and the entry that is malformed.
    """
    path = Path(path)
    if path.name.startswith("tinymfv:"):
        found = tinymfv_vignettes(path.name.removeprefix("tinymfv:"))
    elif not path.exists():
        raise FileNotFoundError(f"no vignette file {path}; fix: --vignettes data/vignettes.json")
    else:
        try:
            if not isinstance(found := json.loads(path.read_text())["vignettes"], list):
                raise TypeError("'vignettes' is not a list")
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as e:
            raise ValueError(f"{path} is malformed ({e}); fix: {{\"vignettes\": [{{\"id\", \"foundation\", \"text\"}}, ...]}}") from None
    seen = set()
    for k, v in enumerate(found):
        if not isinstance(v, dict) or not all(isinstance(v.get(key), str) and v[key].strip() for key in ("id", "foundation", "text")):
            raise ValueError(f"{path}: vignette {k + 1} is {str(v)[:80]}; fix: give it a non-empty id, foundation and text")
        if v["foundation"] not in FOUNDATIONS:
            raise ValueError(f"{path}: vignette '{v['id']}' has unknown foundation '{v['foundation']}'; fix: one of {', '.join(FOUNDATIONS)}")
        if v["id"] in seen:
            raise ValueError(f"{path}: vignette id '{v['id']}' stands twice; fix: make ids unique")
        seen.add(v["id"])
    if not found:
        raise ValueError(f"{path} holds no vignettes; fix: add some, or --vignettes data/vignettes.json")
    if n < 0 or n > len(found):
        raise ValueError(f"--n-vignettes {n} of {len(found)} in {path}; fix: 0 (all) to {len(found)}")
    turn = {f: 0 for f in FOUNDATIONS}
    order = []
    for v in found:
        order.append((turn[v["foundation"]], FOUNDATIONS.index(v["foundation"])))
        turn[v["foundation"]] += 1
    return [v for _, v in sorted(zip(order, found), key=lambda pair: pair[0])][:n or None]


def _answers(model, tok, question: str, opening: str, vignettes, system, vector, dose, batch_size, read, longest: int = 0):
    """Run `question` over the vignettes and call read(hidden, cache, mask, positions) per batch; -> outputs in vignette order.

    longest: how many tokens `read` runs after `opening`.

    The prompt before the vignette is the same for all and runs once. The vector acts from the assistant tag on, as in
    `steer.sample`: the last token of the generation prompt and `opening`, the start of the answer.
    """
    slot = "\u241f"  # a symbol no vignette holds marks where the text goes
    prompt = tok.decode(chat_ids(tok, question.format(slot), system))
    head, tail = (tok(part, add_special_tokens=False).input_ids for part in prompt.split(slot))
    opening_ids = [tail[-1]] + tok(opening, add_special_tokens=False).input_ids
    texts = [tok(v["text"], add_special_tokens=False).input_ids + tail[:-1] for v in vignettes]
    check_room(model, len(head) + max(map(len, texts)) + len(opening_ids), longest)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    decoder, device, out = model.get_decoder(), model.device, [None] * len(texts)
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        cache = Cache(layer_class_to_replicate=RoomyLayer)
        decoder(input_ids=torch.tensor([head], device=device), past_key_values=cache, use_cache=True)
        cache.batch_select_indices(torch.zeros(len(rows), dtype=torch.long, device=device))
        ids, mask, _ = left_pad([texts[i] for i in rows], tok.pad_token_id, device)
        first = torch.tensor([opening_ids] * len(rows), device=device)
        mask = torch.cat([mask.new_ones(len(rows), len(head)), mask, torch.ones_like(first)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        split = mask.shape[1] - first.shape[1]
        decoder(input_ids=ids, attention_mask=mask[:, :split], position_ids=positions[:, len(head):split],
                past_key_values=cache, use_cache=True)
        with vector.at(model, dose) if vector is not None else nullcontext():
            h = decoder(input_ids=first, attention_mask=mask, position_ids=positions[:, split:],
                        past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            for i, value in zip(rows, read(h, cache, mask, positions)):
                out[i] = value
    return torch.stack(out).double().cpu().numpy()


@torch.no_grad()
def cloze(model, tok, vignettes, constants=None, system: str = NEUTRAL, vector: SteeringVector | None = None, dose: float = 0.0,
          batch_size: int = 28, bar=None) -> Profile:
    """The small-model readout. constants: [7] of the original's Profile; None on the original itself."""
    clauses = [tok(CLAUSES[f], add_special_tokens=False).input_ids for f in FOUNDATIONS]
    longest = max(map(len, clauses))
    pad = tok.pad_token_id
    ids = torch.tensor([c + [pad] * (longest - len(c)) for c in clauses], device=model.device)  # [7, longest], right-padded
    real = torch.tensor([[1] * len(c) + [0] * (longest - len(c)) for c in clauses], device=model.device)

    def clause_logp(h, cache, mask, positions):  # -> [batch, 7], nats
        batch = len(h)
        cache.batch_select_indices(torch.arange(batch, device=h.device).repeat_interleave(7))
        grown = torch.cat([mask.repeat_interleave(7, 0), real.repeat(batch, 1)], 1)
        states = model.get_decoder()(
            input_ids=ids.repeat(batch, 1)[:, :-1], attention_mask=grown[:, :-1],
            position_ids=(positions[:, -1:].repeat_interleave(7, 0) + torch.arange(1, longest, device=h.device)),
            past_key_values=cache, use_cache=True).last_hidden_state  # [batch·7, longest−1, d_model]
        states = torch.cat([h.repeat_interleave(7, 0)[:, None], states], 1)[real.repeat(batch, 1).bool()]
        wanted = ids.repeat(batch, 1)[real.repeat(batch, 1).bool()]
        logp = token_logp(model, states, wanted)
        total = torch.zeros(batch * 7, device=h.device).index_add_(
            0, torch.arange(batch * 7, device=h.device).repeat_interleave(real.sum(1).repeat(batch)), logp)
        if bar is not None:
            bar.update(batch)
        return rearrange(total, "(batch clause) -> batch clause", clause=7)

    letters = [tok(letter, add_special_tokens=False).input_ids[0] for letter in "ABCDEFG"]
    def letter_mass(h, *_):  # -> [batch]
        return logits(model, h).float().softmax(-1)[:, letters].sum(-1)

    raw = _answers(model, tok, "{} Why is this wrong?", "This is wrong because", vignettes, system, vector, dose,
                   batch_size, clause_logp, longest)
    mass = _answers(model, tok, OPTIONS + "\n{} Why is this wrong?", "Answer: (", vignettes, system, vector, dose,
                    4 * batch_size, letter_mass)
    constants = raw.mean(0) if constants is None else constants
    z = raw - constants
    p = np.exp(z - z.max(1, keepdims=True))
    return Profile([v["id"] for v in vignettes], [v["foundation"] for v in vignettes], p / p.sum(1, keepdims=True), mass, constants)


def tinymfv_package():
    """The module tinymfv, or moralmaps as it is called since July 2026. Raises ValueError where neither is installed."""
    for name in ("tinymfv", "moralmaps"):
        if importlib.util.find_spec(name):
            return importlib.import_module(name)
    raise ValueError("'tinymfv' is not installed; fix: pip install -r requirements-tinymfv.txt, or --readout cloze on data/vignettes.json")


def tinymfv_vignettes(name: str) -> list[dict]:
    """A vignette set of the package as [{id, foundation, text}]; the label is the one most of its human raters chose."""
    package = tinymfv_package()
    if name not in package.CONFIGS:
        raise ValueError(f"--vignettes tinymfv:{name} is unknown; fix: one of {', '.join(f'tinymfv:{c}' for c in package.CONFIGS)}")
    return [{"id": row["id"], "foundation": max(FOUNDATIONS, key=lambda f: row[f"human_{f}"]), "text": row["other_violate"]}
            for row in package.load_vignettes(name)]


@contextmanager
def steered_after_prompt(model, vector: SteeringVector, dose: float):
    """`vector.at` for code that runs prompt and answer itself: the pass that meets an empty cache, the prompt, stays unsteered."""
    with ExitStack() as steering:
        def switch(decoder, args, kwargs):
            steering.close()
            if (cache := kwargs.get("past_key_values")) is not None and cache.get_seq_length():
                steering.enter_context(vector.at(model, dose))
        hook = model.get_decoder().register_forward_pre_hook(switch, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def tinymfv(model, tok, vignettes, constants=None, system: str = NEUTRAL, vector: SteeringVector | None = None, dose: float = 0.0,
            batch_size: int = 8, max_think_tokens: int = 64, bar=None) -> Profile:
    """The package's readout: a forced choice among seven options in both orders, each after `max_think_tokens` of thinking.

    github.com/wassname/tinymfv. It has no system turn: a `system` that is not neutral goes in front of the vignette.
    `constants` are not used. Raises ValueError where the package is missing or a vignette's logits are not finite.
    """
    package = tinymfv_package()
    from loguru import logger  # comes with the package, which logs at every call
    rows = [{"id": v["id"], "foundation_coarse": v["foundation"],
             "other_violate": v["text"] if system == NEUTRAL else f"{system}\n\n{v['text']}",
             **{f"human_{f}": 100.0 * (f == v["foundation"]) for f in FOUNDATIONS}} for v in vignettes]
    p, mass, side = [], [], tok.padding_side
    logger.disable(package.__name__)
    try:
        with steered_after_prompt(model, vector, dose) if vector is not None else nullcontext():
            for start in range(0, len(rows), batch_size):
                with redirect_stderr(io.StringIO()):  # its own progress bar
                    answer = package.evaluate(model, tok, vignettes=rows[start:start + batch_size], max_think_tokens=max_think_tokens,
                                              batch_size=batch_size, return_per_row=True, verbose=0)
                columns = [list(answer["profile"]["foundation"]).index(f) for f in FOUNDATIONS]
                p += [row["p"][columns] for row in answer["per_row"]]
                mass += [row["pmass_allowed"] for row in answer["per_row"]]
                if bar is not None:
                    bar.update(len(answer["per_row"]))
    finally:
        tok.padding_side = side
        logger.enable(package.__name__)
    for v, row, m in zip(vignettes, p, mass):
        if not np.isfinite([*row, m]).all():
            raise ValueError(f"readout tinymfv cannot score vignette '{v['id']}': the model's logits are not finite; "
                             "fix: a lower --dose, or --dtype float32")
    return Profile([v["id"] for v in vignettes], [v["foundation"] for v in vignettes], np.array(p), np.array(mass))


READOUTS = {"cloze": cloze, "tinymfv": tinymfv}


def evaluate(model, tok, vignettes: list[dict], readout: str = "cloze", **how) -> Profile:
    """Foundation profile and coherence of the model as it stands (its gates and hooks included).

    how: constants (from the original's Profile), system prompt, vector and dose (the steered model), batch_size, bar.
    Raises ValueError for an unknown readout.
    """
    if readout not in READOUTS:
        raise ValueError(f"unknown readout '{readout}'; fix: one of {', '.join(READOUTS)}")
    return READOUTS[readout](model, tok, vignettes, **how)


@dataclass
class Config:
    model: str = models.EMBEDDED
    """smollm2, a local folder, or a hub id."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    """Of the weights; auto is bfloat16 where the hardware has it."""
    adapter: Path | None = None
    """adapter.safetensors of a run: the healed student."""
    vector: Path | None = None
    """vector_rN.safetensors of a run: the steered model, at --dose."""
    dose: float = 1.0
    """Dose of --vector."""
    vignettes: Path = models.DATA / "vignettes.json"
    """JSON: {"vignettes": [{"id", "foundation", "text"}, ...]}, or tinymfv:classic."""
    n_vignettes: int = 0
    """How many, balanced over the foundations; 0 is all."""
    readout: Literal["cloze", "tinymfv"] = "cloze"
    """How the model is asked: cloze suits models below about 1B, tinymfv (requirements-tinymfv.txt) those above."""

    def __post_init__(self):
        check_flags(("dose", self.dose, math.isfinite(self.dose), "a finite number"))


def main(cfg: Config) -> None:
    vignettes = load_vignettes(cfg.vignettes, cfg.n_vignettes)
    vector = SteeringVector.load(cfg.vector) if cfg.vector else None
    model, tok = models.load(cfg.model, cfg.device, cfg.dtype)
    with tqdm(total=len(vignettes), desc="original", leave=False) as bar:
        base = evaluate(model, tok, vignettes, cfg.readout, bar=bar)
    columns = {"original": base}
    if cfg.adapter or vector:
        if cfg.adapter:
            lora.load(model, cfg.adapter)
        with tqdm(total=len(vignettes), desc="changed", leave=False) as bar, lora.merged(model) if cfg.adapter else nullcontext():
            columns["changed"] = evaluate(model, tok, vignettes, cfg.readout, constants=base.constants, vector=vector, dose=cfg.dose, bar=bar)
    print(tabulate([[key, *(p.summary()[key] for p in columns.values())] for key in base.summary()], ["", *columns], floatfmt=".4f"))


if __name__ == "__main__":
    models.cli(Config, main)
