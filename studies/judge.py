"""What does an unrelated model make of what a sweep's models wrote? Added to the sweep's records.

    judge_perplexity = exp of the mean loss per token of the sampled answers, each after its
                       question, under Gemma 3 270M, the base model

    pip install -r requirements-dev.txt
    python -m studies.judge runs/eight results/runs/eight    # then: python -m studies.frontier

The original's own perplexity is what a barrier trains on; this model has no part in the training.
A sweep writes its records anew: judge them again then.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from common import checks, runs
from common.sampling import perplexity, score
from studies import gemma
from studies.tables import OnDevice
from tools import sweep


@dataclass(kw_only=True)
class Config(OnDevice):
    sweep: tyro.conf.Positional[Path]  # the --out of tools.sweep: its run folders
    records: tyro.conf.Positional[Path]  # the folder of their records


def answers_perplexity(model, tok, texts: list[dict]) -> float:
    """Perplexity of all answers together, infinite for none. texts: [{prompt, text}]"""
    prompts = [tok(row["prompt"] + "\n\n").input_ids for row in texts]
    answers = [tok(row["text"], add_special_tokens=False).input_ids for row in texts]
    return perplexity(torch.cat(score(model, prompts, answers)))


def main(cfg: Config) -> None:
    records = sweep.load(cfg.records)
    model, chat = checks.load(str(gemma.folder()), cfg.device, cfg.dtype)
    known = {}  # arms share a base, and forks a round
    for record in tqdm(records, "judge", leave=False, disable=None):
        events = runs.read_events(cfg.sweep / record.name)
        for event, kept in zip(events, record.events, strict=True):
            if "texts" in event:
                key = str(event["texts"])
                if key not in known:
                    known[key] = answers_perplexity(model, chat.tok, event["texts"])
                kept["judge_perplexity"] = float(f"{known[key]:.6g}")
        sweep.save(record, cfg.records)
    print(f"{len(known)} sets of answers judged -> {cfg.records}")


if __name__ == "__main__":
    runs.cli(Config, main)
