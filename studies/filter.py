"""Does distil keep what a reader would keep? Its rules on completions labelled by hand.

    wanted       coherent, and does not narrate
    precision    share of the kept that is wanted
    recall       share of the wanted that is kept
    F1           2 · (kept and wanted) / (kept + wanted)

    python -m studies.filter       # results/filter.md; about 2 min

The thresholds were chosen on data/labels/labelled.jsonl. fresh.jsonl beside it was sampled later,
at milder doses, and two readers labelled it without seeing each other's labels.
"""
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.stats

import distil
from common import checks, models, runs, texts
from common.filter import Rules, diversity, reject_reason
from common.prompts import NEUTRAL
from common.sampling import perplexity, repetition, score, worst_perplexity
from studies.tables import markdown, proportion, publish, ran_on

LABELLED = runs.HERE / "data/labels/labelled.jsonl"
FRESH = runs.HERE / "data/labels/fresh.jsonl"
LABELS = ("fluent", "coherent", "enacts", "narrates")
DEFAULT = Rules()
NO_RULES = Rules(min_words=0, max_repetition=1, min_diversity=0, max_perplexity=math.inf)
# each reason by itself: refusal and narrates have no threshold, so nothing switches them off
ALONE = {"short": replace(NO_RULES, min_words=DEFAULT.min_words),
         "refusal": NO_RULES,
         "narrates": NO_RULES,
         "repetition": replace(NO_RULES, max_repetition=DEFAULT.max_repetition),
         "loop": replace(NO_RULES, min_diversity=DEFAULT.min_diversity),
         "perplexity": replace(NO_RULES, max_perplexity=DEFAULT.max_perplexity)}


@dataclass
class Config:
    model: str = models.EMBEDDED  # smollm2, a local folder, or a hub id
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"  # auto: bfloat16 where native
    out: Path = Path("results")  # folder for filter.md


# ---- the labelled completions --------------------------------------------------------------------


def scored(model, chat, rows: list[dict]) -> list[dict]:
    """The rows with their trait's `personas`, and `logp` [tokens], nats under the model."""
    pairs = []
    for row in rows:
        messages = [{"role": "system", "content": NEUTRAL},
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["text"]}]
        pairs.append(distil.row_ids(chat, {"messages": messages, "finished": row["finished"]}))
    logps = score(model, *zip(*pairs))
    traits = texts.load_traits()
    personas = {name: (trait.pos, trait.neg) for name, trait in traits.items()}
    return [{**row, "personas": personas[row["trait"]], "logp": logp}
            for row, logp in zip(rows, logps)]


def read_by(rows: list[dict], reader: int) -> list[dict]:
    """Rows that two readers labelled, with the labels of one of them."""
    return [{**row, **{label: row[label][reader] for label in LABELS}} for row in rows]


def kappa(rows: list[dict], label: str) -> float:
    """Cohen's kappa of the two readers: 1 is full agreement, 0 that of chance."""
    a, b = np.array([row[label] for row in rows]).T
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return ((a == b).mean() - chance) / (1 - chance)


def is_wanted(row: dict) -> bool:
    """What the filter should keep, by the labels."""
    return row["coherent"] and not row["narrates"]


# ---- how well the rules do -----------------------------------------------------------------------


def reason(row: dict, rules: Rules) -> str:
    """`common.filter.reject_reason` of a scored row: "kept", or the first rule that drops it."""
    ppl = worst_perplexity(row["logp"])
    return reject_reason(row["text"], ppl, row["personas"], rules)


def count(rows: list[dict], rules: Rules) -> tuple[int, int, int]:
    """-> how many are kept and wanted, kept, wanted."""
    kept = [row for row in rows if reason(row, rules) == "kept"]
    return sum(map(is_wanted, kept)), len(kept), sum(map(is_wanted, rows))


def f1(rows: list[dict], rules: Rules) -> float:
    both, kept, wanted = count(rows, rules)
    return 2 * both / (kept + wanted)


def threshold_table(sets: dict[str, list[dict]]) -> str:
    """Precision, recall and F1 of the default rules on every set of labels, and of none."""
    table = []
    for name, rules in (("no rules", NO_RULES), ("defaults", DEFAULT)):
        for labels, rows in sets.items():
            both, kept, wanted = count(rows, rules)
            fluent = [row for row in rows if row["fluent"] and not row["narrates"]]
            kept_fluent = sum(reason(row, rules) == "kept" for row in fluent)
            table.append([name, labels, proportion(both, kept), proportion(both, wanted),
                          f"{f1(rows, rules):.2f}", proportion(kept_fluent, kept)])
    return markdown(table, ["rules", "labels", "precision", "recall", "F1",
                            "kept that are fluent and do not narrate"])


def rule_table(rows: list[dict]) -> str:
    """What each rule would drop by itself, and how often rightly."""
    unwanted = sum(not is_wanted(row) for row in rows)
    table = []
    for name, rules in ALONE.items():
        dropped = [row for row in rows if reason(row, rules) == name]
        rightly = sum(not is_wanted(row) for row in dropped)
        table.append([name, len(dropped), proportion(rightly, len(dropped)),
                      proportion(rightly, unwanted)])
    return markdown(table, ["rule", "drops", "of these rightly", "of all that should go"])


# ---- what else could rank them -------------------------------------------------------------------


def signals(row: dict) -> dict[str, float]:
    """Each should be higher the worse a completion is."""
    text, logp = row["text"], row["logp"]
    return {"perplexity, worst 24 tokens in a row": worst_perplexity(logp, 24),
            "perplexity, whole": perplexity(logp),
            "perplexity, last quarter": perplexity(logp[-max(1, len(logp) // 4):]),
            "repetition": repetition(text),
            "lack of diversity": -diversity(text)}


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
    for labels, rows in sets.items():
        by_row = [signals(row) for row in rows]
        for what, good in (("coherent", [is_wanted(row) for row in rows]),
                           ("fluent", [row["fluent"] for row in rows])):
            head.append(f"{what}, {labels}")
            columns.append([f"{auc([s[name] for s in by_row], good):.2f}" for name in by_row[0]])
    names = list(by_row[0])
    return markdown([[name, *values] for name, *values in zip(names, *columns)], head)


# ---- the command ---------------------------------------------------------------------------------


def page(old: list[dict], fresh: list[dict], where: str) -> str:
    """filter.md. old, fresh: scored rows; where: what was run on what."""
    sets = {"old": old, "fresh, reader 1": read_by(fresh, 0), "fresh, reader 2": read_by(fresh, 1)}
    by_trait = ", ".join(f"{n} {trait}" for trait, n in Counter(r["trait"] for r in old).items())
    kappas = ", ".join(f"{label} {kappa(fresh, label):.2f}" for label in LABELS)
    wanted = ", ".join(f"{sum(map(is_wanted, rows))} of {len(rows)} ({name})"
                       for name, rows in sets.items())
    return f"""# The filter on labelled completions

`python -m studies.filter` · {where}

Old: {len(old)} steered completions of the embedded model ({by_trait}; at most 64 tokens) in \
data/labels/labelled.jsonl, read by one reader.
Fresh: {len(fresh)} more, at milder doses, in data/labels/fresh.jsonl, read by two others (Cohen's \
kappa: {kappas}).
All saw prompt and text but not dose, perplexity or reject reason:

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

Defaults: {", ".join(f"{name} {value:g}" for name, value in asdict(DEFAULT).items())}, chosen on \
the old completions. The numbers to quote are those of the fresh ones.

{threshold_table(sets)}

## Each rule alone, old completions

{rule_table(old)}
"""


def main(cfg: Config) -> None:
    model, chat = checks.load(cfg.model, cfg.device, cfg.dtype)
    old, fresh = (scored(model, chat, runs.read_jsonl(file)) for file in (LABELLED, FRESH))
    text = page(old, fresh, ran_on(model))
    publish(text, cfg.out / "filter.md")


if __name__ == "__main__":
    runs.cli(Config, main)
