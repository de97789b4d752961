"""results/paper.md: every claim of the draft, its experiment, its numbers, figures, a verdict.

    python -m studies.paper        # from the records in results/runs/, without a model

The words stand in studies/paper.md.j2, and ask the records for the numbers of this version's runs,
so that none can differ from what was run:

    {{ sweeps.moved("eight", "nll", 2) }}     nats after round 2, mean [95 % interval] over seeds
    {{ sweeps.cost("eight", "nll", "perplexity", 2) }}
    {{ sweeps.at_equal_trait({"no barrier": ("eight", "nll")}, "text_nats") }}
"""
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from studies import frontier
from common import runs
from studies.frontier import COSTS, LEVELS, Record, over_seeds

TEMPLATE = Path(__file__).parent / "paper.md.j2"
# what stands side by side at equal trait, of sweeps with one base: {name: (sweep, arm)}
SIDE_BY_SIDE = {"doses 2, 4: no barrier": ("eight", "nll"),
                "doses 2, 4: mean, τ 0.8": ("eight", "kl_rev_mean"),
                "doses 2, 4: rmse, τ 0.8": ("eight", "kl_rev_rmse"),
                "doses 1, 2: no barrier": ("long", "nll"),
                "doses 1, 2: rmse, τ 0.2": ("mild", "kl_rev_rmse"),
                "doses 1, 2: rmse, τ 0.8": ("long", "kl_rev_rmse")}

# what is drawn round by round, of the strong regime
BY_ROUND = {"no barrier": ("eight", "nll"),
            "mean, τ 0.8": ("eight", "kl_rev_mean"),
            "rmse, τ 0.8": ("eight", "kl_rev_rmse"),
            "τ raised to 1.6 in round 5": ("raised", "kl_rev_rmse"),
            "D from the round before": ("prev", "kl_rev_rmse"),
            "D from the last fluent student": ("good", "kl_rev_rmse"),
            "nothing steered, no barrier": ("strong_placebo", "nll")}


@dataclass
class Config:
    records: Path = Path("results/runs")  # a folder of records for each sweep
    out: Path = Path("results/paper.md")


class Sweeps:
    """What the template may ask of the records; of[sweep] is a list of them."""

    def __init__(self, folder: Path):
        self.of = {path.name: frontier.load(path) for path in sorted(folder.iterdir())}

    def events(self, sweep: str, arm: str, stage: str, r: int) -> list[tuple[Record, dict]]:
        """(run, event) of every seed of an arm that has this stage of round r."""
        found = []
        for run in frontier.by_arm(self.of[sweep])[arm]:
            found += [(run, e) for e in run.of(stage) if e["round"] == r]
        return found

    def moved(self, sweep: str, arm: str, r: int, stage: str = "healed") -> str:
        """How far the trait moved by the end of round r, or of its student `steered`, nats."""
        return over_seeds([run.moved(e) for run, e in self.events(sweep, arm, stage, r)], 2)

    def within_seed(self, sweep: str, arm: str, other_sweep: str, other: str, r: int,
                    number) -> list[float]:
        """number(run, event) of an arm minus another's of the same seed, at the end of round r."""
        of_other = {}  # {seed: number}
        for run, e in self.events(other_sweep, other, "healed", r):
            of_other[run.config["seed"]] = number(run, e)
        healed = self.events(sweep, arm, "healed", r)
        return [number(run, e) - of_other[run.config["seed"]] for run, e in healed]

    def beyond(self, sweep: str, arm: str, other_sweep: str, other: str, r: int) -> str:
        """How much further it moved than another arm of its seed, such as its placebo, nats."""
        return over_seeds(self.within_seed(sweep, arm, other_sweep, other, r, Record.moved), 2)

    def dearer(self, sweep: str, arm: str, other_sweep: str, other: str, measure: str,
               r: int) -> str:
        """How much more it costs than another arm of its seed."""
        differences = self.within_seed(sweep, arm, other_sweep, other, r,
                                       lambda run, e: frontier.cost(e, measure))
        return over_seeds(differences, COSTS[measure])

    def cost(self, sweep: str, arm: str, measure: str, r: int) -> str:
        """A measure of cost at the end of round r."""
        costs = [frontier.cost(e, measure) for _, e in self.events(sweep, arm, "healed", r)]
        return over_seeds(costs, COSTS[measure])

    def at(self, sweep: str, arm: str, measure: str, level: float) -> str:
        """A measure of cost where an arm first moved so many nats."""
        runs_of = frontier.by_arm(self.of[sweep])[arm]
        costs = [frontier.at_trait(frontier.path(run, "healed", measure), level) for run in runs_of]
        return over_seeds(costs, COSTS[measure])

    def kept(self, sweep: str, arm: str, r: int) -> str:
        """The share of what steering moved that round r's healed student keeps."""
        runs_of = frontier.by_arm(self.of[sweep])[arm]
        return over_seeds([frontier.retained(run, r) for run in runs_of], 2)

    def change(self, sweep: str, arm: str, number: str, r: int) -> str:
        """Change of any number from the base by the end of round r."""
        healed = self.events(sweep, arm, "healed", r)
        return over_seeds([e[number] - run.base[number] for run, e in healed], 2)

    def number(self, sweep: str, arm: str, stage: str, name: str, r: int, digits: int = 2) -> str:
        """Any number of round r, such as the D of its heal or what its distil sampled."""
        return over_seeds([e[name] for _, e in self.events(sweep, arm, stage, r)], digits)

    def base(self, sweep: str, measure: str) -> str:
        """A measure of cost of the original."""
        return over_seeds([frontier.cost(self.of[sweep][0].base, measure)], COSTS[measure])

    def prompted(self, sweep: str) -> str:
        """How far the persona as a system prompt moves the trait, nats."""
        [run] = frontier.of_steering(self.of[sweep])
        return over_seeds([run.moved(e) for e in run.of("prompted")], 2)

    def prompted_cost(self, sweep: str, measure: str) -> str:
        """A measure of cost under that prompt."""
        [run] = frontier.of_steering(self.of[sweep])
        return over_seeds([frontier.cost(e, measure) for e in run.of("prompted")], COSTS[measure])

    def prompted_change(self, sweep: str, number: str) -> str:
        """Change of any number from the base under that prompt."""
        [run] = frontier.of_steering(self.of[sweep])
        return over_seeds([e[number] - run.base[number] for e in run.of("prompted")], 2)

    def alone(self, lines: dict[str, str], *measures: str) -> str:
        """A table of steering alone by dose: {name: sweep}, what it moves and what that costs."""
        rows = []
        for name, sweep in lines.items():
            [run] = frontier.of_steering(self.of[sweep])
            for e in run.of("alone"):
                costs = [f"{frontier.cost(e, m):.{COSTS[m]}f}" for m in measures]
                rows.append([name, f"{e['dose']:g}", f"{run.moved(e):.2f}", *costs])
        return frontier.table(rows, ["", "dose", "moved", *measures])

    def renamed(self, lines: dict[str, tuple[str, str]]) -> list[Record]:
        """The runs of each (sweep, arm) under the names that they have here."""
        found = []
        for name, (sweep, arm) in lines.items():
            for run in frontier.by_arm(self.of[sweep])[arm]:
                found.append(replace(run, config=run.config | {"arm": name}))
        return found

    def side_by_side(self) -> list[Record]:
        """The runs of SIDE_BY_SIDE, and what was not trained."""
        return frontier.of_steering(self.of["mild"]) + self.renamed(SIDE_BY_SIDE)

    def at_equal_trait(self, lines: dict[str, tuple[str, str]], *measures: str, alone: str = "",
                       levels: tuple[float, ...] = LEVELS) -> str:
        """A table for each measure: its value where each line first moved so many nats.

        alone: a sweep whose steering alone is the first line.
        """
        steering = frontier.of_steering(self.of[alone]) if alone else []
        return frontier.matched_tables(steering + self.renamed(lines), measures, levels)

    def all_at_equal_trait(self, *measures: str) -> str:
        """The same of what stands side by side."""
        return frontier.matched_tables(self.side_by_side(), measures)

    def over_rounds(self, lines: dict[str, tuple[str, str]], rounds: list[int], *measures) -> str:
        """A table, a line for each (sweep, arm): moved by the end of these rounds, its cost then.

        The costs are those after the last of the rounds.
        """
        rows = []
        for name, (sweep, arm) in lines.items():
            moved = [self.moved(sweep, arm, r) for r in rounds]
            costs = [self.cost(sweep, arm, measure, rounds[-1]) for measure in measures]
            rows.append([name, *moved, *costs])
        head = [f"moved, round {r}" for r in rounds] + [f"{measure} then" for measure in measures]
        return frontier.table(rows, ["", *head])

    def by_round(self, sweep: str) -> str:
        """The table of every arm after every round: moved, steered and healed, D, the costs."""
        return frontier.rounds_table(self.of[sweep])

    def command(self, sweep: str, arm: str | None = None) -> str:
        """What made a sweep, or an arm of it where two commands did."""
        run = frontier.by_arm(self.of[sweep])[arm][0] if arm else self.of[sweep][0]
        return "`python -m tools.sweep " + run.config["command"] + "`"

    def counts(self) -> str:
        """How much was run: a run, or a round, that several share is counted once."""
        trained = set()  # of each run, what its students lose on plain text: alike in no two
        for one in sum(self.of.values(), []):
            if one.arm != "alone":
                trained.add(tuple(e["text_nats"] for e in one.of("healed")))
        rounds = {run[:r + 1] for run in trained for r in range(len(run))}
        return f"{len(trained)} runs, {len(rounds)} rounds"


def rounds_figure(sweeps: Sweeps) -> Figure:
    """Trait and loss on plain text by round, a line per arm, seeds as a band from low to high."""
    fig = Figure(figsize=(10, 3.6), layout="constrained")
    panels = fig.subplots(1, 2)
    colours = matplotlib.colormaps["turbo"](np.linspace(0.08, 0.92, len(BY_ROUND)))
    for colour, (name, (sweep, arm)) in zip(colours, BY_ROUND.items()):
        of_arm = frontier.by_arm(sweeps.of[sweep])[arm]
        moved = [[0.0] + [run.moved(e) for e in run.of("healed")] for run in of_arm]
        lost = [[e["text_nats"] for e in (run.base, *run.of("healed"))] for run in of_arm]
        for axis, numbers in zip(panels, (moved, lost)):
            numbers = np.array(numbers)  # [seeds, 1 + rounds]
            n = np.arange(numbers.shape[1])
            axis.plot(n, numbers.mean(0), color=colour, marker="o", markersize=3, label=name)
            axis.fill_between(n, numbers.min(0), numbers.max(0), color=colour, alpha=0.15,
                              linewidth=0)
    for axis, title in zip(panels, ("moved (nats)", "text_nats")):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("finished rounds", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
               fontsize=8, frameon=False)
    return fig


def main(cfg: Config) -> None:
    sweeps = Sweeps(cfg.records)
    template = jinja2.Template(TEMPLATE.read_text(), undefined=jinja2.StrictUndefined)
    try:
        text = template.render(sweeps=sweeps)
    except KeyError as e:
        raise ValueError(f"{cfg.records} has no {e}, which {TEMPLATE.name} asks for; "
                         "fix: run the sweep, or studies.judge, again") from None
    runs.write_text(cfg.out, text.rstrip() + "\n")
    frontier.figure(sweeps.side_by_side()).savefig(cfg.out.with_suffix(".png"), dpi=160)
    by_round = cfg.out.with_name(f"{cfg.out.stem}_rounds.png")
    rounds_figure(sweeps).savefig(by_round, dpi=160)
    print(cfg.out)


if __name__ == "__main__":
    runs.cli(Config, main)
