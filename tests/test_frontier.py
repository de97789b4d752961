"""Records of runs and what is read off them: cost at matched Δtrait, intervals, the two pages."""
import pytest
import scipy.stats

from common.texts import NATS
from studies import frontier, paper
from tools import sweep


def event(stage, round, shift, cost, direction="down", **more):
    """A measured event: the trait moved so far from −2 nats, and every metric says `cost`."""
    sign = -1 if direction == "down" else 1
    metrics = {name: -2.0 for name in NATS} | {"auth_nats": -2.0 + sign * shift}
    return {"stage": stage, "round": round, **metrics, "coherence": 1 - cost, "axis": "auth_nats",
            "direction": direction, "n": 14, **dict.fromkeys(
                ("perplexity", "drift", "repetition", "text_nats"), cost), **more}


def record(path, arm="nll", seed=0, direction="down", steered=2.0, **config):
    """A run whose healed rounds are at these (Δtrait, cost)."""
    events = [event("base", -1, 0, 0.01, direction)]
    for r, (shift, cost) in enumerate(path):
        events += [event("steered", r, steered, 0.02, direction),
                   {"stage": "heal", "round": r, "D": 0.1},
                   event("healed", r, shift, cost, direction)]
    config = {"arm": arm, "command": "--seeds 0", "seed": seed, "model": "tiny", "doses": [1.0],
              "reg": "nll", "weight_decay": 100, "rounds": len(path), "agg": "rmse", "tau": 0.8,
              "ref": "base", "max_perplexity": 15.0, "lr": 3e-4} | config
    return sweep.Record(f"{arm}_s{seed}", config, events)


def alone(*path):
    events = [event("base", -1, 0, 0.01), event("prompted", -1, 0.4, 0.01)]
    events += [event("alone", 0, shift, cost, dose=dose) for dose, shift, cost in path]
    return sweep.Record("alone", {"arm": "alone", "command": "", "seed": 0, "model": "tiny"},
                        events)


def read(tmp_path, *records):
    """The records as frontier reads them from their files."""
    for run in records:
        sweep.save(run, tmp_path / "records")
    return frontier.read(tmp_path / "records")


def three_seeds(arm, costs, **config):
    return [record([(1.5, cost), (2.5, cost + 0.1), (2.2, cost)], arm, seed, **config)
            for seed, cost in enumerate(costs)]


def cells(page, first):
    """The cells after the first of every row that begins with it, table after table."""
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")]
    return [[c.strip() for c in row[1:]] for row in rows if row[0].strip() == first]


@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_level_is_read_off_the_line_through_its_first_crossing(tmp_path, direction):
    path = [(0.8, 0.02), (2.8, 0.06), (1.5, 0.5), (3.2, 0.9)]
    run, = read(tmp_path, record(path, direction=direction))
    drift = {level: frontier.at_trait(run, level).get("drift") for level in (1, 2, 3, 5, 0.8, 0.4)}
    assert drift[1] == pytest.approx(0.02 + 0.1 * 0.04)
    assert drift[2] == pytest.approx(0.02 + 0.6 * 0.04)  # the second is later
    assert drift[3] == pytest.approx(0.5 + 1.5 / 1.7 * 0.4)
    assert drift[5] is None
    assert drift[0.8] == pytest.approx(0.02)
    assert drift[0.4] == pytest.approx(0.015)  # from the base on


def test_retained_has_no_value_where_steering_moved_nothing(tmp_path):
    run, still = read(tmp_path, record([(2.0, 0.05)]), record([(1.0, 0.02)], seed=1, steered=0.0))
    assert run.of("healed")[0]["retained"] == 1 and run.of("healed")[0]["D"] == 0.1
    assert still.of("healed")[0]["retained"] is None


def test_the_spread_is_the_least_and_greatest_change_of_a_wording(tmp_path):
    run = record([(1.0, 0.1)])
    run.events[0]["spread"], run.events[-1]["spread"] = [-1.0, -2.0, -3.0], [-1.5, -4.0, -2.8]
    run.events[1]["spread"] = [-1.0, -2.0, -3.0]
    healed = read(tmp_path, run)[0].of("healed")[0]
    assert (healed["least wording"], healed["greatest wording"]) == pytest.approx((-0.2, 2.0))


def test_the_interval_is_the_t_interval_and_never_from_two():
    values = [0.1, 0.4, 0.25]
    low, high = scipy.stats.t.interval(0.95, 2, 0.25, scipy.stats.sem(values))
    assert frontier.over_seeds(values, 3) == f"0.250 [{low:.3f}, {high:.3f}]"
    assert frontier.over_seeds([0.5] * 3, 2) == "0.50 [0.50, 0.50]"
    assert frontier.over_seeds([0.4, 0.6], 2) == "0.50" and frontier.over_seeds([0.5], 1) == "0.5"
    assert frontier.over_seeds([0.4, None, 0.6], 2) == "0.50 (2 of 3)"
    assert frontier.over_seeds([None, None], 2) == "n/a"


def test_arms_stand_in_the_order_of_names_and_numbers(tmp_path):
    arms = ["nll", "kl_rev_tau0.8", "kl_rev_tau0.05", "kl_rev_tau10", "kl_rev_tau1e-05", "kl_rev"]
    runs_of = read(tmp_path, *(record([(1.0, 0.1)], arm, seed) for seed in (1, 0) for arm in arms))
    by_arm = frontier.by_arm(runs_of)
    assert list(by_arm) == ["kl_rev", "kl_rev_tau1e-05", "kl_rev_tau0.05", "kl_rev_tau0.8",
                            "kl_rev_tau10", "nll"]
    assert [run.config["seed"] for run in by_arm["nll"]] == [0, 1]


def test_the_page_has_each_arm_at_matched_trait_and_by_round(tmp_path):
    ended = record([], "wd")
    ended.events.append({"stage": "ended", "round": 0, "why": "too few completions kept"})
    records = read(tmp_path, *three_seeds("kl_rev_rmse", [0.1, 0.2, 0.3]), ended,
                   *three_seeds("nll", [0.5, 0.7]), alone((1.0, 1.0, 0.03)))
    page = frontier.page(records)
    at = [row[0] for row in cells(page, "nll")[:4]]
    assert at[2:] == ["n/a", "n/a"] and "[" not in at[0] and at[1] == "0.650"
    assert [row[0] for row in cells(page, "steering alone")] == ["0.030", "n/a", "n/a", "n/a",
                                                                "dose 1"]
    of_kl = cells(page, "kl_rev_rmse")
    assert of_kl[1][0].startswith("0.250 [") and [row[0] for row in of_kl[4:]] == ["0", "1", "2"]
    assert of_kl[4][1:5] == ["3", "2.00 [2.00, 2.00]", "1.50 [1.50, 1.50]", "0.75 [0.75, 0.75]"]
    assert "persona prompt" in page and "wd_s0 ended in round 0: too few completions kept" in page
    frontier.figure(records).savefig(tmp_path / "frontier.png")


def test_traits_of_two_axes_share_no_page(tmp_path):
    other = record([(1.0, 0.1)], seed=1)
    for e in other.events:
        e["axis"] = "care_nats"
    with pytest.raises(ValueError, match="auth_nats and care_nats, .*; fix: a sweep for each"):
        frontier.page(read(tmp_path, record([(1.0, 0.1)]), other))


def test_a_metric_that_some_record_lacks_is_left_out(tmp_path):
    records = three_seeds("nll", [0.1, 0.2])
    for run in records:
        for e in run.events:
            e["judge_perplexity"] = 3.0
    del records[0].events[0]["drift"]
    metrics = frontier.metrics_of(read(tmp_path, *records))
    assert "judge" in metrics and "plain text" in metrics
    assert not {"drift", "entropy", "least wording"} & set(metrics)


def test_what_is_no_record_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="holds no records; fix: "):
        sweep.load(tmp_path)
    (tmp_path / "events.jsonl").write_text('{"stage": "base", "round": -1}\n')
    with pytest.raises(ValueError, match="holds no records; fix: "):
        sweep.load(tmp_path)


@pytest.fixture
def sweeps(tmp_path):
    """Two sweeps of one arm: cut and whole, with seeds 0 to 2 and 1 to 3."""
    for run in (*three_seeds("nll", [0.1, 0.2, 0.3]), alone((4.0, 3.0, 0.3))):
        sweep.save(run, tmp_path / "records" / "cut")
    for run in three_seeds("nll", [0.5, 0.7, 0.8], top_k=0, top_p=1.0, max_perplexity=1e9):
        run.config["seed"] += 1
        sweep.save(run, tmp_path / "records" / "whole")
    return paper.Sweeps(tmp_path / "records", tmp_path)


def test_a_difference_is_taken_within_seeds(sweeps):
    assert sweeps.get("cut/nll", "plain text", r=2).startswith("0.200 [")
    # seeds 1 and 2: 0.5 − 0.2 and 0.7 − 0.3, where both moved 2 nats and after round 2 alike
    for where in ({"r": 2}, {"level": 2}):
        assert sweeps.difference("whole/nll", "cut/nll", "plain text", **where) == "0.350"
    assert sweeps.difference("whole/nll", "cut/nll", "plain text", level=9) == "n/a"
    assert sweeps.counts() == "6 runs, 18 rounds"


def test_a_recipe_is_what_its_settings_say(sweeps):
    table = sweeps.recipes(["cut/nll", "whole/nll"], "cut/alone", 2)
    cut, whole = cells(table, "steered")
    assert cut[:2] + cut[3:6] == ["samples", "top-k 64, top-p 0.95", "none", "3", "3"]
    assert whole[1] == "whole, any perplexity" and cut[7].startswith("0.250 [")
    assert [cells(table, name)[0][5:8] for name in ("base", "steering alone")] == [
        ["1", "0.00", "0.010"], ["1", "2.00", "0.203"]]
    never, = cells(sweeps.recipes(["cut/nll"], "", 5), "steered")
    assert never[6].startswith("2.20 [")  # after its last round


def test_contrasts_that_were_not_run_are_left_out(sweeps):
    table = sweeps.contrasts({"(a)": ("whole/nll", "cut/nll", {"level": 2}),
                              "(b)": ("soft/nll", "cut/nll", {"r": 0})})
    assert cells(table, "(a)")[0][:2] == ["0.00", "0.350"] and not cells(table, "(b)")
