"""Make the training data: sample the steered student at several doses, keep what is coherent and enacts the trait.

Every completion gets a verdict, "kept" or the first rule that drops it:

    short        fewer than `min_words` words
    refusal      assistant boilerplate ("as an AI language model ...")
    narrates     talks about the trait ("I am someone who ...") or recites its persona, instead of acting it out
    repetition   more than `max_repetition` of its n-grams repeat earlier ones
    loop         some run of 16 words holds less than `min_diversity` distinct words, whatever its perplexity
    perplexity   more than `max_perplexity` over its last quarter under the original (a broken tail hides in a whole-text mean)

A dose with few survivors is lowered and sampling goes on, so an over-steered student still yields a full set.

    python distil.py --trait care --n-keep 16 --out kept.jsonl     # `messages` chat format, one JSON object a line
"""
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import lora
import models
from steer import (NEUTRAL, Persona, SteeringVector, band, chat_ids, check_flags, extract_vector, load_personas, perplexity, repetition, sample,
                   score, steering_flags)

REFUSAL = re.compile(
    r"\bas an? (ai|artificial|language model|virtual|digital)\b|\b(i'?m|i am) (just |only )?an? (ai|artificial|language model|virtual assistant|chatbot)\b"
    r"|\bi (can'?t|cannot|can not|am unable to|am not able to|won'?t) (assist|help|provide|fulfil|comply|engage|answer)"
    r"|\bi must decline\b|\bmy (programming|training data|guidelines)\b|\bi (don'?t|do not) have (personal )?(opinions|feelings|emotions|beliefs)\b", re.I)
NARRATES = re.compile(
    r"\b(i am|i'?m|as) (someone|somebody|a person|the kind of person|an? \w+ (person|assistant|being)) (who|that|of)\b"
    r"|\bmy (principle|persona|character|personality|nature|role|core value)s? (is|are|tells?|means?)\b"
    r"|\bi (always|never) (obey|defer|disobey|defy|put (people|others|wellbeing)|follow (orders|authority|rules))\b"
    r"|\bi (don'?t|do not|refuse to) (obey|defer to|follow) (orders|authority|rules|anyone)\b", re.I)


@dataclass
class Filter:
    """Thresholds of the rules above."""
    min_words: int = 8
    """Completions with fewer words are too short to teach anything."""
    max_repetition: float = 0.2
    """Largest share of repeated n-grams (see steer.repetition)."""
    min_diversity: float = 0.7
    """Smallest share of distinct words in any run of 16."""
    max_perplexity: float = 16.0
    """Largest perplexity of the last quarter under the original."""

    def __post_init__(self):
        check_flags(("min-words", self.min_words, self.min_words >= 0, "0 or more"),
                    ("max-repetition", self.max_repetition, 0 < self.max_repetition <= 1, "above 0, at most 1"),
                    ("min-diversity", self.min_diversity, 0 <= self.min_diversity <= 1, "0 to 1"),
                    ("max-perplexity", self.max_perplexity, self.max_perplexity > 1, "above 1"))


def diversity(text: str, window: int = 16) -> float:
    """Smallest share of distinct words in any run of `window` words; in (0, 1]. Catches loops whose n-grams never quite repeat."""
    words = re.findall(r"\w+", text.lower())
    runs = [words[i:i + window] for i in range(max(1, len(words) - window + 1))]
    return min(len(set(run)) / max(1, len(run)) for run in runs)


def recites(text: str, persona: Persona, n: int = 5) -> bool:
    """True where `text` holds n words in a row of either persona text."""
    def grams(s):
        words = re.findall(r"\w+", s.lower())
        return set(zip(*(words[k:] for k in range(n))))
    return bool(grams(text) & (grams(persona.pos) | grams(persona.neg)))


def verdict(text: str, ppl: float, persona: Persona, rules: Filter) -> str:
    """"kept", or the name of the first rule that drops the completion."""
    if not text.strip() or len(re.findall(r"\w+", text)) < rules.min_words:
        return "short"
    if REFUSAL.search(text.replace("’", "'")):
        return "refusal"
    if NARRATES.search(text.replace("’", "'")) or recites(text, persona):
        return "narrates"
    if repetition(text) > rules.max_repetition:
        return "repetition"
    if diversity(text) < rules.min_diversity:
        return "loop"
    if not ppl <= rules.max_perplexity:
        return "perplexity"
    return "kept"


def end_of_turn(tok) -> list[int]:
    """The token that ends an assistant turn in this chat template, as a list (empty where there is none)."""
    text = tok.apply_chat_template([{"role": "user", "content": "a"}, {"role": "assistant", "content": "\u241f"}], tokenize=False)
    after = tok(text.rpartition("\u241f")[2], add_special_tokens=False).input_ids
    return [t for t in after if t in tok.all_special_ids][:1]


def row_ids(tok, row: dict) -> tuple[list[int], list[int]]:
    """A data row -> (prompt ids, completion ids), tokenised apart so that no token straddles the boundary.

    The completion ends with the end-of-turn token where the model had ended it there.
    """
    system, user, assistant = (m["content"] for m in row["messages"])
    completion = tok(assistant, add_special_tokens=False).input_ids
    return chat_ids(tok, user, system), completion + (end_of_turn(tok) if row["finished"] else [])


def sample_doses(model, tok, vector: SteeringVector, prompts: list[str], doses: list[float], n: int, seed: int,
                 bar=None, **sampling) -> list[dict]:
    """n steered completions of the student over shuffled prompts × doses, each prompt at every dose; -> rows without verdict."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    pairs = [(prompts[order[k // len(doses) % len(prompts)]], doses[k % len(doses)]) for k in range(n)]
    with lora.merged(model), lora.gates(model, live=0):
        new = sample(model, tok, [chat_ids(tok, p) for p, _ in pairs], vector, [d for _, d in pairs], seed=seed, bar=bar, **sampling)
    return [{"messages": [{"role": "system", "content": NEUTRAL}, {"role": "user", "content": p},
                          {"role": "assistant", "content": tok.decode(ids, skip_special_tokens=True)}],
             "dose": d, "finished": len(ids) < sampling["max_new_tokens"]} for (p, d), ids in zip(pairs, new)]


def keep(model, tok, rows: list[dict], persona: Persona, rules: Filter, bar=None) -> list[dict]:
    """The rows with `perplexity` (last quarter, under the original), `repetition` and `verdict`."""
    pairs = [row_ids(tok, row) for row in rows]
    with lora.gates(model, history=0, live=0):
        logp = score(model, *map(list, zip(*pairs)), bar=bar)
    out = []
    for row, lp in zip(rows, logp):
        text, ppl = row["messages"][-1]["content"], perplexity(lp, tail=0.25)
        out.append({**row, "perplexity": round(ppl, 3) if math.isfinite(ppl) else None, "repetition": round(repetition(text), 4),
                    "verdict": verdict(text, ppl, persona, rules)})
    return out


class Starved(ValueError):
    """Too few completions survive the filter, at any dose that was tried."""


def collect(model, tok, vector: SteeringVector, prompts: list[str], persona: Persona, rules: Filter, doses: tuple[float, ...],
            n_keep: int, seed: int, rows: list[dict] = (), on_batch=lambda rows: None, batch: int = 96, max_batches: int = 8,
            bar=None, **sampling) -> tuple[list[dict], list[dict]]:
    """Sample and filter in batches until n_keep survive; -> (kept, all rows). `rows`: what an interrupted call had done.

    A band (one entry of `doses`) of which less than half of a batch survives is lowered to 0.7 of its dose for the next.
    Each batch depends only on the seed and the rows before it, so a continued call gives what an uninterrupted one does.
    Raises Starved when max_batches do not fill the set, naming the rule that dropped most.
    """
    rows = list(rows)
    batch = min(batch, 2 * len(doses) * math.ceil(n_keep / len(doses)))
    while (done := len(rows) // batch) < max_batches:
        kept = [r for r in rows if r["verdict"] == "kept"]
        if len(kept) >= n_keep:
            by_band = [[r for r in kept if r["band"] == b] for b in range(len(doses))]  # take the bands in turn
            turn = sorted(((k, b) for b, band_rows in enumerate(by_band) for k in range(len(band_rows))))
            return [by_band[b][k] for k, b in turn[:n_keep]], rows
        now = []
        for b, dose in enumerate(doses):
            last = [r for r in rows[-batch:] if r["band"] == b]
            survived = sum(r["verdict"] == "kept" for r in last)
            now.append(dose if not last else last[0]["dose"] * (0.7 if survived < len(last) / 2 else 1.0))
        new = sample_doses(model, tok, vector, prompts, now, batch, seed + done, bar, **sampling)
        new = keep(model, tok, new, persona, rules)
        rows += [{**r, "band": k % len(doses)} for k, r in enumerate(new)]
        on_batch(rows)
    dropped = Counter(r["verdict"] for r in rows if r["verdict"] != "kept")
    worst = dropped.most_common(1)[0][0]
    flag = {"short": "--min-words", "repetition": "--max-repetition", "loop": "--min-diversity", "perplexity": "--max-perplexity",
            "refusal": "the prompts", "narrates": "the persona"}[worst]
    raise Starved(f"data starved: {len(rows) - dropped.total()} of {n_keep} completions kept after {len(rows)} samples at doses down to "
                  f"{min(r['dose'] for r in rows):.2g}; dropped: {', '.join(f'{k} {n}' for k, n in dropped.most_common())}; "
                  f"fix: lower --doses, or loosen '{worst}' ({flag})")


def to_jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def read_jsonl(path, log: bool = False) -> list[dict]:
    """Rows of a JSONL file; of a log, a torn last line is left out. Raises ValueError naming file and line where one is malformed."""
    rows = []
    *lines, last = Path(path).read_text().split("\n")  # not splitlines: JSON strings may hold other line separators
    for n, line in enumerate(lines if log else filter(None, [*lines, last]), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as e:
            raise ValueError(f"{path} line {n} is not JSON ({e.msg}); fix: remove or repair the line") from None
    return rows


def load_strings(path, key: str) -> list[str]:
    """A list of non-empty strings under `key` of a JSON file. Raises ValueError naming the file and the entry."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file {path}; fix: give an existing file")
    try:
        strings = json.loads(path.read_text())[key]
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is malformed ({e}); fix: {{\"{key}\": [\"...\", ...]}}") from None
    if not isinstance(strings, list) or not strings:
        raise ValueError(f"{path}: '{key}' is empty; fix: give at least one string")
    for k, s in enumerate(strings, 1):
        if not isinstance(s, str) or not s.strip():
            raise ValueError(f"{path}: entry {k} of '{key}' is empty or not a string; fix: remove it")
    return strings


def find_persona(trait: str, pos: str | None, neg: str | None) -> Persona:
    """The persona by text where --pos and --neg are given, else by name. Raises ValueError for an unknown name or half a pair."""
    if (pos is None) != (neg is None):
        raise ValueError("--pos and --neg go together; fix: give both")
    known = load_personas()
    if pos is None and trait not in known:
        raise ValueError(f"unknown trait '{trait}'; fix: one of {', '.join(known)}, or --pos and --neg")
    return Persona(pos, neg) if pos is not None else known[trait]


@dataclass
class Config(Filter):
    model: str = models.EMBEDDED
    """smollm2, a local folder, or a hub id."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    """Of the weights; auto is bfloat16 where the hardware has it."""
    trait: str = "care"
    """Name of a persona pair in data/personas.json."""
    pos: str | None = None
    """System prompt of the trait, instead of --trait."""
    neg: str | None = None
    """System prompt of its opposite."""
    doses: tuple[float, ...] = (1.0, 2.0)
    """Steering doses of the sampled completions."""
    n_keep: int = 48
    """Completions to keep."""
    max_new_tokens: int = 64
    """Longest completion, in tokens."""
    n_contexts: int = 128
    """Contexts the vector is averaged over."""
    steer_layers: tuple[float, float] = (0.45, 0.55)
    """Depth range that is steered, as fractions."""
    seed: int = 0
    """Of the sampling."""
    out: Path = Path("kept.jsonl")
    """Where the kept data goes; everything sampled, with verdicts, goes beside it as *.sampled.jsonl."""

    def __post_init__(self):
        super().__post_init__()
        check_flags(*steering_flags(self, "doses"), ("n-keep", self.n_keep, self.n_keep >= 1, "at least 1"))


def main(cfg: Config) -> None:
    persona = find_persona(cfg.trait, cfg.pos, cfg.neg)
    model, tok = models.load(cfg.model, cfg.device, cfg.dtype)
    lora.attach(model)
    contexts = load_strings(models.DATA / "contexts.json", "contexts")[:cfg.n_contexts]
    with tqdm(total=2 * len(contexts), desc="extract", leave=False) as bar:
        vector = extract_vector(model, tok, persona, contexts, band(model, cfg.steer_layers), bar=bar)
    with tqdm(desc="sample", unit=" completions", leave=False) as bar:
        kept, rows = collect(model, tok, vector, load_strings(models.DATA / "prompts.json", "dilemmas"), persona, cfg, cfg.doses,
                             cfg.n_keep, cfg.seed, bar=bar, max_new_tokens=cfg.max_new_tokens)
    models.write_text(cfg.out, to_jsonl(kept))
    models.write_text(cfg.out.with_suffix(".sampled.jsonl"), to_jsonl(rows))
    print(f"kept {len(kept)} of {len(rows)} -> {cfg.out}   {dict(Counter(r['verdict'] for r in rows))}")


if __name__ == "__main__":
    models.cli(Config, main)
