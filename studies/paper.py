"""results/paper.md: which recipe does what at matched Δtrait, and each claim of the draft.

    python -m studies.paper        # from the records in results/runs/, without a model

The words stand in studies/paper.md.j2, and ask the records for their numbers. An arm is sweep/arm:

    {{ get("eight/nll", "plain text", r=2) }}           after round 2, mean [95 % interval]
    {{ get("eight/nll", "plain text", level=5) }}       where it first moved 5 nats
    {{ difference("long/nll", "mild/nll", "Δtrait", r=2) }}     within seeds

Arms that have not been run are left out. commands.md lists what made each sweep.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2

from common import runs
from studies import frontier
from studies.frontier import over_seeds
from studies.tables import markdown
from tools.sweep import Record


@dataclass
class Config:
    records: Path = Path("results/runs")  # a folder of records for each sweep
    out: Path = Path("results")  # folder for paper.md, its figures and commands.md
    barrier: Path = Path("docs/barrier.png")  # README's figure: what the barrier does to the loop


# the arms of README's figure, at doses 2 and 4 and a high rate: training alone breaks the model
BARRIER = {"no barrier": "strong_barrier/nll",
           "mean, D from the round before": "strong_prev_mean/kl_rev_mean",
           "rmse, D from the base": "strong_barrier/kl_rev_rmse_tau0.8"}


class Sweeps:
    """What the template may ask of the records; arms is {sweep/arm: its runs}."""

    def __init__(self, folder: Path, pictures: Path):
        self.pictures, self.arms, self.commands = pictures, {}, {}
        for sweep in sorted(path for path in folder.iterdir() if path.is_dir()):
            for run in frontier.read(sweep):
                self.arms.setdefault(f"{sweep.name}/{run.config['arm']}", []).append(run)
                self.commands.setdefault(sweep.name, {})[run.config["command"]] = True

    def by_seed(self, arm: str, r: int | None = None, level: float | None = None,
                stage: str = "healed") -> dict[int, dict]:
        """{seed: its metrics after round r, or where it first moved `level` nats}; {} for none."""
        events = {}
        for run in self.arms[arm]:
            event = next((e for e in run.of(stage) if e["round"] == r), {})
            if level is not None:
                event = frontier.at_trait(run, level, stage)
            events[run.config["seed"]] = event
        return events

    def get(self, arm: str, metric: str, **where) -> str:
        """A metric over seeds, see by_seed; steering alone is SWEEP/alone, stage="alone"."""
        events = self.by_seed(arm, **where).values()
        return over_seeds([event[metric] if event else None for event in events],
                          frontier.DIGITS.get(metric, 2))

    def difference(self, arm: str, other: str, metric: str, **where) -> str:
        """How much more the arm has of a metric than another one has, within seeds."""
        ours, others = self.by_seed(arm, **where), self.by_seed(other, **where)
        pairs = [(ours[seed], others[seed]) for seed in ours if seed in others]
        return over_seeds([a[metric] - b[metric] if a and b else None for a, b in pairs],
                          frontier.DIGITS.get(metric, 2))

    def named(self, lines: dict[str, str] | list[str]) -> list[Record]:
        """The runs of each arm, {name: arm} under the names that they have here."""
        lines = lines if isinstance(lines, dict) else dict(zip(lines, lines))
        return [replace(run, config=run.config | {"arm": name})
                for name, arm in lines.items() for run in self.arms.get(arm, [])]

    def draw(self, name: str, lines, metrics: list[str] = (), **kwargs) -> str:
        """Draw frontier.figure of arms, see `named`, into a file beside the page; -> its name."""
        figure = frontier.figure(self.named(lines), metrics, **kwargs)
        figure.savefig(self.pictures / name, dpi=160)
        return name

    def known(self, arms: list[str]) -> list[str]:
        """Those of the arms that were run."""
        return [arm for arm in arms if arm in self.arms]

    def finished(self, arm: str) -> str:
        """How many rounds each seed finished, such as 6, 7, 8."""
        return ", ".join(str(len(run.of("healed"))) for run in self.arms[arm])

    def metrics(self, arms: list[str]) -> list[str]:
        """What the tables over all wordings show."""
        metrics = frontier.metrics_of(self.named(arms))
        return [name for name in metrics if name not in ("drift", "repetition", "judge")]

    def recipes(self, arms: list[str], alone: str, level: float) -> str:
        """A table: what is not trained (alone), and every arm where it first moved `level` nats.

        An arm that never got so far stands as it was after its last round.
        """
        metrics = ["Δtrait", *self.metrics(arms)]
        head = "teacher, targets, sampler, doses; rate, barrier, rounds, seeds".split(", ")
        rows = []
        for run in self.arms.get(alone, []):
            for name, stage in (("base", "base"), ("persona as a prompt", "prompted")):
                rows.append([name, *[""] * 5, 1, *frontier.cells(run.of(stage), metrics)])
            steered = frontier.at_trait(run, level, "alone")
            rows.append(["steering alone", *[""] * 5, 1, *frontier.cells([steered], metrics)])
        for arm in arms:
            of_arm = self.arms[arm]
            events = [frontier.at_trait(run, level) for run in of_arm]
            if not any(events):
                events = [run.of("healed")[-1] for run in of_arm]
            rows.append([*recipe(of_arm[0].config), len(of_arm), *frontier.cells(events, metrics)])
        return markdown(rows, [*head, *metrics])

    def contrasts(self, pairs: dict[str, tuple]) -> str:
        """A table of differences: {name: (arm, other arm, where)}, of the pairs that were run."""
        pairs = {name: pair for name, pair in pairs.items() if {*pair[:2]} <= {*self.arms}}
        metrics = ["Δtrait", *self.metrics([arm for pair in pairs.values() for arm in pair[:2]])]
        rows = [[name, *(self.difference(*pair, key, **where) for key in metrics)]
                for name, (*pair, where) in pairs.items()]
        return markdown(rows, ["difference", *metrics])

    def counts(self) -> str:
        """How much was run: a run, or a round, that several share is counted once."""
        every = [run for of_arm in self.arms.values() for run in of_arm]
        # of each run, what its students lose on plain text: alike in no two
        trained = {tuple(e["text_nats"] for e in run.of("healed")) for run in every} - {()}
        rounds = {run[:r + 1] for run in trained for r in range(len(run))}
        return f"{len(trained)} runs, {len(rounds)} rounds"


def recipe(config: dict) -> list:
    """Teacher, targets, sampler, doses and rate, barrier, rounds; defaults for older records."""
    config = {"teacher": "steered", "targets": "samples", "top_k": 64, "top_p": 0.95} | config
    unsteered = config["teacher"] == "steered" and set(config["doses"] or [1]) == {0}
    sampler = f"top-k {config['top_k']}, top-p {config['top_p']:g}"
    if config["top_k"] == 0 and config["top_p"] == 1:
        sampler = "whole"
    if config["max_perplexity"] > 1e6:  # as good as none
        sampler += ", any perplexity"
    barrier = {"nll": "none", "wd": f"weight decay {config['weight_decay']:g}"}.get(
        config["reg"], f"{config['agg']}, τ {config['tau']:g}, D from {config['ref']}")
    teacher = "unsteered" if unsteered else config["teacher"]
    doses = " ".join(map(str, config["doses"] or [])) if teacher == "steered" else "none"
    return [teacher, config["targets"], sampler, f"{doses}; {config['lr']:g}", barrier,
            config["rounds"]]


def main(cfg: Config) -> None:
    cfg.out.mkdir(parents=True, exist_ok=True)
    sweeps = Sweeps(cfg.records, cfg.out)
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent),
                                   undefined=jinja2.StrictUndefined, trim_blocks=True,
                                   keep_trailing_newline=True)
    ask = {name: getattr(sweeps, name) for name in dir(sweeps) if not name.startswith("_")}
    for name in ("paper", "commands"):
        page = templates.get_template(f"{name}.md.j2").render(ask)
        runs.write_text(cfg.out / f"{name}.md", page)
        print(cfg.out / f"{name}.md")
    figure = frontier.figure(sweeps.named(BARRIER), ["Δtrait", "plain text"], "finished rounds")
    figure.savefig(cfg.barrier, dpi=160)


if __name__ == "__main__":
    runs.cli(Config, main)
