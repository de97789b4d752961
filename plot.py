"""Remake a run's table and pictures from its folder alone: trajectory.png, map.html, report.html.

    python plot.py runs/20261123-040000_care_kl_rev_rmse_s0
"""
import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path

import jinja2
import plotly.graph_objects as go
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from tabulate import tabulate

import distil
import models
from evaluate import Estimate, Profile, coh_cost, delta_coherence, delta_nats, surgicality

RED, GREEN, GREY = "#c0392b", "#1e8449", "#555555"
COLOUR = {"base": GREY, "steered": RED, "healed": GREEN}


@dataclass
class Config:
    run: tyro.conf.Positional[Path]
    """A run folder of heal_loop.py."""


def measured(events: list[dict]) -> list[tuple[str, int, dict, Profile]]:
    """(stage, round, event, profile) of every evaluation, in order."""
    return [(e["stage"], e["round"], e, Profile.from_dict(e["profile"])) for e in events if "profile" in e]


def show(e: Estimate, digits: int = 2) -> str:
    """`+1.20 [+0.90, +1.50]`, marked n.s. where the interval holds 0."""
    if e.value is None:
        return f"n/a ({e.why})"
    text = f"{e.value:+.{digits}f} [{e.low:+.{digits}f}, {e.high:+.{digits}f}]"
    return text + " n.s." if e.holds_zero else text


def name(stage: str, round: int, event: dict) -> str:
    return {"base": "base", "prompted": "persona prompt", "matched": f"steering alone, dose {event.get('dose', 0):.2f}"}.get(stage, f"{stage} r{round}")


def cells(events: list[dict]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the table: base, baselines, then steered and healed of each round, deltas against the base."""
    rows, points = [], measured(events)
    base = points[0][3]
    for stage, r, event, profile in points:
        is_base, cost = profile is base, coh_cost(base, profile)
        rows.append([name(stage, r, event), f"{profile.auth_nats:.2f}", "" if is_base else show(delta_nats("Authority", base, profile)),
                     f"{profile.care_nats:.2f}", "" if is_base else show(delta_nats("Care", base, profile)), f"{profile.coherence:.4f}",
                     "" if is_base else show(delta_coherence(base, profile), 4),
                     "" if is_base else f"n/a ({cost.why})" if cost.value is None else f"{cost.value:.4f} [{cost.low:.4f}, {cost.high:.4f}]",
                     f"{event['perplexity']:.1f}", f"{event['repetition']:.2f}"])
    return ["stage", "auth", "Δauth (nats)", "care", "Δcare (nats)", "coherence", "Δcoherence", "coh_cost", "ppl", "rep"], rows


def verdict(events: list[dict]) -> str:
    """The last healed model against the base, and against steering alone at equal trait: a sentence each."""
    points = measured(events)
    base, healed = points[0][3], [p for p in points if p[0] == "healed"]
    if not healed:
        return "no round was healed"
    _, r, event, last = healed[-1]
    lines = [f"surgicality of healed r{r} (|Δauth| beyond |Δcare| and |Δfairness|): {show(surgicality(base, last))} nats"]
    for _, _, alone, profile in (p for p in points if p[0] == "matched"):
        lines.append(f"at equal trait, healed − steered alone (dose {alone['dose']:.2f}): coherence {show(delta_coherence(profile, last), 4)}, Δauth "
                     f"{show(delta_nats('Authority', profile, last))} nats, perplexity {event['perplexity']:.1f} against {alone['perplexity']:.1f}, "
                     f"repetition {event['repetition']:.2f} against {alone['repetition']:.2f}")
    return "\n".join(lines)


def table(events: list[dict], fmt: str = "simple") -> str:
    head, rows = cells(events)
    return tabulate(rows, head, tablefmt=fmt, disable_numparse=True)


def trajectory(events: list[dict]) -> Figure:
    """Trait and incoherence over rounds, and the map of one against the other; steered red, healed green, 95 % intervals."""
    points = measured(events)
    base = points[0][3]
    fig = Figure(figsize=(7.2, 2.6), layout="constrained")
    trait, broken, both = fig.subplots(1, 3)
    for stage in ("steered", "healed"):
        seen = [(r, p) for s, r, _, p in points if s == stage]
        if not seen:
            continue
        x, style = [r for r, _ in seen], dict(color=COLOUR[stage], marker="o", markersize=4, linewidth=1.4, capsize=2, label=stage)
        auth, coh = [delta_nats("Authority", base, p) for _, p in seen], [delta_coherence(base, p) for _, p in seen]
        def bars(estimates, sign=1):
            return [[max(0.0, e.value - e.low) for e in estimates], [max(0.0, e.high - e.value) for e in estimates]][::sign]
        y = [1 - p.coherence for _, p in seen]
        trait.errorbar([-1, *x], [0, *(e.value for e in auth)], [[0, *b] for b in bars(auth)], **style)
        broken.errorbar([-1, *x], [1 - base.coherence, *y], [[0, *b] for b in bars(coh, -1)], **style)
        both.plot([0, *(e.value for e in auth)], [1 - base.coherence, *y], **{k: v for k, v in style.items() if k != "capsize"})
        for r, e, value in zip(x, auth, y):
            both.annotate(str(r), (e.value, value), textcoords="offset points", xytext=(4, 3), fontsize=7, color=COLOUR[stage])
    both.plot([0], [1 - base.coherence], "o", color=GREY, markersize=5, label="base")
    for stage, marker, label in (("prompted", "^", "persona prompt"), ("matched", "x", "steering alone")):
        for p in (p for s, _, _, p in points if s == stage):
            both.plot([p.auth_nats - base.auth_nats], [1 - p.coherence], marker, color=GREY, markersize=5, label=label, linestyle="none")
    trait.axhline(0, color=GREY, linewidth=0.6)
    trait.set(xlabel="round", ylabel="Δ Authority (nats; down = more trait)")
    broken.set(xlabel="round", ylabel="1 − coherence", yscale="log")
    both.set(xlabel="Δ Authority (nats)", ylabel="1 − coherence", yscale="log")
    for axis in (broken, both):
        low, high = axis.get_ylim()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())
    for axis in (trait, broken):
        axis.set_xticks(rounds := range(-1, 1 + max(r for s, r, *_ in points if s in ("base", "steered", "healed"))),
                        ["base" if r < 0 else r for r in rounds])
    for axis, title in zip((trait, broken, both), ("trait", "incoherence", "map (numbers: rounds)")):
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelsize=7, which="both")
        axis.xaxis.label.set_size(7), axis.yaxis.label.set_size(7)
        axis.spines[["top", "right"]].set_visible(False)
    fig.legend(*both.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    return fig


def care_map(events: list[dict]) -> go.Figure:
    """Care against Authority, one node a round, hover for the numbers."""
    points, fig = measured(events), go.Figure()
    base_point = points[0]
    for stage in ("steered", "healed"):
        path = [base_point] + [p for p in points if p[0] == stage]
        fig.add_scatter(x=[p.auth_nats for *_, p in path], y=[p.care_nats for *_, p in path], mode="lines+markers+text", name=stage,
                        line_color=COLOUR[stage], text=["base"] + [f"r{r}" for _, r, *_ in path[1:]], textposition="top center",
                        hovertext=[f"{s} round {r}<br>auth {p.auth_nats:.2f} nats<br>care {p.care_nats:.2f} nats<br>coherence {p.coherence:.4f}"
                                   f"<br>perplexity {e['perplexity']:.1f}" for s, r, e, p in path], hoverinfo="text")
    fig.update_layout(template="simple_white", xaxis_title="log mean blame on Authority (nats; left = more trait)",
                      yaxis_title="log mean blame on Care (nats)", title="Care against Authority, round by round", width=820, height=560)
    return fig


REPORT = jinja2.Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>steer, heal, loop: {{ config.trait }}</title>
<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem} h2{font-size:1.15rem;margin-top:2.2rem} h3{font-size:1rem;margin:1.6rem 0 .3rem}
table{border-collapse:collapse;font-size:.82rem;font-variant-numeric:tabular-nums} .wide{overflow-x:auto}
td,th{padding:.25rem .7rem .25rem 0;text-align:left;border-bottom:1px solid #ddd;vertical-align:top} th{white-space:nowrap}
img{max-width:100%} .steered{color:{{ colour.steered }}} .healed{color:{{ colour.healed }}} .base{color:{{ colour.base }}}
.say td:first-child{white-space:nowrap;font-weight:600} .say td{white-space:pre-wrap} .note{color:#555;font-size:.85rem}
</style>
<h1>Does the model keep its head while it moves along “{{ config.trait }}”?</h1>
<p>{{ config.model }}, {{ config.reg }}{% if config.reg.startswith("kl") %} · {{ config.agg }}, λ = {{ config.lam }}, τ = {{ config.tau }} nats
against the {{ "original" if config.ref == "base" else "previous student" }}{% endif %}, {{ config.rounds }} rounds, seed {{ config.seed }},
{{ n }} vignettes. Steered is the student with the vector added at the mean dose of its kept data; healed is the student after the round, without any vector.</p>
{% if ended %}<p><strong>The loop ended early: {{ ended }}</strong></p>{% endif %}
<div class="wide"><table><tr>{% for h in head %}<th>{{ h }}</th>{% endfor %}</tr>
{% for row in rows %}<tr class="{{ row[0].split()[0] }}">{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table></div>
<p class="note" style="white-space:pre-line">{{ verdict }}</p>
<p class="note">Δ against the base, 95 % bootstrap intervals over vignettes; n.s.: the interval holds 0. coh_cost = |Δcoherence| / |Δauth|.
ppl and rep: perplexity under the original and repetition of greedy completions of held-out prompts.</p>
<img alt="trait, incoherence and their map over rounds" src="data:image/png;base64,{{ png }}">
<h2>What each round did</h2>
<div class="wide"><table><tr>{% for h in heal_head %}<th>{{ h }}</th>{% endfor %}</tr>
{% for row in heal_rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table></div>
<p class="note">CE on held-out kept data, before → after. D: divergence in the last epoch, active: share of completions with D &gt; τ, gradient ratio:
barrier to data at the final hidden states. cos: the round's vector with round 0's, and what the student moved under the neutral prompt with the vector.</p>
<h2>The same prompts, round under round</h2>
{% for prompt, answers in said %}<h3>{{ prompt }}</h3>
<table class="say">{% for name, text in answers %}<tr><td class="{{ name.split()[0] }}">{{ name }}</td><td>{{ text }}</td></tr>{% endfor %}</table>{% endfor %}
</html>
""")


def report(events: list[dict], config: dict, png: bytes) -> str:
    """One self-contained page; model text is escaped."""
    points = measured(events)
    head, rows = cells(events)
    heals = {e["round"]: e for e in events if e["stage"] == "heal"}
    distils = {e["round"]: e for e in events if e["stage"] == "distil"}
    cosines = {e["round"]: e["cos_v0"] for e in events if e["stage"] == "extract"}
    heal_rows = [[r, f"{distils[r]['kept']} of {distils[r]['sampled']}", f"{distils[r]['dose']:.2f}", f"{h['held_out_before']:.2f} → {h['held_out_after']:.2f}",
                  f"{h['D']:.2f}", f"{h['active']:.0%}", f"{h['grad_ratio']:.2f}", f"{cosines[r]:.2f}", f"{h['internalised']:.2f}"] for r, h in heals.items()]
    said = [(p["prompt"], [(name(s, r, e), e["texts"][k]["text"]) for s, r, e, _ in points])
            for k, p in enumerate(points[0][2]["texts"])]
    return REPORT.render(config=config, n=len(points[0][3].ids), head=head, rows=rows, verdict=verdict(events), png=base64.b64encode(png).decode(), said=said, colour=COLOUR,
                         ended=next((e["why"] for e in events if e["stage"] == "ended"), ""), heal_rows=heal_rows,
                         heal_head=["round", "kept", "mean dose", "CE (nats)", "D (nats)", "active", "gradient ratio", "cos(v, v0)", "cos(moved, v)"])


def draw(run: Path) -> list[dict]:
    """Write the run's pictures and report; -> its events. Raises FileNotFoundError or ValueError for what is not a run."""
    events_file, config_file = run / "events.jsonl", run / "config.json"
    if not events_file.exists() or not config_file.exists():
        raise FileNotFoundError(f"{run} is not a run folder (no events.jsonl or config.json); fix: give the --out of heal_loop.py")
    events = distil.read_jsonl(events_file, log=True)
    if not measured(events):
        raise ValueError(f"{events_file} holds no evaluation yet; fix: let the run get past its base evaluation")
    png = io.BytesIO()
    trajectory(events).savefig(png, format="png", dpi=200, metadata={"Software": None})
    models.write_bytes(run / "trajectory.png", png.getvalue())
    models.write_bytes(run / "map.html", care_map(events).to_html(include_plotlyjs=True, div_id="map").encode())
    models.write_bytes(run / "report.html", report(events, json.loads(config_file.read_text()), png.getvalue()).encode())
    return events


def main(cfg: Config) -> None:
    events = draw(cfg.run)
    print(f"{table(events)}\n\n{verdict(events)}")


if __name__ == "__main__":
    models.cli(Config, main)
