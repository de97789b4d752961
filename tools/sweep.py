"""Compare arms: every combination of teacher, targets, regulariser, τ, ... × seed, a run each.

    python -m tools.sweep --reg nll kl_rev --tau 0.1 0.2 0.4 --seeds 0 1 2 --rounds 4
    python -m tools.sweep --reg nll --doses 0 1,2 2,4         # each word is an arm; 0 is unsteered
    python -m tools.sweep --reg nll --teacher steered prompted --targets samples soft
    python -m tools.sweep --executor local --gpus 0 1 1       # three runs at once, two on GPU 1
    python -m tools.sweep --executor slurm --sbatch="--partition gpu --gpus-per-node 1"
    python -m studies.frontier results/runs/sweep             # then: the page of tables, its figure

Every flag of heal_loop.py works here too and holds for all arms. The same command goes on where it
stopped. Runs that differ only in how they heal share round 0 up to its healing: the first of them
makes it, the others are forks of it. --only NAME makes that one run: the executors call it so, and
any other scheduler may.

When all is run, a record of each run (its metrics, no texts) is in results/runs/NAME, NAME that of
--out: one JSON line of settings, and one per event.
"""
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

import distil
import evaluate
import heal_loop
import lora
from common import checks, runs, texts


@dataclass
class Config:
    # what arms differ in: every combination is an arm; an empty list is heal_loop.py's default
    reg: tuple[Literal["nll", "kl_fwd", "kl_rev", "wd"], ...] = ("nll", "kl_fwd", "kl_rev", "wd")
    agg: tuple[Literal["mean", "rmse", "p95", "max"], ...] = ("mean", "rmse")
    trait: tuple[str, ...] = ()  # of one axis, such as care and authority
    teacher: tuple[Literal["steered", "prompted"], ...] = ()
    doses: tuple[str, ...] = ()  # each word is an arm, its doses joined by commas
    dose_nats: tuple[str, ...] = ()  # likewise
    top_k: tuple[int, ...] = ()  # 0: the whole vocabulary
    top_p: tuple[float, ...] = ()  # 1: no cut
    max_perplexity: tuple[float, ...] = ()
    targets: tuple[Literal["samples", "soft"], ...] = ()
    rank: tuple[int, ...] = ()
    lam: tuple[float, ...] = ()
    tau: tuple[float, ...] = ()
    ref: tuple[Literal["base", "prev", "good"], ...] = ()
    weight_decay: tuple[float, ...] = ()
    lr: tuple[float, ...] = ()
    epochs: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)  # one run of every arm each
    alone: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)  # doses of steering alone; or none
    baselines: bool = False  # also measure every run's own baselines
    out: Path = Path("runs/sweep")  # folder of the run folders
    records: Path = Path("results/runs")  # the records go into a folder in it, named as --out
    executor: Literal["here", "local", "slurm"] = "here"  # in this process, or a process a run
    gpus: tuple[int, ...] = ()  # local: a GPU for each run at a time; default: all, one run each
    sbatch: str = ""  # slurm: flags of sbatch for a run, as --sbatch="--partition gpu"
    only: str | None = None  # the one run to make, such as kl_rev_rmse_s0, or alone
    run: tyro.conf.Suppress[heal_loop.Config] = field(default_factory=heal_loop.Config)  # the rest


DOSES = ("doses", "dose_nats")
VARIED = ("reg", "agg", "trait", "teacher", *DOSES, "top_k", "top_p", "max_perplexity", "targets",
          "rank", "lam", "tau", "ref", "weight_decay", "lr", "epochs")
BARRIER = ("agg", "lam", "tau", "ref")
IGNORED = {"nll": (*BARRIER, "weight_decay"), "wd": BARRIER, "kl_fwd": ("weight_decay",),
           "kl_rev": ("weight_decay",), "steered": (), "prompted": DOSES}  # what has no effect
SHORT = {"agg": "", "trait": "", "teacher": "", "targets": "", "doses": "dose", "top_k": "k",
         "dose_nats": "nats", "top_p": "p", "max_perplexity": "ppl", "weight_decay": "decay"}


def arm_name(chosen: dict, lists: dict[str, list]) -> str:
    """Such as kl_rev_rmse_tau0.2: regulariser, aggregation, and what else varies in this sweep."""
    ignored = ("reg", *IGNORED[chosen["reg"]], *IGNORED[chosen["teacher"]])
    words = [chosen["reg"]]
    for name, value in chosen.items():
        if name in ignored or name != "agg" and len(lists[name]) == 1:
            continue
        if name in DOSES:
            value = "+".join(f"{dose:g}" for dose in value)
        elif name == "trait":
            value = Path(value).stem
        shown = value if isinstance(value, str) else f"{value:g}"
        words.append(SHORT.get(name, name) + shown)
    return "_".join(words)


def arms(cfg: Config) -> dict[str, list[heal_loop.Config]]:
    """{arm: one run per seed}, in the order of the flags. Raises ValueError for a malformed one."""
    for name in ("seed", "resume", "fork", "at"):
        if getattr(cfg.run, name) != getattr(heal_loop.Config, name):
            raise ValueError(f"--{name} is a single run's; fix: leave it out, seeds go by --seeds")
    # dict.fromkeys: what a flag names twice is run once, in the order of the flag
    lists = {}
    for name in VARIED:
        values = getattr(cfg, name)
        if name in DOSES:
            values = [tuple(map(float, word.split(","))) for word in values]
        lists[name] = list(dict.fromkeys(values or [getattr(cfg.run, name)]))
    if len({Path(trait).stem for trait in lists["trait"]}) < len(lists["trait"]):
        raise ValueError(f"--trait: two files called alike: {', '.join(lists['trait'])}; "
                         "fix: other names, which arms go by")
    by_arm = {}
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values))
        arm = arm_name(chosen, lists)
        if arm in by_arm:  # differs only in what has no effect
            continue
        by_arm[arm] = []
        for seed in dict.fromkeys(cfg.seeds or [cfg.run.seed]):
            run = replace(cfg.run, **chosen, seed=seed, baselines=cfg.baselines,
                          out=cfg.out / f"{arm}_s{seed}")
            runs.check_ranges(run)
            by_arm[arm].append(texts.complete(run))
    return by_arm


def upstream(run: heal_loop.Config) -> str:
    """All that comes before healing: runs with the same of it share their round 0."""
    settings = runs.settings(run)
    return json.dumps({k: v for k, v in settings.items() if k not in heal_loop.HEALING})


def recorded(run: heal_loop.Config) -> list[dict]:
    """The events of a run so far. Raises ValueError for a folder of other settings."""
    if not (run.out / "config.json").exists():
        return []
    runs.refuse_other_settings(run, run.out, fix="another --out, or the old flags")
    return runs.read_events(run.out)


def is_finished(run: heal_loop.Config) -> bool:
    """True where the last metric is on record, or the reason why there is none."""
    done = [(e["stage"], e["round"]) for e in recorded(run)]
    last = ("matched", run.rounds) if run.baselines else ("healed", run.rounds - 1)
    return last in done or "ended" in dict(done)


def run_arm(run: heal_loop.Config, trunk: heal_loop.Config, loaded: tuple) -> None:
    """One run from wherever it stands to its end; a run that has not begun forks from `trunk`."""
    if (run.out / "config.json").exists():
        run = replace(run, resume=run.out)
    elif trunk.out != run.out and runs.rounds_done(trunk.out):
        run = replace(run, fork=trunk.out, at=0)
    try:
        heal_loop.main(run, loaded)
    except runs.Ended as e:  # on record in the run, and a result of this arm
        print(f"{run.out} ended: {e}")
    finally:
        if lora.is_attached(loaded[0]):
            lora.detach(loaded[0])  # the next run gets the plain model


def references(cfg: Config, run: heal_loop.Config) -> heal_loop.Config:
    """The run folder of what is not trained, which no flag of teacher or healing changes."""
    names = {*VARIED, *heal_loop.HEALING, "seed"} - {"trait"}
    usual = {name: getattr(heal_loop.Config, name) for name in names}
    return texts.complete(replace(run, **usual, out=cfg.out / "alone"))


def doses_left(run: heal_loop.Config, doses: tuple[float, ...]) -> list[float]:
    """The doses that are not on record yet."""
    known = [e["dose"] for e in recorded(run) if e["stage"] == "alone"]
    return [dose for dose in dict.fromkeys(doses) if dose not in known]


def steer_alone(run: heal_loop.Config, doses: tuple[float, ...], loaded: tuple) -> None:
    """The original, with the persona as its prompt, and with its own vector at each dose."""
    doses, reading, (model, chat) = doses_left(run, doses), texts.read(run), loaded
    if (run.out / "config.json").exists():
        run = replace(run, resume=run.out)
    lora.attach(model)  # whose gates, shut, are the original
    try:
        again = "python -m tools.sweep, with the same flags"
        with runs.begin(run, "alone", again=again) as folder, lora.gates(model, history=0, live=0):
            # no round: the base and the persona prompt alone
            heal_loop.loop(replace(run, rounds=0, baselines=True), folder, model, chat, reading)
            constants = folder.find("base", -1)["profile"]["constants"]
            vector = distil.trait_vector(model, chat, reading, run.steer_layers)
            for dose in doses:
                metrics = evaluate.measure(model, chat, reading, f"dose {dose:g}", run.readout,
                                           constants, run.think_tokens, run.max_new_tokens,
                                           vector=vector, dose=dose)
                folder.record("alone", 0, dose=dose, **metrics)
    finally:
        lora.detach(model)


def log_of(cfg: Config, name: str) -> Path:
    return cfg.out / "jobs" / f"{name}.log"


def execute(cfg: Config, names: list[str]) -> list[str]:
    """Each run by `--only` in a process of its own, waited for to the last; -> those that failed.

    local: one at a time for each of --gpus, which is all that it sees. slurm: all at once, each by
    `sbatch --wait`, which lasts as long as its job. Raises ValueError where GPUs or cluster are
    missing.
    """
    is_local, job = cfg.executor == "local", f"{cfg.out.name}_{os.getpid()}"
    gpus = list(cfg.gpus or range(torch.cuda.device_count())) if is_local else [None] * len(names)
    if is_local and not gpus:
        raise ValueError("no GPU here; fix: --gpus 0 1 for two runs at once, or --executor here")
    if not is_local and not shutil.which("sbatch"):
        raise ValueError("no sbatch here; fix: run it on a login node, or --executor here")
    (cfg.out / "jobs").mkdir(parents=True, exist_ok=True)
    waiting, running, failed = list(names), {}, []
    try:
        while waiting or running:
            for k, gpu in enumerate(gpus):
                # 1. its process has ended: well, or its log says how
                if k in running and running[k][1].poll() is not None:
                    name, process = running.pop(k)
                    if process.returncode:
                        text = log_of(cfg, name).read_text(encoding="utf-8", errors="replace")
                        last_line = text.strip().rpartition("\n")[2]
                        print(f"{name} failed: {last_line} ({log_of(cfg, name)})", flush=True)
                        failed.append(name)

                # 2. the next one
                if k not in running and waiting:
                    name, env = waiting.pop(0), dict(os.environ)
                    log = log_of(cfg, name)
                    command = [sys.executable, "-m", "tools.sweep", *sys.argv[1:],
                               "--executor", "here", "--only", name]
                    if is_local:
                        seen = env.get("CUDA_VISIBLE_DEVICES")  # of which gpu is the index
                        env["CUDA_VISIBLE_DEVICES"] = seen.split(",")[gpu] if seen else str(gpu)
                    else:
                        command = ["sbatch", "--wait", *shlex.split(cfg.sbatch), f"--output={log}",
                                   "--open-mode=append", f"--job-name={job}",
                                   f"--wrap={shlex.join(command)}"]
                    with log.open("a") as file:
                        process = subprocess.Popen(command, env=env, stdout=file, stderr=file)
                    running[k] = name, process
                    print(f"waiting for {name}, {len(waiting)} have not begun", flush=True)
            time.sleep(0.5)
    finally:  # where it was interrupted
        for _, process in running.values():
            process.terminate()
        if running and not is_local:
            subprocess.run(["scancel", f"--name={job}"])
    return failed


@dataclass
class Record:
    """One run, without its texts."""
    name: str  # of the run folder
    config: dict  # its settings, its `arm`, and the `command` of the sweep
    events: list[dict]

    def of(self, stage: str) -> list[dict]:
        """The events of a stage, in order."""
        return [e for e in self.events if e["stage"] == stage]


def slim(event: dict) -> dict:
    """An event without texts, of whose profile axis, direction, size and spread are kept.

    spread: the trait metric under each wording or on each probe, nats.
    """
    kept = {k: v for k, v in event.items() if k not in ("texts", "log", "profile")}
    if profile := event.get("profile"):
        axis = profile["axis"]
        kept |= {"axis": axis, "direction": profile["direction"], "n": len(profile["ids"]),
                 "spread": profile["spread"].get(axis, [])}
    return json.loads(json.dumps(kept), parse_float=lambda digits: float(f"{float(digits):.6g}"))


def record(run: Path, **labels) -> Record:
    """The record of a run folder. labels: what its settings do not say, such as the arm."""
    settings = runs.read_json(run / "config.json")
    return Record(run.name, {**labels, **settings}, [slim(e) for e in runs.read_events(run)])


def save(record: Record, folder: Path) -> None:
    """Write a record: a line of settings, and one per event."""
    folder.mkdir(parents=True, exist_ok=True)
    first = {"stage": "config", "round": -1, **record.config}
    runs.write_text(folder / f"{record.name}.jsonl", runs.to_jsonl([first, *record.events]))


def load(folder: Path) -> list[Record]:
    """Every record of a folder. Raises ValueError for a folder without one."""
    records = []
    for file in sorted(folder.glob("*.jsonl")):
        first, *events = runs.read_jsonl(file)
        if (first.pop("stage"), first.pop("round")) == ("config", -1):
            records.append(Record(file.stem, first, events))
    if not records:
        raise ValueError(f"{folder} holds no records; fix: give one that tools.sweep wrote")
    return records


def main(cfg: Config) -> None:
    # 1. what is to be run, checked before a folder appears
    by_arm = arms(cfg)
    every = {run.out.name: run for of_arm in by_arm.values() for run in of_arm}
    alone = references(cfg, next(iter(every.values())))
    for run in every.values():
        texts.read(run)
    if cfg.only not in (None, "alone", *every):
        raise ValueError(f"--only {cfg.only} is no run of these flags; fix: {' '.join(every)}")
    todo = ["alone"] * bool(doses_left(alone, cfg.alone))
    todo += [name for name, run in every.items() if not is_finished(run)]
    todo = [name for name in todo if cfg.only in (None, name)]
    print(f"{len(every)} runs in {cfg.out}, {len(todo)} to do", flush=True)

    # 2. first what others fork from, then these
    trunks = {}
    trunk_of = {name: trunks.setdefault(upstream(run), run) for name, run in every.items()}
    forks = [name for name in todo if name != "alone" and trunk_of[name].out.name != name]
    first, failed = [name for name in todo if name not in forks], []
    if cfg.executor != "here":
        for names in (first, forks):
            if names and not failed:  # a fork needs the round 0 of its first run
                failed = execute(cfg, names)
    elif todo:  # one model for all runs
        loaded = checks.load(cfg.run.model, cfg.run.device, cfg.run.dtype, cfg.run.date)
        for name in (*first, *forks):
            if name == "alone":
                steer_alone(alone, cfg.alone, loaded)
            else:
                run_arm(every[name], trunk_of[name], loaded)
    if failed:
        raise ValueError(f"did not finish: {' '.join(failed)}; fix: what their logs say; "
                         "the same command goes on")

    # 3. the records
    if cfg.only:
        return
    folder, command = cfg.records / cfg.out.name, shlex.join(sys.argv[1:])
    for arm, of_arm in {"alone": [alone] * bool(cfg.alone), **by_arm}.items():
        for run in of_arm:
            save(record(run.out, arm=arm, command=command), folder)
    print(f"{folder}; tables and figure: python -m studies.frontier {folder}")


if __name__ == "__main__":
    runs.cli(Config, main, rest="run")
