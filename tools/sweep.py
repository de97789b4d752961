"""Compare arms: every combination of regulariser, aggregation, τ, ... × seed, a run folder each.

    python -m tools.sweep --reg nll kl_rev --agg mean rmse --tau 0.1 0.2 0.4 --seeds 0 1 2 --rounds 4
    python -m tools.sweep --reg nll --doses 0 1,2 2,4           # an arm a word: placebo; 1 and 2; 2 and 4
    python -m tools.sweep --executor local --gpus 0 1 2 3       # four runs at once, one GPU each
    python -m tools.sweep --executor slurm --partition gpu --model google/gemma-3-4b-it --readout tinymfv

Every flag of heal_loop.py works here too and holds for all arms. The same command goes on where it
stopped: a finished run is not run again. Runs that differ only in how they heal share round 0 up to
its healing: the first of them makes it, the others are forks of it.

When all is run: a record of each run (its numbers, no texts) in results/runs/, and from these the
table and its figure, which `python -m studies.frontier results/runs/sweep` remakes without a model.
"""
import functools
import itertools
import json
import os
import shlex
import subprocess
import time
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

import evaluate
from studies import frontier
import heal_loop
import lora
from common import models
from common import runs
from common import texts
from steer import band, extract_vector


def apart(words: list[str]) -> tuple[float, ...]:
    """One arm's doses from one word: ["1,2"] -> (1.0, 2.0)."""
    return tuple(map(float, words[0].split(",")))


def together(doses: tuple[float, ...]) -> str:
    return ",".join(f"{dose:g}" for dose in doses)


Together = Annotated[tuple[float, ...], tyro.constructors.PrimitiveConstructorSpec(
    nargs=1, metavar="X[,X]", instance_from_str=apart,
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda value: [together(value)])]


@dataclass
class Config:
    # what arms differ in: every combination is an arm; a list left out is as heal_loop.py has it
    reg: tuple[Literal["nll", "kl_fwd", "kl_rev", "wd"], ...] = ("nll", "kl_fwd", "kl_rev", "wd")
    agg: tuple[Literal["mean", "rmse", "p95", "max"], ...] = ("mean", "rmse")
    doses: tuple[Together, ...] = ()  # one arm's doses joined by commas
    dose_nats: tuple[Together, ...] = ()  # likewise
    rank: tuple[int, ...] = ()
    lam: tuple[float, ...] = ()
    lam_power: tuple[float, ...] = ()
    tau: tuple[float, ...] = ()
    ref: tuple[Literal["base", "prev", "good"], ...] = ()
    weight_decay: tuple[float, ...] = ()
    lr: tuple[float, ...] = ()
    epochs: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)  # one run of every arm each
    # what they are compared with
    alone: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)  # doses of steering alone; or none
    baselines: bool = False  # also measure every run's own baselines
    # where
    out: Path = Path("runs/sweep")  # folder of the run folders
    table: Path = Path("results/arms.md")  # the comparison; runs/ and its figure go beside it
    executor: Literal["here", "local", "slurm"] = "here"  # in this process, or jobs by submitit
    gpus: tuple[int, ...] = ()  # local: the GPUs, one run at a time on each; default: all there are
    partition: str | None = None  # slurm: the partition
    hours: runs.Above0 = 8.0  # local and slurm: time limit of one run
    run: tyro.conf.Suppress[heal_loop.Config] = field(default_factory=heal_loop.Config)  # the rest


# ---- the arms -----------------------------------------------------------------------------------

BARRIER = ("agg", "lam", "lam_power", "tau", "ref")
IGNORED = {"nll": (*BARRIER, "weight_decay"), "wd": BARRIER,
           "kl_fwd": ("weight_decay",), "kl_rev": ("weight_decay",)}  # what has no effect
DOSES = ("doses", "dose_nats")
VARIED = ("reg", "agg", *DOSES, "rank", "lam", "lam_power", "tau", "ref",
          "weight_decay", "lr", "epochs")
SHORT = {"doses": "dose", "dose_nats": "nats", "lam_power": "power", "weight_decay": "decay"}


def arm_name(chosen: dict, lists: dict[str, list]) -> str:
    """Such as kl_rev_rmse_tau0.2: regulariser, aggregation, and what else varies in this sweep."""
    words = [chosen["reg"]]
    for name, value in chosen.items():
        if name in IGNORED[chosen["reg"]] or name == "reg":
            continue
        if name == "agg":
            words.append(value)
        elif len(lists[name]) > 1:
            shown = together(value) if name in DOSES else value
            shown = f"{shown:g}" if isinstance(shown, (int, float)) else shown
            words.append(SHORT.get(name, name) + shown.replace(",", "+"))
    return "_".join(words)


def arms(cfg: Config) -> dict[str, list[heal_loop.Config]]:
    """{arm: one run per seed}, in the order of the flags. Raises ValueError for an empty list."""
    for name in ("reg", "agg", "seeds"):
        if not getattr(cfg, name):
            raise ValueError(f"--{name} is empty; fix: give at least one")
    for name in ("seed", "resume", "fork", "at"):
        if getattr(cfg.run, name) != getattr(heal_loop.Config, name):
            raise ValueError(f"--{name} is a single run's; fix: leave it out, seeds go by --seeds")
    # dict.fromkeys: what a flag names twice is run once, in the order of the flag
    lists = {}
    for name in VARIED:
        lists[name] = list(dict.fromkeys(getattr(cfg, name) or [getattr(cfg.run, name)]))
    found = {}
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values))
        arm = arm_name(chosen, lists)
        if arm in found:  # differs only in what its regulariser ignores
            continue
        found[arm] = []
        for seed in dict.fromkeys(cfg.seeds):
            run = replace(cfg.run, **chosen, seed=seed, baselines=cfg.baselines,
                          out=cfg.out / f"{arm}_s{seed}")
            runs.check_ranges(run)
            found[arm].append(texts.complete(run))
    return found


def upstream(run: heal_loop.Config) -> str:
    """All that comes before healing: runs with the same of it share their round 0."""
    settings = runs.settings(run)
    return json.dumps({k: v for k, v in settings.items() if k not in heal_loop.HEALING})


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


# ---- what they are compared with ----------------------------------------------------------------


def references(cfg: Config, run: heal_loop.Config) -> heal_loop.Config:
    """The run folder of what is not trained, which no flag of healing changes."""
    usual = {name: getattr(heal_loop.Config, name) for name in heal_loop.HEALING}
    return replace(run, **usual, doses=None, dose_nats=None, seed=0, out=cfg.out / "alone")


def doses_left(run: heal_loop.Config, doses: tuple[float, ...]) -> list[float]:
    """The doses that are not on record yet. Raises ValueError for a folder of other settings."""
    known = []
    if (run.out / "config.json").exists():
        runs.refuse_other_settings(run, run.out, fix="another --out, or the old flags")
        known = [e["dose"] for e in runs.read_events(run.out) if e["stage"] == "alone"]
    return [dose for dose in dict.fromkeys(doses) if dose not in known]


def steer_alone(run: heal_loop.Config, doses: tuple[float, ...], loaded=None) -> None:
    """The original, with the persona as its prompt, and with its own vector at each dose."""
    doses = doses_left(run, doses)
    if not doses:
        return
    reading = texts.read(run)
    if (run.out / "config.json").exists():
        run = replace(run, resume=run.out)
    model, tok = loaded or models.load(run.model, run.device, run.dtype)
    tok.chat_date = date.fromisoformat(run.date)
    lora.attach(model)  # whose gates, shut, are the original
    try:
        again = "python -m tools.sweep, with the same flags"
        with runs.begin(run, "alone", again=again) as folder, lora.gates(model, history=0, live=0):
            measure = functools.partial(evaluate.measure, model, tok, reading,
                                        readout=run.readout, think_tokens=run.think_tokens)
            base = folder.find("base", -1) or folder.record("base", -1, **measure("base"))
            constants = evaluate.Profile.from_dict(base["profile"]).constants
            measure = functools.partial(measure, constants=constants)
            if not folder.find("prompted", -1):
                numbers = measure("prompted", system=reading.persona.pos)
                folder.record("prompted", -1, **numbers)
            vector = extract_vector(model, tok, reading.persona, reading.contexts,
                                    band(model, run.steer_layers))
            for dose in doses:
                numbers = measure(f"dose {dose:g}", vector=vector, dose=dose)
                folder.record("alone", 0, dose=dose, **numbers)
    finally:
        lora.detach(model)


# ---- where they run -----------------------------------------------------------------------------


def check_executor(cfg: Config) -> None:
    """Raises ValueError where the package, the GPUs or the cluster is missing."""
    if cfg.executor == "here":
        return
    instead = "or --executor here"
    try:
        import submitit
    except ImportError:
        raise ValueError(f"--executor {cfg.executor} needs the package submitit; "
                         f"fix: pip install -r requirements-cluster.txt, {instead}") from None
    if cfg.executor == "local" and not cfg.gpus and not torch.cuda.device_count():
        raise ValueError("--executor local: no GPU here; "
                         f"fix: --gpus 0 1 for two runs at once all the same, {instead}")
    if cfg.executor == "slurm" and submitit.SlurmExecutor.affinity() < 0:
        raise ValueError("--executor slurm: no srun here; "
                         f"fix: run it on the cluster's login node, {instead}")


def execute(cfg: Config, calls: list) -> None:
    """Make every call, each with no arguments, and wait until the last is over, well or not."""
    # jobs import this folder's modules wherever they start
    os.environ["PYTHONPATH"] = os.pathsep.join([str(runs.HERE), os.environ.get("PYTHONPATH", "")])
    if cfg.executor == "local":
        execute_local(cfg, calls)
    elif cfg.executor == "slurm":
        execute_slurm(cfg, calls)
    else:
        for call in calls:
            call()


def execute_local(cfg: Config, calls: list) -> None:
    """submitit on this machine: one process at a time on each GPU, which is all that it sees."""
    import submitit
    executors = {}
    for gpu in cfg.gpus or range(torch.cuda.device_count()):
        executors[gpu] = submitit.LocalExecutor(cfg.out / "jobs")
        executors[gpu].update_parameters(timeout_min=60 * cfg.hours, gpus_per_node=1,
                                         visible_gpus=(gpu,))
    waiting, running = list(calls), {}
    try:
        while waiting or running:
            for gpu, executor in executors.items():
                if gpu in running and running[gpu].done():
                    del running[gpu]
                if gpu not in running and waiting:
                    running[gpu] = executor.submit(waiting.pop(0))
            time.sleep(0.5)
    finally:
        for job in running.values():
            job.cancel()


def execute_slurm(cfg: Config, calls: list) -> None:
    """A job array. Raises ValueError where the cluster refuses it."""
    import submitit

    # 1. GPUs are asked for where the partition has some
    partition = ["--partition", cfg.partition] if cfg.partition else []
    resources = subprocess.run(["sinfo", "--noheader", "--format=%G", *partition],
                               capture_output=True, text=True).stdout
    gpus = {"gpus_per_node": 1} if "gpu" in resources and cfg.run.device != "cpu" else {}
    executor = submitit.SlurmExecutor(cfg.out / "jobs")
    executor.update_parameters(time=int(60 * cfg.hours), job_name=cfg.out.name,
                               partition=cfg.partition, **gpus)
    try:
        jobs = executor.submit_array(calls)
    except submitit.core.utils.FailedJobError as e:
        raise ValueError(f"sbatch refused the jobs: {e}; fix: --partition, --hours") from None

    # 2. until none is in the queue any more: what became of them, the run folders say
    waiting = {job.job_id for job in jobs}
    try:
        while waiting:
            time.sleep(2)
            queue = subprocess.run(["squeue", "--noheader", "--me", "--array", "--format=%i"],
                                   capture_output=True, text=True)
            if queue.returncode == 0:  # a controller that restarts answers later
                waiting &= set(queue.stdout.split())
    finally:
        if waiting:
            subprocess.run(["scancel", *sorted(waiting)])


# ---- the command --------------------------------------------------------------------------------


def flags_of(cfg: Config) -> str:
    """The flags that make this table, those at their default left out."""
    chosen = {"reg": cfg.reg, "agg": cfg.agg, "seeds": cfg.seeds, "rounds": cfg.run.rounds}
    default = runs.settings(heal_loop.Config())
    for name, value in runs.settings(cfg.run).items():
        if name in DOSES:
            value = [together(doses) for doses in getattr(cfg, name) or [value] if doses]
        elif name in VARIED:
            value = getattr(cfg, name) or value
        is_left_out = value in (None, [], default[name])
        if not is_left_out and name not in (*chosen, "seed", "baselines"):
            chosen[name] = value
    if cfg.alone != Config.alone:
        chosen["alone"] = cfg.alone
    words = []
    for name, value in chosen.items():
        values = value if isinstance(value, (tuple, list)) else [value]
        words.append(shlex.join([f"--{name.replace('_', '-')}", *map(str, values)]))
    return " ".join(words + ["--baselines"] * cfg.baselines)


def main(cfg: Config) -> None:
    # 1. what is to be run, checked before a folder appears
    by_arm = arms(cfg)
    every = [run for of_arm in by_arm.values() for run in of_arm]
    alone = references(cfg, every[0])
    texts.read(every[0])
    check_executor(cfg)
    todo = [run for run in every if not is_finished(run)]
    to_steer = doses_left(alone, cfg.alone)
    print(f"{len(every)} runs in {cfg.out}, {len(todo)} to do", flush=True)
    loaded = None  # here, one model for all runs
    if cfg.executor == "here" and (todo or to_steer):
        loaded = models.load(cfg.run.model, cfg.run.device, cfg.run.dtype)

    # 2. first what others fork from, then these
    trunks = {}
    for run in every:
        trunks.setdefault(upstream(run), run)
    first = [run for run in todo if trunks[upstream(run)] is run]
    others = [run for run in todo if trunks[upstream(run)] is not run]
    for wave in (first, others):
        calls = [functools.partial(run_arm, run, trunks[upstream(run)], loaded) for run in wave]
        if to_steer and wave is first:
            calls.insert(0, functools.partial(steer_alone, alone, cfg.alone, loaded))
        if calls:
            execute(cfg, calls)
    cut = [run.out.name for run in every if not is_finished(run)]
    cut += [alone.out.name] if doses_left(alone, cfg.alone) else []
    if cut:
        raise ValueError(f"did not finish: {' '.join(cut)}; fix: read their logs in "
                         f"{cfg.out / 'jobs'}; the same command goes on")

    # 3. the records, and the page that is made from them
    folder = cfg.table.parent / "runs" / cfg.out.name
    records = []
    for arm, of_arm in by_arm.items():
        for run in of_arm:
            records.append(frontier.record(run.out, arm=arm, command=flags_of(cfg)))
    if cfg.alone:
        records.append(frontier.record(alone.out, arm="alone", command=flags_of(cfg)))
    for record in records:
        frontier.save(record, folder)
    frontier.draw(records, cfg.table)
    print(cfg.table.read_text())


if __name__ == "__main__":
    runs.cli(Config, main, rest="run")
