"""Compare arms: every regulariser × aggregation × seed, one run folder each, and one table over the seeds.

    python sweep.py --reg nll kl_fwd kl_rev wd --agg mean rmse --seeds 0 1 2 --rounds 2     # runs/sweep/*, results/arms.md
    python sweep.py --executor slurm --partition gpu --model google/gemma-3-4b-it --readout tinymfv --doses 0.5 1 --rounds 8

Every flag of heal_loop.py works here too and holds for all arms. The same command goes on where it stopped: a finished run is
not run again. What the arms of a seed have in common (base evaluation, round 0's vector, completions and steered evaluation)
is computed by the first and copied by the others. `nll` and `wd` have no divergence, hence no aggregation.
"""
import functools
import json
import os
import shutil
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import numpy as np
import scipy.stats
import tyro
from tabulate import tabulate

import distil
import heal_loop
import lora
import models
import plot
from evaluate import COHERENCE_FLOOR, coh_cost

SHARED = [("base", -1), ("prompted", -1), ("extract", 0), ("distil", 0), ("steered", 0)]  # stages that no arm's training touches


@dataclass
class Config(heal_loop.Config):
    reg: tuple[Literal["nll", "kl_fwd", "kl_rev", "wd"], ...] = ("nll", "kl_fwd", "kl_rev", "wd")
    """Divergences to compare."""
    agg: tuple[Literal["mean", "rmse", "p95", "max"], ...] = ("mean", "rmse")
    """Aggregations to compare, for kl_fwd and kl_rev."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of every arm each."""
    out: Path = Path("runs/sweep")
    """Folder of the run folders."""
    table: Path = Path("results/arms.md")
    """The comparison."""
    baselines: bool = False
    """Also measure the persona as a system prompt, and steering alone at the healed model's trait, in every run."""
    executor: Literal["local", "slurm"] = "local"
    """local: here, one run after the other. slurm: one job per run, through submitit."""
    partition: str | None = None
    """slurm: the partition."""
    hours: float = 8.0
    """slurm: time limit of one run."""
    seed: tyro.conf.Suppress[int] = 0
    resume: tyro.conf.Suppress[Path | None] = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("reg", "agg", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is empty; fix: give at least one")


def arms(cfg: Config) -> dict[str, list[heal_loop.Config]]:
    """{arm: one run per seed}, in the order of the flags."""
    common = {f.name: getattr(cfg, f.name) for f in fields(heal_loop.Config)}
    pairs = [(reg, agg) for reg in dict.fromkeys(cfg.reg) for agg in (dict.fromkeys(cfg.agg) if reg.startswith("kl") else [heal_loop.Config.agg])]
    names = [f"{reg}_{agg}" if reg.startswith("kl") else reg for reg, agg in pairs]
    return {name: [heal_loop.Config(**common | dict(reg=reg, agg=agg, seed=seed, out=cfg.out / f"{name}_s{seed}")) for seed in dict.fromkeys(cfg.seeds)]
            for name, (reg, agg) in zip(names, pairs)}


def events(run: heal_loop.Config) -> list[dict]:
    return heal_loop.Run(run.out).events


def finished(run: heal_loop.Config) -> bool:
    """True where the last stage is on record, or the reason why there is none. Raises ValueError for a folder of other settings."""
    file = run.out / "config.json"
    if not file.exists():
        return False
    asked, found = heal_loop.recorded(run), json.loads(file.read_text())
    if other := [k for k in asked if asked[k] != found.get(k)]:
        raise ValueError(f"{run.out} was run with {other[0]} {found.get(other[0])}, not {asked[other[0]]}; fix: another --out, or the old flags")
    last = ("matched", run.rounds) if run.baselines else ("healed", run.rounds - 1)
    return any(e["stage"] == "ended" or (e["stage"], e["round"]) == last for e in events(run))


def share(trunk: heal_loop.Config, run: heal_loop.Config) -> None:
    """Copy what `trunk`, another arm of the same seed, has of the shared stages into the folder of a run that has not begun."""
    common = [e for e in events(trunk) if (e["stage"], e["round"]) in SHARED]
    if (run.out / "events.jsonl").exists() or ("steered", 0) not in [(e["stage"], e["round"]) for e in common]:
        return
    run.out.mkdir(parents=True, exist_ok=True)
    models.write_text(run.out / "config.json", json.dumps(heal_loop.recorded(run), indent=2) + "\n")
    for name in ("vector_r0.safetensors", "sampled_r0.jsonl", "kept_r0.jsonl"):
        shutil.copyfile(trunk.out / name, run.out / name)
    models.write_text(run.out / "events.jsonl", distil.to_jsonl(common))


def run_arm(run: heal_loop.Config, trunk: heal_loop.Config) -> None:
    """One run from wherever it stands to its end."""
    if finished(run):
        return print(f"{run.out} is finished")
    share(trunk, run)
    try:
        heal_loop.main(replace(run, resume=run.out if (run.out / "config.json").exists() else None))
    except (distil.Starved, heal_loop.Diverged) as e:  # on record in the run, and a result of this arm
        print(f"{run.out} ended: {e}")


class Here:
    """The executor that runs a job when it is submitted."""
    def submit(self, job, *args) -> Future:
        future = Future()
        future.set_result(job(*args))
        return future


def slurm(cfg: Config):
    """submitit's executor. Raises ValueError where the package or the cluster is missing."""
    try:
        import submitit
    except ImportError:
        raise ValueError("--executor slurm needs the package submitit; fix: pip install submitit, or --executor local") from None
    try:
        executor = submitit.AutoExecutor(folder=cfg.out / "slurm", cluster="slurm")
    except RuntimeError as e:
        raise ValueError(f"--executor slurm: {e}; fix: run it on the cluster's login node, or --executor local") from None
    executor.update_parameters(timeout_min=int(60 * cfg.hours), gpus_per_node=1, slurm_partition=cfg.partition)
    return executor


def loaded_once(load):
    """models.load that reads a model once per process and hands it out without the LoRA of the run before."""
    cached = functools.cache(load)
    def again(*which):
        model, tok = cached(*which)
        if hasattr(model, "lora_config"):
            lora.detach(model)
        return model, tok
    return again


# ---- the table --------------------------------------------------------------------------------------------------------


def over_seeds(values: list[float], digits: int) -> str:
    """`mean [low, high]`, the 95 % t-interval over seeds; the mean alone for one seed."""
    mean = np.mean(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return f"{mean:.{digits}f} [{mean - half:.{digits}f}, {mean + half:.{digits}f}]"


def cells(name: str, points: list[tuple], coherent: list[int] | None = None) -> list[str]:
    """A line of the table from (base profile, profile, event) of every seed."""
    costs = [coh_cost(base, after) for base, after, _ in points]
    priced, why = [c.value for c in costs if c.value is not None], sorted({c.why for c in costs if c.value is None})
    cost = over_seeds(priced, 4) if priced else ""
    cost += f" ({len(costs) - len(priced)} of {len(costs)} n/a: {'; '.join(why)})" if why else ""
    return [name, len(points), cost.strip(), *(over_seeds([after.nats(f) - base.nats(f) for base, after, _ in points], 2) for f in ("Authority", "Care")),
            over_seeds([after.coherence - base.coherence for base, after, _ in points], 4), over_seeds([e["perplexity"] for *_, e in points], 1),
            over_seeds([e["repetition"] for *_, e in points], 2), over_seeds(coherent, 1) if coherent else ""]


def report(cfg: Config, runs: dict[str, list[heal_loop.Config]]) -> str:
    """arms.md: every arm after its last round, against the base of its own run."""
    rows, ended = [], []
    for name, of_arm in runs.items():
        measured = [plot.measured(events(run)) for run in of_arm]  # (stage, round, event, profile) of every evaluation
        stages = [{(stage, r): (points[0][3], profile, event) for stage, r, event, profile in points} for points in measured]
        if not rows and (steered := [s["steered", 0] for s in stages if ("steered", 0) in s]):
            rows.append(cells("steered r0, untrained", steered))
        healed = [[s["healed", r] for r in range(cfg.rounds) if ("healed", r) in s] for s in stages]
        coherent = [next((r for r, (_, after, _) in enumerate(h) if after.coherence < COHERENCE_FLOOR), len(h)) for h in healed]
        if any(healed):
            rows.append(cells(name, [h[-1] for h in healed if h], coherent))
        ended += [f"- {run.out.name}, round {e['round']}: {e['why']}" for run in of_arm for e in events(run) if e["stage"] == "ended"]
    first = plot.measured(events(next(iter(runs.values()))[0]))[0]
    asked, default = heal_loop.recorded(next(iter(runs.values()))[0]), heal_loop.recorded(heal_loop.Config())
    chosen = {"reg": cfg.reg, "agg": cfg.agg, "seeds": cfg.seeds, "rounds": cfg.rounds}
    chosen |= {k: v for k, v in asked.items() if k not in {*chosen, "seed", "baselines"} and v != default[k]}
    flags = " ".join(f"--{k.replace('_', '-')} {' '.join(map(str, v)) if isinstance(v, (tuple, list)) else v}" for k, v in chosen.items())
    head = ["arm", "seeds", "coh_cost", "Δauth (nats)", "Δcare (nats)", "Δcoherence", "perplexity", "repetition", f"coherent rounds of {cfg.rounds}"]
    return f"""# Arms

`python sweep.py {flags}` · {os.cpu_count()} cores, {models.best_device() if cfg.device == "auto" else cfg.device} · {len(first[3].ids)} vignettes

After the last round, against the base of the same run: mean over seeds, in brackets the 95 % t-interval over seeds (the interval over
vignettes within one run is in that run's report). coh_cost = |Δcoherence| / |Δauth|, without value below coherence {COHERENCE_FLOOR} or where
the trait hardly moved. Perplexity under the original and repetition of greedy completions of held-out prompts; the base has {first[2]["perplexity"]:.1f} and
{first[2]["repetition"]:.2f}. Coherent rounds: how many before coherence first fell below {COHERENCE_FLOOR}.

{tabulate(rows, head, tablefmt="github", disable_numparse=True)}
""" + ("\nRuns that ended early:\n\n" + "\n".join(ended) + "\n" if ended else "")


def main(cfg: Config) -> None:
    runs = arms(cfg)
    every = [run for of_arm in runs.values() for run in of_arm]
    heal_loop.checked(every[0])
    todo = sum(not finished(run) for run in every)
    executor = slurm(cfg) if cfg.executor == "slurm" else Here()
    print(f"{len(every)} runs in {cfg.out}, {todo} to do", flush=True)
    first, *others = runs.values()
    trunk = {run.seed: run for run in first}
    with patch.object(models, "load", loaded_once(models.load)):
        for wave in (first, [run for of_arm in others for run in of_arm]):  # the others copy from the first
            for job in [executor.submit(run_arm, run, trunk[run.seed]) for run in wave]:
                job.result()
    cfg.table.parent.mkdir(parents=True, exist_ok=True)
    models.write_text(cfg.table, report(cfg, runs))
    print(cfg.table.read_text())


if __name__ == "__main__":
    models.cli(Config, main)
