"""A run's table, findings and page, from its records alone."""
import json

import numpy as np

import heal_loop
from common import runs
from evaluate import Profile
from tools import plot


def event(stage, round, p_auth=1 / 7, text="Yes.", spread=(-2, -3, -1), controls=None, **metrics):
    """One evaluation of 14 vignettes, `p_auth` of each on Authority."""
    p = np.full((14, 7), (1 - p_auth) / 6)
    p[:, 3] = p_auth
    found = Profile(list("abcdefghijklmn"), ["Care"] * 14, p, np.full(14, 0.95), controls=controls,
                    spread={"auth_nats": spread} if controls else {})
    metrics = dict(perplexity=5.0, drift=0.1, repetition=0.1, text_nats=3.0) | metrics
    return {"stage": stage, "round": round, **found.summary(), **metrics,
            "texts": [{"prompt": "<img src=x>", "text": text}], "profile": found.to_dict()}


def cells(events, stage):
    """{column: text} of the table's row of a stage."""
    head, *rows = plot.table_rows(events)
    return next(dict(zip(head, row)) for row in rows if row[0].startswith(stage))


def test_each_delta_has_its_interval_and_range_over_wordings():
    events = [event("base", -1, controls=[2.0, 3.0, 4.0], entropy=2.0, ended=0.25),
              event("healed", 0, 0.01, spread=(-4, -3.5, -1.2), controls=[2.0, 3.5, 4.0],
                    entropy=1.0, ended=0.5)]
    row = list(cells(events, "healed").values())
    assert row[1:4] == ["-2.7 [-2.7, -2.7]", "-2.0 to -0.2", "Care +0.1"]
    assert row[4:6] == ["0.9500 (+0.0000 [+0.0000, +0.0000])", "0.0000 [0.0000, 0.0000]"]
    assert row[6:] == ["5.0", "0.10", "1.00", "50%", "0.10", "3.00", "+3.17"]
    assert cells(events, "base")["ΔAuthority (nats)"] == "base -1.9"
    findings = plot.findings(events)
    assert "surgicality of healed r0" in findings and "base +3.00, healed r0 +3.17" in findings


def test_what_was_not_measured_is_blank_and_text_is_escaped(tmp_path):
    # an older run, without entropy and the like; silence, whose perplexity is not finite
    runs.write_text(tmp_path / "config.json", json.dumps(runs.settings(heal_loop.Config())))
    runs.write_text(tmp_path / "events.jsonl", runs.to_jsonl([
        event("base", -1), event("prompted", -1, 0.1, "<script>alert(1)</script>"),
        event("matched", 3, 0.05, dose=1.5, perplexity=float("inf"), drift=float("nan"))]))
    row = cells(plot.draw(tmp_path), "steering alone, dose 1.50")
    blank = "over wordings", "entropy", "ended", "controls", "ppl", "drift"
    assert {row[name] for name in blank} == {""}
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "&lt;script&gt;alert(1)" in page and "<script>" not in page and "<img src=x>" not in page


def test_the_page_of_a_run_shows_rounds_reasons_and_pictures(run):
    page = (run / "report.html").read_text("utf-8")
    for words in ("healed r1", "6 of", "reject reason", "controls, log-odds", "τ = 0.8 nats"):
        assert words in page
    assert page.count('src="data:image/png;base64,') == 2 == page.count("src=")
