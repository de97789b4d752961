"""The sweep on a tiny random model: which arms there are, what they share, what is run again, and the table."""
import dataclasses
import sys

import numpy as np
import pytest
import scipy.stats

import distil
import heal_loop
import lora
import models
import sweep
from conftest import tiny
from test_run import tiny_folder  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def settings(tiny_folder):
    """Flags under which a run takes about two seconds."""
    return dict(model=str(tiny_folder), n_keep=6, max_new_tokens=12, n_vignettes=14, epochs=1, batch_size=2, n_contexts=4, max_perplexity=1e9,
                min_diversity=0, max_repetition=1, dtype="float32", rounds=2, tau=0.0, lam=100.0, lr=0.009)


def config(settings, tmp_path, **changes):
    return sweep.Config(**settings | dict(out=tmp_path / "sweep", table=tmp_path / "arms.md", seeds=(0, 1), reg=("nll", "kl_rev"), agg=("rmse",)) | changes)


@pytest.fixture(scope="module")
def swept(settings, tmp_path_factory):
    cfg = config(settings, tmp_path_factory.mktemp("swept"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heal_loop, "COHERENCE_FLOOR", 0.0)  # a random model has no coherence to lose
        sweep.main(cfg)
        yield cfg


def contents(folder):
    """Every file of a run but the lock, events without their times."""
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "lock"}
    return files | {"events.jsonl": [{k: v for k, v in e.items() if k != "seconds"} for e in distil.read_jsonl(folder / "events.jsonl")]}


def test_every_combination_that_makes_sense_is_an_arm_once():
    cfg = sweep.Config(reg=("nll", "kl_fwd", "kl_rev", "wd", "nll"), agg=("mean", "rmse"), seeds=(0, 1, 2))
    runs = sweep.arms(cfg)
    assert list(runs) == ["nll", "kl_fwd_mean", "kl_fwd_rmse", "kl_rev_mean", "kl_rev_rmse", "wd"]
    assert all([r.seed for r in of_arm] == [0, 1, 2] for of_arm in runs.values())
    assert len({r.out for of_arm in runs.values() for r in of_arm}) == 18
    assert {(r.reg, r.agg) for r in runs["kl_fwd_mean"]} == {("kl_fwd", "mean")}


def test_a_sweep_leaves_whole_run_folders_and_a_table(swept):
    for of_arm in sweep.arms(swept).values():
        for run in of_arm:
            assert sweep.finished(run) and (run.out / "report.html").exists()
    said = swept.table.read_text()
    lines = {line.split("|")[1].strip(): line for line in said.splitlines() if line.startswith("|")}
    assert {"steered r0, untrained", "nll", "kl_rev_rmse"} <= set(lines) and "nan" not in said
    assert "`python sweep.py --reg nll kl_rev --agg rmse --seeds 0 1 --rounds 2 " in said and str(swept.out.parent) not in said
    assert lines["nll"].split("|", 2)[2] != lines["kl_rev_rmse"].split("|", 2)[2]
    shifts = [sweep.plot.measured(sweep.events(run)) for run in sweep.arms(swept)["nll"]]
    wanted = np.mean([points[-1][3].auth_nats - points[0][3].auth_nats for points in shifts])
    assert f"{wanted:.2f} [" in lines["nll"]


def test_arms_of_a_seed_share_round_0_to_the_byte_and_seeds_do_not(swept):
    nll, kl = (sweep.arms(swept)[name] for name in ("nll", "kl_rev_rmse"))
    for name in ("vector_r0.safetensors", "sampled_r0.jsonl", "kept_r0.jsonl"):
        assert (nll[0].out / name).read_bytes() == (kl[0].out / name).read_bytes()
    assert (nll[0].out / "kept_r0.jsonl").read_bytes() != (nll[1].out / "kept_r0.jsonl").read_bytes()
    def recorded(run):
        return [e for e in sweep.events(run) if (e["stage"], e["round"]) in sweep.SHARED]
    assert recorded(nll[0]) == recorded(kl[0]) and len(recorded(kl[0])) == 4


def test_an_arm_that_copied_ends_in_the_bytes_of_one_that_ran_alone(swept, tmp_path):
    copied = sweep.arms(swept)["kl_rev_rmse"][1]
    heal_loop.main(dataclasses.replace(copied, out=tmp_path / "alone"))
    a, b = contents(copied.out), contents(tmp_path / "alone")
    assert a.keys() == b.keys() and [k for k in a if a[k] != b[k]] == []


def test_a_second_call_runs_nothing_and_a_cut_run_goes_on_alone(swept, monkeypatch):
    ran, main = [], heal_loop.main
    monkeypatch.setattr(sweep.heal_loop, "main", lambda cfg: ran.append(cfg.resume) or main(cfg))
    table = swept.table.read_text()
    sweep.main(swept)
    assert ran == [] and swept.table.read_text() == table
    cut = sweep.arms(swept)["kl_rev_rmse"][0]
    before = contents(cut.out)
    lines = distil.read_jsonl(cut.out / "events.jsonl")
    models.write_text(cut.out / "events.jsonl", distil.to_jsonl(lines[:-1]))
    sweep.main(swept)
    assert ran == [cut.out] and contents(cut.out) == before


def test_a_folder_of_other_settings_is_not_taken_for_finished(swept):
    with pytest.raises(ValueError, match="was run with lr 0.009, not 0.001; fix: another --out"):
        sweep.main(dataclasses.replace(swept, lr=1e-3))


def test_an_arm_that_starves_is_on_record_and_the_others_go_on(settings, tmp_path):
    cfg = config(settings | dict(max_perplexity=1.001, rounds=1), tmp_path, seeds=(0,))
    sweep.main(cfg)
    said = cfg.table.read_text()
    assert "- nll_s0, round 0: data starved" in said and "- kl_rev_rmse_s0, round 0: data starved" in said
    assert all(sweep.finished(run) for of_arm in sweep.arms(cfg).values() for run in of_arm)


def test_the_model_is_read_once_and_handed_out_clean():
    calls = []
    def load(name, device, dtype):
        calls.append(name)
        return tiny("llama"), None
    again = sweep.loaded_once(load)
    model, _ = again("a", "cpu", "float32")
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    lora.attach(model)
    same, _ = again("a", "cpu", "float32")
    assert same is model and calls == ["a"]
    assert {k: v.tolist() for k, v in same.state_dict().items()} == {k: v.tolist() for k, v in plain.items()}


def test_the_interval_over_seeds_is_the_t_interval():
    values = [0.1, 0.4, 0.25]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
    assert sweep.over_seeds(values, 3) == f"0.250 [{low:.3f}, {high:.3f}]"
    assert sweep.over_seeds([0.5], 2) == "0.50" and sweep.over_seeds([0.5, 0.5], 2) == "0.50 [0.50, 0.50]"


def test_slurm_without_submitit_is_one_line(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match="needs the package submitit; fix: pip install submitit, or --executor local"):
        sweep.main(config(settings, tmp_path, executor="slurm"))
    assert not (tmp_path / "sweep").exists()


def test_a_submitit_executor_takes_the_same_path(settings, tmp_path, monkeypatch, swept):
    submitit = pytest.importorskip("submitit", reason="needs submitit")
    monkeypatch.setattr(sweep, "slurm", lambda cfg: submitit.DebugExecutor(folder=tmp_path / "slurm"))
    cfg = config(settings, tmp_path, executor="slurm", seeds=(0,))
    sweep.main(cfg)
    for name, of_arm in sweep.arms(cfg).items():
        assert contents(of_arm[0].out) == contents(sweep.arms(swept)[name][0].out)


def test_flags_that_leave_nothing_to_run_are_named():
    with pytest.raises(ValueError, match="--seeds is empty"):
        sweep.Config(seeds=())
