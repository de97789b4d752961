"""A run folder, and how a command reports a mistake.

    runs/X/   config.json  events.jsonl  round_0/ ...  trajectory.png  map.html  report.html
    round_0/  vector.safetensors  sampled.jsonl  kept.jsonl  adapter.safetensors  events.jsonl

    a stage's randomness = crc32("{seed} {round} {stage}")

A round exists or it does not: it is written into `round_0.tmp`, its own events with it, and appears
by one rename. The top events.jsonl holds what belongs to no round: base, prompted, matched, ended.
A killed run is resumed after its last finished round, and ends in the same bytes (seconds aside).

    with begin(config, "name") as run:                   # made or resumed, and locked
        for r in range(run.rounds_done, config.rounds):
            with run.new_round(r) as folder: ...         # files into it; run.record("heal", r, ...)
    cli(Config, main)                                    # flags in; a mistake is one line on stderr
"""
import contextlib
import json
import math
import os
import platform
import re
import shutil
import sys
import time
import typing
import zlib
from dataclasses import asdict, fields
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Callable, NamedTuple

import torch
import transformers
import tyro
from filelock import FileLock, Timeout
from safetensors import SafetensorError

HERE = Path(__file__).parent.parent


# ---- files --------------------------------------------------------------------------------------


def write_bytes(path, data: bytes) -> None:
    """Written aside and renamed: a reader, or a resumed run, never meets half a file."""
    aside = Path(f"{path}.tmp")
    aside.write_bytes(data)
    os.replace(aside, path)


def write_text(path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def to_jsonl(rows: list[dict]) -> str:
    """One line a row."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path, torn: bool = False) -> list[dict]:
    """Rows of a JSONL file; with `torn`, a last line that never got its newline is left out.

    Raises ValueError naming file and line where one is malformed.
    """
    *lines, last = Path(path).read_text().split("\n")  # splitlines would also cut at U+2028
    if last and not torn:
        lines.append(last)
    rows = []
    for n, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as e:
            raise ValueError(f"{path} line {n} is not JSON ({e.msg}); "
                             "fix: remove or repair the line") from None
    return rows


# ---- flags --------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """A range, said beside the field it holds for: `rank: Annotated[int, Rule(...)]`."""
    holds: Callable
    words: str


AtLeast1 = Annotated[int, Rule(lambda n: n >= 1, "at least 1")]
AtLeast2 = Annotated[int, Rule(lambda n: n >= 2, "at least 2, one of which is held out")]
WholeFrom0 = Annotated[int, Rule(lambda n: n >= 0, "0 or more")]
Seed = Annotated[int, Rule(lambda n: 0 <= n < 2**32, "0 to 4294967295")]


def is_day(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(date.fromisoformat(text))
    return False


Day = Annotated[str, Rule(is_day, "a date such as 2026-01-01")]
Finite = Annotated[float, Rule(math.isfinite, "a finite number")]
From0 = Annotated[float, Rule(lambda x: 0 <= x < math.inf, "a number from 0 up")]
Above0 = Annotated[float, Rule(lambda x: 0 < x < math.inf, "a number above 0")]
Above1 = Annotated[float, Rule(lambda x: x > 1, "above 1")]
ZeroTo1 = Annotated[float, Rule(lambda x: 0 <= x <= 1, "0 to 1")]
Above0To1 = Annotated[float, Rule(lambda x: 0 < x <= 1, "above 0, at most 1")]
Rate = Annotated[float, Rule(lambda x: 0 < x < 1, "between 0 and 1, such as 3e-4")]
Doses = Annotated[tuple[float, ...], Rule(
    lambda doses: len(doses) > 0 and all(map(math.isfinite, doses)), "one finite number or more")]
DoseNats = Annotated[tuple[float, ...], Rule(
    lambda nats: len(nats) > 0 and all(0 < x < math.inf for x in nats),
    "one number above 0 or more, such as 0.5 1")]
DepthRange = Annotated[tuple[float, float], Rule(
    lambda at: 0 <= at[0] < at[1] <= 1,
    "fractions of the depth, 0 <= from < to <= 1, such as 0.45 0.55")]


def check_ranges(config) -> None:
    """Raises ValueError for the first field of a dataclass whose value breaks its `Rule`."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        for kind in (hint, *typing.get_args(hint)):  # `Doses | None` has it one level down
            rule = getattr(kind, "__metadata__", [None])[0]
            if value is not None and isinstance(rule, Rule) and not rule.holds(value):
                shown = " ".join(map(str, value)) or "''" if isinstance(value, tuple) else value
                flag = field.name.replace("_", "-")
                raise ValueError(f"--{flag} {shown} is out of range; fix: {rule.words}")


def cli(config_class, main, rest: str | None = None) -> None:
    """Parse flags into a dataclass, run `main(config)`; a user's mistake is one line on stderr.

    With --resume or --fork, what no flag says is as the earlier run had it. rest: a field, itself a
    dataclass, whose flags are what config_class does not know.
    Exit codes: 0 done, 1 bad input or data, 2 flags that do not parse (tyro's words),
    130 interrupted.
    """
    how = dict(prog=Path(sys.argv[0]).name, config=(tyro.conf.OmitArgPrefixes,),
               description=sys.modules[main.__module__].__doc__)
    try:
        # 1. the flags, those that config_class does not know into its field `rest`
        if rest:
            config, unknown = tyro.cli(config_class, return_unknown_args=True, **how)
            setattr(config, rest, tyro.cli(type(getattr(config, rest)), args=unknown, **how))
        else:
            config = tyro.cli(config_class, **how)

        # 2. once more on top of an earlier run's settings, where there is one
        earlier = getattr(config, "resume", None) or getattr(config, "fork", None)
        if earlier:
            before = read_config(config_class, earlier)
            config = tyro.cli(config_class, default=before, **how)

        # 3. checked, and run
        check_ranges(config)
        main(config)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, SafetensorError) as e:
        message = " ".join(str(e).split())
        if "fix:" not in message and not isinstance(e, ValueError):  # the system's own words
            message += "; fix: a path that can be read and written, on a disk with room"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


# ---- settings -----------------------------------------------------------------------------------

# where and when, nothing that changes a number
UNRECORDED = ("out", "resume", "fork", "at", "device")


def settings(config) -> dict:
    """The settings as config.json keeps them: no absolute path of this machine."""
    kept = {}
    for name, value in asdict(config).items():
        is_path = isinstance(value, Path) or name == "model" and Path(value).is_dir()
        is_path = is_path and not str(value).startswith("tinymfv:")  # of the package, not a file
        if name not in UNRECORDED:
            kept[name] = os.path.relpath(value, HERE) if is_path else value
    return json.loads(json.dumps(kept))  # tuples as lists, as they will be read back


def read_config(config_class, folder: Path):
    """The settings of a run folder as a config_class. Raises ValueError for what is not a run."""
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder} is not a run folder (no config.json); "
                         "fix: give the --out of an earlier run")
    try:
        found = json.loads(file.read_text())
        missing = set(settings(config_class())) - set(found)
        if missing:  # it would silently be the default
            raise ValueError(f"{file} lacks '{min(missing)}', as of an earlier version; "
                             "fix: restore it, start a new run, or use that version")
        for name, hint in typing.get_type_hints(config_class).items():
            if name in UNRECORDED or found[name] is None:
                continue
            kinds = [typing.get_origin(kind) or kind for kind in (hint, *typing.get_args(hint))]
            if Path in kinds:
                is_file = not found[name].startswith("tinymfv:")
                found[name] = HERE / found[name] if is_file else Path(found[name])
            elif name == "model" and (HERE / found[name]).is_dir():
                found[name] = str(HERE / found[name])
            elif tuple in kinds:
                found[name] = tuple(found[name])
        return config_class(**found)
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"{file} is malformed ({e}); "
                         "fix: restore it, or start a new run") from None


def refuse_other_settings(config, folder: Path, free: tuple[str, ...] = (), fix: str = "") -> None:
    """Raises ValueError for the first setting, not in `free`, that differs from the run's."""
    before, asked = settings(read_config(type(config), folder)), settings(config)
    for name in asked:
        if name not in free and asked[name] != before[name]:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {asked[name]} was {before[name]} when {folder} began; "
                             f"fix: {fix}")


def stage_seed(seed: int, round: int, stage: str) -> int:
    """Randomness is drawn per run, round and stage: none depends on how much another drew."""
    return zlib.crc32(f"{seed} {round} {stage}".encode())


# ---- the run folder -----------------------------------------------------------------------------


class Ended(ValueError):
    """A round that cannot be finished, such as for want of data: a result, kept on record."""


def rounds_done(folder: Path) -> int:
    """How many rounds are finished."""
    n = 0
    while (folder / f"round_{n}").is_dir():
        n += 1
    return n


def read_events(folder: Path) -> list[dict]:
    """Every event of a run: base and prompted, then round after round, then matched and ended.

    Raises ValueError for a folder of an earlier version of this code, or a line that is no event.
    """
    # 1. those of no round, checked
    file = folder / "events.jsonl"
    top = read_jsonl(file, torn=True) if file.exists() else []
    for n, event in enumerate(top, 1):
        if not isinstance(event, dict) or not {"stage", "round"} <= event.keys():
            raise ValueError(f"{file} line {n} is not an event of a run; "
                             "fix: restore the file, or start a new run")
        if event["stage"] == "extract":  # a round's own event
            raise ValueError(f"{folder} was written by an earlier version of this code; "
                             "fix: start a new run, or read it with that version")
    if rounds_done(folder) and "base" not in [e["stage"] for e in top]:
        raise ValueError(f"{file} lacks the base evaluation; "
                         "fix: restore the file, or start a new run")

    # 2. in order: what came before round 0, the rounds, what came after
    events = [e for e in top if e["round"] < 0]
    for r in range(rounds_done(folder)):
        events += read_jsonl(folder / f"round_{r}" / "events.jsonl")
    return events + [e for e in top if e["round"] >= 0]


def machine(device: str) -> str:
    """What decides over the last digits of a number: processor, threads, library versions."""
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"

    # 1. a GPU, under auto the first one
    if device == "auto" and torch.cuda.is_available():
        device = "cuda"
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, {libraries}"

    # 2. or the processor, with the widest instructions it has for matrices: kernels differ by them
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    parts = [found[1] if found else platform.processor()]
    for instructions in ("amx_bf16", "avx512_bf16", "avx512f", "avx2"):
        if instructions in text:
            parts.append(instructions)
            break
    return ", ".join([*parts, f"{torch.get_num_threads()} threads", libraries])


class Run:
    """A run folder that is being worked on."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.events = read_events(folder)
        self.under_way = None  # where the round at work is written
        self.clock = time.perf_counter()

    @property
    def rounds_done(self) -> int:
        return rounds_done(self.folder)

    def find(self, stage: str, round: int) -> dict | None:
        """The recorded event of this stage and round."""
        for event in self.events:
            if (event["stage"], event["round"]) == (stage, round):
                return event

    def record(self, stage: str, round: int, **numbers) -> dict:
        """Put an event on record, with the seconds since the one before; -> the event."""
        now = time.perf_counter()
        seconds = float(f"{now - self.clock:.3g}")
        event = {"stage": stage, "round": round, **numbers, "seconds": seconds}
        self.clock = now
        self.events.append(event)
        file = (self.under_way or self.folder) / "events.jsonl"
        before = read_jsonl(file, torn=True) if file.exists() else []
        write_text(file, to_jsonl([*before, event]))
        return event

    def record_machine(self, device: str) -> None:
        """Where the run is worked on, when it begins and whenever it goes on somewhere else."""
        here = machine(device)
        known = [e["name"] for e in self.events if e["stage"] == "machine"]
        if known[-1:] != [here]:
            self.record("machine", -1, name=here)

    @contextlib.contextmanager
    def new_round(self, r: int):
        """A folder for round r, which becomes permanent, by one rename, when the block ends well.

        A round that raises `Ended` leaves what it has in ended_round_r/. Anything else leaves
        nothing.
        """
        # 1. an empty folder, or one with what a fork brought along
        aside = self.folder / f"round_{r}.tmp"
        forked = self.folder / f"forked_round_{r}"
        shutil.rmtree(aside, ignore_errors=True)  # what a killed process left
        if forked.is_dir():
            shutil.copytree(forked, aside)
            self.events += read_jsonl(aside / "events.jsonl")
        else:
            aside.mkdir()
        self.under_way = aside
        try:
            # 2. the round's work, and the rename; what a fork brought goes first:
            # were it lost in between, it would be sampled again to the same bytes
            yield aside
            shutil.rmtree(forked, ignore_errors=True)
            os.replace(aside, self.folder / f"round_{r}")
        except Ended as e:
            # 3. or its end, on record
            ended = self.folder / f"ended_round_{r}"
            shutil.rmtree(ended, ignore_errors=True)
            os.replace(aside, ended)
            self.under_way = None
            self.record("ended", r, why=str(e))
            raise
        finally:
            self.under_way = None
            shutil.rmtree(aside, ignore_errors=True)


def check_fork(config) -> None:
    """Raises ValueError where round `at` of a run cannot be healed again."""
    source, at = config.fork, config.at
    if config.rounds <= at:
        raise ValueError(f"--rounds {config.rounds} leaves nothing to heal from --at {at} on; "
                         f"fix: --rounds {at + 1} or more")
    read_events(source)  # raises for a folder of an earlier version
    done = rounds_done(source)
    if at >= done:
        fix = f"at most {done - 1}" if done else "a run with a finished round"
        raise ValueError(f"--at {at}: {source} has {done} finished rounds, counted from 0; "
                         f"fix: {fix}")
    read_jsonl(source / f"round_{at}" / "kept.jsonl")


def copy_for_fork(source: Path, at: int, folder: Path) -> None:
    """The first `at` rounds of a run, and of its round `at` all that came before healing."""
    # 1. the rounds before
    for r in range(at):
        shutil.copytree(source / f"round_{r}", folder / f"round_{r}")

    # 2. what round `at` had before it was healed
    forked = folder / f"forked_round_{at}"
    forked.mkdir()
    for name in ("vector.safetensors", "sampled.jsonl", "kept.jsonl"):
        shutil.copyfile(source / f"round_{at}" / name, forked / name)
    unhealed = [e for e in read_jsonl(source / f"round_{at}" / "events.jsonl")
                if e["stage"] in ("extract", "distil", "steered")]
    write_text(forked / "events.jsonl", to_jsonl(unhealed))

    # 3. the events of no round, and where all this is from
    shared = ("machine", "memory", "base", "prompted")
    top = [e for e in read_events(source) if e["stage"] in shared]
    origin = {"stage": "forked", "round": -1, "run": source.name, "at": at}
    write_text(folder / "events.jsonl", to_jsonl([*top, origin]))


def is_free(folder: Path) -> bool:
    """True for an empty folder, and for one whose start was killed or met a full disk."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()} - {"lock"}
    made_by_start = {name for name in names if name in ("start.tmp", "events.jsonl")
                     or name.startswith(("round_", "forked_round_"))}
    return not names or "start.tmp" in names and names == made_by_start


def start(config, folder: Path) -> None:
    """Fill an empty run folder: config.json, which comes last, and what is forked."""
    aside = folder / "start.tmp"
    for path in [*folder.glob("round_*"), *folder.glob("forked_round_*")]:
        shutil.rmtree(path)  # of a start that was cut off
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    if config.fork:
        copy_for_fork(config.fork, config.at, aside)
    write_text(aside / "config.json", json.dumps(settings(config), indent=2) + "\n")
    for path in sorted(aside.iterdir(), reverse=True):  # from round_0 to config.json
        os.replace(path, folder / path.name)
    aside.rmdir()


@contextlib.contextmanager
def begin(config, name: str, downstream: tuple[str, ...] = (), again: str = ""):
    """The run folder of a config with out, resume, fork, at: made, locked and yielded as a `Run`.

    name: of a folder that --out does not name. downstream: settings that a fork may change.
    again: the command that goes on with it, if not heal_loop.py.
    Raises ValueError for a taken folder, another process at work, or settings that do not fit.
    """
    # 1. which folder, and whether it may be used
    folder = config.resume or config.out
    if not folder:
        folder = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}_{name}"
    if config.resume:
        refuse_other_settings(config, folder, fix="resume without the flag, or --fork the run")
    elif folder.exists() and not is_free(folder):
        raise ValueError(f"--out {folder} is not empty; fix: another folder, or --resume {folder}")
    if config.fork and not config.resume:
        check_fork(config)
        refuse_other_settings(config, config.fork, downstream, "a fork shares what comes before "
                              f"healing; start a new run, or change only {', '.join(downstream)}")

    # 2. locked and filled, and what came of an earlier attempt to end the run forgotten
    again = again or f"python heal_loop.py --resume {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock").acquire(timeout=0):
            if not config.resume:
                start(config, folder)
            run = Run(folder)
            unfinished = [e for e in run.events
                         if e["stage"] == "ended" and e["round"] >= run.rounds_done]
            if unfinished:  # the round that could not be finished is tried again
                run.events = [e for e in run.events if e not in unfinished]
                top = read_jsonl(folder / "events.jsonl", torn=True)
                kept = [e for e in top if e not in unfinished]
                write_text(folder / "events.jsonl", to_jsonl(kept))
            run.record_machine(config.device)
            yield run

    # 3. what goes wrong in here, with the command that goes on
    except Timeout:
        raise ValueError(f"another process is at work in {folder}; "
                         "fix: wait for it, or choose another --out") from None
    except (OSError, SafetensorError) as e:
        if "fix:" in str(e) or not (folder / "config.json").exists():
            raise
        said = str(e).rpartition("I/O error: ")[2]  # how safetensors wraps the system's words
        raise OSError(f"{said}; nothing finished is lost; "
                      f"fix: free space or permissions, then {again}") from None
    except torch.OutOfMemoryError as e:
        said = str(e).partition(". ")[0]
        raise ValueError(f"{said}; nothing finished is lost; fix: where another program holds the "
                         f"memory, end it, then {again}; else a new run with a smaller "
                         "--batch-size (healing), --max-new-tokens, or --dtype bfloat16") from None
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on with: {again}", file=sys.stderr)
        raise
