"""The sweep on a tiny random model: which arms there are, what they share, what is run again."""
import json
import math
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

import evaluate
import heal_loop
import lora
from common import checks, runs, texts
from studies import frontier
from tools import plot, sweep


def config(tmp_path, **changes):
    """A sweep of one arm and one seed."""
    return replace(sweep.Config(reg=("nll",), agg=("rmse",), seeds=(0,), out=tmp_path / "sweep",
                                records=tmp_path / "records"), **changes)


def test_every_combination_that_makes_sense_is_an_arm_once(tmp_path):
    arms = sweep.arms(config(tmp_path, reg=("nll", "kl_fwd", "kl_rev", "wd", "nll"),
                             agg=("mean", "rmse"), seeds=(0, 1, 2)))
    assert list(arms) == ["nll", "kl_fwd_mean", "kl_fwd_rmse", "kl_rev_mean", "kl_rev_rmse", "wd"]
    assert all([run.seed for run in of_arm] == [0, 1, 2] for of_arm in arms.values())
    assert len({run.out for run in sum(arms.values(), [])}) == 18


def test_only_what_varies_and_has_an_effect_names_an_arm(tmp_path):
    arms = sweep.arms(config(
        tmp_path, reg=("nll", "wd"), tau=(0.05, 0.2), weight_decay=(10, 100), lr=(1e-4, 3e-4),
        teacher=("steered", "prompted"), doses=("0", "1,2")))
    ways = ("steered_dose0", "steered_dose1+2", "prompted")
    assert set(arms) == {f"{reg}_{way}{decay}_lr{lr}" for way in ways for lr in (0.0001, 0.0003)
                         for reg, decay in (("nll", ""), ("wd", "_decay10"), ("wd", "_decay100"))}
    run, = arms["wd_steered_dose1+2_decay10_lr0.0003"]
    assert (run.reg, run.doses, run.weight_decay, run.lr) == ("wd", (1, 2), 10, 3e-4)


@pytest.mark.parametrize("name, values, arms", [
    ("ref", ("prev", "good"), "refprev refgood"), ("dose_nats", ("0.5", "1,2"), "nats0.5 nats1+2"),
    ("tau", (0.05, 1.0), "tau0.05 tau1"), ("lam", (1.0, 4.0), "lam1 lam4"),
    ("epochs", (1, 3), "epochs1 epochs3"), ("rank", (16, 64), "rank16 rank64"),
    ("trait", ("care", "authority"), "care authority"),
    ("teacher", ("steered", "prompted"), "steered prompted"),
    ("targets", ("samples", "soft"), "samples soft"), ("top_k", (0, 64), "k0 k64"),
    ("top_p", (0.95, 1.0), "p0.95 p1"), ("max_perplexity", (15.0, 1e9), "ppl15 ppl1e+09")])
def test_every_flag_that_may_vary_makes_arms(tmp_path, name, values, arms):
    by_arm = sweep.arms(config(tmp_path, reg=("kl_rev",), **{name: values}))
    assert list(by_arm) == [f"kl_rev_rmse_{arm}" for arm in arms.split()]
    if name != "dose_nats":
        assert [getattr(run, name) for run, in by_arm.values()] == list(values)


def test_every_flag_of_the_loop_holds_for_all_arms(monkeypatch):
    configs = []

    def main(cfg):
        configs.append(cfg)
    monkeypatch.setattr(sys, "argv", (
        "sweep.py --reg nll kl_rev --tau 0.7 --seeds 3 4 --doses 0 1,2.5 --agg max --top-k 0 "
        "--out x --rounds 5 --baselines --executor slurm --executor here").split())
    runs.cli(sweep.Config, main, rest="run")
    [cfg] = configs
    assert (cfg.reg, cfg.seeds, cfg.executor) == (("nll", "kl_rev"), (3, 4), "here")
    every = sum(sweep.arms(cfg).values(), [])
    assert [run.doses for run in every] == [(0,), (0,), (1, 2.5), (1, 2.5)] * 2
    for run in every:
        assert (run.tau, run.top_k, run.rounds, run.baselines) == (0.7, 0, 5, True)
        assert run.n_keep == heal_loop.Config.n_keep and run.resume is None and run.fork is None


@pytest.mark.parametrize("changes, words", [
    ({"lr": (1e-4, 7)}, "--lr 7"), ({"doses": ("1,x",)}, "could not convert string to float: 'x'"),
    ({"run": heal_loop.Config(seed=3)}, "--seed is a single run's; fix: "),
    ({"trait": ("care", str(texts.DATA / "traits/care.json"))}, "two files called .*care.json")])
def test_flags_that_make_no_sweep_are_named(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        sweep.arms(config(tmp_path, **changes))


def test_a_pair_of_ones_own_is_swept_too(tmp_path):
    own = heal_loop.Config(pos="Be brief.", neg="Be wordy.")
    by_arm = sweep.arms(config(tmp_path, reg=("nll", "kl_rev"), agg=("mean", "rmse"), run=own))
    assert list(by_arm) == ["nll", "kl_rev_mean", "kl_rev_rmse"]


def test_arms_share_round_0_unless_they_differ_before_healing(tmp_path):
    cfg = config(tmp_path, reg=("nll", "kl_rev"), teacher=("steered", "prompted"), seeds=(0, 1),
                 top_k=(0, 64), top_p=(0.95, 1.0), targets=("samples", "soft"), epochs=(1, 3))
    groups = {}
    for run in sum(sweep.arms(cfg).values(), []):
        key = (run.teacher, run.top_k, run.top_p, run.seed)
        groups.setdefault(sweep.upstream(run), []).append(key)
    assert len(groups) == 16
    assert all(len(set(keys)) == 1 and len(keys) == 8 for keys in groups.values())


@pytest.fixture(scope="module")
def settings(tiny_folder):
    """Settings under which a run takes about two seconds."""
    return heal_loop.Config(
        model=str(tiny_folder), n_keep=6, max_new_tokens=12, n_vignettes=7, epochs=1, batch_size=2,
        n_contexts=4, max_perplexity=1e9, min_diversity=0, max_repetition=1, dtype="float32",
        rounds=2, tau=0.0, lam=100.0, lr=0.009)


@pytest.fixture(scope="module")
def swept(settings, tmp_path_factory):
    """A finished sweep of two arms: its config and the model. Tests leave it as they found it."""
    cfg = config(tmp_path_factory.mktemp("swept"), reg=("nll", "kl_rev"), alone=(2.0,),
                 run=settings)
    loaded, load = [], checks.load

    def noted(*which):
        loaded.append(load(*which))
        return loaded[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "COHERENCE_FLOOR", 0.0)  # a random model has no coherence to lose
        patch.setattr(checks, "load", noted)
        patch.setattr(sys, "argv", ["sweep.py", "--reg", "nll", "kl_rev"])
        sweep.main(cfg)
    [(model, chat)] = loaded  # read once
    assert not lora.is_attached(model)
    return cfg, (model, chat)


@pytest.fixture
def no_floor(monkeypatch):
    monkeypatch.setattr(evaluate, "COHERENCE_FLOOR", 0.0)


def contents(folder):
    """{path: content} of every file of a run but the lock; events without times and forks."""
    found = {}
    for file in folder.rglob("*"):
        if file.name == "events.jsonl":
            found[str(file.relative_to(folder))] = [
                {k: v for k, v in e.items() if k != "seconds"}
                for e in runs.read_jsonl(file) if e["stage"] != "forked"]
        elif file.is_file() and file.name != "lock":
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


@pytest.mark.slow
def test_a_sweep_leaves_whole_runs_records_and_a_page(swept, tmp_path):
    cfg, _ = swept
    folder = cfg.records / "sweep"
    by_name = {run.name: run for run in sweep.load(folder)}
    assert list(by_name) == ["alone", "kl_rev_rmse_s0", "nll_s0"]
    for run in sum(sweep.arms(cfg).values(), []):
        assert sweep.is_finished(run) and (run.out / "report.html").exists()
        record, events = by_name[run.out.name], runs.read_events(run.out)
        settings = json.loads((run.out / "config.json").read_text(encoding="utf-8"))
        labels = {"arm": run.out.name[:-3], "command": "--reg nll kl_rev"}
        assert record.config == settings | labels and len(record.events) == len(events)
        for kept, event in zip(record.events, events):
            assert (kept["stage"], kept["round"]) == (event["stage"], event["round"])
            for name, value in event.items():
                if isinstance(value, float):
                    assert math.isclose(kept[name], value, rel_tol=1e-5)
            assert not {"texts", "profile", "log"} & kept.keys()
            if "profile" in event:
                assert kept["axis"] == "auth_nats" and kept["n"] == 7
                assert np.allclose(kept["spread"], event["profile"]["spread"]["auth_nats"])
                assert {"perplexity", "drift", "entropy", "ended", "repetition", "text_nats",
                        "control_nats", "care_nats", "coherence"} <= kept.keys()
    assert all(file.stat().st_size < 12000 for file in folder.iterdir())

    frontier.main(frontier.Config(folder, tmp_path / "arms.md"))
    base, *_, last = [e for e in events if e["stage"] in ("base", "healed")]
    page = (tmp_path / "arms.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines()]
    [row] = [row for row in rows if row[1:3] == [record.config["arm"], "1"]]
    assert row[5] == f"{base['auth_nats'] - last['auth_nats']:.2f}" and "least wording" in page


@pytest.mark.slow
def test_only_a_new_dose_of_steering_alone_is_measured(swept, tmp_path):
    cfg, loaded = swept
    alone = sweep.references(cfg, sweep.arms(cfg)["nll"][0])
    alone = replace(alone, out=shutil.copytree(alone.out, tmp_path / "alone"))
    before = runs.read_events(alone.out)
    assert sweep.doses_left(alone, (2.0, 2.0)) == [] and sweep.doses_left(alone, (1, 2)) == [1]
    sweep.steer_alone(alone, (1.0, 2.0), loaded)
    *same, new = runs.read_events(alone.out)
    assert same == before and (new["stage"], new["dose"]) == ("alone", 1.0)
    steered = next(e for e in before if e["stage"] == "alone")
    assert new["auth_nats"] != steered["auth_nats"] and new["drift"] < steered["drift"]


@pytest.mark.slow
def test_a_forked_arm_ends_in_the_bytes_of_one_alone(swept, tmp_path, no_floor):
    forked, = sweep.arms(swept[0])["kl_rev_rmse"]
    heal_loop.main(replace(forked, out=tmp_path / "alone"))
    a, b = contents(forked.out), contents(tmp_path / "alone")
    assert a.keys() == b.keys() and [name for name in a if a[name] != b[name]] == []


@pytest.mark.slow
def test_a_second_call_makes_only_what_is_missing(swept, monkeypatch, no_floor):
    cfg, resumed, main, load = swept[0], [], heal_loop.main, checks.load

    def noted(run, loaded):
        resumed.append(run.resume)
        return main(run, loaded)
    monkeypatch.setattr(sweep.heal_loop, "main", noted)
    monkeypatch.setattr(checks, "load", None)  # what runs nothing reads no model
    sweep.main(cfg)
    assert resumed == []

    monkeypatch.setattr(checks, "load", load)
    cut = cfg.out / "kl_rev_rmse_s0"
    before = contents(cut)
    (cut / "round_1").rename(cut / "round_1.tmp")  # killed before the rename that finishes it
    sweep.main(replace(cfg, only=cut.name))
    assert resumed == [cut] and contents(cut) == before


@pytest.mark.slow
def test_an_arm_that_keeps_too_few_is_a_result(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "draw", runs.read_events)  # drawing takes as long as a tiny run
    too_few = replace(settings, max_perplexity=1.001, rounds=1, n_keep=2)
    cfg = config(tmp_path, reg=("nll", "kl_rev"), alone=(), run=too_few)
    sweep.main(cfg)
    for run in sweep.load(cfg.records / "sweep"):
        ended, = run.of("ended")
        assert "too few completions kept" in ended["why"] and ended["round"] == 0
    with pytest.raises(ValueError, match="finished a round; fix: "):
        frontier.main(frontier.Config(cfg.records / "sweep", tmp_path / "arms.md"))
