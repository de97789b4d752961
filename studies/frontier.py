"""Many runs on one page: what each arm costs, round by round and at equal trait; its figure.

    python -m studies.frontier results/runs/sweep        # from the records of a sweep, without a model

    moved       the trait's number − the base's, in the trait's own direction               (nats)
    cost at L   where an arm first moved L nats, on the straight line between the two rounds
    retained    moved, healed / moved, steered: what of the vector a round's healing keeps
    slope       (cost − base's cost) / moved: below 0, the model got better as it moved
    interval    mean ± t(0.975, n − 1) · standard deviation / √n over n seeds, n ≥ 3

A record is a run's numbers without its texts and profiles, a few kB: one JSON line of settings, and
one per event.
"""
import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import scipy.stats
import tyro
from matplotlib.figure import Figure
from tabulate import tabulate

from common import runs
from evaluate import COHERENCE_FLOOR, MIN_SHIFT, NATS

LEVELS = (1, 2, 3, 5)  # nats of the trait, at which arms are compared
COSTS = {"1 − coherence": 4, "perplexity": 2, "judge_perplexity": 2, "drift": 3, "repetition": 3,
         "text_nats": 3}  # and how many digits are shown


@dataclass
class Config:
    records: tyro.conf.Positional[Path]  # a folder of records that sweep.py wrote
    table: Path = Path("results/arms.md")  # the page; its figure goes beside it


# ---- records ------------------------------------------------------------------------------------


@dataclass
class Record:
    """One run, without its texts."""
    name: str  # of the run folder
    config: dict  # its settings, its `arm`, and the `command` of the sweep
    events: list[dict]

    def of(self, stage: str) -> list[dict]:
        """The events of a stage, in order."""
        return [e for e in self.events if e["stage"] == stage]

    @property
    def arm(self) -> str:
        return self.config["arm"]

    @property
    def base(self) -> dict:
        return self.of("base")[0]

    def moved(self, event: dict) -> float:
        """How far an event is from the base in the trait's own direction, nats."""
        axis = self.base["axis"]
        change = event[axis] - self.base[axis]
        return 0.0 - change if self.base["direction"] == "down" else change


def slim(event: dict) -> dict:
    """An event without texts and profile, of which axis, direction and size are kept."""
    kept = {}
    for name, value in event.items():
        if name == "profile":
            kept |= {"axis": value["axis"], "direction": value["direction"],
                     "n": len(value["ids"])}
        elif isinstance(value, float):
            kept[name] = float(f"{value:.6g}")
        elif name not in ("texts", "log"):
            kept[name] = value
    return kept


def record(run: Path, **about) -> Record:
    """The record of a run folder. about: what its settings do not say, such as the arm."""
    settings = json.loads((run / "config.json").read_text())
    return Record(run.name, {**about, **settings}, [slim(e) for e in runs.read_events(run)])


def save(record: Record, folder: Path) -> None:
    """Write a record. What studies.judge added to the one before it stays with the same events."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{record.name}.jsonl"
    before = runs.read_jsonl(file)[1:] if file.exists() else []
    for event, earlier in zip(record.events, before):
        judged = {name: earlier[name] for name in earlier.keys() - event.keys()}
        if judged.keys() == {"judge_perplexity"} and event | judged == earlier:
            event |= judged
    first = {"stage": "config", "round": -1, **record.config}
    runs.write_text(file, runs.to_jsonl([first, *record.events]))


def load(folder: Path) -> list[Record]:
    """Every record of a folder. Raises ValueError for a folder or a file without one."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ValueError(f"{folder} holds no records; fix: give a folder that sweep.py wrote")
    found = []
    for file in files:
        first, *events = runs.read_jsonl(file)
        if first.get("stage") != "config":
            raise ValueError(f"{file} is not a record (its first line is no config); "
                             "fix: run the sweep again, which writes it anew")
        config = {k: v for k, v in first.items() if k not in ("stage", "round")}
        found.append(Record(file.stem, config, events))
    return found


def by_arm(records: list[Record]) -> dict[str, list[Record]]:
    """{arm: its runs by seed}, in the order of the names and of the numbers in them."""
    def key(record):
        words = re.split(r"(\d[\d.]*(?:e-?\d+)?)", record.arm)  # every second one is a number
        return [float(w) if k % 2 else w for k, w in enumerate(words)], record.config["seed"]
    found = {}
    for one in sorted(records, key=key):
        if one.of("base") and one.arm != "alone":
            found.setdefault(one.arm, []).append(one)
    return found


def of_steering(records: list[Record]) -> list[Record]:
    """The record of what was not trained: base, persona prompt, steering alone."""
    return [one for one in records if one.arm == "alone"]


# ---- one run ------------------------------------------------------------------------------------


def cost(event: dict, name: str) -> float:
    return 1 - event["coherence"] if name == "1 − coherence" else event[name]


def path(run: Record, stage: str, name: str) -> list[tuple[float, float]]:
    """(moved, cost) of the base and of each event of a stage: by round, `alone` by dose."""
    events = sorted(run.of(stage), key=lambda e: e.get("dose", e["round"]))
    return [(0.0, cost(run.base, name)), *((run.moved(e), cost(e, name)) for e in events)]


def at_trait(points: list[tuple[float, float]], level: float) -> float | None:
    """The cost where a path first moves `level` nats, interpolated; None if it never does."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 < level <= x1:
            return y0 + (level - x0) / (x1 - x0) * (y1 - y0)
    return None


def slope(run: Record, event: dict, name: str) -> float | None:
    """Δcost per nat moved, signed; None where the trait did not move, or the other way."""
    moved = run.moved(event)
    if moved < MIN_SHIFT:
        return None
    return (cost(event, name) - cost(run.base, name)) / moved


def coh_cost(run: Record, event: dict) -> float | None:
    """|Δcoherence| / |Δtrait|; None as in evaluate.py, below the floor or where nothing moved."""
    moved = abs(run.moved(event))
    if event["coherence"] < COHERENCE_FLOOR or moved < MIN_SHIFT:
        return None
    return abs(event["coherence"] - run.base["coherence"]) / moved


def retained(run: Record, r: int) -> float | None:
    """Δhealed / Δsteered of a round; None where steering did not move the trait."""
    steered, healed = (next(e for e in run.of(stage) if e["round"] == r)
                       for stage in ("steered", "healed"))
    moved = run.moved(steered)
    return run.moved(healed) / moved if moved >= MIN_SHIFT else None


def coherent_rounds(run: Record) -> int:
    """How many rounds before coherence first fell below the floor."""
    healed = run.of("healed")
    broken = [k for k, e in enumerate(healed) if e["coherence"] < COHERENCE_FLOOR]
    return broken[0] if broken else len(healed)


# ---- over seeds ---------------------------------------------------------------------------------


def over_seeds(values: list[float | None], digits: int) -> str:
    """`mean [low, high]`, the 95 % t-interval over seeds; the mean alone for fewer than three.

    Where some seeds have no value, how many have one: `mean (2 of 3)`.
    """
    known = [value for value in values if value is not None]
    if not known:
        return "n/a"
    mean = np.mean(known)
    said = f"{mean:.{digits}f}"
    if len(known) >= 3:
        half = scipy.stats.t.ppf(0.975, len(known) - 1) * scipy.stats.sem(known)
        said += f" [{mean - half:.{digits}f}, {mean + half:.{digits}f}]"
    return said if len(known) == len(values) else f"{said} ({len(known)} of {len(values)})"


def table(rows: list[list], head: list[str]) -> str:
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def costs_of(records: list[Record]) -> list[str]:
    """The measures of cost that all records have."""
    measured = [e for one in records for e in one.events if "coherence" in e]
    return [name for name in COSTS
            if name == "1 − coherence" or all(name in e for e in measured)]


def off_target(of_arm: list[Record], events: list[dict]) -> str:
    """The foundation off the axis that moved most on the mean over seeds, and how far (nats)."""
    axis = of_arm[0].base["axis"]
    shifts = {name: [e[name] - run.base[name] for run, e in zip(of_arm, events)]
              for name in NATS if name != axis}
    name = max(shifts, key=lambda name: abs(np.mean(shifts[name])))
    return f"{name.removesuffix('_nats')} {over_seeds(shifts[name], 2)}"


def reference_rows(alone: list[Record], costs: list[str]) -> list[list[str]]:
    """The base, the persona as a prompt, and steering alone at each dose."""
    rows = []
    for run in alone:
        named = [("base", run.base), *(("persona prompt", e) for e in run.of("prompted"))]
        for e in sorted(run.of("alone"), key=lambda e: e["dose"]):
            named.append((f"steering alone, dose {e['dose']:g}", e))
        for name, e in named:
            rows.append([name, f"{run.moved(e):.2f}",
                         *(f"{cost(e, c):.{COSTS[c]}f}" for c in costs)])
    return rows


def last_rows(arms: dict[str, list[Record]]) -> list[list[str]]:
    """Each arm after its last round, its peak, and how long it stayed coherent."""
    rows = []
    for arm, of_arm in arms.items():
        of_arm = [run for run in of_arm if run.of("healed")]
        if not of_arm:
            continue
        last = [run.of("healed")[-1] for run in of_arm]
        peaks = [max(run.of("healed"), key=run.moved) for run in of_arm]
        pairs, at_peak = list(zip(of_arm, last)), list(zip(of_arm, peaks))
        rows.append([
            arm, len(of_arm), over_seeds([run.moved(e) for run, e in pairs], 2),
            over_seeds([e["coherence"] - run.base["coherence"] for run, e in pairs], 4),
            over_seeds([coh_cost(run, e) for run, e in pairs], 4), off_target(of_arm, last),
            over_seeds([run.moved(e) for run, e in at_peak], 2),
            over_seeds([e["coherence"] - run.base["coherence"] for run, e in at_peak], 4),
            " ".join(str(e["round"]) for e in peaks),
            over_seeds([coherent_rounds(run) for run in of_arm], 1)])
    return rows


def round_rows(arms: dict[str, list[Record]], costs: list[str]) -> list[list[str]]:
    """Each arm after each round: the trait steered and healed, the controls, and every cost."""
    rows = []
    for arm, of_arm in arms.items():
        rounds = sorted({e["round"] for run in of_arm for e in run.of("healed")})
        for r in rounds:
            runs_of, healed, steered, D = [], [], [], []
            for run in of_arm:
                at = {e["stage"]: e for e in run.events if e["round"] == r}
                if "healed" in at:
                    runs_of.append(run)
                    healed.append(at["healed"])
                    steered.append(at["steered"])
                    D.append(at["heal"]["D"])
            rows.append([
                arm, r, len(runs_of),
                over_seeds([run.moved(e) for run, e in zip(runs_of, steered)], 2),
                over_seeds([run.moved(e) for run, e in zip(runs_of, healed)], 2),
                over_seeds([retained(run, r) for run in runs_of], 2),
                *([over_seeds([e["control_nats"] - run.base["control_nats"]
                               for run, e in zip(runs_of, healed)], 2)]
                  if "control_nats" in healed[0] else []),
                over_seeds(D, 3),
                *(over_seeds([cost(e, c) for e in healed], COSTS[c]) for c in costs)])
    return rows


def matched_rows(arms: dict[str, list[Record]], alone: list[Record], name: str,
                 levels: tuple[float, ...]) -> list[list[str]]:
    """One measure of cost where each arm first moved so many nats."""
    rows = []
    lines = [("steering alone", alone, "alone")] if alone else []
    lines += [(arm, of_arm, "healed") for arm, of_arm in arms.items()]
    for arm, of_arm, stage in lines:
        paths = [path(run, stage, name) for run in of_arm]
        rows.append([arm, *(over_seeds([at_trait(points, level) for points in paths], COSTS[name])
                            for level in levels)])
    return rows


def slope_rows(arms: dict[str, list[Record]], costs: list[str]) -> list[list[str]]:
    """Δcost per nat of trait after the last round, signed."""
    rows = []
    for arm, of_arm in arms.items():
        pairs = [(run, run.of("healed")[-1]) for run in of_arm if run.of("healed")]
        if pairs:
            rows.append([arm, *(over_seeds([slope(run, e, c) for run, e in pairs], COSTS[c] + 1)
                                for c in costs)])
    return rows


def matched_tables(records: list[Record], costs: list[str],
                   levels: tuple[float, ...] = LEVELS) -> str:
    """A table for each measure of cost, at equal trait."""
    alone = of_steering(records)
    arms = by_arm(records)
    sign = "−" if next(iter(arms.values()))[0].base["direction"] == "down" else "+"
    tables = []
    for name in costs:
        head = [name, *(f"at {sign}{level}" for level in levels)]
        tables.append(table(matched_rows(arms, alone, name, levels), head))
    return "\n\n".join(tables)


def rounds_table(records: list[Record]) -> str:
    """Every arm after every round."""
    arms, costs = by_arm(records), costs_of(records)
    base = next(iter(arms.values()))[0].base
    controls = ["Δcontrols (nats)"] if "control_nats" in base else []
    return table(round_rows(arms, costs), ["arm", "round", "seeds", "moved, steered",
                                           "moved, healed", "retained", *controls, "D", *costs])


# ---- the figure ---------------------------------------------------------------------------------


def draw_arm(axis, of_arm: list[Record], name: str, colour, label: str) -> None:
    """The mean over seeds, a dot a round, within the band from the lowest to the highest seed."""
    paths = [path(run, "healed", name) for run in of_arm]
    x, mean, low, high = [], [], [], []
    for k in range(max(map(len, paths))):
        points = [points[k] for points in paths if len(points) > k]  # seeds that got this far
        x.append(np.mean([moved for moved, _ in points]))
        costs = [y for _, y in points]
        mean.append(np.mean(costs))
        low.append(min(costs))
        high.append(max(costs))
    axis.plot(x, mean, color=colour, marker="o", markersize=3, linewidth=1.3, label=label)
    if len(of_arm) > 1:
        axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def draw_references(axis, alone: list[Record], name: str) -> None:
    """Steering alone from dose to dose, and the persona as a prompt."""
    for run in alone:
        points = path(run, "alone", name)
        axis.plot(*zip(*points), color="black", linestyle="--", marker="x", markersize=4,
                  linewidth=1, label="steering alone, by dose")
        doses = sorted(e["dose"] for e in run.of("alone"))
        for dose, point in zip(doses, points[1:]):
            axis.annotate(f"{dose:g}", point, textcoords="offset points", xytext=(3, 3),
                          fontsize=6)
        for e in run.of("prompted"):
            axis.plot([run.moved(e)], [cost(e, name)], "^", color="black", markersize=5,
                      label="persona prompt")


def figure(records: list[Record]) -> Figure:
    """Trait against cost: a panel per measure, a line per arm over its rounds."""
    arms, costs = by_arm(records), costs_of(records)
    alone = of_steering(records)
    columns = min(3, len(costs))
    rows = -(-len(costs) // columns)
    fig = Figure(figsize=(3.4 * columns, 2.9 * rows), layout="constrained")
    panels = fig.subplots(rows, columns, squeeze=False).ravel()
    colours = matplotlib.colormaps["turbo"](np.linspace(0.08, 0.92, len(arms)))
    for axis, name in zip(panels, costs):
        for colour, (arm, of_arm) in zip(colours, arms.items()):
            draw_arm(axis, of_arm, name, colour, arm)
        draw_references(axis, alone, name)
        axis.set_xlabel("moved (nats; right = more trait)", fontsize=7)
        axis.set_title(name, fontsize=8)
        axis.locator_params(axis="x", nbins=5)
        axis.tick_params(labelsize=7, which="both")
        axis.spines[["top", "right"]].set_visible(False)
        if name == "1 − coherence" or "perplexity" in name:
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
    for axis in panels[len(costs):]:
        axis.set_visible(False)
    fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
               fontsize=7, frameon=False)
    return fig


# ---- the page -----------------------------------------------------------------------------------


def ended_early(records: list[Record]) -> str:
    """The section of the runs that ended early, or nothing."""
    rows = []
    for run in records:
        rows += [f"- {run.name}, round {e['round']}: {e['why']}" for e in run.of("ended")]
    return "\n".join(["## Runs that ended early\n", *rows]) if rows else ""


def page(records: list[Record], picture: str = "arms.png") -> str:
    """arms.md, the same in whatever order the records come."""
    records = sorted(records, key=lambda one: one.name)
    arms, costs = by_arm(records), costs_of(records)
    alone = of_steering(records)
    one = next(iter(arms.values()))[0]
    axis, direction = one.base["axis"], one.base["direction"]
    commands = list(dict.fromkeys(f"`python -m tools.sweep {r.config['command']}`" for r in records))

    last = table(last_rows(arms), ["arm", "seeds", "moved (nats)", "Δcoherence", "coh_cost",
                                   "off target (nats)", "peak moved", "Δcoherence there",
                                   "peak in round", "coherent rounds"])
    slopes = table(slope_rows(arms, costs), ["arm", *costs])
    beside = ""
    if alone:
        rows = table(reference_rows(alone, costs), ["nothing trained", "moved (nats)", *costs])
        beside = f"## What they are compared with\n\n{rows}\n\n"

    judge = ""
    if "judge_perplexity" in costs:
        judge = ", judge_perplexity: under an\nunrelated model (studies.judge)"

    return f"""# Arms

{"; ".join(commands)} · {one.config["model"]} · {one.base["n"]} vignettes

![trait against cost]({picture})

Means over seeds; in brackets, from three seeds on, the 95 % t-interval over seeds (the interval
over vignettes within one run is in that run's report). Moved: Δ{axis} against the base of the same
run, in the trait's own direction ({direction}), so that more is more of the trait. Perplexity:
of sampled answers under the original{judge}; drift: KL(model ‖ original) on them, nats per token;
text_nats: loss on plain text that nobody trained on. n/a: never reached, or without meaning.

## At equal trait

The cost where Δ{axis} first reached so many nats, on the straight
line between two rounds, or two doses.

{matched_tables(records, costs)}

## After the last round

coh_cost = |Δcoherence| / |moved|, n/a below coherence {COHERENCE_FLOOR} or where the trait moved
less than {MIN_SHIFT} nats. Coherent rounds: how many before coherence first fell below
{COHERENCE_FLOOR}. Peak: the round in which the trait was furthest, of each seed.

{last}

Slope: Δcost per nat moved; below 0, the model got better as it moved; n/a where it did not move.

{slopes}

## Round by round

Retained: moved, healed / moved, steered.

{rounds_table(records)}

{beside}{ended_early(records)}""".rstrip() + "\n"


def draw(records: list[Record], file: Path) -> None:
    """Write the page, and its figure beside it. Raises ValueError where nothing was measured."""
    if not by_arm(records):
        raise ValueError("no run of these records was measured; fix: finish the sweep")
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = file.name.removesuffix(".md") + ".png"
    figure(records).savefig(file.with_name(picture), dpi=160)
    runs.write_text(file, page(records, picture))


def main(cfg: Config) -> None:
    draw(load(cfg.records), cfg.table)
    print(cfg.table.read_text())


if __name__ == "__main__":
    runs.cli(Config, main)
