"""Does distil keep what a reader would keep? Its verdicts on completions labelled by hand.

    wanted       coherent, and does not narrate
    precision    share of the kept that is wanted
    recall       share of the wanted that is kept
    F1           2 · (kept and wanted) / (kept + wanted)

    python -m studies.filter       # results/filter.md; about 2 min

Thresholds and the signal are chosen on data/labels/labelled.jsonl and reported on fresh.jsonl beside
it, milder doses sampled later, which two readers labelled without knowledge of each other.
"""
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.stats
from tqdm import tqdm

import distil
import lora
from common import models
from common import runs
from common import texts
from distil import Rules
from common.sampling import perplexity, repetition, score, worst_perplexity
from steer import NEUTRAL
from studies.readout import markdown, proportion, ran_on

LABELLED = runs.HERE / "data/labels" / "labelled.jsonl"
FRESH = runs.HERE / "data/labels" / "fresh.jsonl"
LABELS = ("fluent", "coherent", "enacts", "narrates")
DEFAULT = Rules()
BEFORE = Rules(min_words=8, max_repetition=0.2, min_diversity=0.7, max_perplexity=16)
NO_RULES = Rules(min_words=0, max_repetition=1, min_diversity=0, max_perplexity=math.inf)
GRID = [replace(DEFAULT, max_perplexity=most)
        for most in (8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 25, 30, 40, 60)]


@dataclass
class Config:
    model: str = models.EMBEDDED  # smollm2, a local folder, or a hub id
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"  # auto: bfloat16 where native
    out: Path = Path("results")  # folder for filter.md


# ---- the labelled completions --------------------------------------------------------------------


def judged(model, tok, labelled: list[dict]) -> list[dict]:
    """The rows with `persona`, and with `ppl`, `verdict` and `logp` [tokens] under the model."""
    found = []
    names = list(dict.fromkeys(row["trait"] for row in labelled))
    for name in tqdm(names, "judge", leave=False, disable=None):
        persona = texts.find_trait(name).persona
        of_trait = [row for row in labelled if row["trait"] == name]
        # 1. as rows of distil
        data = []
        for row in of_trait:
            messages = [{"role": "system", "content": NEUTRAL},
                        {"role": "user", "content": row["prompt"]},
                        {"role": "assistant", "content": row["text"]}]
            data.append({"messages": messages, "finished": row["finished"]})
        # 2. what distil says of them
        verdicts = distil.judge(model, tok, data, persona, DEFAULT)
        # 3. every token's log-probability, for the other signals
        prompts, completions = zip(*(distil.row_ids(tok, row) for row in data))
        logps = score(model, prompts, completions)
        for row, said, logp in zip(of_trait, verdicts, logps):
            ppl = math.inf if said["perplexity"] is None else said["perplexity"]
            found.append({**row, "persona": persona, "ppl": ppl, "verdict": said["verdict"],
                          "logp": logp})
    return found


def as_read_by(rows: list[dict], reader: int) -> list[dict]:
    """Rows that two readers labelled, with the labels of one of them."""
    return [{**row, **{label: row[label][reader] for label in LABELS}} for row in rows]


def agreement(rows: list[dict], label: str) -> float:
    """Cohen's kappa of the two readers: 1 is full agreement, 0 that of chance."""
    a, b = np.array([row[label] for row in rows]).T
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return ((a == b).mean() - chance) / (1 - chance)


def is_wanted(row: dict) -> bool:
    """What the filter should keep, by the labels."""
    return row["coherent"] and not row["narrates"]


def is_kept(row: dict, rules: Rules) -> bool:
    return distil.verdict(row["text"], row["ppl"], row["persona"], rules) == "kept"


# ---- how well the rules do -----------------------------------------------------------------------


def count(rows: list[dict], rules: Rules) -> tuple[int, int, int]:
    """-> how many are kept and wanted, kept, wanted."""
    kept = [row for row in rows if is_kept(row, rules)]
    return sum(map(is_wanted, kept)), len(kept), sum(map(is_wanted, rows))


def f1(rows: list[dict], rules: Rules) -> float:
    both, kept, wanted = count(rows, rules)
    return 2 * both / (kept + wanted)


def threshold_table(sets: dict[str, list[dict]], chosen: Rules) -> str:
    """Precision, recall and F1 of some rules on every set of labels."""
    compared = {"no thresholds": (NO_RULES, None), "shipped": (DEFAULT, None)}
    if chosen != DEFAULT:
        compared["chosen here"] = (chosen, None)
    compared["before: last quarter <= 16"] = (BEFORE, "perplexity, last quarter")
    table = []
    for name, (rules, signal) in compared.items():
        for about, rows in sets.items():
            if signal:  # what the rule on perplexity looks at
                rows = [{**row, "ppl": signals(row)[signal]} for row in rows]
            both, kept, wanted = count(rows, rules)
            fluent = [row for row in rows if row["fluent"] and not row["narrates"]]
            kept_fluent = sum(is_kept(row, rules) for row in fluent)
            table.append([name, about, proportion(both, kept), proportion(both, wanted),
                          f"{f1(rows, rules):.2f}", proportion(kept_fluent, kept)])
    return markdown(table, ["thresholds", "labels", "precision", "recall", "F1",
                            "kept that are fluent and do not narrate"])


def rule_table(rows: list[dict]) -> str:
    """What each rule would drop by itself, and how often rightly."""
    alone = {"short": replace(NO_RULES, min_words=DEFAULT.min_words),
             "refusal": NO_RULES,  # these two have no threshold
             "narrates": NO_RULES,
             "repetition": replace(NO_RULES, max_repetition=DEFAULT.max_repetition),
             "loop": replace(NO_RULES, min_diversity=DEFAULT.min_diversity),
             "perplexity": replace(NO_RULES, max_perplexity=DEFAULT.max_perplexity)}
    unwanted = [row for row in rows if not is_wanted(row)]
    table = []
    for name, rules in alone.items():
        dropped = [row for row in rows
                   if distil.verdict(row["text"], row["ppl"], row["persona"], rules) == name]
        rightly = sum(not is_wanted(row) for row in dropped)
        table.append([name, len(dropped), proportion(rightly, len(dropped)),
                      proportion(rightly, len(unwanted))])
    return markdown(table, ["rule", "drops", "of these rightly", "of all that should go"])


def dose_table(rows: list[dict]) -> str:
    """The labels, and what the defaults keep, by the dose that a completion was sampled at."""
    table = []
    for dose in sorted({row["dose"] for row in rows}):
        at_dose = [row for row in rows if row["dose"] == dose]
        labels = [sum(row[label] for row in at_dose)
                  for label in LABELS]
        kept = [row for row in at_dose if row["verdict"] == "kept"]
        table.append([f"{dose:g}", len(at_dose), *labels, len(kept), sum(map(is_wanted, kept))])
    return markdown(table, ["dose", "n", "fluent", "coherent", "enacts", "narrates",
                            "kept by the defaults", "of these rightly"])


# ---- what else could rank them -------------------------------------------------------------------


def signals(row: dict) -> dict[str, float]:
    """Each should be higher the worse a completion is."""
    text, logp = row["text"], row["logp"]
    return {"perplexity, last quarter": perplexity(logp, 0.25),
            "perplexity, last half": perplexity(logp, 0.5),
            "perplexity, whole": perplexity(logp),
            "perplexity, worst 24 tokens in a row": worst_perplexity(logp, 24),
            "repetition": repetition(text),
            "lack of diversity": -distil.diversity(text)}


def auc(signal: list[float], good: list[bool]) -> float:
    """Probability that a bad completion scores higher than a good one; ties count half.

    That is the Mann-Whitney U over the number of pairs.
    """
    x, is_good = np.array(signal), np.array(good)
    u = scipy.stats.mannwhitneyu(x[~is_good], x[is_good]).statistic
    return u / ((~is_good).sum() * is_good.sum())


def signal_table(sets: dict[str, list[dict]]) -> str:
    """The AUC of every signal on every set of labels."""
    head, columns = ["signal"], []
    for about, rows in sets.items():
        by_row = [signals(row) for row in rows]
        for what, good in (("coherent", [is_wanted(row) for row in rows]),
                           ("fluent", [row["fluent"] for row in rows])):
            head.append(f"{what}, {about}")
            columns.append([f"{auc([s[name] for s in by_row], good):.2f}" for name in by_row[0]])
    names = list(signals(next(iter(sets.values()))[0]))
    return markdown([[name, *numbers] for name, *numbers in zip(names, *columns)], head)


# ---- the command ---------------------------------------------------------------------------------


def in_words(rules: Rules) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in asdict(rules).items())


def page(old: list[dict], fresh: list[dict], about: str) -> str:
    """filter.md. old, fresh: judged rows; about: what was run on what."""
    sets = {"old": old, "fresh, reader 1": as_read_by(fresh, 0),
            "fresh, reader 2": as_read_by(fresh, 1)}
    chosen = max(GRID, key=lambda rules: f1(old, rules))
    by_trait = ", ".join(f"{n} {trait}" for trait, n in Counter(r["trait"] for r in old).items())
    defaults = "these are the defaults" if chosen == DEFAULT else f"defaults: {in_words(DEFAULT)}"
    kappa = ", ".join(f"{label} {agreement(fresh, label):.2f}" for label in LABELS)
    wanted = ", ".join(f"{sum(map(is_wanted, rows))} of {len(rows)} ({name})"
                       for name, rows in sets.items())
    return f"""# The filter on labelled completions

`python -m studies.filter` · {about}

Old: {len(old)} steered completions of the embedded model ({by_trait}; at most 64 tokens, \
`distil.sample_doses`) in data/labels/labelled.jsonl, read by one reader.
Fresh: {len(fresh)} more, at milder doses, in data/labels/fresh.jsonl, read by two others (Cohen's \
kappa: {kappa}).
All saw prompt and text but not dose, perplexity or verdict:

- fluent: every sentence is English that parses, and follows from the one before
- coherent: fluent, and makes sense as a reply to its prompt (the criterion of Betley et al. 2025, \
arXiv 2502.17424); naive advice counts
- enacts: acts the trait out. narrates: talks about having it instead

The filter should keep a completion if and only if it is coherent and does not narrate: {wanted}.
The fresh readers were stricter than the first: compare rules within a column, not columns.
Brackets: Wilson's 95 % interval.

## Which signal ranks bad above good?

Area under the ROC curve, 0.5 is chance:

{signal_table(sets)}

## The rules together

The signal and its threshold are those with the largest F1 on the old completions, the other
rules as they were: {in_words(chosen)}; {defaults}. The numbers to quote are those of the fresh
ones.

{threshold_table(sets, chosen)}

## Each rule alone, old completions

{rule_table(old)}

## By dose

Old:

{dose_table(old)}

Fresh, reader 2:

{dose_table(sets["fresh, reader 2"])}
"""


def main(cfg: Config) -> None:
    model, tok = models.load(cfg.model, cfg.device, cfg.dtype)
    lora.attach(model)  # distil.judge asks the original, with the gates shut
    cfg.out.mkdir(parents=True, exist_ok=True)
    old, fresh = (judged(model, tok, runs.read_jsonl(file)) for file in (LABELLED, FRESH))
    text = page(old, fresh, ran_on(model))
    runs.write_text(cfg.out / "filter.md", text)
    print(text)


if __name__ == "__main__":
    runs.cli(Config, main)
