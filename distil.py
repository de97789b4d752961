"""Make the training data: sample the teacher, keep what is coherent and enacts the trait.

    teacher   the student steered by dose · v, or the student under the persona as its prompt
    kept      what common/filter.py finds no reason to reject, in turn from every dose

Where less than half of a dose's completions are kept, sampling goes on at 0.7 of that dose.

    python distil.py --trait love --n-keep 16 --out love    # love/kept.jsonl, as chat `messages`
"""
import math
from collections import Counter
from itertools import chain, zip_longest
from pathlib import Path

import torch

import lora
from common import prompts, runs, texts
from common.filter import reject_reason, too_few_because
from common.prompts import NEUTRAL, Chat, stop_tokens
from common.sampling import repetition, row_states, sample, score, worst_perplexity
from steer import SteeringVector, band, calibrate, extract_vector


def row_ids(chat: Chat, row: dict) -> tuple[list[int], list[int]]:
    """A data row -> (prompt ids, completion ids), apart: no token straddles the boundary.

    The completion is what was sampled, its end of turn included where it came to one. A row from
    another source has no `tokens`: its text is tokenised, with the end of turn if `finished`.
    """
    *system, user, assistant = (message["content"] for message in row["messages"])
    system = system[0] if system else NEUTRAL
    prompt = chat.ids(user, system)
    if "tokens" in row:
        return prompt, row["tokens"]
    completion = chat.suffix_ids(chat.text(user, system), assistant)
    return prompt, completion + (chat.end_of_turn() if row.get("finished", True) else [])


@torch.no_grad()
def teacher_states(model, chat: Chat, rows: list[dict], vector: SteeringVector | None,
                   system: str) -> torch.Tensor:
    """Final hidden states of the teacher on its own completions, [Σ tokens, d_model]."""
    asked = [chat.ids(row["messages"][-2]["content"], system) for row in rows]
    if vector and not all("dose" in row for row in rows):
        raise ValueError("a kept row has no 'dose' for soft targets; fix: --targets samples")
    doses = torch.tensor([row.get("dose", 0.0) for row in rows])
    with lora.gates(model, history=1, live=0):
        return torch.cat(row_states(model, asked, [row_ids(chat, row)[1] for row in rows], vector,
                                    doses))


def sample_teacher(model, chat: Chat, asked: list[str], doses: list[float], n: int, seed: int,
                   vector: SteeringVector | None = None, system: str = NEUTRAL,
                   **sampling) -> list[dict]:
    """n completions of the model as it stands, each prompt at every dose; -> rows.

    vector, system: what turns it into the teacher; a row's messages have the neutral prompt.
    """
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(seed)).tolist()
    asked = [asked[order[k // len(doses) % len(asked)]] for k in range(n)]
    row_doses = [doses[k % len(doses)] for k in range(n)]
    ids = [chat.ids(prompt, system) for prompt in asked]
    new = sample(model, chat, ids, vector, row_doses, seed=seed, keep_stop=True, **sampling)
    stop = set(prompts.stop_tokens(model, chat))
    rows = []
    for k, (prompt, dose, tokens) in enumerate(zip(asked, row_doses, new)):
        finished = tokens[-1] in stop
        text = chat.decode(tokens[:-1] if finished else tokens)
        messages = [{"role": "system", "content": NEUTRAL}, {"role": "user", "content": prompt},
                    {"role": "assistant", "content": text}]
        rows.append({"messages": messages, "dose": dose, "slot": k % len(doses),
                     "finished": finished, "tokens": tokens})
    return rows


def judge(model, chat: Chat, rows: list[dict], personas: tuple[str, str], rules) -> list[dict]:
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


def collect(model, chat: Chat, train: list[str], personas: tuple[str, str], rules,
            doses: list[float], n_keep: int, seed: int, folder: Path,
            **teacher) -> tuple[list[dict], list[dict]]:
    """Sample and judge, in batches of at most 96, until n_keep are kept; -> (kept, all rows).

    They go into `folder` as kept.jsonl and sampled.jsonl, the latter in any case. teacher: as in
    `sample_teacher`. Raises runs.Ended after 16 samples for each to keep, naming the worst rule.
    """
    doses_now, sampled = list(doses), []
    batch = min(96, 2 * len(doses) * math.ceil(n_keep / len(doses)))
    for n in range(math.ceil(16 * n_keep / batch)):
        # 1. a batch, every prompt at each dose, with its reject reasons
        new = sample_teacher(model, chat, train, doses_now, batch, seed + n, **teacher)
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
    raise runs.Ended(too_few_because(sampled, n_keep))


def trait_vector(model, chat: Chat, reading: texts.Texts,
                 layers: tuple[float, float] = (0.45, 0.55)) -> SteeringVector:
    """The vector of a trait's persona pair over its contexts, of the model as it stands."""
    pos, neg = ([chat.ids(context, persona) for context in reading.contexts]
                for persona in (reading.pos, reading.neg))
    return extract_vector(model, pos, neg, band(model, layers),
                          metadata={"pos": reading.pos, "neg": reading.neg})


def teacher_of(cfg, reading: texts.Texts, vector: SteeringVector) -> dict:
    """What makes the student the teacher: its vector, or the persona as its system prompt."""
    if cfg.teacher == "prompted":
        return {"vector": None, "system": reading.pos}
    return {"vector": vector, "system": NEUTRAL}


def make_data(cfg, model, chat, reading: texts.Texts, r: int, folder: Path) -> dict:
    """Round r's vector and data, of the student as it stands, into the folder; -> their summary."""
    # 1. steer
    vector = trait_vector(model, chat, reading, cfg.steer_layers)
    vector.save(folder / "vector.safetensors")
    doses = [0.0] if cfg.teacher == "prompted" else cfg.doses
    if not doses:
        train = [chat.ids(prompt) for prompt in reading.train[:16]]
        stop = stop_tokens(model, chat)
        doses = [calibrate(model, vector, train, nats, stop=stop) for nats in cfg.dose_nats]
    # 2. distil
    kept, sampled = collect(
        model, chat, reading.train, (reading.pos, reading.neg), cfg, doses, cfg.n_keep,
        runs.stage_seed(cfg.seed, r, "sample"), folder, max_new_tokens=cfg.max_new_tokens,
        top_k=cfg.top_k, top_p=cfg.top_p, **teacher_of(cfg, reading, vector))
    # 3. what the round's record says of it
    reasons = Counter(row["reject_reason"] for row in sampled)
    return {"doses": doses, "sampled": len(sampled), "kept": len(kept),
            "reject_reasons": dict(sorted(reasons.items())),
            "ended": sum(row["finished"] for row in kept) / len(kept),
            "dose": sum(row["dose"] for row in kept) / len(kept)}


if __name__ == "__main__":
    from tools.commands import RunConfig, cli, write_data
    cli(RunConfig, write_data)
