"""docs/barrier.png: what the barrier does to the loop, over eight rounds. No model is loaded.

    python -m docs.barrier        # from the records in results/runs

Left: Δtrait, how far the trait moved from the base, in its own direction (nats, one wording).
Right: the model's loss on plain text that nobody trained on (nats a token).
All at doses 2 and 4 and a high rate, where training alone breaks the model; three seeds a line.
"""
import json
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
# name: (sweep, arm, first round drawn, colour)
LINES = {"no barrier": ("eight", "nll", 0, "#c0392b"),
         "τ raised to 1.6": ("raised", "kl_rev_rmse", 5, "#7fbf7b"),
         "τ 0.8": ("eight", "kl_rev_rmse", 0, "#1b7837"),
         "τ 0.2": ("strong_tau02", "kl_rev_rmse", 0, "#2166ac")}


def seeds(sweep: str, arm: str) -> list[tuple[list[float], list[float]]]:
    """(Δtrait, loss on plain text) of each seed, both with one value per student, base first."""
    curves = []
    for file in sorted((ROOT / "results/runs" / sweep).glob(f"{arm}_s*.jsonl")):
        events = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        students = [e for e in events if e["stage"] in ("base", "healed")]
        base = students[0]
        sign = 1 if base["direction"] == "up" else -1
        trait = [sign * (e[base["axis"]] - base[base["axis"]]) for e in students]
        curves.append((trait, [e["text_nats"] for e in students]))
    return curves


def draw() -> Figure:
    fig = Figure(figsize=(9, 3.6), layout="constrained")
    panels = fig.subplots(1, 2)
    for name, (sweep, arm, first, colour) in LINES.items():
        for axis, curves in zip(panels, zip(*seeds(sweep, arm))):
            columns = list(zip(*curves))[first:]  # of each number of rounds, the seeds' values
            rounds = range(first, first + len(columns))
            mean = [sum(values) / len(values) for values in columns]
            axis.plot(rounds, mean, "o-", color=colour, markersize=4, label=name)
            axis.fill_between(rounds, [min(values) for values in columns],
                              [max(values) for values in columns], color=colour, alpha=0.15, lw=0)
    panels[0].set_title("Δtrait (nats)")
    panels[1].set_title("loss on plain text (nats a token)")
    for axis in panels:
        axis.set_xlabel("finished rounds")
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, loc="upper left")
    return fig


if __name__ == "__main__":
    draw().savefig(ROOT / "docs/barrier.png", dpi=150)
