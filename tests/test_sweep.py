"""The sweep on a tiny random model: which arms there are, what they share, what is run again."""
import shutil
import sys
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

import evaluate
from studies import frontier
import heal_loop
import lora
from common import models
from tools import plot
from common import runs
from tools import sweep

SHARED = ("vector.safetensors", "sampled.jsonl", "kept.jsonl")  # of a round, all before its healing


@pytest.fixture(scope="module")
def settings(tiny_folder):
    """Settings under which a run takes about two seconds."""
    return heal_loop.Config(
        model=str(tiny_folder), n_keep=6, max_new_tokens=12, n_vignettes=7, epochs=1, batch_size=2,
        n_contexts=4, max_perplexity=1e9, min_diversity=0, max_repetition=1, dtype="float32",
        rounds=2, tau=0.0, lam=100.0, lr=0.009)


def config(settings, tmp_path, **changes):
    """A sweep of two arms and two seeds."""
    cfg = sweep.Config(reg=("nll", "kl_rev"), agg=("rmse",), seeds=(0, 1), alone=(2.0,),
                       out=tmp_path / "sweep", table=tmp_path / "arms.md", run=settings)
    return replace(cfg, **changes)


class Swept(NamedTuple):
    """A finished sweep."""
    cfg: sweep.Config
    arms: dict[str, list[heal_loop.Config]]
    loaded: list  # every (model, tokenizer) that was read from disk


@pytest.fixture(scope="module")
def swept(settings, tmp_path_factory):
    """Tests leave it as they found it."""
    cfg, loaded, load = config(settings, tmp_path_factory.mktemp("swept")), [], models.load

    def noted(*which):
        loaded.append(load(*which))
        return loaded[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "COHERENCE_FLOOR", 0.0)  # a random model has no coherence to lose
        patch.setattr(models, "load", noted)
        sweep.main(cfg)
    return Swept(cfg, sweep.arms(cfg), loaded)


@pytest.fixture
def no_floor(monkeypatch):
    monkeypatch.setattr(evaluate, "COHERENCE_FLOOR", 0.0)


@pytest.fixture
def no_pictures(monkeypatch):
    """For tests that look at numbers alone: drawing takes as long as a tiny run."""
    monkeypatch.setattr(plot, "draw", runs.read_events)


def untimed(file):
    """The events of a file without their times, and without the note of a fork."""
    events = [e for e in runs.read_jsonl(file) if e["stage"] != "forked"]
    return [{key: value for key, value in e.items() if key != "seconds"} for e in events]


def contents(folder):
    """{path: content} of every file of a run, or of a round, but the lock."""
    found = {}
    for file in folder.rglob("*"):
        if file.is_file() and file.name != "lock":
            content = untimed(file) if file.name == "events.jsonl" else file.read_bytes()
            found[str(file.relative_to(folder))] = content
    return found


# ---- the flags ----------------------------------------------------------------------------------


def test_every_combination_that_makes_sense_is_an_arm_once():
    cfg = sweep.Config(reg=("nll", "kl_fwd", "kl_rev", "wd", "nll"), agg=("mean", "rmse"),
                       seeds=(0, 1, 2))
    arms = sweep.arms(cfg)
    assert list(arms) == ["nll", "kl_fwd_mean", "kl_fwd_rmse", "kl_rev_mean", "kl_rev_rmse", "wd"]
    assert all([run.seed for run in of_arm] == [0, 1, 2] for of_arm in arms.values())
    assert len({run.out for of_arm in arms.values() for run in of_arm}) == 18
    assert {(run.reg, run.agg) for run in arms["kl_fwd_mean"]} == {("kl_fwd", "mean")}


def parsed(monkeypatch, *argv):
    """The sweep.Config of a command line."""
    given = []

    def main(cfg):
        given.append(cfg)
    monkeypatch.setattr(sys, "argv", ["sweep.py", *argv])
    runs.cli(sweep.Config, main, rest="run")
    return given[0]


def test_every_flag_of_the_loop_works_and_holds_for_all_arms(monkeypatch):
    cfg = parsed(monkeypatch, *("--reg nll kl_rev --tau 0.7 --seeds 3 4 --doses 1,2.5,3 --agg max "
                                "--out x --rounds 5 --baselines").split())
    assert (cfg.reg, cfg.agg, cfg.seeds) == (("nll", "kl_rev"), ("max",), (3, 4))
    every = [run for of_arm in sweep.arms(cfg).values() for run in of_arm]
    assert len(every) == 4
    for run in every:
        assert (run.tau, run.doses, run.rounds, run.baselines) == (0.7, (1, 2.5, 3), 5, True)
        assert run.n_keep == heal_loop.Config.n_keep and run.resume is None and run.fork is None


def test_flags_that_leave_nothing_to_run_are_named():
    for name in ("reg", "agg", "seeds"):
        with pytest.raises(ValueError, match=f"--{name} is empty; fix: give at least one"):
            sweep.arms(sweep.Config(**{name: ()}))


# ---- the runs -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_leaves_whole_run_folders_and_a_table(swept):
    for of_arm in swept.arms.values():
        for run in of_arm:
            assert sweep.is_finished(run) and (run.out / "report.html").exists()
    said = swept.cfg.table.read_text()
    after_last = said[said.index("## After the last round"):said.index("Slope:")]
    lines = {line.split("|")[1].strip(): line for line in after_last.splitlines() if "|" in line}
    assert {"nll", "kl_rev_rmse"} <= set(lines) and "nan" not in said
    assert "steering alone, dose 2" in said and "persona prompt" in said
    assert "`python -m tools.sweep --reg nll kl_rev --agg rmse --seeds 0 1 --rounds 2 " in said
    assert str(swept.cfg.out.parent) not in said
    assert lines["nll"].split("|", 2)[2] != lines["kl_rev_rmse"].split("|", 2)[2]
    shifts = []
    for run in swept.arms["nll"]:
        base, *points = plot.measured(runs.read_events(run.out))
        healed = [p.profile for p in points if p.stage == "healed"]
        shifts.append(base.profile.value("auth_nats") - healed[-1].value("auth_nats"))
    assert lines["nll"].split("|")[3].strip() == f"{np.mean(shifts):.2f}"


@pytest.mark.slow
def test_the_page_is_remade_from_the_records_alone(swept, tmp_path):
    table, records = swept.cfg.table, swept.cfg.table.parent / "runs" / "sweep"
    assert sorted(p.stem for p in records.iterdir()) == [
        "alone", "kl_rev_rmse_s0", "kl_rev_rmse_s1", "nll_s0", "nll_s1"]
    frontier.main(frontier.Config(records, tmp_path / "arms.md"))
    assert (tmp_path / "arms.md").read_text() == table.read_text()
    assert (tmp_path / "arms.png").read_bytes() == table.with_suffix(".png").read_bytes()


@pytest.mark.slow
def test_another_dose_of_steering_alone_is_measured_and_the_others_are_not_again(swept,
                                                                                 tmp_path):
    alone = sweep.references(swept.cfg, swept.arms["nll"][0])
    alone = replace(alone, out=shutil.copytree(alone.out, tmp_path / "alone"))
    before = runs.read_events(alone.out)
    assert sweep.doses_left(alone, (2.0, 2.0)) == [] and sweep.doses_left(alone, (1, 2)) == [1]
    sweep.steer_alone(alone, (1.0, 2.0), swept.loaded[0])
    *same, new = runs.read_events(alone.out)
    assert same == before and (new["stage"], new["dose"]) == ("alone", 1.0)
    steered = next(e for e in before if e["stage"] == "alone")
    assert new["auth_nats"] != steered["auth_nats"] and new["drift"] < steered["drift"]


@pytest.mark.slow
def test_arms_of_a_seed_share_round_0_to_the_byte_and_seeds_do_not(swept):
    nll, kl = swept.arms["nll"], swept.arms["kl_rev_rmse"]
    for name in SHARED:
        ours, theirs, other_seed = ((run.out / "round_0" / name).read_bytes()
                                    for run in (kl[0], nll[0], nll[1]))
        assert ours == theirs
        assert ours != other_seed or name == "vector.safetensors"  # nothing drawn goes into it
    common = []  # the times of the events included: they were copied, not made again
    for run in (nll[0], kl[0]):
        common.append([e for e in runs.read_events(run.out) if e["stage"] == "base" or (
            e["round"] == 0 and e["stage"] in ("extract", "distil", "steered"))])
    assert common[0] == common[1] and len(common[0]) == 4


@pytest.mark.slow
def test_an_arm_that_forked_ends_in_the_bytes_of_one_that_ran_alone(swept, tmp_path, no_floor):
    forked = swept.arms["kl_rev_rmse"][1]
    heal_loop.main(replace(forked, out=tmp_path / "alone"))
    a, b = contents(forked.out), contents(tmp_path / "alone")
    assert a.keys() == b.keys() and [name for name in a if a[name] != b[name]] == []


@pytest.mark.slow
def test_the_model_is_read_once_and_handed_out_clean(swept, settings):
    (model, _), = swept.loaded
    assert not hasattr(model, "lora_config")
    ours = model.state_dict()
    theirs = models.load(settings.model, "cpu", "float32")[0].state_dict()
    assert ours.keys() == theirs.keys()
    assert all((value == theirs[key]).all() for key, value in ours.items())


@pytest.mark.slow
def test_a_second_call_runs_nothing_and_a_cut_run_goes_on_alone(swept, monkeypatch, no_floor):
    ran, main, load = [], heal_loop.main, models.load

    def noted(run, loaded):
        ran.append(run.resume)
        return main(run, loaded)
    monkeypatch.setattr(sweep.heal_loop, "main", noted)
    monkeypatch.setattr(models, "load", None)  # what runs nothing reads no model
    table = swept.cfg.table.read_text()
    sweep.main(swept.cfg)
    assert ran == [] and swept.cfg.table.read_text() == table

    monkeypatch.setattr(models, "load", load)
    cut = swept.arms["kl_rev_rmse"][0].out
    before = contents(cut)
    (cut / "round_1").rename(cut / "round_1.tmp")  # killed before the rename that finishes it
    sweep.main(swept.cfg)
    assert ran == [cut] and contents(cut) == before


@pytest.mark.slow
def test_an_arm_that_was_killed_while_it_forked_begins_again(swept, tmp_path, monkeypatch):
    trunk = swept.arms["nll"][0].out
    arm = replace(swept.arms["kl_rev_rmse"][0], out=tmp_path / "arm", fork=trunk)

    write = runs.write_text

    def killed(path, text):
        if path.name == "config.json":  # which comes after the copying
            raise KeyboardInterrupt
        write(path, text)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            heal_loop.main(arm)
    assert not sweep.is_finished(arm) and list(arm.out.rglob("kept.jsonl"))
    with runs.begin(arm, "arm", heal_loop.HEALING) as run:
        assert run.rounds_done == 0 and run.find("forked", -1)["run"] == trunk.name
    forked = contents(arm.out / "forked_round_0")
    for name in SHARED:
        assert forked[name] == (trunk / "round_0" / name).read_bytes()
    assert {p.name for p in arm.out.iterdir()} == {
        "config.json", "events.jsonl", "forked_round_0", "lock"}


@pytest.mark.slow
def test_a_folder_of_other_settings_is_not_taken_for_finished(swept, settings):
    other = replace(swept.cfg, run=replace(settings, lr=1e-3))
    with pytest.raises(ValueError, match="--lr 0.001 was 0.009 when .*; fix: another --out"):
        sweep.main(other)


@pytest.mark.slow
def test_an_arm_that_starves_is_on_record_and_the_others_go_on(settings, tmp_path, no_pictures):
    starving = replace(settings, max_perplexity=1.001, rounds=1, n_keep=2)
    cfg = config(starving, tmp_path, seeds=(0,), alone=())
    sweep.main(cfg)
    said = cfg.table.read_text()
    for arm in ("nll", "kl_rev_rmse"):
        assert f"- {arm}_s0, round 0: data starved" in said
    assert all(sweep.is_finished(run) for of_arm in sweep.arms(cfg).values() for run in of_arm)


def test_the_next_run_gets_the_plain_model_also_after_a_failure(embedded, tmp_path, monkeypatch):
    run = heal_loop.Config(out=tmp_path / "run")

    def fails(run, loaded):
        lora.attach(loaded[0])
        raise OSError("disk full")
    monkeypatch.setattr(sweep.heal_loop, "main", fails)
    with pytest.raises(OSError, match="disk full"):
        sweep.run_arm(run, run, embedded)
    assert not hasattr(embedded[0], "lora_config")
