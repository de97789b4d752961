"""Make the training data: sample the steered student, keep what is coherent and enacts the trait.

Every completion gets a verdict, "kept" or the first rule that drops it:

    short        fewer than `min_words` words
    refusal      assistant boilerplate ("as an AI language model ...")
    narrates     talks about the trait ("I am someone who ..."), or recites its persona
    repetition   more than `max_repetition` of its n-grams repeat earlier ones
    loop         some run of 16 words holds less than `min_diversity` distinct words
    perplexity   more than `max_perplexity` over its worst 24 tokens in a row, under the original

A dose with few survivors is lowered and sampling goes on: an over-steered student still yields a
full set.

    python distil.py --trait love --n-keep 16 --out love    # love/kept.jsonl, as chat `messages`
"""
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import lora
from common import models
from common import runs
from common import texts
from common.readouts import suffix_ids
from common.sampling import end_of_turn, repetition, sample, score, stop_tokens, worst_perplexity
from steer import NEUTRAL, Persona, SteeringVector, band, chat_ids, chat_text, extract_vector

REFUSAL = re.compile(
    r"\bas an? (ai|artificial|language model|virtual|digital)\b"
    r"|\b(i'?m|i am) (just |only )?an? (ai|artificial|language model|virtual assistant|chatbot)\b"
    r"|\bi (can'?t|cannot|can not|am unable to|am not able to|won'?t)"
    r" (assist|help|provide|fulfil|comply|engage|answer)"
    r"|\bi must decline\b|\bmy (programming|training data|guidelines)\b"
    r"|\bi (don'?t|do not) have (personal )?(opinions|feelings|emotions|beliefs)\b", re.I)
NARRATES = re.compile(
    r"\b(i am|i'?m|as) (someone|somebody|a person|the kind of person|"
    r"an? \w+ (person|assistant|being)) (who|that|of)\b"
    r"|\bmy (principle|persona|character|personality|nature|role|core value)s?"
    r" (is|are|tells?|means?)\b"
    r"|\bi (always|never) (obey|defer|disobey|defy|put (people|others|wellbeing)"
    r"|follow (orders|authority|rules))\b"
    r"|\bi (don'?t|do not|refuse to) (obey|defer to|follow) (orders|authority|rules|anyone)\b",
    re.I)


# ---- verdicts -----------------------------------------------------------------------------------


@dataclass
class Rules:
    """Thresholds of the rules above; see `Config` for each."""
    min_words: int = 8
    max_repetition: float = 0.2
    min_diversity: float = 0.7
    max_perplexity: float = 15.0


def diversity(text: str, window: int = 16) -> float:
    """Smallest share of distinct words in any run of `window` words, in (0, 1].

    Catches loops whose n-grams never quite repeat.
    """
    words = re.findall(r"\w+", text.lower())
    stretches = [words[i:i + window] for i in range(max(1, len(words) - window + 1))]
    return min(len(set(run)) / max(1, len(run)) for run in stretches)


def recites(text: str, persona: Persona, n: int = 5) -> bool:
    """True where `text` holds n words in a row of either persona text."""
    def grams(s):
        words = re.findall(r"\w+", s.lower())
        return set(zip(*(words[k:] for k in range(n))))
    return bool(grams(text) & (grams(persona.pos) | grams(persona.neg)))


def verdict(text: str, ppl: float, persona: Persona, rules: Rules) -> str:
    """"kept", or the name of the first rule that drops the completion."""
    straight = text.replace("’", "'")
    if len(re.findall(r"\w+", text)) < rules.min_words or not text.strip():
        return "short"
    if REFUSAL.search(straight):
        return "refusal"
    if NARRATES.search(straight) or recites(text, persona):
        return "narrates"
    if repetition(text) > rules.max_repetition:
        return "repetition"
    if diversity(text) < rules.min_diversity:
        return "loop"
    if not ppl <= rules.max_perplexity:  # nan too
        return "perplexity"
    return "kept"


# ---- rows ---------------------------------------------------------------------------------------


def row_ids(tok, row: dict) -> tuple[list[int], list[int]]:
    """A data row -> (prompt ids, completion ids), apart: no token straddles the boundary.

    The completion is what was sampled, token for token, its end of turn included where it came to
    one. A row of other making has no `tokens`: its text is tokenised, and the end of turn follows
    unless the row says `finished: false`.
    """
    system, user, assistant = (message["content"] for message in row["messages"])
    prompt = chat_ids(tok, user, system)
    if "tokens" in row:
        return prompt, row["tokens"]
    completion = suffix_ids(tok, chat_text(tok, user, system), assistant)
    return prompt, completion + (end_of_turn(tok) if row.get("finished", True) else [])


def sample_doses(model, tok, vector: SteeringVector, prompts: list[str], doses: list[float], n: int,
                 seed: int, **sampling) -> list[dict]:
    """n steered completions of the model as it stands, each prompt at every dose; -> rows."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    asked = [prompts[order[k // len(doses) % len(prompts)]] for k in range(n)]
    given = [doses[k % len(doses)] for k in range(n)]
    ids = [chat_ids(tok, prompt) for prompt in asked]
    new = sample(model, tok, ids, vector, given, seed=seed, keep_stop=True, **sampling)
    stop = set(stop_tokens(model, tok))
    rows = []
    for prompt, dose, tokens in zip(asked, given, new):
        finished = tokens[-1] in stop
        text = tok.decode(tokens[:-1] if finished else tokens, skip_special_tokens=True)
        messages = [{"role": "system", "content": NEUTRAL}, {"role": "user", "content": prompt},
                    {"role": "assistant", "content": text}]
        rows.append({"messages": messages, "dose": dose, "finished": finished, "tokens": tokens})
    return rows


def judge(model, tok, rows: list[dict], persona: Persona, rules: Rules) -> list[dict]:
    """The rows with `perplexity` (of the worst 24 tokens), `repetition` and `verdict`."""
    prompts, completions = zip(*(row_ids(tok, row) for row in rows))
    with lora.gates(model, history=0, live=0):
        scored = score(model, prompts, completions)
    judged = []
    for row, logp in zip(rows, scored):
        text, ppl = row["messages"][-1]["content"], worst_perplexity(logp)
        judged.append({**row, "perplexity": round(ppl, 3) if math.isfinite(ppl) else None,
                       "repetition": round(repetition(text), 4),
                       "verdict": verdict(text, ppl, persona, rules)})
    return judged


# ---- a full set ---------------------------------------------------------------------------------


class Starved(runs.Ended):
    """Too few completions survive the rules, at any dose that was tried."""


def collect(model, tok, vector: SteeringVector, prompts: list[str], persona: Persona, rules: Rules,
            doses: tuple[float, ...], n_keep: int, seed: int, folder: Path, batch: int = 96,
            max_batches: int = 8, **sampling) -> tuple[list[dict], list[dict]]:
    """Sample and judge in batches until n_keep survive; -> (kept, all rows).

    They go into `folder` as kept.jsonl and sampled.jsonl, the latter in any case.
    A band (one entry of `doses`) of which less than half of a batch survives goes on at 0.7 of its
    dose. Raises Starved after max_batches, naming the rule that dropped most.
    """
    doses_now, sampled = list(doses), []
    batch = min(batch, 2 * len(doses) * math.ceil(n_keep / len(doses)))
    for n in range(max_batches):
        # 1. a batch, every prompt at each dose, with its verdicts
        new = sample_doses(model, tok, vector, prompts, doses_now, batch, seed + n, **sampling)
        new = judge(model, tok, new, persona, rules)
        for k, row in enumerate(new):
            row["band"] = k % len(doses)
        sampled += new
        runs.write_text(folder / "sampled.jsonl", runs.to_jsonl(sampled))
        # 2. enough survivors: take the bands in turn, so that no dose crowds out another
        kept = [row for row in sampled if row["verdict"] == "kept"]
        if len(kept) >= n_keep:
            by_band = [[row for row in kept if row["band"] == b] for b in range(len(doses))]
            kept = texts.in_turn(by_band)[:n_keep]
            runs.write_text(folder / "kept.jsonl", runs.to_jsonl(kept))
            return kept, sampled
        # 3. a dose that breaks most of its completions is lowered
        for b in range(len(doses)):
            of_band = [row["verdict"] for row in new if row["band"] == b]
            if of_band.count("kept") < len(of_band) / 2:
                doses_now[b] *= 0.7
    raise Starved(starved_because(sampled, n_keep))


def summary(kept: list[dict], sampled: list[dict]) -> dict:
    """What a round's record says of its data."""
    verdicts = Counter(row["verdict"] for row in sampled)
    return {"sampled": len(sampled), "kept": len(kept), "verdicts": dict(sorted(verdicts.items())),
            "dose": sum(row["dose"] for row in kept) / len(kept)}


def starved_because(sampled: list[dict], n_keep: int) -> str:
    """One line: how far it got, what dropped the others, and the flag that would help."""
    dropped = Counter(row["verdict"] for row in sampled if row["verdict"] != "kept")
    worst = dropped.most_common(1)[0][0]
    flag = {"short": "--min-words", "refusal": "the prompts", "narrates": "the persona",
            "repetition": "--max-repetition", "loop": "--min-diversity",
            "perplexity": "--max-perplexity"}[worst]
    return (f"data starved: {len(sampled) - dropped.total()} of {n_keep} completions kept after "
            f"{len(sampled)} samples at doses down to {min(row['dose'] for row in sampled):.2g}; "
            f"dropped: {', '.join(f'{rule} {n}' for rule, n in dropped.most_common())}; "
            f"fix: lower --doses, or loosen '{worst}' ({flag})")


# ---- the command --------------------------------------------------------------------------------


@dataclass
class Config:
    model: str = models.EMBEDDED  # smollm2, a local folder, or a hub id
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"  # auto: bfloat16 where native
    seed: runs.Seed = 0  # of the sampling
    trait: str = "care"  # name of a persona pair in data/personas.json
    pos: str | None = None  # system prompt of the trait, instead of --trait
    neg: str | None = None  # system prompt of its opposite
    n_contexts: runs.AtLeast1 = 128  # contexts the vector is averaged over
    steer_layers: runs.DepthRange = (0.45, 0.55)  # depth range that is steered, as fractions
    prompts: Path | None = None  # JSON file of prompts to sample on; default: the trait's own
    doses: runs.Doses | None = None  # of the sampled completions; default: the trait's own
    n_keep: runs.AtLeast1 = 48  # completions to keep
    max_new_tokens: runs.AtLeast1 = 64  # longest completion, in tokens
    min_words: runs.WholeFrom0 = 8  # completions with fewer words teach nothing
    max_repetition: runs.Above0To1 = 0.2  # largest share of repeated n-grams (sampling.repetition)
    min_diversity: runs.ZeroTo1 = 0.7  # smallest share of distinct words in any run of 16
    max_perplexity: runs.Above1 = 15.0  # of the worst 24 tokens in a row, under the original
    out: Path = Path("distilled")  # folder for kept.jsonl, and sampled.jsonl with all verdicts


def main(cfg: Config) -> None:
    cfg = texts.complete(cfg)
    reading = texts.read(cfg)
    rules = Rules(cfg.min_words, cfg.max_repetition, cfg.min_diversity, cfg.max_perplexity)
    model, tok = models.load(cfg.model, cfg.device, cfg.dtype)
    lora.attach(model)
    layers = band(model, cfg.steer_layers)
    vector = extract_vector(model, tok, reading.persona, reading.contexts, layers)
    cfg.out.mkdir(parents=True, exist_ok=True)
    (cfg.out / "kept.jsonl").unlink(missing_ok=True)  # of an earlier call
    kept, sampled = collect(model, tok, vector, reading.dilemmas, reading.persona, rules, cfg.doses,
                            cfg.n_keep, cfg.seed, cfg.out, max_new_tokens=cfg.max_new_tokens)
    print(f"kept {len(kept)} of {len(sampled)} -> {cfg.out}   {summary(kept, sampled)['verdicts']}")


if __name__ == "__main__":
    runs.cli(Config, main)
