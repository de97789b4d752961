"""Remake a run's table and pictures from its folder alone: trajectory.png, map.html, report.html.

    python plot.py runs/20261123-040000_care_kl_rev_rmse_s0

    Δ = after − base, paired per vignette        coh_cost = |Δcoherence| / |Δauth|
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

import runs
from evaluate import Estimate, Profile, coh_cost, delta_coherence, delta_nats, surgicality
from steer import SteeringVector

RED, GREEN, GREY = "#c0392b", "#1e8449", "#555555"
COLOUR = {"base": GREY, "steered": RED, "healed": GREEN}


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


HEAD = ["stage", "auth", "Δauth (nats)", "care", "Δcare (nats)", "coherence", "Δcoherence",
        "coh_cost", "ppl", "rep"]


def table_rows(events: list[dict]) -> list[list[str]]:
    """Base, baselines, then steered and healed of each round, under HEAD; Δ against the base."""
    base, *others = measured(events)
    rows = []
    for point in [base, *others]:
        after = point.profile
        auth = care = coherence = cost = ""
        if point is not base:
            auth = show(delta_nats("Authority", base.profile, after))
            care = show(delta_nats("Care", base.profile, after))
            coherence = show(delta_coherence(base.profile, after), 4)
            cost = show_cost(coh_cost(base.profile, after))
        rows.append([point.name, f"{after.auth_nats:.2f}", auth, f"{after.care_nats:.2f}", care,
                     f"{after.coherence:.4f}", coherence, cost,
                     f"{point.event['perplexity']:.1f}", f"{point.event['repetition']:.2f}"])
    return rows


def table(events: list[dict], fmt: str = "simple") -> str:
    """The rows as text, in a format of tabulate."""
    return tabulate(table_rows(events), HEAD, tablefmt=fmt, disable_numparse=True)


def findings(events: list[dict]) -> str:
    """The last healed model against the base, and against steering alone at equal trait."""
    points = measured(events)
    base = points[0].profile
    healed = [p for p in points if p.stage == "healed"]
    if not healed:
        return "no round was healed"
    last = healed[-1]
    margin = show(surgicality(base, last.profile))
    lines = [f"surgicality of {last.name} (|Δauth| beyond |Δcare| and |Δfairness|): {margin} nats"]
    for alone in points:
        if alone.stage != "matched":
            continue
        coherence = show(delta_coherence(alone.profile, last.profile), 4)
        auth = show(delta_nats("Authority", alone.profile, last.profile))
        lines.append(
            f"at equal trait, healed − steered alone (dose {alone.event['dose']:.2f}): "
            f"coherence {coherence}, Δauth {auth} nats, "
            f"perplexity {last.event['perplexity']:.1f} against "
            f"{alone.event['perplexity']:.1f}, repetition {last.event['repetition']:.2f} against "
            f"{alone.event['repetition']:.2f}")
    lines += [f"the loop ended early: {e['why']}" for e in events if e["stage"] == "ended"]
    return "\n".join(lines)


# ---- the pictures -------------------------------------------------------------------------------


def whiskers(estimates: list[Estimate]) -> list[list[float]]:
    """The intervals as matplotlib wants them: [distances below, distances above]."""
    return [[max(0.0, e.value - e.low) for e in estimates],
            [max(0.0, e.high - e.value) for e in estimates]]


def trajectory(events: list[dict]) -> Figure:
    """Trait and incoherence over rounds, and the map of one against the other; 95 % intervals."""
    points = measured(events)
    base = points[0].profile
    fig = Figure(figsize=(7.2, 2.6), layout="constrained")
    trait, broken, both = fig.subplots(1, 3)

    # 1. a line per stage, from the base on; the base is drawn at round −1
    for stage in ("steered", "healed"):
        found = [p for p in points if p.stage == stage]
        if not found:
            continue
        rounds = [-1, *(p.round for p in found)]
        auth = [Estimate(0.0, 0.0, 0.0), *(delta_nats("Authority", base, p.profile) for p in found)]
        lost = [Estimate(0.0, 0.0, 0.0), *(delta_coherence(p.profile, base) for p in found)]
        x = [e.value for e in auth]
        y = [1 - base.coherence + e.value for e in lost]
        line = dict(color=COLOUR[stage], marker="o", markersize=4, linewidth=1.4, label=stage)
        trait.errorbar(rounds, x, whiskers(auth), capsize=2, **line)
        broken.errorbar(rounds, y, whiskers(lost), capsize=2, **line)
        both.plot(x, y, **line)
        for r, across, up in zip(rounds[1:], x[1:], y[1:]):
            both.annotate(str(r), (across, up), textcoords="offset points", xytext=(4, 3),
                          fontsize=7, color=COLOUR[stage])

    # 2. what they are compared with
    both.plot([0], [1 - base.coherence], "o", color=GREY, markersize=5, label="base")
    marks = {"prompted": ("^", "persona prompt"), "matched": ("x", "steering alone")}
    for stage, (marker, label) in marks.items():
        for p in points:
            if p.stage == stage:
                both.plot([p.profile.auth_nats - base.auth_nats], [1 - p.profile.coherence], marker,
                          color=GREY, markersize=5, label=label, linestyle="none")

    # 3. axes and legend
    last = max(p.round for p in points if p.stage in ("base", "steered", "healed"))
    label_axes(trait, broken, both, last)
    fig.legend(*both.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=7,
               frameon=False)
    return fig


def label_axes(trait, broken, both, last: int) -> None:
    """Titles, labels and ticks of the three axes; last: the last round."""
    # 1. what each shows
    for axis in (trait, broken):
        axis.set_xticks(range(-1, last + 1), ["base", *range(last + 1)])
    trait.axhline(0, color=GREY, linewidth=0.6)
    trait.set(title="trait", xlabel="round", ylabel="Δ Authority (nats; down = more trait)")
    broken.set(title="incoherence", xlabel="round", ylabel="1 − coherence", yscale="log")
    both.set(title="map (numbers: rounds)", xlabel="Δ Authority (nats)", ylabel="1 − coherence",
             yscale="log")

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


def care_map(events: list[dict]) -> go.Figure:
    """Care against Authority, one node a round, hover for the numbers."""
    base, *others = measured(events)
    fig = go.Figure()
    for stage in ("steered", "healed"):
        path = [base, *(p for p in others if p.stage == stage)]
        names = ["base", *(f"r{p.round}" for p in path[1:])]
        hover = [f"{p.name}<br>auth {p.profile.auth_nats:.2f} nats"
                 f"<br>care {p.profile.care_nats:.2f} nats"
                 f"<br>coherence {p.profile.coherence:.4f}"
                 f"<br>perplexity {p.event['perplexity']:.1f}" for p in path]
        fig.add_scatter(x=[p.profile.auth_nats for p in path],
                        y=[p.profile.care_nats for p in path],
                        mode="lines+markers+text", name=stage, line_color=COLOUR[stage],
                        text=names, textposition="top center", hovertext=hover, hoverinfo="text")
    fig.update_layout(template="simple_white", width=820, height=560,
                      title="Care against Authority, round by round",
                      xaxis_title="log mean blame on Authority (nats; left = more trait)",
                      yaxis_title="log mean blame on Care (nats)")
    return fig


# ---- the report ---------------------------------------------------------------------------------

REPORT = jinja2.Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>steer, heal, loop: {{ config.trait }}</title>
<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem} h2{font-size:1.15rem;margin-top:2.2rem}
h3{font-size:1rem;margin:1.6rem 0 .3rem}
table{border-collapse:collapse;font-size:.82rem;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto} th{white-space:nowrap}
td,th{padding:.25rem .7rem .25rem 0;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
img{max-width:100%}
.steered{color:{{ colour.steered }}} .healed{color:{{ colour.healed }}}
.base{color:{{ colour.base }}}
.say td:first-child{white-space:nowrap;font-weight:600} .say td{white-space:pre-wrap}
.note{color:#555;font-size:.85rem}
</style>
<h1>Does the model keep its head while it moves along “{{ config.trait }}”?</h1>
<p>{{ config.model }}, {{ config.reg }}{% if config.reg.startswith("kl") %} · {{ config.agg }},
λ = {{ config.lam }}, τ = {{ config.tau }} nats
against the {{ "original" if config.ref == "base" else "previous student" }}{% endif %},
{{ config.rounds }} rounds, seed {{ config.seed }}, {{ n }} vignettes.
Steered is the student with the vector added at the mean dose of its kept data;
healed is the student after the round, without any vector.</p>
{% if ended %}<p><strong>The loop ended early: {{ ended }}</strong></p>{% endif %}
<div class="wide"><table><tr>{% for h in head %}<th>{{ h }}</th>{% endfor %}</tr>
{% for row in rows %}<tr class="{{ row[0].split()[0] }}">{% for cell in row %}<td>{{ cell }}</td>
{%- endfor %}</tr>{% endfor %}</table></div>
<p class="note" style="white-space:pre-line">{{ findings }}</p>
<p class="note">Δ against the base, 95 % bootstrap intervals over vignettes;
n.s.: the interval holds 0. coh_cost = |Δcoherence| / |Δauth|. ppl and rep: perplexity under the
original and repetition of greedy completions of held-out prompts.</p>
<img alt="trait, incoherence and their map over rounds" src="data:image/png;base64,{{ png }}">
<h2>What each round did</h2>
<div class="wide"><table><tr>{% for h in heal_head %}<th>{{ h }}</th>{% endfor %}</tr>
{% for row in heal_rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table></div>
<p class="note">CE on held-out kept data, before → after. D: divergence in the last epoch,
active: share of completions with D &gt; τ, gradient ratio: barrier to data at the final hidden
states, first batch of the last epoch. cos: the round's vector with round 0's, and what the student
moved under the neutral prompt with the vector.</p>
<h2>The same prompts, round under round</h2>
{% for prompt, answers in said %}<h3>{{ prompt }}</h3>
<table class="say">{% for name, text in answers %}
<tr><td class="{{ name.split()[0] }}">{{ name }}</td><td>{{ text }}</td></tr>{% endfor %}</table>
{%- endfor %}
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


def report(run: Path, events: list[dict], config: dict, png: bytes) -> str:
    """One self-contained page; model text is escaped."""
    points = measured(events)
    said = []  # prompt, and what every measured model answered to it
    for k, base in enumerate(points[0].event["texts"]):
        answers = [(p.name, p.event["texts"][k]["text"]) for p in points]
        said.append((base["prompt"], answers))
    ended = next((e["why"] for e in events if e["stage"] == "ended"), "")
    return REPORT.render(
        config=config, n=len(points[0].profile.ids), head=HEAD, rows=table_rows(events), said=said,
        findings=findings(events), png=base64.b64encode(png).decode(), colour=COLOUR, ended=ended,
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
    png = io.BytesIO()
    trajectory(events).savefig(png, format="png", dpi=200, metadata={"Software": None})
    page = report(run, events, json.loads(config_file.read_text()), png.getvalue())
    map_page = care_map(events).to_html(include_plotlyjs=True, div_id="map")
    runs.write_bytes(run / "trajectory.png", png.getvalue())
    runs.write_text(run / "map.html", map_page)
    runs.write_text(run / "report.html", page)
    return events


def main(cfg: Config) -> None:
    events = draw(cfg.run)
    print(f"\n{table(events)}\n\n{findings(events)}\n{cfg.run / 'report.html'}")


if __name__ == "__main__":
    runs.cli(Config, main)
