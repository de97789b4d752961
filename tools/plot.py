"""Make a run's table, pictures and report from its folder alone.

    python -m tools.plot runs/20261123-040000_care_kl_rev_rmse_s0

    Δ = after − base, paired per vignette or probe        coh_cost = |Δcoherence| / |Δtrait|

It writes trajectory.png, map.html and report.html, whose page is the template report.html.j2.
"""
import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jinja2
import matplotlib
import plotly.graph_objects as go
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from tabulate import tabulate

from common import runs
from common.texts import FOUNDATIONS, NATS
from evaluate import Estimate, Profile, coh_cost, delta, largest_mover, surgicality
from steer import SteeringVector

RED, GREEN, GREY = "#c0392b", "#1e8449", "#555555"
COLOUR = {"base": GREY, "steered": RED, "healed": GREEN}
NAMES = {**dict(zip(NATS, FOUNDATIONS)), "probe_nats": "probes"}  # metrics as a reader knows them
METRICS = {"perplexity": ("ppl", ".1f"), "drift": ("drift", ".2f"), "entropy": ("entropy", ".2f"),
           "ended": ("ended", ".0%"), "repetition": ("rep", ".2f"), "text_nats": ("text", ".2f"),
           "control_nats": ("controls", "+.2f")}  # of an event: its column, its format
PAGES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent),
                           autoescape=jinja2.select_autoescape(["html.j2"]))


@dataclass
class Config:
    run: tyro.conf.Positional[Path]  # a run folder of heal_loop.py


class Point(NamedTuple):
    """One evaluation of a run."""
    name: str
    stage: str
    round: int
    event: dict
    profile: Profile


def measured(events: list[dict]) -> list[Point]:
    """Every evaluation, in order; the base comes first. Raises ValueError for a broken one."""
    points = []
    for e in [e for e in events if "profile" in e]:
        names = {"base": "base", "prompted": "persona prompt",
                 "matched": f"steering alone, dose {e.get('dose', 0):.2f}"}
        name = names.get(e["stage"], f"{e['stage']} r{e['round']}")
        try:
            points.append(Point(name, e["stage"], e["round"], e, Profile(**e["profile"])))
        except (TypeError, ValueError) as error:
            file = "events.jsonl" if e["stage"] in names else f"round_{e['round']}/events.jsonl"
            raise ValueError(f"{file}: the profile of '{e['stage']}' is broken ({error}); "
                             "fix: restore the file, or start a new run") from None
    return points


def show(e: Estimate, digits: int = 2) -> str:
    """`+1.20 [+0.90, +1.50]`, or why there is no value."""
    if e.value is None:
        return f"n/a ({e.why})"
    return f"{e.value:+z.{digits}f} [{e.low:+z.{digits}f}, {e.high:+z.{digits}f}]"


def by_wording(base: Profile, after: Profile) -> str:
    """`-5.1 to -0.9`: smallest and largest Δtrait over wordings or probes; blank if only one."""
    before, now = base.spread.get(base.axis, []), after.spread.get(base.axis, [])
    moved = [b - a for a, b in zip(before, now)]
    return f"{min(moved):+z.1f} to {max(moved):+z.1f}" if moved else ""


def cells(event: dict) -> dict[str, str]:
    """{column: text} of METRICS; blank for what an older run did not measure."""
    return {column: format(event[key], digits) if event.get(key) is not None else ""
            for key, (column, digits) in METRICS.items()}


def table_rows(events: list[dict]) -> list[list[str]]:
    """The head, base, baselines, then steered and healed of each round; Δ against the base."""
    points = measured(events)
    base = points[0].profile
    rows = [["stage", f"Δ{NAMES[base.axis]} (nats)", "over wordings", "largest other Δ",
             "coherence (Δ)", "coh_cost", *cells({})]]
    for p in points:
        if p.stage == "base":
            moved = [f"base {base.trait:+.1f}", "", "", f"{base.value('coherence'):.4f}", ""]
        else:
            other, cost = largest_mover(base, p.profile), coh_cost(base, p.profile)
            lost = show(delta("coherence", base, p.profile), 4)
            moved = [show(delta(base.axis, base, p.profile), 1), by_wording(base, p.profile),
                     f"{NAMES[other]} {p.profile.value(other) - base.value(other):+z.1f}",
                     f"{p.profile.value('coherence'):.4f} ({lost})",
                     "n/a" if cost.value is None else show(cost, 4).replace("+", "")]
        rows.append([p.name, *moved, *cells(p.event).values()])
    return rows


def table(events: list[dict], fmt: str = "simple") -> str:
    """The rows as text, in a format of tabulate."""
    head, *rows = table_rows(events)
    return tabulate(rows, head, tablefmt=fmt, disable_numparse=True)


def findings(events: list[dict]) -> str:
    """The last healed model against the base, and against steering alone at matched trait."""
    points = measured(events)
    base, trait = points[0].profile, NAMES[points[0].profile.axis]
    last = [p for p in points if p.stage in ("base", "healed")][-1]
    ended = [f"the loop ended early: {e['why']}" for e in events if e["stage"] == "ended"]
    if last.stage == "base":
        return "\n".join(["no round was healed", *ended])
    lines = [f"surgicality of {last.name}, |Δ{trait}| minus the largest other |Δ|: "
             f"{show(surgicality(base, last.profile), 1)} nats"]
    if base.controls is not None and last.profile.controls is not None:
        lines.append("controls, log-odds of the right answer, which should stay: "
                     f"base {base.value('control_nats'):+.2f}, "
                     f"{last.name} {last.profile.value('control_nats'):+.2f}, "
                     f"Δ {show(delta('control_nats', base, last.profile))} nats")
    for alone in [p for p in points if p.stage == "matched"]:
        lines.append(f"{last.name} minus {alone.name}, the dose nearest to its trait: {trait} "
                     f"{show(delta(base.axis, alone.profile, last.profile), 1)} nats, "
                     f"coherence {show(delta('coherence', alone.profile, last.profile), 4)}")
    return "\n".join(lines + ended)


SMALL = {"font.size": 7, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False}


def trajectory(events: list[dict]) -> Figure:
    """Trait and perplexity over rounds, and the map of one against the other."""
    base, *others = measured(events)
    fig = Figure(figsize=(7.2, 2.6), layout="constrained")
    trait, ppl, both = fig.subplots(1, 3)

    # 1. a line per stage, from the base on; the base is drawn at round −1
    for stage in ("steered", "healed"):
        path = [base, *(p for p in others if p.stage == stage)]
        rounds = [p.round for p in path]
        deltas = [delta(base.profile.axis, base.profile, p.profile) for p in path]
        x, y = [e.value for e in deltas], [p.event["perplexity"] for p in path]
        line = dict(color=COLOUR[stage], marker="o", markersize=4, label=stage)
        trait.plot(rounds, x, **line)
        trait.vlines(rounds, [e.low for e in deltas], [e.high for e in deltas], COLOUR[stage])
        ppl.plot(rounds, y, **line)
        both.plot(x, y, **line)
        for r, *at in list(zip(rounds, x, y))[1:]:
            both.text(*at, f" {r}", va="bottom", color=COLOUR[stage])

    # 2. what they are compared with
    marks = {"prompted": "^", "matched": "x"}
    for p in [p for p in others if p.stage in marks]:
        both.plot([p.profile.trait - base.profile.trait], [p.event["perplexity"]],
                  marks[p.stage], color=GREY, markersize=5, label=p.name)

    # 3. labels and legend; more of the trait is always to the right
    moved, cost = f"Δ {NAMES[base.profile.axis]} (nats)", "perplexity under the original"
    trait.set(title=f"trait ({base.profile.direction}: more of it)", xlabel="round", ylabel=moved)
    ppl.set(title="sampled answers", xlabel="round", ylabel=cost, yscale="log")
    both.set(title="both (right: more trait)", xlabel=moved, ylabel=cost, yscale="log")
    for panel in (trait, ppl):
        panel.set_xticks(rounds, ["base", *rounds[1:]])
    if base.profile.direction == "down":
        both.invert_xaxis()
    for axis in (ppl.yaxis, both.yaxis):  # plain numbers on the log scales, not powers of ten
        axis.set(major_formatter=LogFormatter(), minor_formatter=LogFormatter())
    fig.legend(*both.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return fig


def heal_steps(events: list[dict], tau: float) -> Figure:
    """Loss and divergence over the steps of every round; D should settle at or below τ."""
    fig = Figure(figsize=(7.2, 2.2), layout="constrained")
    loss, divergence = fig.subplots(1, 2)
    log = []
    for e in [e for e in events if e["stage"] == "heal"]:
        for panel in (loss, divergence):
            panel.axvline(len(log), color="#bbbbbb", linewidth=0.6)
            panel.text(len(log), 0.97, f" round {e['round']}", va="top",
                       transform=panel.get_xaxis_transform())
        log += e["log"]
    loss.plot([step["data_loss"] for step in log], color=GREY, linewidth=1)
    divergence.plot([step["D"] for step in log], color=GREEN, linewidth=1.2)
    divergence.plot([step["D_max"] for step in log], color=GREEN, linewidth=0.6, alpha=0.5)
    divergence.axhline(tau, color="black", linewidth=0.8, linestyle="--")
    loss.set(title="loss on the kept completions", xlabel="step", ylabel="nats per token")
    divergence.set(title="D, mean and largest (dashed: τ)", xlabel="step", ylabel="nats")
    return fig


def trait_map(events: list[dict]) -> go.Figure:
    """The trait against the largest other mover, one node a round, hover for the metrics."""
    base, *others = measured(events)
    last = [base, *(p for p in others if p.stage == "healed")][-1]
    mover = largest_mover(base.profile, last.profile)
    fig = go.Figure()
    for stage in ("steered", "healed"):
        path = [base, *(p for p in others if p.stage == stage)]
        hover = [", ".join(map(" ".join, cells(p.event).items())) for p in path]
        fig.add_scatter(x=[p.profile.trait for p in path],
                        y=[p.profile.value(mover) for p in path], hovertext=hover,
                        text=["base", *(f"r{p.round}" for p in path[1:])],
                        mode="lines+markers+text", textposition="top center", name=stage,
                        line_color=COLOUR[stage])
    trait = f"{NAMES[base.profile.axis]} (nats; {base.profile.direction} = more trait)"
    fig.update_layout(template="simple_white", width=820, height=560, xaxis_title=trait,
                      yaxis_title=f"{NAMES[mover]} (nats), the largest other mover")
    return fig


def border_rows(run: Path) -> list[dict]:
    """Of the newest round, the two kept completions of the highest perplexity, and of each reject
    reason the one of the lowest."""
    files = run.glob("*round_*[0-9]/sampled.jsonl")
    newest = sorted(files, key=lambda file: int(file.parent.name.split("_")[-1]))[-1:]
    rows = [row for file in newest for row in runs.read_jsonl(file)]
    rows.sort(key=lambda row: row["perplexity"] or float("inf"))
    kept = [row for row in rows if row["reject_reason"] == "kept"]
    lowest = {row["reject_reason"]: row for row in reversed(rows)}
    return [*kept[-2:], *(row for reason, row in lowest.items() if reason != "kept")]


def draw(run: Path) -> list[dict]:
    """Write the run's pictures and its report, one page that needs no other file; -> its events.

    Raises ValueError where there is no evaluation, as in a folder that is not a run's.
    """
    events = runs.read_events(run)
    points = measured(events)
    if not points:
        raise ValueError(f"{run / 'events.jsonl'} holds no evaluation; fix: give the --out of "
                         "heal_loop.py, once the base is evaluated")
    config = runs.read_json(run / "config.json")
    vectors = [SteeringVector.load(run / f"round_{r}/vector.safetensors")
               for r in range(runs.rounds_done(run))]
    # everything is made before the first file is written; the page escapes model text
    pngs = [io.BytesIO(), io.BytesIO()]
    with matplotlib.rc_context(SMALL):
        for png, figure in zip(pngs, (trajectory(events), heal_steps(events, config["tau"]))):
            figure.savefig(png, dpi=200, metadata={"Software": None})
    page = PAGES.get_template("report.html.j2").render(
        config=config, events=events, points=points, colour=COLOUR, findings=findings(events),
        rows=table_rows(events), border=border_rows(run),
        cosines=[vector.cosine(vectors[0]) for vector in vectors],
        pictures=[base64.b64encode(png.getvalue()).decode() for png in pngs])
    map_page = trait_map(events).to_html(include_plotlyjs=True, div_id="map")
    runs.write_bytes(run / "trajectory.png", pngs[0].getvalue())
    runs.write_text(run / "map.html", map_page)
    runs.write_text(run / "report.html", page)
    return events


def main(cfg: Config) -> None:
    events = draw(cfg.run)
    print(f"\n{table(events)}\n\n{findings(events)}\n{cfg.run / 'report.html'}")


if __name__ == "__main__":
    runs.cli(Config, main)
