"""Compare arms: every regulariser × aggregation × seed, a run folder each, a table over the seeds.

    python sweep.py --reg nll kl_fwd kl_rev wd --agg mean rmse --seeds 0 1 2 --rounds 2
    python sweep.py --executor slurm --partition gpu --model google/gemma-3-4b-it --readout tinymfv

    interval over n seeds = mean ± t(0.975, n − 1) · standard deviation / √n

Every flag of heal_loop.py works here too and holds for all arms. The same command goes on where it
stopped: a finished run is not run again. Arms of a seed share round 0 up to its healing: the first
arm makes it, the others are forks of it. `nll` and `wd` have no divergence, hence no aggregation.
"""
import os
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.stats
import tyro
from tabulate import tabulate

import heal_loop
import lora
import models
import plot
import runs
import texts
from evaluate import COHERENCE_FLOOR, coh_cost


@dataclass
class Config:
    reg: tuple[Literal["nll", "kl_fwd", "kl_rev", "wd"], ...] = ("nll", "kl_fwd", "kl_rev", "wd")
    """Divergences to compare."""
    agg: tuple[Literal["mean", "rmse", "p95", "max"], ...] = ("mean", "rmse")
    """Aggregations to compare, for kl_fwd and kl_rev."""
    seeds: tuple[int, ...] = (0, 1, 2)  # one run of every arm each
    baselines: bool = False  # also measure the baselines in every run
    out: Path = Path("runs/sweep")  # folder of the run folders
    table: Path = Path("results/arms.md")  # the comparison
    executor: Literal["local", "slurm"] = "local"  # one after the other, or a job each by submitit
    partition: str | None = None  # slurm: the partition
    hours: runs.Above0 = 8.0  # slurm: time limit of one run
    run: tyro.conf.Suppress[heal_loop.Config] = field(default_factory=heal_loop.Config)  # the rest


# ---- the runs -----------------------------------------------------------------------------------


def arms(cfg: Config) -> dict[str, list[heal_loop.Config]]:
    """{arm: one run per seed}, in the order of the flags. Raises ValueError for an empty list."""
    for name in ("reg", "agg", "seeds"):
        if not getattr(cfg, name):
            raise ValueError(f"--{name} is empty; fix: give at least one")
    for name in ("seed", "resume", "fork", "at"):
        if getattr(cfg.run, name) != getattr(heal_loop.Config, name):
            raise ValueError(f"--{name} is a single run's; fix: leave it out, seeds go by --seeds")
    found, common = {}, texts.complete(cfg.run)
    # dict.fromkeys: what a flag names twice is run once, in the order of the flag
    for reg in dict.fromkeys(cfg.reg):
        has_kl = reg.startswith("kl")
        aggs = dict.fromkeys(cfg.agg) if has_kl else [cfg.run.agg]
        for agg in aggs:
            arm = f"{reg}_{agg}" if has_kl else reg
            found[arm] = []
            for seed in dict.fromkeys(cfg.seeds):
                run = replace(common, reg=reg, agg=agg, seed=seed, baselines=cfg.baselines,
                              out=cfg.out / f"{arm}_s{seed}")
                runs.check_ranges(run)
                found[arm].append(run)
    return found


def is_finished(run: heal_loop.Config) -> bool:
    """True where the last number is on record, or the reason why there is none.

    Raises ValueError for a folder of other settings.
    """
    if not (run.out / "config.json").exists():
        return False
    runs.refuse_other_settings(run, run.out, fix="another --out, or the old flags")
    done = {(e["stage"], e["round"]) for e in runs.read_events(run.out)}
    ended = any(stage == "ended" for stage, _ in done)
    last = ("matched", run.rounds) if run.baselines else ("healed", run.rounds - 1)
    return ended or last in done


def run_arm(run: heal_loop.Config, trunk: heal_loop.Config, loaded=None) -> None:
    """One run from wherever it stands to its end; a run that has not begun forks from `trunk`."""
    if is_finished(run):
        return print(f"{run.out} is finished")
    if (run.out / "config.json").exists():
        run = replace(run, resume=run.out)
    elif trunk.out != run.out and runs.rounds_done(trunk.out):
        run = replace(run, fork=trunk.out, at=0)
    try:
        heal_loop.main(run, loaded)
    except runs.Ended as e:  # on record in the run, and a result of this arm
        print(f"{run.out} ended: {e}")
    finally:
        if loaded and hasattr(loaded[0], "lora_config"):
            lora.detach(loaded[0])  # the next run gets the plain model


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
        raise ValueError("--executor slurm needs the package submitit; "
                         "fix: pip install submitit, or --executor local") from None
    try:
        executor = submitit.AutoExecutor(folder=cfg.out / "slurm", cluster="slurm")
    except RuntimeError as e:
        raise ValueError(f"--executor slurm: {e}; "
                         "fix: run it on the cluster's login node, or --executor local") from None
    executor.update_parameters(timeout_min=int(60 * cfg.hours), gpus_per_node=1,
                               slurm_partition=cfg.partition)
    return executor


# ---- the table ----------------------------------------------------------------------------------


def over_seeds(values: list[float], digits: int) -> str:
    """`mean [low, high]`, the 95 % t-interval over seeds; the mean alone for fewer than three."""
    mean = np.mean(values)
    if len(values) < 3:
        return f"{mean:.{digits}f}"
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return f"{mean:.{digits}f} [{mean - half:.{digits}f}, {mean + half:.{digits}f}]"


def arm_row(name: str, pairs: list[tuple[plot.Point, plot.Point]],
            coherent: list[int]) -> list[str]:
    """A line of the table from (base, after) of every seed.

    coherent: how many coherent rounds each seed had.
    """
    # 1. the price of the trait; where some seed has none, how many and why
    costs = [coh_cost(base.profile, after.profile) for base, after in pairs]
    priced = [c.value for c in costs if c.value is not None]
    why = "; ".join(sorted({c.why for c in costs if c.value is None}))
    cost = over_seeds(priced, 4) if priced else ""
    if why:
        cost += f" ({len(costs) - len(priced)} of {len(costs)} n/a: {why})"

    # 2. each seed against the base of its own run
    auth, care, coherence = [], [], []
    for base, after in pairs:
        auth.append(after.profile.value("auth_nats") - base.profile.value("auth_nats"))
        care.append(after.profile.value("care_nats") - base.profile.value("care_nats"))
        coherence.append(after.profile.coherence - base.profile.coherence)

    # 3. over the seeds
    return [name, len(pairs), cost.strip(),
            over_seeds(auth, 2), over_seeds(care, 2), over_seeds(coherence, 4),
            over_seeds([after.event["perplexity"] for _, after in pairs], 1),
            over_seeds([after.event["repetition"] for _, after in pairs], 2),
            over_seeds(coherent, 1) if coherent else ""]


def arm_rows(cfg: Config, by_arm: dict[str, list[heal_loop.Config]]) -> list[list[str]]:
    """Every arm after its last round, against the base of its own run.

    Above them one line for round 0 steered, before anything is trained.
    """
    rows = []
    for arm, of_arm in by_arm.items():
        last, coherent, steered = [], [], []
        for run in of_arm:
            base, *points = plot.measured(runs.read_events(run.out))
            steered += [(base, p) for p in points if (p.stage, p.round) == ("steered", 0)]
            healed = [p for p in points if p.stage == "healed"]
            # the rounds below the floor: the first of them ends the coherent ones
            broken = [k for k, p in enumerate(healed) if p.profile.coherence < COHERENCE_FLOOR]
            if healed:
                last.append((base, healed[-1]))
                coherent.append(broken[0] if broken else len(healed))
        if steered and not rows:
            rows.append(arm_row("steered r0, untrained", steered, []))
        if last:
            rows.append(arm_row(arm, last, coherent))
    return rows


def flags_of(cfg: Config) -> str:
    """The flags that make this table, those at their default left out."""
    chosen = {"reg": cfg.reg, "agg": cfg.agg, "seeds": cfg.seeds, "rounds": cfg.run.rounds}
    default = runs.settings(heal_loop.Config())
    for name, value in runs.settings(cfg.run).items():
        if value != default[name] and name not in (*chosen, "seed", "baselines"):
            chosen[name] = value
    words = []
    for name, value in chosen.items():
        value = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else value
        words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(words)


def report(cfg: Config, by_arm: dict[str, list[heal_loop.Config]]) -> str:
    """arms.md."""
    every = [run for of_arm in by_arm.values() for run in of_arm]
    base = plot.measured(runs.read_events(every[0].out))[0]
    device = models.best_device() if cfg.run.device == "auto" else cfg.run.device
    head = ["arm", "seeds", "coh_cost", "Δauth (nats)", "Δcare (nats)", "Δcoherence", "perplexity",
            "repetition", f"coherent rounds of {cfg.run.rounds}"]
    table = tabulate(arm_rows(cfg, by_arm), head, tablefmt="github", disable_numparse=True)

    # what ended early, below the table
    early = ""
    for run in every:
        for e in runs.read_events(run.out):
            if e["stage"] == "ended":
                early += f"- {run.out.name}, round {e['round']}: {e['why']}\n"
    if early:
        early = f"\nRuns that ended early:\n\n{early}"

    machine = f"{os.cpu_count()} cores, {device}"
    return f"""# Arms

`python sweep.py {flags_of(cfg)}` · {machine} · {len(base.profile.ids)} vignettes

After the last round, against the base of the same run: mean over seeds, in brackets, from three
seeds on, the 95 % t-interval over seeds (the interval over vignettes within one run is in that
run's report). coh_cost = |Δcoherence| / |Δauth|, without value below coherence {COHERENCE_FLOOR} or
where the trait hardly moved. Perplexity under the original and repetition of greedy completions of
held-out prompts; the base has {base.event["perplexity"]:.1f} and {base.event["repetition"]:.2f}.
Coherent rounds: how many before coherence first fell below {COHERENCE_FLOOR}.

{table}
{early}"""


def main(cfg: Config) -> None:
    # 1. what is to be run, checked before a folder appears
    by_arm = arms(cfg)
    every = [run for of_arm in by_arm.values() for run in of_arm]
    texts.read(cfg.run)
    todo = [run for run in every if not is_finished(run)]
    here = cfg.executor == "local"
    executor = Here() if here else slurm(cfg)
    print(f"{len(every)} runs in {cfg.out}, {len(todo)} to do", flush=True)
    loaded = None  # here, one model for all runs
    if here and todo:
        loaded = models.load(cfg.run.model, cfg.run.device, cfg.run.dtype)

    # 2. the first arm, and then the others, which fork from it
    first = next(iter(by_arm.values()))
    others = every[len(first):]
    trunk = {run.seed: run for run in first}
    for wave in (first, others):
        jobs = [executor.submit(run_arm, run, trunk[run.seed], loaded) for run in wave]
        for job in jobs:
            job.result()

    # 3. the table
    cfg.table.parent.mkdir(parents=True, exist_ok=True)
    runs.write_text(cfg.table, report(cfg, by_arm))
    print(cfg.table.read_text())


if __name__ == "__main__":
    runs.cli(Config, main, rest="run")
