"""Remake a run's table and pictures from its folder alone: trajectory.png, map.html, report.html.

    python -m tools.plot runs/20261123-040000_care_kl_rev_rmse_s0

    Δ = after − base, paired per vignette or probe        coh_cost = |Δcoherence| / |Δtrait|
"""
import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jinja2
import plotly.graph_objects as go
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from tabulate import tabulate

from common import runs
from evaluate import (EQUAL, NATS, Estimate, Profile, coh_cost, delta, largest_mover,
                      surgicality)
from steer import SteeringVector
from common.texts import FOUNDATIONS

RED, GREEN, GREY = "#c0392b", "#1e8449", "#555555"
COLOUR = {"base": GREY, "steered": RED, "healed": GREEN}
NAMES = {**dict(zip(NATS, FOUNDATIONS)), "probe_nats": "probes"}  # of the numbers, for a reader


@dataclass
class Config:
    run: tyro.conf.Positional[Path]  # a run folder of heal_loop.py


# ---- the table ----------------------------------------------------------------------------------


class Point(NamedTuple):
    """One evaluation of a run."""
    stage: str
    round: int
    event: dict
    profile: Profile

    @property
    def name(self) -> str:
        if self.stage == "base":
            return "base"
        if self.stage == "prompted":
            return "persona prompt"
        if self.stage == "matched":
            return f"steering alone, dose {self.event.get('dose', 0):.2f}"
        return f"{self.stage} r{self.round}"


def measured(events: list[dict]) -> list[Point]:
    """Every evaluation, in order; the base comes first."""
    return [Point(e["stage"], e["round"], e, Profile.from_dict(e["profile"]))
            for e in events if "profile" in e]


def show(e: Estimate, digits: int = 2) -> str:
    """`+1.20 [+0.90, +1.50]`, marked n.s. where the interval holds 0."""
    if e.value is None:
        return f"n/a ({e.why})"
    text = f"{e.value:+.{digits}f} [{e.low:+.{digits}f}, {e.high:+.{digits}f}]"
    return text + " n.s." if e.holds_zero else text


def show_cost(e: Estimate) -> str:
    """`0.0012 [0.0009, 0.0015]`, or why there is no number."""
    return show(e) if e.value is None else f"{e.value:.4f} [{e.low:.4f}, {e.high:.4f}]"


def head(axis: str) -> list[str]:
    """The table's columns; the first numbers are those of the trait's axis."""
    name = NAMES[axis]
    return ["stage", name, f"Δ{name} (nats)", "largest other mover", "coherence", "Δcoherence",
            "coh_cost", "ppl", "drift", "p95", "rep", "text"]


def table_rows(events: list[dict]) -> list[list[str]]:
    """Base, baselines, then steered and healed of each round, under `head`; Δ against the base."""
    base, *others = measured(events)
    rows = []
    for point in [base, *others]:
        after = point.profile
        trait = other = coherence = cost = ""
        if point is not base:
            trait = show(delta(after.axis, base.profile, after))
            mover = largest_mover(base.profile, after)
            other = f"{NAMES[mover]} {after.value(mover) - base.profile.value(mover):+.2f}"
            coherence = show(delta("coherence", base.profile, after), 4)
            cost = show_cost(coh_cost(base.profile, after))
        e = point.event
        rows.append([point.name, f"{after.trait:.2f}", trait, other, f"{after.coherence:.4f}",
                     coherence, cost, f"{e['perplexity']:.1f}", f"{e['drift']:.2f}",
                     f"{e['drift_p95']:.1f}", f"{e['repetition']:.2f}", f"{e['text_nats']:.2f}"])
    return rows


def table(events: list[dict], fmt: str = "simple") -> str:
    """The rows as text, in a format of tabulate."""
    columns = head(measured(events)[0].profile.axis)
    return tabulate(table_rows(events), columns, tablefmt=fmt, disable_numparse=True)


def findings(events: list[dict]) -> str:
    """The last healed model against the base, and against steering alone at equal trait."""
    points = measured(events)
    base = points[0].profile
    healed = [p for p in points if p.stage == "healed"]
    if not healed:
        return "no round was healed"
    last, axis = healed[-1], base.axis
    mover = NAMES[largest_mover(base, last.profile)]
    margin = show(surgicality(base, last.profile))
    lines = [f"surgicality of {last.name} (|Δ{NAMES[axis]}| beyond |Δ{mover}|, the largest "
             f"other mover): {margin} nats"]
    if base.controls is not None:
        held = show(delta("control_nats", base, last.profile))
        lines.append(f"controls, which should stay: {base.value('control_nats'):+.2f} nats for "
                     f"the right answer, Δ {held}")
    for alone in points:
        if alone.stage != "matched":
            continue
        coherence = show(delta("coherence", alone.profile, last.profile), 4)
        trait = show(delta(axis, alone.profile, last.profile))
        compared = [f"{name} {last.event[name]:.2f} against {alone.event[name]:.2f}"
                    for name in ("perplexity", "drift", "repetition", "text_nats")]
        near = abs(alone.profile.trait - alone.event["wanted"]) < EQUAL
        lines.append(
            f"at {'equal' if near else 'the nearest'} trait, healed − steered alone "
            f"(dose {alone.event['dose']:.2f}): "
            f"coherence {coherence}, Δ{NAMES[axis]} {trait} nats; "
            f"{', '.join(compared)}")
    lines += [f"the loop ended early: {e['why']}" for e in events if e["stage"] == "ended"]
    return "\n".join(lines)


# ---- the pictures -------------------------------------------------------------------------------


def trajectory(events: list[dict]) -> Figure:
    """Trait and perplexity over rounds, and the map of one against the other."""
    points = measured(events)
    base = points[0]
    fig = Figure(figsize=(7.2, 2.6), layout="constrained")
    trait, broken, both = fig.subplots(1, 3)

    # 1. a line per stage, from the base on; the base is drawn at round −1
    for stage in ("steered", "healed"):
        found = [p for p in points if p.stage == stage]
        if not found:
            continue
        rounds = [-1, *(p.round for p in found)]
        moved = [delta(p.profile.axis, base.profile, p.profile) for p in [base, *found]]
        x = [e.value for e in moved]
        y = [p.event["perplexity"] for p in [base, *found]]
        below = [max(0.0, e.value - e.low) for e in moved]
        above = [max(0.0, e.high - e.value) for e in moved]
        line = dict(color=COLOUR[stage], marker="o", markersize=4, linewidth=1.4, label=stage)
        trait.errorbar(rounds, x, [below, above], capsize=2, **line)
        broken.plot(rounds, y, **line)
        both.plot(x, y, **line)
        for r, across, up in zip(rounds[1:], x[1:], y[1:]):
            both.annotate(str(r), (across, up), textcoords="offset points", xytext=(4, 3),
                          fontsize=7, color=COLOUR[stage])

    # 2. what they are compared with
    both.plot([0], [base.event["perplexity"]], "o", color=GREY, markersize=5, label="base")
    marks = {"prompted": ("^", "persona prompt"), "matched": ("x", "steering alone")}
    for stage, (marker, label) in marks.items():
        for p in points:
            if p.stage == stage:
                both.plot([p.profile.trait - base.profile.trait], [p.event["perplexity"]], marker,
                          color=GREY, markersize=5, label=label, linestyle="none")

    # 3. axes and legend
    last = max(p.round for p in points if p.stage in ("base", "steered", "healed"))
    label_axes(trait, broken, both, last, base.profile)
    fig.legend(*both.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=7,
               frameon=False)
    return fig


def label_axes(trait, broken, both, last: int, base: Profile) -> None:
    """Titles, labels and ticks of the three axes; last: the last round."""
    # 1. what each shows
    moved = f"Δ {NAMES[base.axis]} (nats; {base.direction} = more trait)"
    lost = "perplexity under the original"
    for axis in (trait, broken):
        axis.set_xticks(range(-1, last + 1), ["base", *range(last + 1)])
    trait.axhline(0, color=GREY, linewidth=0.6)
    trait.set(title="trait", xlabel="round", ylabel=moved)
    broken.set(title="sampled answers (low = near the original)", xlabel="round", ylabel=lost,
               yscale="log")
    both.set(title="map (numbers: rounds)", ylabel=lost, yscale="log",
             xlabel=f"Δ {NAMES[base.axis]} (nats; right = more trait)")
    if base.direction == "down":  # more of the trait is always to the right
        both.invert_xaxis()

    # 2. plain numbers on the log scales, between the decades too where there is at most one
    for axis in (broken, both):
        low, high = axis.get_ylim()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())

    # 3. small type
    for axis in (trait, broken, both):
        axis.title.set_size(8)
        axis.tick_params(labelsize=7, which="both")
        axis.xaxis.label.set_size(7)
        axis.yaxis.label.set_size(7)
        axis.spines[["top", "right"]].set_visible(False)


def steps(events: list[dict], tau: float) -> Figure:
    """Loss and divergence over the steps of every round; D should settle at or below τ."""
    fig = Figure(figsize=(7.2, 2.2), layout="constrained")
    loss, divergence = fig.subplots(1, 2)
    start = 0
    for e in events:
        if e["stage"] != "heal":
            continue
        at = range(start, start + len(e["log"]))
        loss.plot(at, [step["data_loss"] for step in e["log"]], color=GREY, linewidth=1)
        divergence.plot(at, [step["D"] for step in e["log"]], color=GREEN, linewidth=1.2)
        divergence.plot(at, [step["D_max"] for step in e["log"]], color=GREEN, linewidth=0.6,
                        alpha=0.5)
        for axis in (loss, divergence):
            axis.axvline(start, color="#bbbbbb", linewidth=0.6)
            axis.annotate(f"round {e['round']}", (start, 0.97), xycoords=("data", "axes fraction"),
                          fontsize=7, va="top", xytext=(3, 0), textcoords="offset points")
        start += len(e["log"])
    divergence.axhline(tau, color="black", linewidth=0.8, linestyle="--")
    divergence.annotate("τ", (0, tau), xytext=(-6, 2), textcoords="offset points", fontsize=8)
    loss.set(title="CE on the kept completions", xlabel="step", ylabel="nats per token")
    divergence.set(title="D of a batch: mean and largest", xlabel="step", ylabel="nats")
    for axis in (loss, divergence):
        axis.title.set_size(8)
        axis.tick_params(labelsize=7)
        axis.xaxis.label.set_size(7)
        axis.yaxis.label.set_size(7)
        axis.spines[["top", "right"]].set_visible(False)
    return fig


def trait_map(events: list[dict]) -> go.Figure:
    """The trait against what moved most beside it, one node a round, hover for the numbers."""
    base, *others = measured(events)
    axis = base.profile.axis
    healed = [p.profile for p in others if p.stage == "healed"]
    mover = largest_mover(base.profile, healed[-1] if healed else base.profile)
    fig = go.Figure()
    for stage in ("steered", "healed"):
        path = [base, *(p for p in others if p.stage == stage)]
        names = ["base", *(f"r{p.round}" for p in path[1:])]
        hover = [f"{p.name}<br>{NAMES[axis]} {p.profile.trait:.2f} nats"
                 f"<br>{NAMES[mover]} {p.profile.value(mover):.2f} nats"
                 f"<br>coherence {p.profile.coherence:.4f}"
                 f"<br>perplexity {p.event['perplexity']:.1f}"
                 f"<br>drift {p.event['drift']:.2f} nats" for p in path]
        fig.add_scatter(x=[p.profile.trait for p in path],
                        y=[p.profile.value(mover) for p in path],
                        mode="lines+markers+text", name=stage, line_color=COLOUR[stage],
                        text=names, textposition="top center", hovertext=hover, hoverinfo="text")
    fig.update_layout(template="simple_white", width=820, height=560,
                      title=f"The trait against what moved most beside it: {NAMES[mover]}",
                      xaxis_title=f"{NAMES[axis]} (nats; {base.profile.direction} = more trait)",
                      yaxis_title=f"{NAMES[mover]} (nats)")
    return fig


# ---- the report ---------------------------------------------------------------------------------

REPORT = jinja2.Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>steer, heal, loop: {{ config.trait }}</title>
<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:84rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem} h2{font-size:1.15rem;margin-top:2.2rem}
h3{font-size:1rem;margin:1.6rem 0 .3rem}
table{border-collapse:collapse;font-size:.82rem;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto} .wide td,.wide th{white-space:nowrap}
td,th{padding:.25rem .7rem .25rem 0;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
img{max-width:100%}
.steered,.steering{color:{{ colour.steered }}} .healed{color:{{ colour.healed }}}
.base,.persona{color:{{ colour.base }}}
.say td:first-child{white-space:nowrap;font-weight:600} .say td{white-space:pre-wrap}
.note{color:#555;font-size:.85rem} summary{cursor:pointer;margin-top:1rem}
</style>
<h1>Does the model keep its head while it moves along “{{ config.trait }}”?</h1>
<p>{{ config.model }}, {{ config.reg }}{% if config.reg.startswith("kl") %} · {{ config.agg }},
λ = {{ config.lam }}, τ = {{ config.tau }} nats against
{{ {"base": "the original", "prev": "the previous student",
    "good": "the newest coherent student"}[config.ref] }}{% endif %},
{{ config.rounds }} rounds, seed {{ config.seed }}, {{ n }} vignettes.
Steered is the student with the vector added at the mean dose of its kept data;
healed is the student after the round, without any vector.
{% if machines %}Made on {{ machines | join(", then on ") }}.{% endif %}</p>
{% if ended %}<p><strong>The loop ended early: {{ ended }}</strong></p>{% endif %}
{% macro answers_to(prompt, answers) %}<h3>{{ prompt }}</h3>
<table class="say">{% for name, text in answers %}
<tr><td class="{{ name.split()[0] }}">{{ name }}</td><td>{{ text }}</td></tr>{% endfor %}</table>
{%- endmacro %}
<h2>In its own words</h2>
{% for prompt, answers in said[:3] %}{{ answers_to(prompt, answers) }}{% endfor %}
<h2>In numbers</h2>
<div class="wide"><table><tr>{% for h in head %}<th>{{ h }}</th>{% endfor %}</tr>
{% for row in rows %}<tr class="{{ row[0].split()[0] }}">{% for cell in row %}<td>{{ cell }}</td>
{%- endfor %}</tr>{% endfor %}</table></div>
<p class="note" style="white-space:pre-line">{{ findings }}</p>
<p class="note">Δ against the base, 95 % bootstrap intervals over vignettes or probes;
n.s.: the interval holds 0. coh_cost = |Δcoherence| / |Δtrait|. Of sampled answers to held-out
prompts: ppl, perplexity under the original; drift and p95, mean and 95th percentile of
KL(model ‖ original) per token, nats; rep, repetition. text: loss on plain text, nats per
token.</p>
<img alt="trait and perplexity over rounds, and their map" src="data:image/png;base64,{{ png }}">
<h2>What each round did</h2>
<div class="wide"><table><tr>{% for h in heal_head %}<th>{{ h }}</th>{% endfor %}</tr>
{% for row in heal_rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table></div>
<p class="note">CE on held-out kept data, before → after. D: divergence in the last epoch,
active: share of completions with D &gt; τ, gradient ratio: barrier to data at the final hidden
states, first batch of the last epoch. cos: the round's vector with round 0's, and what the student
moved under the neutral prompt with the vector.</p>
<img alt="loss and divergence over the steps" src="data:image/png;base64,{{ steps }}">
<h2>At the filter's border</h2>
<div><table class="say"><tr><th>verdict</th><th>dose</th><th>perplexity</th><th>completion</th></tr>
{% for row in border %}<tr><td>{{ row.verdict }}</td><td>{{ "%.2f" % row.dose }}</td>
<td>{{ row.perplexity }}</td><td>{{ row.messages[-1].content }}</td></tr>{% endfor %}</table></div>
<details><summary>The other held-out prompts, round under round</summary>
{% for prompt, answers in said[3:] %}{{ answers_to(prompt, answers) }}{% endfor %}</details>
</html>
""")
HEAL_HEAD = ["round", "kept", "mean dose", "CE (nats)", "D (nats)", "active", "gradient ratio",
             "cos(v, v0)", "cos(moved, v)"]


def heal_rows(run: Path, events: list[dict]) -> list[list]:
    """What each finished round did, under HEAL_HEAD."""
    of = {(e["stage"], e["round"]): e for e in events}
    vectors = [SteeringVector.load(run / f"round_{r}" / "vector.safetensors")
               for r in range(runs.rounds_done(run))]
    rows = []
    for (stage, r), heal in of.items():
        if stage != "heal":
            continue
        distil = of["distil", r]
        rows.append([r, f"{distil['kept']} of {distil['sampled']}", f"{distil['dose']:.2f}",
                     f"{heal['held_out_before']:.2f} → {heal['held_out_after']:.2f}",
                     f"{heal['D']:.2f}", f"{heal['active']:.0%}", f"{heal['grad_ratio']:.2f}",
                     f"{vectors[r].cosine(vectors[0]):.2f}", f"{heal['internalised']:.2f}"])
    return rows


def at_the_border(run: Path) -> list[dict]:
    """Of the newest round: the kept with the highest perplexity, and the best of each rule's."""
    files = run.glob("*round_*/sampled.jsonl")
    newest = sorted(files, key=lambda file: int(file.parent.name.split("_")[-1]))[-1:]
    rows = [row for file in newest for row in runs.read_jsonl(file)]
    rows.sort(key=lambda row: row["perplexity"] or float("inf"))
    kept = [row for row in rows if row["verdict"] == "kept"]
    dropped = {}
    for row in rows:
        dropped.setdefault(row["verdict"], row)
    return kept[-2:] + [row for verdict, row in dropped.items() if verdict != "kept"]


def as_text(figure: Figure) -> str:
    """A figure as base64 of its PNG, for a page that needs no other file."""
    return base64.b64encode(as_png(figure)).decode()


def as_png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
    return png.getvalue()


def report(run: Path, events: list[dict], config: dict) -> str:
    """One self-contained page; model text is escaped."""
    points = measured(events)
    said = []  # prompt, and what every measured model answered to it
    for k, base in enumerate(points[0].event["texts"]):
        answers = [(p.name, p.event["texts"][k]["text"]) for p in points]
        said.append((base["prompt"], answers))
    ended = next((e["why"] for e in events if e["stage"] == "ended"), "")
    return REPORT.render(
        config=config, n=len(points[0].profile.ids), head=head(points[0].profile.axis),
        rows=table_rows(events), said=said, findings=findings(events), colour=COLOUR, ended=ended,
        png=as_text(trajectory(events)), steps=as_text(steps(events, config["tau"])),
        machines=[e["name"] for e in events if e["stage"] == "machine"],
        border=at_the_border(run),
        heal_head=HEAL_HEAD, heal_rows=heal_rows(run, events))


# ---- the command --------------------------------------------------------------------------------


def draw(run: Path) -> list[dict]:
    """Write the run's pictures and report; -> its events.

    Raises FileNotFoundError for what is not a run, ValueError for a run without an evaluation.
    """
    events_file, config_file = run / "events.jsonl", run / "config.json"
    if not events_file.exists() or not config_file.exists():
        raise FileNotFoundError(f"{run} is not a run folder (no events.jsonl or config.json); "
                                "fix: give the --out of heal_loop.py")
    events = runs.read_events(run)
    if not measured(events):
        raise ValueError(f"{events_file} holds no evaluation yet; "
                         "fix: let the run get past its base evaluation")
    # everything is made before the first file is written
    png = as_png(trajectory(events))
    page = report(run, events, json.loads(config_file.read_text()))
    map_page = trait_map(events).to_html(include_plotlyjs=True, div_id="map")
    runs.write_bytes(run / "trajectory.png", png)
    runs.write_text(run / "map.html", map_page)
    runs.write_text(run / "report.html", page)
    return events


def main(cfg: Config) -> None:
    events = draw(cfg.run)
    print(f"\n{table(events)}\n\n{findings(events)}\n{cfg.run / 'report.html'}")


if __name__ == "__main__":
    runs.cli(Config, main)
