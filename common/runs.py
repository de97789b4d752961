"""A run folder; and how a command takes its settings, reads and writes files, reports a mistake.

    runs/X/   config.json  events.jsonl  round_0/ ...  trajectory.png  map.html  report.html
    round_0/  vector.safetensors  sampled.jsonl  kept.jsonl  adapter.safetensors  events.jsonl

    a stage's randomness = crc32("{seed} {round} {stage}")

A round exists or it does not: it is written into `round_0.tmp`, its own events with it, and appears
by one rename. The top events.jsonl holds what belongs to no round: base, prompted, matched.
A killed run is resumed after its last finished round, and ends in the same bytes (seconds aside).

    with begin(config, "name") as run:                   # made or resumed, and locked
        for r in range(run.rounds_done, config.rounds):
            with run.new_round(r) as folder: ...         # files into it; run.record("heal", r, ...)

    @dataclass
    class Config:
        rank: AtLeast1 = 16                              # its range stands beside the field
    cli(Config, main)                                    # a user's mistake is one line on stderr

What is read and written is UTF-8 whatever the locale, and no terminal is too old for a λ.
"""
import contextlib
import errno
import functools
import itertools
import json
import math
import os
import shutil
import sys
import time
import zlib
from dataclasses import asdict, dataclass, fields
from datetime import date, datetime
from pathlib import Path
from typing import Annotated

import torch
import transformers
import tyro
from annotated_types import Ge, Gt, Interval, MinLen
from filelock import FileLock, Timeout
from pydantic import AfterValidator, FiniteFloat, StrictInt, TypeAdapter, ValidationError
from safetensors import SafetensorError

HERE = Path(__file__).resolve().parent.parent


def read_json(path) -> dict:
    """The JSON object in a UTF-8 file, with or without a byte order mark.

    Raises OSError where there is no such file, ValueError for what is not one.
    """
    try:
        found = json.loads(Path(path).read_text("utf-8-sig"))
        json.dumps(found, allow_nan=False)  # Python reads NaN and Infinity; JSON has neither
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 ({e.reason} at byte {e.start}); "
                         "fix: save it in encoding UTF-8") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is malformed ({e}); fix: make it valid JSON") from None
    return checked(dict, found, f"{path}: ")


def write_bytes(path, data: bytes) -> None:
    """Written aside and renamed: a reader, or a resumed run, never meets half a file."""
    aside = Path(f"{path}.tmp")
    aside.write_bytes(data)
    os.replace(aside, path)


def write_text(path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def to_jsonl(rows: list[dict]) -> str:
    """One line a row; NaN and infinity, for which JSON has no word, become null."""
    rows = json.loads(json.dumps(rows), parse_constant=lambda name: None)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path, torn: bool = False) -> list:
    """Rows of a JSONL file; with `torn`, a last line that never got its newline is left out.

    Raises ValueError naming file and line where one is malformed.
    """
    rows = []
    for n, line in enumerate(Path(path).read_bytes().splitlines(keepends=True), 1):
        if torn and not line.endswith(b"\n"):
            break
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path} line {n} is not JSON in UTF-8; "
                             "fix: remove or repair the line") from None
    return rows


def rising(depths: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= depths[0] < depths[1] <= 1:
        raise ValueError("fractions of the depth, 0 <= from < to <= 1, such as 0.45 0.55")
    return depths


AtLeast1 = Annotated[int, Ge(1)]
AtLeast2 = Annotated[int, Ge(2)]
WholeFrom0 = Annotated[int, Ge(0)]
Seed = Annotated[int, Interval(ge=0, lt=2**32)]
Day = Annotated[str, AfterValidator(lambda day: str(date.fromisoformat(day)))]
Finite = FiniteFloat
From0 = Annotated[FiniteFloat, Ge(0)]
Above0 = Annotated[FiniteFloat, Gt(0)]
Above1 = Annotated[FiniteFloat, Gt(1)]
ZeroTo1 = Annotated[float, Interval(ge=0, le=1)]
Above0To1 = Annotated[float, Interval(gt=0, le=1)]
Rate = Annotated[float, Interval(gt=0, lt=1)]
Doses = Annotated[tuple[FiniteFloat, ...], MinLen(1)]
DoseNats = Annotated[tuple[Above0, ...], MinLen(1)]
DepthRange = Annotated[tuple[float, float], AfterValidator(rising)]


type_adapter = functools.cache(TypeAdapter)  # made in milliseconds, and asked for every row


def checked(kind, values, where: str):
    """A dict as the dataclass `kind`, text as a Path where its field says so, and the like.

    where: how a message begins. Raises ValueError for the first value that is not allowed.
    """
    try:
        return type_adapter(kind).validate_python(values)
    except ValidationError as e:
        fault = e.errors()[0]
        place = [f"entry {k + 1}" if isinstance(k, int) else k.replace("_", "-")
                 for k in fault["loc"]]
        value = "" if isinstance(fault["input"], dict) else ascii(fault["input"])[:80] + " "
        wrong = f"{value}is not allowed"
        fix = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if fault["type"] == "missing":
            wrong, fix = "is missing", "add it"
        if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            wrong, fix = "is unknown", "remove it, or mend its spelling"
        raise ValueError(f"{where}{' '.join([*place, wrong])}; fix: {fix}") from None


def check_ranges(config) -> None:
    """Give each field its type (text becomes a Path); raises ValueError for the first it cannot."""
    config.__dict__.update(vars(checked(type(config), vars(config), "--")))


# where a run is, and where it runs: its `machine` events say that
NOT_IN_CONFIG = ("out", "resume", "fork", "at", "device")


def settings(config) -> dict:
    """The settings as config.json keeps them: no absolute path of this machine.

    A file or folder is resolved and seen from this repository, and begins with ./
    A name stays one: smollm2 is the embedded model, whatever folder is called so.
    """
    kept = {}
    for name, value in asdict(config).items():
        is_path = (isinstance(value, Path) or name == "model" and Path(value).is_dir()
                   or name == "trait" and value.endswith(".json"))
        if is_path and value != "smollm2" and not str(value).startswith("tinymfv:"):
            value = "./" + os.path.relpath(Path(value).resolve(), HERE)
        if name not in NOT_IN_CONFIG:
            kept[name] = value
    return json.loads(json.dumps(kept, default=str))  # tuples as lists, as they will be read back


def read_config(config_class, folder: Path):
    """The settings of a run folder as a config_class. Raises ValueError for what is not a run."""
    file = Path(folder) / "config.json"
    if not file.exists():
        raise ValueError(f"{folder} is not a run folder (no config.json); "
                         "fix: give the --out of an earlier run")
    values = read_json(file)
    missing = {field.name for field in fields(config_class)} - {*values, *NOT_IN_CONFIG}
    if missing:  # it would silently be the default
        raise ValueError(f"{file} lacks '{min(missing)}', as of an earlier version; "
                         "fix: restore it, start a new run, or use that version")
    for name, value in values.items():
        if str(value).startswith("./"):
            values[name] = str((HERE / value).resolve())
    return checked(config_class, values, f"{file}: ")


def refuse_other_settings(config, folder: Path, free: tuple[str, ...] = (), fix: str = "") -> None:
    """Raises ValueError for the first setting, not in `free`, that differs from the run's."""
    before, asked = settings(read_config(type(config), folder)), settings(config)
    for name in asked:
        was_moved = str(before[name]).startswith("./") and not (HERE / before[name]).exists()
        if name not in free and asked[name] != before[name] and not was_moved:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {asked[name]} was {before[name]} when {folder} began; "
                             f"fix: {fix}")


@dataclass
class Message:
    role: str
    content: Annotated[str, AfterValidator(str.encode)]  # fails on half a character


@dataclass
class Row:
    """What healing reads of a row of kept.jsonl; tokens: of the answer, where they are known."""
    messages: list[Message]
    tokens: Annotated[list[Annotated[StrictInt, Ge(0)]], MinLen(1)] = ()


def check_rows(path, n_tokens: int | None = None) -> list[dict]:
    """-> the rows of a kept.jsonl. n_tokens: of the vocabulary, once a model is loaded.

    Raises ValueError naming file, row and field.
    """
    rows, turns = read_jsonl(path), ["system", "user", "assistant"]
    if len(rows) < 2:
        raise ValueError(f"{path} has {len(rows)} rows; fix: two or more, one of them is held out")
    for n, row in enumerate(rows, 1):
        where = f"{path} row {n}: "
        row = checked(Row, row, where)
        if [m.role for m in row.messages] not in (turns, turns[1:]):
            raise ValueError(f"{where}messages are not of system (or none), user and assistant; "
                             "fix: one exchange a row")
        if not (row.tokens or row.messages[-1].content.strip()):
            raise ValueError(f"{where}the answer is empty; fix: remove the row")
        if n_tokens and max(row.tokens or [0]) >= n_tokens:
            raise ValueError(f"{where}tokens has {max(row.tokens)}, of {n_tokens} in the model; "
                             "fix: leave tokens out, the content is used then")
    return rows


def cli(config_class, main, rest: str | None = None) -> None:
    """Parse flags into a dataclass, run `main(config)`; a user's mistake is one line on stderr.

    With --resume or --fork, flags that are not given keep the earlier run's values. rest: a field,
    itself a dataclass, that takes the flags which config_class does not know.
    Exit codes: 0 done, 1 bad input or data, 2 flags that do not parse (tyro's words),
    130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # λ is ? where a terminal has none
    kwargs = dict(prog=Path(sys.argv[0]).name, config=(tyro.conf.OmitArgPrefixes,),
                  description=sys.modules[main.__module__].__doc__)
    try:
        # 1. the flags, those that config_class does not know into its field `rest`
        typed = " ".join(sys.argv[1:])
        if typed != typed.encode(errors="replace").decode():
            raise ValueError(f"{typed!r} is not text in this terminal's encoding; "
                             "fix: type it in a UTF-8 terminal")
        if rest:
            config, unknown = tyro.cli(config_class, return_unknown_args=True, **kwargs)
            setattr(config, rest, tyro.cli(type(getattr(config, rest)), args=unknown, **kwargs))
        else:
            config = tyro.cli(config_class, **kwargs)

        # 2. once more on top of an earlier run's settings, where there is one
        earlier = getattr(config, "resume", None) or getattr(config, "fork", None)
        if earlier:
            before = read_config(config_class, earlier)
            config = tyro.cli(config_class, default=before, **kwargs)

        # 3. checked, and run
        check_ranges(config)
        main(config)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, SafetensorError, torch.OutOfMemoryError) as e:
        message = " ".join(str(e).split())
        if "fix:" not in message and not isinstance(e, ValueError):  # the system's own words
            fix = "a path that can be read and written, on a disk with room"
            if isinstance(e, torch.OutOfMemoryError):
                fix = "--dtype bfloat16, or a smaller model"
            message += f"; fix: {fix}"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


def stage_seed(seed: int, round: int, stage: str) -> int:
    """Randomness is drawn per run, round and stage: none depends on how much another drew."""
    return zlib.crc32(f"{seed} {round} {stage}".encode())


class Ended(ValueError):
    """Too few completions were kept, or the loss diverged: a result, kept on record."""


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
    """What results depend on beside the settings: processor, threads, library versions."""
    if device == "auto" and torch.cuda.is_available():
        device = "cuda"
    if device.startswith("cuda"):
        parts = [torch.cuda.get_device_name(device)]
    else:
        cpu = torch.cpu.get_capabilities()
        name = cpu.get("cpu_name") or cpu["architecture"]
        # the widest instructions that it has for matrices: kernels differ by them
        widest = [x for x in ("amx_bf16", "avx512_bf16", "avx512_f", "avx2") if cpu.get(x)][:1]
        parts = [name, *widest, f"{torch.get_num_threads()} threads"]
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
    healed = shutil.ignore_patterns("adapter.safetensors", "events.jsonl")
    shutil.copytree(source / f"round_{at}", forked, ignore=healed)

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
    write_text(aside / "config.json", json.dumps(settings(config), indent=2) + "\n")
    for path in sorted(aside.iterdir(), reverse=True):  # from round_0 to config.json
        os.replace(path, folder / path.name)
    aside.rmdir()


def is_free(folder: Path) -> bool:
    """Whether a run may begin here: nothing, or what one left that was killed as it began."""
    return not folder.exists() or folder.is_dir() and all(
        path.name == "lock" or path.suffix == ".tmp" for path in folder.iterdir())


def locked(folder: Path) -> FileLock:
    """The folder's lock, taken. Raises ValueError where another process has it."""
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
    return lock


@contextlib.contextmanager
def begin(config, name: str, downstream: tuple[str, ...] = (), again: str = ""):
    """The run folder of a config with out, resume, fork, at: made, locked and yielded as a `Run`.

    name: of a folder that --out does not name. downstream: settings that a fork may change.
    again: the command that goes on with it, if not heal_loop.py.
    Raises ValueError for a taken folder, another process at work, or settings that do not fit.
    """
    # 1. which folder, and whether it may be used; the adapters check their model themselves
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
    folder.mkdir(parents=True, exist_ok=True)
    lock = locked(folder)
    try:
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
    finally:
        lock.release()
