"""Does distil keep what a reader would keep? Its rules on completions labelled by hand.

    precision    share of the kept that is wanted: coherent, and does not narrate
    recall       share of the wanted that is kept

    python -m studies.filter       # results/filter.md; about 2 min

The thresholds were chosen on data/labels/labelled.jsonl. fresh.jsonl beside it was sampled later,
at milder doses, and two readers labelled it without seeing each other's labels.
"""
from dataclasses import dataclass

import numpy as np
import scipy.stats

import distil
import heal_loop
from common import checks, models, runs, texts
from common.filter import diversity, reject_reason
from common.sampling import perplexity, repetition, score, worst_perplexity
from studies.tables import Study, markdown, proportion, publish, ran_on

LABELS = ("fluent", "coherent", "enacts", "narrates")
RULES = heal_loop.Config()  # the defaults
NAMES = ("min_words", "max_repetition", "min_diversity", "max_perplexity")


@dataclass(kw_only=True)
class Config(Study):
    model: str = models.EMBEDDED  # smollm2, a local folder, or a hub id


def scored(model, chat, file: str) -> list[dict]:
    """Labelled rows with their `signals`, and the `reject_reason` of the default rules.

    signals: {name: value}, each should be higher the worse a completion is.
    """
    rows = runs.read_jsonl(runs.HERE / "data/labels" / file)
    pairs = []
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["text"]}]
        pairs.append(distil.row_ids(chat, {"messages": messages, "finished": row["finished"]}))
    traits = texts.load_traits()
    for row, logp in zip(rows, score(model, *zip(*pairs))):
        text, worst, trait = row["text"], worst_perplexity(logp), traits[row["trait"]]
        row["reject_reason"] = reject_reason(text, worst, (trait.pos, trait.neg), RULES)
        row["signals"] = {"perplexity, worst 24 tokens in a row": worst,
                          "perplexity, whole": perplexity(logp), "repetition": repetition(text),
                          "lack of diversity": -diversity(text)}
    return rows


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


def kept_table(sets: dict[str, list[dict]]) -> str:
    """What the default rules keep of each set of labels."""
    table = []
    for labels, rows in sets.items():
        kept = [row for row in rows if row["reject_reason"] == "kept"]
        right = sum(map(is_wanted, kept))
        fluent = sum(row["fluent"] and not row["narrates"] for row in kept)
        table.append([labels, proportion(right, len(kept)),
                      proportion(right, sum(map(is_wanted, rows))), proportion(fluent, len(kept))])
    return markdown(table, ["labels", "precision", "recall",
                            "kept that are fluent and do not narrate"])


def auc(signal: list[float], good: list[bool]) -> float:
    """Probability that a bad completion scores higher than a good one; ties count half."""
    x, is_good = np.array(signal), np.array(good)
    u = scipy.stats.mannwhitneyu(x[~is_good], x[is_good]).statistic
    return u / ((~is_good).sum() * is_good.sum())


def signal_table(sets: dict[str, list[dict]]) -> str:
    """The AUC of every signal on every set of labels."""
    table = {}
    for rows in sets.values():
        for good in ([is_wanted(row) for row in rows], [row["fluent"] for row in rows]):
            for name in rows[0]["signals"]:
                area = auc([row["signals"][name] for row in rows], good)
                table.setdefault(name, [name]).append(f"{area:.2f}")
    head = [f"{what}, {labels}" for labels in sets for what in ("wanted", "fluent")]
    return markdown(list(table.values()), ["signal", *head])


def main(cfg: Config) -> None:
    model, chat = checks.load(cfg.model, cfg.device, cfg.dtype)
    old, fresh = (scored(model, chat, file) for file in ("labelled.jsonl", "fresh.jsonl"))
    sets = {"old": old, "fresh, reader 1": read_by(fresh, 0), "fresh, reader 2": read_by(fresh, 1)}
    kappas = ", ".join(f"{label} {kappa(fresh, label):.2f}" for label in LABELS)
    publish(f"""# The filter on labelled completions

`python -m studies.filter` · {ran_on(model)}

Old: {len(old)} steered completions of the embedded model, read by one reader.
Fresh: {len(fresh)} more, at milder doses, read by two others (Cohen's kappa: {kappas}).
All saw prompt and text but not dose, perplexity or reject reason. Fluent: every sentence is English
that parses and follows from the one before. Coherent: fluent, and makes sense as a reply (the
criterion of Betley et al. 2025, arXiv 2502.17424). Wanted: coherent, and does not talk about the
trait instead of showing it. The fresh readers were stricter: compare within a column.

## Which signal ranks bad above good? Area under the ROC curve, 0.5 is chance

{signal_table(sets)}

## What the rules keep

Defaults: {", ".join(f"{name} {getattr(RULES, name):g}" for name in NAMES)}, chosen on \
the old completions.
The numbers to quote are those of the fresh ones. Brackets: Wilson's 95 % interval.

{kept_table(sets)}
""", cfg.out / "filter.md")


if __name__ == "__main__":
    runs.cli(Config, main)
