"""Many runs on one page: what each arm costs, round by round and at matched Δtrait; its figure.

    python -m studies.frontier results/runs/sweep        # from a sweep's records, without a model

    Δtrait      the trait metric − the base's, in the trait's own direction                 (nats)
    at L nats   a metric where an arm first moved L nats, on the straight line between two rounds
    retained    Δtrait of the healed student / of the steered one before it
    interval    mean ± t(0.975, n − 1) · standard deviation / √n over n seeds, n ≥ 3

A metric that some record lacks, such as one of an earlier version, is left out of the tables.
"""
import re
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path

import matplotlib
import numpy as np
import scipy.stats
import tyro
from matplotlib.figure import Figure

from common import runs
from common.texts import NATS
from evaluate import MIN_SHIFT
from studies.tables import markdown
from tools.sweep import Record, load

LEVELS = (1, 2, 3, 5)  # nats of Δtrait at which arms are compared
KEYS = {"plain text": "text_nats", "valid answers": "coherence", "perplexity": "perplexity",
        "judge": "judge_perplexity", "entropy": "entropy", "ended": "ended", "drift": "drift",
        "repetition": "repetition", "controls": "control_nats"}  # {heading: key of an event}
METRICS = ("least wording", "greatest wording", *KEYS)
# digits after the point, of all else 2
DIGITS = {"plain text": 3, "valid answers": 4, "entropy": 3, "drift": 3, "repetition": 3, "D": 3,
          "sampled": 0}


@dataclass
class Config:
    records: tyro.conf.Positional[Path]  # a folder of records that tools.sweep wrote
    table: Path = Path("results/arms.md")  # the page; its figure goes beside it


def read(folder: Path) -> list[Record]:
    """The records of a folder; measured events get METRICS, Δtrait and every Δ, under headings.

    A healed one also gets Δsteered, retained and D, of its round.
    """
    records = [run for run in load(folder) if run.of("base")]
    for run in records:
        [base] = run.of("base")
        axis, sign = base["axis"], -1 if base["direction"] == "down" else 1
        start = {key: base[key] for key in (*NATS, "control_nats") if key in base}
        of_round = {}
        for event in run.events:
            if "D" in event:
                of_round["D"] = event["D"]
            if "coherence" not in event:
                continue
            event |= {name: event[key] for name, key in KEYS.items() if key in event}
            event["finished rounds"] = event["round"] + 1
            event |= {f"Δ{key}": event[key] - value for key, value in start.items()}
            event["Δtrait"] = sign * (event[axis] - base[axis]) + 0.0  # no −0
            pairs = zip(base.get("spread", []), event.get("spread", []))
            if shifts := [sign * (after - before) for before, after in pairs]:
                event |= {"least wording": min(shifts), "greatest wording": max(shifts)}
            if event["stage"] == "steered":
                of_round = {"Δsteered": event["Δtrait"]}
            if event["stage"] == "healed":
                steered = of_round["Δsteered"]
                retained = event["Δtrait"] / steered if steered >= MIN_SHIFT else None
                event |= {**of_round, "retained": retained}
    return records


def path(run: Record, stage: str = "healed") -> list[dict]:
    """The base and each event of a stage: by round, `alone` by dose."""
    return run.of("base") + sorted(run.of(stage), key=lambda e: e.get("dose", e["round"]))


def at_trait(run: Record, level: float, stage: str = "healed") -> dict:
    """Every metric where a run first moved `level` nats, interpolated; {} if it never did."""
    for before, after in pairwise(path(run, stage)):
        x0, x1 = before["Δtrait"], after["Δtrait"]
        if x0 < level <= x1:
            share = (level - x0) / (x1 - x0)
            metrics = [name for name, value in before.items()
                       if isinstance(value, float) and isinstance(after.get(name), float)]
            return {name: before[name] + share * (after[name] - before[name]) for name in metrics}
    return {}


def by_arm(records: list[Record]) -> dict[str, list[Record]]:
    """{arm: its runs by seed}, in the order of the names and of the numbers in them."""
    def key(run):
        words = re.split(r"(\d[\d.]*(?:e-?\d+)?)", run.config["arm"])  # every second is a number
        return [float(w) if k % 2 else w for k, w in enumerate(words)], run.config["seed"]
    arms = {}
    for run in sorted(records, key=key):
        if run.of("healed"):
            arms.setdefault(run.config["arm"], []).append(run)
    return arms


def untrained(records: list[Record]) -> list[Record]:
    """The record of base, persona prompt and steering alone."""
    return [run for run in records if run.config["arm"] == "alone"]


def over_seeds(values: list[float | None], digits: int) -> str:
    """`mean [low, high]`, the 95 % t-interval over seeds; the mean alone for fewer than three.

    Where some seeds have no value, how many have one: `mean (2 of 3)`.
    """
    known = [value for value in values if value is not None]
    if not known:
        return "n/a"
    mean = np.mean(known)
    text = f"{mean:z.{digits}f}"
    if len(known) >= 3:
        half = scipy.stats.t.ppf(0.975, len(known) - 1) * scipy.stats.sem(known)
        text += f" [{mean - half:z.{digits}f}, {mean + half:z.{digits}f}]"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def cells(events: list[dict], metrics: list[str]) -> list[str]:
    """Each metric over the events of several seeds; n/a where none has it."""
    return [over_seeds([e.get(name) for e in events], DIGITS.get(name, 2)) for name in metrics]


def metrics_of(records: list[Record]) -> list[str]:
    """The metrics that every measured event has."""
    measured = [e for run in records for e in run.events if "coherence" in e]
    return [name for name in METRICS if all(name in e for e in measured)]


def matched_table(records: list[Record], level: float, metrics: list[str]) -> str:
    """Steering alone and every arm at `level` nats."""
    rows = [["steering alone", *cells([at_trait(run, level, "alone")], metrics)]
            for run in untrained(records)]
    rows += [[arm, *cells([at_trait(run, level) for run in of_arm], metrics)]
             for arm, of_arm in by_arm(records).items()]
    return markdown(rows, [f"at {level:g} nats", *metrics])


def rounds_table(records: list[Record], metrics: list[str]) -> str:
    """What is not trained, and every arm after every round; also how every foundation moved."""
    others = [f"Δ{name}" for name in NATS if name != records[0].of("base")[0]["axis"]]
    metrics = ["Δsteered", "Δtrait", "retained", "D", *metrics, *others]
    names = {"base": "base", "prompted": "persona prompt", "alone": "steering alone"}
    rows = []
    for run in untrained(records):
        for e in sorted(run.events, key=lambda e: e.get("dose", 0)):
            if e["stage"] in names:
                dose = f"dose {e['dose']:g}" if "dose" in e else ""
                rows.append([names[e["stage"]], dose, 1, *cells([e], metrics)])
    for arm, of_arm in by_arm(records).items():
        for r, of_round in enumerate(zip_longest(*(run.of("healed") for run in of_arm))):
            events = [e for e in of_round if e]
            rows.append([arm, r, len(events), *cells(events, metrics)])
    return markdown(rows, ["arm", "round", "seeds", *metrics])


def values(events: list[dict], *names: str) -> list[list[float]]:
    """Each metric of the events in a list of its own."""
    return [[e[name] for e in events] for name in names]


def figure(records: list[Record], metrics: list[str] = (), x: str = "Δtrait") -> Figure:
    """A panel a metric over x, a colour an arm, a line a seed, a dot a round.

    x: Δtrait, where steering alone and the persona prompt are drawn too, or finished rounds.
    """
    arms, metrics = by_arm(records), metrics or metrics_of(records)
    rows, columns = -(-len(metrics) // 3), min(3, len(metrics))
    fig = Figure(figsize=(4.2 * columns, 3.4 * rows + 0.4), layout="constrained")
    colours = matplotlib.colormaps["turbo"](np.linspace(0.08, 0.92, len(arms)))
    for k, metric in enumerate(metrics, 1):
        axis = fig.add_subplot(rows, columns, k, title=metric, xlabel=x)
        for n, (arm, of_arm) in enumerate(arms.items()):
            for run in of_arm:  # first arms on top: τ 0.8 over the rounds that "raised" has of it
                axis.plot(*values(path(run), x, metric), "o-", color=colours[n], zorder=-n,
                          markersize=3, linewidth=1, label=arm if run is of_arm[0] else None)
        for run in untrained(records) if x == "Δtrait" else ():
            axis.plot(*values(path(run, "alone"), x, metric), "kx--", markersize=4, linewidth=1,
                      label="steering alone, by dose")
            axis.plot(*values(run.of("prompted"), x, metric), "k^", label="persona prompt")
        axis.spines[["top", "right"]].set_visible(False)
        if metric in ("perplexity", "judge"):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
    fig.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4,
               fontsize="small", frameon=False)
    return fig


LEGEND = """Means over seeds; in brackets, from three seeds on, the 95 % t-interval over seeds.
Δtrait: change of {axis} from the base, in the trait's own direction ({direction}), nats; least and
greatest wording: the same under the wording, or on the probe, where it is least and greatest.
Plain text: loss on text that nobody trained on, nats a token. Valid answers: probability of one.
Of sampled answers: perplexity and drift, KL(model ‖ original) in nats a token, measure distance
from the original; judge: perplexity under an unrelated model; entropy of the next token, nats;
ended: share that ends by itself. Controls: log-odds of right answers to questions of fact, nats.
Δsteered: Δtrait of the steered student that a round sampled. D: the barrier's divergence, nats.
n/a: never reached, or without meaning."""


def page(records: list[Record], picture: str = "arms.png") -> str:
    """arms.md, the same in whatever order the records come. Raises ValueError for two axes."""
    records = sorted(records, key=lambda run: run.name)
    bases = [e for run in records for e in run.of("base")]
    axes = sorted({base["axis"] for base in bases})
    if len(axes) > 1:
        raise ValueError(f"the records measure {' and '.join(axes)}, which cannot share a table; "
                         "fix: a sweep for each trait")
    metrics, model = metrics_of(records), records[0].config["model"]
    commands = dict.fromkeys(f"`python -m tools.sweep {run.config['command']}`" for run in records)

    parts = ["# Arms", f"{'; '.join(commands)} · {model} · {bases[0]['n']} vignettes",
             f"![each metric over Δtrait]({picture})", LEGEND.format(**bases[0]),
             "## At matched Δtrait", *(matched_table(records, at, metrics) for at in LEVELS),
             "## Round by round", rounds_table(records, metrics)]
    for run in records:
        parts += [f"{run.name} ended in round {e['round']}: {e['why']}" for e in run.of("ended")]
    return "\n\n".join(parts) + "\n"


def main(cfg: Config) -> None:
    records = read(cfg.records)
    if not by_arm(records):
        raise ValueError(f"no run in {cfg.records} finished a round; fix: finish the sweep")
    cfg.table.parent.mkdir(parents=True, exist_ok=True)
    picture = cfg.table.with_suffix(".png")
    figure(records).savefig(picture, dpi=160)
    runs.write_text(cfg.table, page(records, picture.name))
    print(cfg.table)


if __name__ == "__main__":
    runs.cli(Config, main)
