"""Records of runs and what is read off them: cost at equal trait, peaks, slopes, intervals."""
import json
import math

import pytest
import scipy.stats

from studies import frontier
from common import runs
from evaluate import NATS


def event(stage, round, trait, cost, direction="down", **more):
    """A measured event: the trait moved so far from −2 nats, and every measure says `cost`."""
    sign = -1 if direction == "down" else 1
    numbers = {name: -2.0 for name in NATS} | {"auth_nats": -2.0 + sign * trait}
    return {"stage": stage, "round": round, **numbers, "coherence": 1 - cost, "perplexity": cost,
            "drift": cost, "repetition": cost, "text_nats": cost, "axis": "auth_nats",
            "direction": direction, "n": 14, **more}


def record(path, arm="nll", seed=0, direction="down", steered=2.0):
    """A run whose healed rounds are at these (moved, cost)."""
    events = [event("base", -1, 0, 0.01, direction)]
    for r, (moved, cost) in enumerate(path):
        events += [event("steered", r, steered, 0.02, direction), {"stage": "heal", "round": r,
                   "D": 0.1}, event("healed", r, moved, cost, direction)]
    config = {"arm": arm, "command": "--seeds 0", "seed": seed, "model": "tiny"}
    return frontier.Record(f"{arm}_s{seed}", config, events)


def alone(*path):
    events = [event("base", -1, 0, 0.01), event("prompted", -1, 0.4, 0.01)]
    events += [event("alone", 0, moved, cost, dose=dose) for dose, moved, cost in path]
    return frontier.Record("alone", {"arm": "alone", "command": "", "seed": 0, "model": "tiny"},
                           events)


# ---- one run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["down", "up"])
def test_the_cost_at_a_level_lies_on_the_line_through_its_first_crossing(direction):
    run = record([(0.8, 0.02), (2.8, 0.06), (1.5, 0.5), (3.2, 0.9)], direction=direction)
    points = frontier.path(run, "healed", "drift")
    assert frontier.at_trait(points, 1) == pytest.approx(0.02 + 0.1 * 0.04)
    assert frontier.at_trait(points, 2) == pytest.approx(0.02 + 0.6 * 0.04)  # the second is later
    assert frontier.at_trait(points, 3) == pytest.approx(0.5 + 1.5 / 1.7 * 0.4)
    assert frontier.at_trait(points, 5) is None
    assert frontier.at_trait(points, 0.8) == pytest.approx(0.02)
    assert frontier.at_trait(points, 0.4) == pytest.approx(0.015)  # from the base on


def test_steering_alone_is_a_path_by_dose_however_its_doses_were_measured():
    run = alone((4.0, 3.0, 0.3), (1.0, 1.0, 0.1), (2.0, 1.5, 0.2))
    assert frontier.path(run, "alone", "drift") == [(0, 0.01), (1.0, 0.1), (1.5, 0.2), (3.0, 0.3)]


def test_a_slope_has_the_sign_of_what_the_trait_cost():
    run = record([(2.0, 0.05), (2.0, 0.002), (-1.0, 0.05), (0.01, 0.05)])
    worse, better, backwards, still = run.of("healed")
    assert frontier.slope(run, worse, "drift") == pytest.approx(0.02)
    assert frontier.slope(run, better, "drift") == pytest.approx(-0.004)
    assert frontier.slope(run, backwards, "drift") is None
    assert frontier.slope(run, still, "drift") is None
    assert frontier.coh_cost(run, better) == pytest.approx(0.004)
    assert frontier.coh_cost(run, still) is None
    assert frontier.coh_cost(run, event("healed", 0, 5, 0.9)) is None  # collapsed


def test_retained_is_what_healing_keeps_of_what_steering_reached():
    run = record([(1.0, 0.02), (3.0, 0.02)])
    assert [frontier.retained(run, r) for r in (0, 1)] == [0.5, 1.5]
    assert frontier.retained(record([(1.0, 0.02)], steered=0.0), 0) is None


# ---- over seeds ---------------------------------------------------------------------------------


def test_the_interval_over_seeds_is_the_t_interval_and_never_from_two():
    values = [0.1, 0.4, 0.25]
    low, high = scipy.stats.t.interval(0.95, 2, 0.25, scipy.stats.sem(values))
    assert frontier.over_seeds(values, 3) == f"0.250 [{low:.3f}, {high:.3f}]"
    assert frontier.over_seeds([0.5] * 3, 2) == "0.50 [0.50, 0.50]"
    assert frontier.over_seeds([0.4, 0.6], 2) == "0.50" and frontier.over_seeds([0.5], 1) == "0.5"
    assert frontier.over_seeds([0.4, None, 0.6], 2) == "0.50 (2 of 3)"
    assert frontier.over_seeds([None, None], 2) == "n/a"


def cells(page, first):
    """The cells after the first of every row that begins with it, table after table."""
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")]
    return [[c.strip() for c in row[1:]] for row in rows if row[0].strip() == first]


def three_seeds(arm, costs):
    return [record([(1.5, cost), (2.5, cost + 0.1), (2.2, cost)], arm, seed)
            for seed, cost in enumerate(costs)]


def test_the_page_has_each_arm_at_equal_trait_after_its_rounds_and_at_its_peak():
    records = [*three_seeds("kl_rev_rmse", [0.1, 0.2, 0.3]), *three_seeds("nll", [0.5, 0.7]),
               alone((1.0, 1.0, 0.03))]
    page = frontier.page(records)
    matched, *_ = cells(page, "nll")
    assert matched[2:] == ["n/a", "n/a"] and "[" not in matched[0]
    assert float(matched[1]) == pytest.approx((0.55 + 0.75) / 2, abs=1e-4)
    assert [row[0] for row in cells(page, "steering alone")] == ["0.0300", "0.03", "0.030", "0.030",
                                                                "0.030"]
    of_kl = cells(page, "kl_rev_rmse")
    assert all("[" in row[1] for row in of_kl[:5])
    last = of_kl[5]
    assert last[0] == "3" and last[1].startswith("2.20 [") and last[5].startswith("2.50 [")
    assert last[7] == "1 1 1"
    assert [row[0] for row in of_kl[7:]] == ["0", "1", "2"]
    assert of_kl[7][4].startswith("0.75 [") and "persona prompt" in page


def test_arms_stand_in_the_order_of_their_names_and_of_the_numbers_in_them():
    arms = ["nll", "kl_rev_tau0.8", "kl_rev_tau0.05", "kl_rev_tau10", "kl_rev_tau1e-05", "kl_rev"]
    records = [record([(1.0, 0.1)], arm, seed) for seed in (1, 0) for arm in arms]
    by_arm = frontier.by_arm(records)
    assert list(by_arm) == ["kl_rev", "kl_rev_tau1e-05", "kl_rev_tau0.05", "kl_rev_tau0.8",
                            "kl_rev_tau10", "nll"]
    assert [run.config["seed"] for run in by_arm["nll"]] == [0, 1]


def test_a_run_that_ended_before_its_first_round_is_listed_and_breaks_nothing(tmp_path):
    ended = record([], "nll")
    ended.events.append({"stage": "ended", "round": 0, "why": "data starved"})
    page = frontier.page([ended, *three_seeds("wd", [0.1, 0.2])])
    assert "- nll_s0, round 0: data starved" in page
    frontier.figure([ended]).savefig(tmp_path / "frontier.png")


def test_a_measure_that_some_run_lacks_is_left_out_and_a_judge_is_let_in():
    records = three_seeds("nll", [0.1, 0.2])
    assert "judge_perplexity" not in frontier.costs_of(records)
    for run in records:
        for e in run.events:
            e["judge_perplexity"] = 3.0
    assert "judge_perplexity" in frontier.costs_of(records)
    del records[0].base["drift"]
    assert "drift" not in frontier.costs_of(records)


# ---- records ------------------------------------------------------------------------------------


def test_tables_are_remade_from_the_records_alone_to_the_byte(tmp_path, monkeypatch):
    records = [*three_seeds("nll", [0.1, 0.2, 0.3]), alone((1.0, 1.0, 0.03))]
    for one in records:
        frontier.save(one, tmp_path / "runs")
    frontier.draw(records, tmp_path / "first" / "arms.md")
    frontier.main(frontier.Config(tmp_path / "runs", tmp_path / "again" / "arms.md"))
    for name in ("arms.md", "arms.png"):
        first, again = ((tmp_path / which / name).read_bytes() for which in ("first", "again"))
        assert first == again


def test_a_record_written_again_keeps_what_a_judge_added_to_the_same_events(tmp_path):
    judged = record([(1.0, 0.01), (2.0, 0.02)], "nll")
    frontier.save(judged, tmp_path)
    for e in judged.events:
        e["judge_perplexity"] = 3.0
    frontier.save(judged, tmp_path)
    # a sweep that is run again has the same numbers, but for a last round made anew
    again = record([(1.0, 0.01), (2.5, 0.02)], "nll")
    frontier.save(again, tmp_path)
    [kept] = frontier.load(tmp_path)
    assert [e.get("judge_perplexity") for e in kept.events[:-1]] == [3.0] * (len(kept.events) - 1)
    assert "judge_perplexity" not in kept.events[-1]


def test_what_is_no_record_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="holds no records; fix: "):
        frontier.load(tmp_path)
    (tmp_path / "events.jsonl").write_text('{"stage": "base", "round": -1}\n')
    with pytest.raises(ValueError, match="events.jsonl is not a record .*; fix: "):
        frontier.load(tmp_path)


@pytest.mark.slow
def test_a_record_holds_every_number_of_the_run_in_a_few_kilobytes(run, tmp_path):
    one = frontier.record(run, arm="nll", command="")
    frontier.save(one, tmp_path)
    file = tmp_path / f"{run.name}.jsonl"
    assert file.stat().st_size < 8000
    events = runs.read_events(run)
    again, = frontier.load(tmp_path)
    assert again.config == json.loads((run / "config.json").read_text()) | one.config
    assert [(e["stage"], e["round"]) for e in again.events] == [
        (e["stage"], e["round"]) for e in events]
    for before, after in zip(events, again.events):
        for name, value in before.items():
            if isinstance(value, float):
                assert math.isclose(after[name], value, rel_tol=1e-5)
        assert not {"texts", "profile", "log"} & after.keys()
        if "profile" in before:
            assert after["axis"] == before["profile"]["axis"]
            assert after["n"] == len(before["profile"]["ids"])
