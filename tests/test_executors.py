"""Where a sweep's runs are made: a process each, one at a time on each GPU, or jobs of SLURM."""
import json
import os
import sys
from dataclasses import replace

import pytest
import torch

from conftest import ROOT, python
from tools import sweep


def config(tmp_path, **changes):
    return replace(sweep.Config(reg=("nll",), seeds=(0,), out=tmp_path / "sweep",
                                records=tmp_path / "records"), **changes)


def stand_in(tmp_path, monkeypatch, name, script):
    """A program of this name in place of SLURM's, first on the path."""
    file = tmp_path / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    if str(file.parent) not in os.environ["PATH"]:
        monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")


def test_an_executor_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no GPU here; fix: --gpus 0 1 "):
        sweep.main(config(tmp_path, executor="local"))
    with pytest.raises(ValueError, match="no sbatch here; fix: .*login node, or --executor here"):
        sweep.main(config(tmp_path, executor="slurm"))
    with pytest.raises(ValueError, match="--only nll_s7 is no run of these flags; fix: nll_s0"):
        sweep.main(config(tmp_path, only="nll_s7"))
    assert not (tmp_path / "sweep").exists()


def test_local_runs_are_one_at_a_time_on_each_gpu(tmp_path, monkeypatch, capsys):
    """A stand-in for Python notes its GPU, and that it found none at work on the same."""
    stand_in(tmp_path, monkeypatch, "python", f'''
at={tmp_path}/on_$CUDA_VISIBLE_DEVICES; mkdir $at || echo taken
sleep 0.7; rmdir $at; echo $CUDA_VISIBLE_DEVICES $*''')
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--tau", "0.1"])
    cfg = config(tmp_path, executor="local", gpus=(1, 3))
    assert sweep.execute(cfg, list("abcde")) == []
    logs = {name: sweep.log_of(cfg, name).read_text().split() for name in "abcde"}
    assert {words[0] for words in logs.values()} == {"1", "3"}
    for name, words in logs.items():
        assert " ".join(words[1:]) == (
            f"-m tools.sweep --tau 0.1 --executor here --only {name}")
    assert "waiting for b, 3 have not begun\n" in capsys.readouterr().out


def test_slurm_gets_each_run_with_the_flags_given(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "sbatch", 'for word in "$@"; do echo "$word"; done')
    cfg = config(tmp_path, executor="slurm", sbatch="--partition gpu --time 60")
    sweep.execute(cfg, ["a", "b"])
    words = sweep.log_of(cfg, "b").read_text().splitlines()
    assert words[:5] == ["--wait", "--partition", "gpu", "--time", "60"]
    assert f"--output={sweep.log_of(cfg, 'b')}" in words
    assert words[-1].startswith("--wrap=") and words[-1].endswith("--executor here --only b")


def test_a_run_without_a_result_is_told_with_its_logs_last_line(tmp_path, monkeypatch, capsys):
    stand_in(tmp_path, monkeypatch, "sbatch", "echo 'sbatch: error: invalid partition: gpu' >&2\n"
             "echo; exit 1")
    with pytest.raises(ValueError, match="did not finish: alone nll_s0; fix: what their logs say"):
        sweep.main(config(tmp_path, executor="slurm"))
    assert "nll_s0 failed: sbatch: error: invalid partition: gpu (" in capsys.readouterr().out
    assert not (tmp_path / "records").exists()


def test_jobs_are_cancelled_when_the_sweep_is_interrupted(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "sbatch", "exec sleep 60")
    stand_in(tmp_path, monkeypatch, "scancel", f"echo $* > {tmp_path}/cancelled")

    def interrupt(seconds):
        raise KeyboardInterrupt
    monkeypatch.setattr(sweep.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sweep.execute(config(tmp_path, executor="slurm"), ["a"])
    assert (tmp_path / "cancelled").read_text() == f"--name=sweep_{os.getpid()}\n"


def flags(model, folder):
    """A sweep of two arms; a random model is below the coherence floor, so one round is all."""
    trait = json.loads((ROOT / "data" / "traits" / "care.json").read_text(encoding="utf-8"))
    controls = [{"prompt": "2 + 2 =", "toward": " 4", "away": f" {n}"} for n in (5, 6)]
    file = folder.parent / "few.json"
    file.write_text(json.dumps(trait | {"heldout": trait["heldout"][:2], "controls": controls}))
    return ["--model", model, "--trait", file, "--out", folder / "sweep",
            "--records", folder / "records", *(
                "--reg nll kl_rev --agg rmse --seeds 0 --alone 2 --rounds 1 --n-keep 6 --epochs 1 "
                "--max-new-tokens 12 --n-vignettes 7 --batch-size 2 --n-contexts 4 --dtype float32 "
                "--max-perplexity 1e9 --min-diversity 0 --max-repetition 1 --lam 100 --tau 0"
            ).split()]


def swept(model, folder, *more):
    """The sweep in a process of its own; -> the finished process."""
    return python("-m", "tools.sweep", *flags(model, folder), *more)


def events(folder):
    """{run: its events without times, machine and origin} of a sweep's records."""
    return {run.name: [{k: v for k, v in e.items() if k != "seconds"} for e in run.events
                       if e["stage"] not in ("machine", "forked")]
            for run in sweep.load(folder / "records" / "sweep")}


@pytest.mark.slow
def test_local_processes_give_the_records_that_one_process_gives(tiny_folder, tmp_path):
    for name, executor in (("here", []), ("local", ["--executor", "local", "--gpus", 0, 0])):
        done = swept(tiny_folder, tmp_path / name, *executor)
        assert done.returncode == 0, done.stdout + done.stderr
    assert events(tmp_path / "here") == events(tmp_path / "local")
    assert len(events(tmp_path / "here")) == 3
