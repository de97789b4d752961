"""Make the training data: sample the teacher, keep what is coherent and enacts the trait.

The teacher is the student steered by its vector, or the student under the persona as a prompt. A
completion is kept, or has as its reject reason the first rule that drops it:

    short        fewer than `min_words` words
    refusal      assistant boilerplate ("as an AI language model ...")
    narrates     talks about the trait ("I am someone who ..."), or recites its persona
    repetition   more than `max_repetition` of its n-grams repeat earlier ones
    loop         some run of 16 words holds less than `min_diversity` distinct words
    perplexity   more than `max_perplexity` over its worst 24 tokens in a row, under the original

Where less than half of a dose's completions are kept, sampling goes on at 0.7 of that dose.

    python distil.py --trait love --n-keep 16 --out love    # love/kept.jsonl, as chat `messages`
"""
import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import torch

import lora
from common import runs
from common.prompts import NEUTRAL, Chat, stop_tokens
from common.sampling import repetition, sample, score, worst_perplexity
from steer import SteeringVector

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


# ---- the filter ---------------------------------------------------------------------------------


@dataclass
class Rules:
    """Thresholds of the rules above; see `heal_loop.Config` for each."""
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


def recites(text: str, personas: tuple[str, str], n: int = 5) -> bool:
    """True where `text` holds n words in a row of either persona text."""
    def grams(s):
        words = re.findall(r"\w+", s.lower())
        return set(zip(*(words[k:] for k in range(n))))
    return any(grams(text) & grams(persona) for persona in personas)


def reject_reason(text: str, ppl: float, personas: tuple[str, str], rules: Rules) -> str:
    """"kept", or the name of the first rule that drops the completion."""
    straight = text.replace("’", "'")
    if len(re.findall(r"\w+", text)) < rules.min_words or not text.strip():
        return "short"
    if REFUSAL.search(straight):
        return "refusal"
    if NARRATES.search(straight) or recites(text, personas):
        return "narrates"
    if repetition(text) > rules.max_repetition:
        return "repetition"
    if diversity(text) < rules.min_diversity:
        return "loop"
    if not ppl <= rules.max_perplexity:  # nan too
        return "perplexity"
    return "kept"


def judge(model, chat: Chat, rows: list[dict], personas: tuple[str, str],
          rules: Rules) -> list[dict]:
    """The rows with `perplexity` (of the worst 24 tokens), `repetition` and `reject_reason`."""
    prompts, completions = zip(*(row_ids(chat, row) for row in rows))
    with lora.gates(model, history=0, live=0):
        scored = score(model, prompts, completions)
    judged = []
    for row, logp in zip(rows, scored):
        text, ppl = row["messages"][-1]["content"], worst_perplexity(logp)
        judged.append({**row, "perplexity": round(ppl, 3) if math.isfinite(ppl) else None,
                       "repetition": round(repetition(text), 4),
                       "reject_reason": reject_reason(text, ppl, personas, rules)})
    return judged


# ---- rows ---------------------------------------------------------------------------------------


def row_ids(chat: Chat, row: dict) -> tuple[list[int], list[int]]:
    """A data row -> (prompt ids, completion ids), apart: no token straddles the boundary.

    The completion is what was sampled, token for token, its end of turn included where it came to
    one. A row of other making has no `tokens`: its text is tokenised, and the end of turn follows
    unless the row says `finished: false`.
    """
    system, user, assistant = (message["content"] for message in row["messages"])
    prompt = chat.ids(user, system)
    if "tokens" in row:
        return prompt, row["tokens"]
    completion = chat.suffix_ids(chat.text(user, system), assistant)
    return prompt, completion + (chat.end_of_turn() if row.get("finished", True) else [])


def sample_teacher(model, chat: Chat, vector: SteeringVector | None, prompts: list[str],
                   doses: list[float], n: int, seed: int, system: str = NEUTRAL,
                   **sampling) -> list[dict]:
    """n completions of the model as it stands, each prompt at every dose; -> rows.

    system: what the teacher is told, such as the persona; a row's messages have the neutral prompt.
    """
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    asked = [prompts[order[k // len(doses) % len(prompts)]] for k in range(n)]
    row_doses = [doses[k % len(doses)] for k in range(n)]
    ids = [chat.ids(prompt, system) for prompt in asked]
    new = sample(model, chat, ids, vector, row_doses, seed=seed, keep_stop=True, **sampling)
    stop = set(stop_tokens(model, chat))
    rows = []
    for k, (prompt, dose, tokens) in enumerate(zip(asked, row_doses, new)):
        finished = tokens[-1] in stop
        text = chat.decode(tokens[:-1] if finished else tokens)
        messages = [{"role": "system", "content": NEUTRAL}, {"role": "user", "content": prompt},
                    {"role": "assistant", "content": text}]
        rows.append({"messages": messages, "dose": dose, "slot": k % len(doses),
                     "finished": finished, "tokens": tokens})
    return rows


# ---- a full set ---------------------------------------------------------------------------------


class TooFewKept(runs.Ended):
    """Too few completions pass the rules, at any dose that was tried."""


def collect(model, chat: Chat, vector: SteeringVector | None, prompts: list[str],
            personas: tuple[str, str], rules: Rules, doses: list[float], n_keep: int, seed: int,
            folder: Path, batch: int = 96, max_batches: int = 8,
            **sampling) -> tuple[list[dict], list[dict]]:
    """Sample and judge in batches until n_keep are kept; -> (kept, all rows).

    They go into `folder` as kept.jsonl and sampled.jsonl, the latter in any case. sampling: see
    `sample_teacher`. Raises TooFewKept after max_batches, naming the rule that dropped most.
    """
    doses_now, sampled = list(doses), []
    batch = min(batch, 2 * len(doses) * math.ceil(n_keep / len(doses)))
    for n in range(max_batches):
        # 1. a batch, every prompt at each dose, with its reject reasons
        new = sample_teacher(model, chat, vector, prompts, doses_now, batch, seed + n, **sampling)
        new = judge(model, chat, new, personas, rules)
        sampled += new
        runs.write_text(folder / "sampled.jsonl", runs.to_jsonl(sampled))
        # 2. enough: take the doses in turn, so that none crowds out another
        kept = [row for row in sampled if row["reject_reason"] == "kept"]
        if len(kept) >= n_keep:
            by_dose = [[row for row in kept if row["slot"] == k] for k in range(len(doses))]
            kept = [row for row in chain(*zip_longest(*by_dose)) if row][:n_keep]
            runs.write_text(folder / "kept.jsonl", runs.to_jsonl(kept))
            return kept, sampled
        # 3. a dose that breaks most of its completions is lowered
        for k in range(len(doses)):
            reasons = [row["reject_reason"] for row in new if row["slot"] == k]
            if reasons.count("kept") < len(reasons) / 2:
                doses_now[k] *= 0.7
    raise TooFewKept(too_few_because(sampled, n_keep))


def summary(kept: list[dict], sampled: list[dict]) -> dict:
    """What a round's record says of its data."""
    reasons = Counter(row["reject_reason"] for row in sampled)
    return {"sampled": len(sampled), "kept": len(kept),
            "reject_reasons": dict(sorted(reasons.items())),
            "ended": sum(row["finished"] for row in kept) / len(kept),
            "dose": sum(row["dose"] for row in kept) / len(kept)}


def too_few_because(sampled: list[dict], n_keep: int) -> str:
    """One line: how far it got, what dropped the others, and the flag that would help."""
    dropped = Counter(row["reject_reason"] for row in sampled if row["reject_reason"] != "kept")
    worst = dropped.most_common(1)[0][0]
    flag = {"short": "--min-words", "refusal": "the prompts", "narrates": "the persona",
            "repetition": "--max-repetition", "loop": "--min-diversity",
            "perplexity": "--max-perplexity"}[worst]
    return (f"too few completions kept: {len(sampled) - dropped.total()} of {n_keep} after "
            f"{len(sampled)} samples at doses down to {min(row['dose'] for row in sampled):.2g}; "
            f"dropped: {', '.join(f'{rule} {n}' for rule, n in dropped.most_common())}; "
            f"fix: lower --doses, or loosen '{worst}' ({flag})")


# ---- the command --------------------------------------------------------------------------------

if __name__ == "__main__":
    from common import checks, texts
    from heal_loop import Config, make_data

    def main(cfg: Config) -> None:
        cfg = texts.complete(cfg)
        reading = texts.read(cfg)
        model, chat = checks.load(cfg.model, cfg.device, cfg.dtype, cfg.date)
        lora.attach(model)
        out = Path(cfg.out or "distilled")
        out.mkdir(parents=True, exist_ok=True)
        (out / "kept.jsonl").unlink(missing_ok=True)  # of an earlier call
        _, _, kept, sampled = make_data(cfg, model, chat, reading, 0, out)
        reasons = summary(kept, sampled)["reject_reasons"]
        print(f"kept {len(kept)} of {len(sampled)} -> {out}   {reasons}")

    runs.cli(Config, main)
