"""A run folder.

    runs/X/   config.json  events.jsonl  round_0/ ...  trajectory.png  map.html  report.html
    round_0/  vector.safetensors  sampled.jsonl  kept.jsonl  adapter.safetensors  events.jsonl

    a stage's randomness = crc32("{seed} {round} {stage}")

A round exists or it does not: it is written into `round_0.tmp`, its own events with it, and appears
by one rename. The top events.jsonl holds what belongs to no round: base, prompted, matched.
A killed run is resumed after its last finished round, and ends in the same bytes (seconds aside).

    with begin(config, "name") as run:                   # made or resumed, and locked
        for r in range(run.rounds_done, config.rounds):
            with run.new_round(r) as folder: ...         # files into it; run.record("heal", r, ...)
"""
import contextlib
import errno
import itertools
import json
import math
import os
import platform
import re
import shutil
import sys
import time
import zlib
from datetime import datetime
from pathlib import Path

import torch
import transformers
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from common.command import (  # noqa: F401  what every command needs, as runs.NAME
    HERE, Above0, Above0To1, Above1, AtLeast1, AtLeast2, Day, DepthRange, DoseNats, Doses, Finite,
    From0, Rate, Seed, WholeFrom0, ZeroTo1, check_ranges, check_rows, cli, read_config, read_jsonl,
    read_text, refuse_other_settings, settings, to_jsonl, write_bytes, write_config,
    write_text)


def stage_seed(seed: int, round: int, stage: str) -> int:
    """Randomness is drawn per run, round and stage: none depends on how much another drew."""
    return zlib.crc32(f"{seed} {round} {stage}".encode())


class Ended(ValueError):
    """A round that cannot be finished, such as for want of data: a result, kept on record."""


def rounds_done(folder: Path) -> int:
    """How many rounds are finished."""
    return next(n for n in itertools.count() if not (folder / f"round_{n}").is_dir())


def read_events(folder: Path) -> list[dict]:
    """Every event of a run in order: base and prompted, round after round, matched, why it ended.

    Raises ValueError for a line that is no event, or where the base evaluation is missing.
    """
    done, events = rounds_done(folder), []
    for name in (*(f"round_{r}" for r in range(done)), f"ended_round_{done}", ""):
        file = folder / name / "events.jsonl"
        if not file.exists() and not name.startswith("round"):
            continue
        found = read_jsonl(file, torn=True)
        for n, event in enumerate(found, 1):
            if not isinstance(event, dict) or not isinstance(event.get("round"), int):
                raise ValueError(f"{file} line {n} is not an event of a run; "
                                 "fix: restore the file, or start a new run")
        events += found[-1:] if name.startswith("ended") else found
    if done and "base" not in [e.get("stage") for e in events]:
        raise ValueError(f"{folder / 'events.jsonl'} lacks the base evaluation; "
                         "fix: restore the file, or start a new run")
    return sorted(events, key=lambda e: e["round"])  # -1: before all rounds


def machine(device: str) -> str:
    """What decides over the last digits of a number: processor, threads, library versions."""
    if device == "auto" and torch.cuda.is_available():
        device = "cuda"
    if device.startswith("cuda"):
        parts = [torch.cuda.get_device_name(device)]
    else:
        cpuinfo = Path("/proc/cpuinfo")
        text = read_text(cpuinfo) if cpuinfo.exists() else ""
        name = re.search(r"model name\s*: (.*)", text)
        # the widest instructions that it has for matrices: kernels differ by them
        widest = [x for x in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if x in text][:1]
        parts = [name[1] if name else platform.processor(), *widest,
                 f"{torch.get_num_threads()} threads"]
    libraries = [f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
    return ", ".join([*parts, *libraries])


class Run:
    """A run folder that is being worked on."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.under_way = folder  # or where the round at work is written
        self.events = read_events(folder)
        self.clock = time.perf_counter()

    @property
    def rounds_done(self) -> int:
        return rounds_done(self.folder)

    def find(self, stage: str, round: int) -> dict | None:
        """The recorded event of this stage and round."""
        for event in self.events:
            if (event["stage"], event["round"]) == (stage, round):
                return event

    def reference(self, ref: str, r: int) -> list[float]:
        """History gates of the model that round r's D is measured from, one a finished round."""
        n = r if ref == "prev" else 0  # rounds that the reference has
        if ref == "good":  # up to the newest student at most twice as perplexing as the original
            limit = 2 * self.find("base", -1)["perplexity"]
            perplexities = [self.find("healed", k)["perplexity"] or math.inf for k in range(r)]
            fluent = [k for k in range(r) if perplexities[k] <= limit]
            n = max(fluent, default=-1) + 1
        return [1.0] * n + [0.0] * (r - n)

    def record(self, stage: str, round: int, **numbers) -> dict:
        """Append an event, with the seconds since the one before, to the record; -> the event."""
        now = time.perf_counter()
        seconds = float(f"{now - self.clock:.3g}")
        self.clock = now
        line = to_jsonl([{"stage": stage, "round": round, **numbers, "seconds": seconds}]).encode()
        self.events.append(json.loads(line))
        with open(self.under_way / "events.jsonl", "a+b") as file:
            file.seek(0)  # what a killed process left of a line is cut off
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line)
        return self.events[-1]

    @contextlib.contextmanager
    def new_round(self, r: int):
        """A folder for round r, which becomes permanent, by one rename, when the block ends well.

        A round that raises `Ended` leaves what it has in ended_round_r/. Anything else leaves
        nothing.
        """
        # 1. an empty folder, or one with what a fork brought along; how r ended before is forgotten
        aside, ended = self.folder / f"round_{r}.tmp", self.folder / f"ended_round_{r}"
        forked = self.folder / f"forked_round_{r}"
        shutil.rmtree(aside, ignore_errors=True)  # what a killed process left
        self.events = [e for e in self.events if (e["stage"], e["round"]) != ("ended", r)]
        if forked.is_dir():
            shutil.copytree(forked, aside)
            self.events += read_jsonl(aside / "events.jsonl")
        else:
            aside.mkdir()
        self.under_way = aside
        try:
            # 2. the round's work, and the rename
            yield aside
            os.replace(aside, self.folder / f"round_{r}")
            shutil.rmtree(forked, ignore_errors=True)
        except Ended as e:
            # 3. or its end, on record
            self.record("ended", r, why=str(e))
            shutil.rmtree(ended, ignore_errors=True)
            os.replace(aside, ended)
            raise
        finally:
            self.under_way = self.folder
            shutil.rmtree(aside, ignore_errors=True)


def copy_for_fork(source: Path, at: int, folder: Path) -> None:
    """The first `at` rounds of a run, and of its round `at` all that came before healing."""
    # 1. the rounds before, and what round `at` had before it was healed
    for r in range(at):
        shutil.copytree(source / f"round_{r}", folder / f"round_{r}")
    forked = folder / f"forked_round_{at}"
    forked.mkdir()
    for name in ("vector.safetensors", "sampled.jsonl", "kept.jsonl"):
        shutil.copyfile(source / f"round_{at}" / name, forked / name)

    # 2. the events of both, those of no round, and where all this is from
    events = read_events(source)
    unhealed = [e for e in events if e["round"] == at and e["stage"] in ("distil", "steered")]
    write_text(forked / "events.jsonl", to_jsonl(unhealed))
    top = [e for e in events if e["stage"] in ("machine", "base", "prompted")]
    origin = {"stage": "forked", "round": -1, "run": source.name, "at": at}
    write_text(folder / "events.jsonl", to_jsonl([*top, origin]))


def start(config, folder: Path) -> None:
    """Fill an empty run folder: config.json, which comes last, and what is forked."""
    aside = folder / "start.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    if config.fork:
        copy_for_fork(config.fork, config.at, aside)
    write_config(config, aside)
    for path in sorted(aside.iterdir(), reverse=True):  # from round_0 to config.json
        os.replace(path, folder / path.name)
    aside.rmdir()


def is_free(folder: Path) -> bool:
    """Whether a run may begin here: nothing, or what one left that was killed as it began."""
    return not folder.exists() or folder.is_dir() and all(
        path.name == "lock" or path.suffix == ".tmp" for path in folder.iterdir())


@contextlib.contextmanager
def locked(folder: Path):
    """No other process works in it meanwhile. Raises ValueError where one does."""
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process is at work in {folder}; "
                         "fix: wait for it, or choose another --out") from None
    except (NotImplementedError, OSError) as e:  # 524: ENOTSUPP, which errno does not name
        if getattr(e, "errno", None) not in (None, errno.ENOLCK, errno.EOPNOTSUPP, 524):
            raise
        print(f"no locks on this file system ({e}): two processes in {folder} are not kept apart",
              file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def begin(config, name: str, downstream: tuple[str, ...] = (), again: str = ""):
    """The run folder of a config with out, resume, fork, at: made, locked and yielded as a `Run`.

    name: of a folder that --out does not name. downstream: settings that a fork may change.
    again: the command that goes on with it, if not heal_loop.py.
    Raises ValueError for a taken folder, another process at work, or settings that do not fit.
    """
    # 1. which folder, and whether it may be used; of which model the adapters are, they say
    check_ranges(config)
    folder = config.resume or config.out or Path(f"runs/{datetime.now():%Y%m%d-%H%M%S}_{name}")
    source, at = config.fork, config.at
    if source and config.resume:
        raise ValueError("--resume and --fork exclude each other; fix: give one of them")
    if at and not source:
        raise ValueError(f"--at {at} says where a fork begins; fix: --fork RUN")
    if config.resume:
        refuse_other_settings(config, folder, ("model",),
                              "resume without the flag, or --fork the run")
        forked = folder / f"forked_round_{rounds_done(folder)}"
        if forked.is_dir():
            check_rows(forked / "kept.jsonl")
    elif not is_free(folder):
        raise ValueError(f"--out {folder} is not empty; fix: another folder, or --resume {folder}")
    elif source:
        if not at < min(rounds_done(source), config.rounds):
            raise ValueError(f"--at {at} of --rounds {config.rounds}: {source} has "
                             f"{rounds_done(source)} finished rounds, counted from 0; "
                             "fix: --at one of them, and more --rounds")
        read_events(source)
        check_rows(source / f"round_{at}" / "kept.jsonl")
        refuse_other_settings(config, source, (*downstream, "model"), "a fork shares what comes "
                              f"before healing; start a new run, or change {', '.join(downstream)}")

    # 2. locked and filled
    again = again or f"python heal_loop.py --resume {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if not config.resume:
                start(config, folder)
            run = Run(folder)
            here = machine(config.device)
            if here not in [e["name"] for e in run.events if e["stage"] == "machine"][-1:]:
                run.record("machine", -1, name=here)  # anew where it goes on somewhere else
            yield run

    # 3. what goes wrong in here, with the command that goes on
    except (OSError, SafetensorError, torch.OutOfMemoryError) as e:
        if "fix:" in str(e) or not (folder / "config.json").exists():
            raise
        reason = str(e).rpartition("I/O error: ")[2].partition(". ")[0]  # the system's own words
        raise ValueError(f"{reason}; nothing finished is lost; fix: make room (or permissions; of "
                         "a GPU's memory also by a new run with a smaller --batch-size or "
                         f"--max-new-tokens, or --dtype bfloat16), then {again}") from None
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on with: {again}", file=sys.stderr)
        raise
