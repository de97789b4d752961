"""Which arms a sweep has, what they share, and where they run."""
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import heal_loop
from common import runs
from tools import sweep

# ---- the arms -----------------------------------------------------------------------------------


def config(tmp_path, **changes):
    return replace(sweep.Config(reg=("nll",), agg=("rmse",), seeds=(0,), out=tmp_path / "sweep",
                                table=tmp_path / "arms.md"), **changes)


def test_only_what_varies_and_has_an_effect_is_in_the_name_of_an_arm(tmp_path):
    cfg = config(tmp_path, reg=("nll", "kl_rev", "wd"), agg=("mean", "rmse"), tau=(0.05, 0.2),
                 weight_decay=(10, 100), lr=(1e-4, 3e-4))
    arms = sweep.arms(cfg)
    named = {"nll_lr0.0001", "nll_lr0.0003", "wd_decay10_lr0.0001", "wd_decay100_lr0.0001",
             "wd_decay10_lr0.0003", "wd_decay100_lr0.0003"}
    named |= {f"kl_rev_{agg}_tau{tau}_lr{lr}" for agg in ("mean", "rmse") for tau in (0.05, 0.2)
              for lr in (0.0001, 0.0003)}
    assert arms.keys() == named
    run, = arms["kl_rev_mean_tau0.05_lr0.0001"]
    assert (run.reg, run.agg, run.tau, run.lr) == ("kl_rev", "mean", 0.05, 1e-4)
    run, = arms["wd_decay10_lr0.0003"]
    assert (run.reg, run.weight_decay, run.lr) == ("wd", 10, 3e-4)


@pytest.mark.parametrize("name, values, arms", [
    ("ref", ("base", "prev", "good"), ["refbase", "refprev", "refgood"]),
    ("doses", ((0.0,), (1.0, 2.0)), ["dose0", "dose1+2"]),
    ("dose_nats", ((0.5,), (1.0, 2.0)), ["nats0.5", "nats1+2"]),
    ("lam", (1.0, 4.0), ["lam1", "lam4"]), ("lam_power", (-0.5, 0.0), ["power-0.5", "power0"]),
    ("epochs", (1, 3), ["epochs1", "epochs3"]), ("rank", (16, 64), ["rank16", "rank64"])])
def test_every_flag_that_may_vary_makes_arms(tmp_path, name, values, arms):
    found = sweep.arms(config(tmp_path, reg=("kl_rev",), **{name: values}))
    assert list(found) == [f"kl_rev_rmse_{arm}" for arm in arms]
    assert [getattr(run, name) for run, in found.values()] == list(values)


def test_on_the_command_line_a_word_is_an_arm_and_commas_join_its_doses(monkeypatch):
    given = []

    def main(cfg):
        given.append(cfg)
    argv = "sweep.py --doses 0 1,2 --tau 0.1 0.2 --rounds 5".split()
    monkeypatch.setattr(sys, "argv", argv)
    runs.cli(sweep.Config, main, rest="run")
    assert given[0].doses == ((0.0,), (1.0, 2.0)) and given[0].tau == (0.1, 0.2)
    assert given[0].run.rounds == 5
    assert "--doses 0 1,2 --tau 0.1 0.2" in sweep.flags_of(given[0])


def test_a_value_out_of_range_is_named_and_no_list_is_empty(tmp_path):
    with pytest.raises(ValueError, match="--lr 7 is out of range"):
        sweep.arms(config(tmp_path, lr=(1e-4, 7)))
    with pytest.raises(ValueError, match="--seeds is empty; fix: give at least one"):
        sweep.arms(config(tmp_path, seeds=()))


def test_a_list_that_is_left_out_is_as_the_loop_has_it(tmp_path):
    cfg = config(tmp_path, run=heal_loop.Config(tau=0.7, doses=(1.0, 3.0), min_diversity=0.0),
                 lr=(1e-4,))
    run, = sweep.arms(cfg)["nll"]
    assert (run.tau, run.doses, run.lr, run.rank) == (0.7, (1.0, 3.0), 1e-4, heal_loop.Config.rank)
    assert {"--tau 0.7", "--doses 1,3", "--lr 0.0001", "--min-diversity 0.0"} <= {
        " ".join(words) for words in zip(*[iter(sweep.flags_of(cfg).split())] * 2)}


def test_only_runs_that_differ_in_their_healing_alone_share_a_round_0(tmp_path):
    cfg = config(tmp_path, reg=("nll", "kl_rev"), doses=((0.0,), (1.0,)), seeds=(0, 1),
                 epochs=(1, 3))
    runs_of = [run for of_arm in sweep.arms(cfg).values() for run in of_arm]
    groups = {}
    for run in runs_of:
        groups.setdefault(sweep.upstream(run), []).append((run.doses, run.seed))
    assert len(groups) == 4 and all(len(set(of)) == 1 and len(of) == 4 for of in groups.values())


# ---- submitit -----------------------------------------------------------------------------------


def test_an_executor_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    for executor in ("local", "slurm"):
        with pytest.raises(ValueError, match="needs the package submitit; fix: .*-cluster.txt"):
            sweep.main(config(tmp_path, executor=executor))
    monkeypatch.undo()
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="no GPU here; fix: --gpus 0 1 "):
        sweep.main(config(tmp_path, executor="local"))
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", lambda: -1)
    with pytest.raises(ValueError, match="no srun here; fix: .*login node, or --executor here"):
        sweep.main(config(tmp_path, executor="slurm"))
    assert not (tmp_path / "sweep").exists()


def test_local_jobs_run_one_at_a_time_on_each_gpu_which_is_all_they_see(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    busy, most, done = {}, [], []

    class Job:
        """Over when it is looked at for the third time."""
        def __init__(self, gpu, call):
            self.gpu, self.call, self.looks = gpu, call, 0

        def done(self):
            self.looks += 1
            if self.looks < 3:
                return False
            del busy[self.gpu]
            done.append(self.call)
            return True

    class Executor:
        def __init__(self, folder):
            assert folder == tmp_path / "sweep" / "jobs"

        def update_parameters(self, timeout_min, gpus_per_node, visible_gpus):
            assert (timeout_min, gpus_per_node, len(visible_gpus)) == (120, 1, 1)
            self.gpu, = visible_gpus

        def submit(self, call):
            assert self.gpu not in busy
            busy[self.gpu] = call
            most.append(len(busy))
            return Job(self.gpu, call)
    monkeypatch.setattr(submitit, "LocalExecutor", Executor)
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: None)
    sweep.execute_local(config(tmp_path, gpus=(1, 3), hours=2.0), list("abcde"))
    assert sorted(done) == list("abcde") and max(most) == 2 and not busy


class Slurm:
    """Stands in for submitit.SlurmExecutor: two jobs, 7_0 and 7_1."""
    given = {}

    def __init__(self, folder):
        pass

    def update_parameters(self, **parameters):
        Slurm.given = parameters

    def submit_array(self, calls):
        return [SimpleNamespace(job_id=f"7_{k}") for k in range(len(calls))]


@pytest.fixture
def cluster(monkeypatch):
    """{command: what it says}, each taken from the front; -> the commands that were given."""
    submitit = pytest.importorskip("submitit")
    answers, given = {}, []

    def run(command, **how):
        given.append(command)
        said = answers[command[0]].pop(0)
        if said is KeyboardInterrupt:
            raise said
        return SimpleNamespace(stdout=said or "", returncode=said is None)
    monkeypatch.setattr(submitit, "SlurmExecutor", Slurm)
    monkeypatch.setattr(sweep.subprocess, "run", run)
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: None)
    return SimpleNamespace(answers=answers, given=given)


@pytest.mark.parametrize("resources, device, asked", [
    ("(null)\n", "auto", {}), ("gpu:a100:4(S:0-1)\n", "auto", {"gpus_per_node": 1}),
    ("gpu:4\n", "cpu", {})])
def test_slurm_is_asked_for_a_gpu_only_where_there_are_some(tmp_path, cluster, resources, device,
                                                            asked):
    cluster.answers |= {"sinfo": [resources], "squeue": [""]}
    cfg = config(tmp_path, run=heal_loop.Config(device=device), partition="all")
    sweep.execute_slurm(cfg, [print, print])
    assert {k: v for k, v in Slurm.given.items() if "gpu" in k} == asked
    assert (Slurm.given["time"], Slurm.given["partition"]) == (480, "all")


def test_slurm_is_waited_for_until_no_job_is_queued_also_while_the_controller_is_away(tmp_path,
                                                                                      cluster):
    cluster.answers |= {"sinfo": [""], "squeue": ["7_0\n7_1\n", None, "7_1\n9\n", "9\n"]}
    sweep.execute_slurm(config(tmp_path), [print, print])
    assert cluster.answers["squeue"] == []
    assert "scancel" not in [command[0] for command in cluster.given]


def test_jobs_that_are_left_when_the_sweep_is_interrupted_are_cancelled(tmp_path, cluster):
    cluster.answers |= {"sinfo": [""], "squeue": ["7_1\n9\n", KeyboardInterrupt], "scancel": [""]}
    with pytest.raises(KeyboardInterrupt):
        sweep.execute_slurm(config(tmp_path), [print, print])
    assert cluster.given[-1] == ["scancel", "7_1"]


# ---- for real -----------------------------------------------------------------------------------


def flags(model, folder):
    """A sweep of two arms; a random model is below the coherence floor, so one round is all."""
    return ["--model", model, "--out", folder / "sweep", "--table", folder / "arms.md", *(
        "--reg nll kl_rev --agg rmse --seeds 0 --alone 2 --rounds 1 --n-keep 6 --epochs 1 "
        "--max-new-tokens 12 --n-vignettes 14 --batch-size 2 --n-contexts 4 --max-perplexity 1e9 "
        "--min-diversity 0 --max-repetition 1 --dtype float32 --lam 100 --tau 0").split()]


def swept(model, folder, *more):
    """The sweep in a process of its own, started elsewhere; -> the finished process."""
    command = [sys.executable, "-m", "tools.sweep", *flags(model, folder), *more]
    folder.mkdir(exist_ok=True)
    return subprocess.run([str(word) for word in command], cwd=folder, capture_output=True,
                          text=True)


@pytest.mark.slow
def test_local_jobs_give_the_table_that_one_process_gives(tiny_folder, tmp_path):
    pytest.importorskip("submitit")
    tables = []
    for name, how in (("here", []), ("local", ["--executor", "local", "--gpus", "0", "1"])):
        said = swept(tiny_folder, tmp_path / name, *how)
        assert said.returncode == 0, said.stderr
        tables.append((tmp_path / name / "arms.md").read_text())
    assert tables[0] == tables[1]
