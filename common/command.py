"""How a command takes its settings, reads and writes text, and reports a mistake.

    @dataclass
    class Config:
        rank: AtLeast1 = 16             # its range stands beside the field
    cli(Config, main)                   # flags in; a user's mistake is one line on stderr

What is read and written is UTF-8 whatever the locale, and no terminal is too old for a λ.
"""
import functools
import itertools
import json
import os
import sys
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Ge, Gt, Interval, MinLen
from pydantic import AfterValidator, FiniteFloat, StrictInt, TypeAdapter, ValidationError
from safetensors import SafetensorError

HERE = Path(__file__).resolve().parent.parent


def read_text(path, torn: bool = False) -> str:
    """A UTF-8 file, whatever the locale; with `torn`, without a last line that has no newline.

    Raises ValueError for another encoding.
    """
    data = Path(path).read_bytes()
    if torn:
        data = data[:data.rfind(b"\n") + 1]
    try:
        return data.decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 ({e.reason} at byte {e.start}); "
                         "fix: save it in encoding UTF-8") from None


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
    lines = []
    for row in rows:
        row = json.loads(json.dumps(row), parse_constant=lambda name: None)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


def read_jsonl(path, torn: bool = False) -> list:
    """Rows of a JSONL file; with `torn`, a last line that never got its newline is left out.

    Raises ValueError naming file and line where one is malformed.
    """
    rows = []
    lines = read_text(path, torn).removesuffix("\n").split("\n")  # splitlines: also at U+2028
    for n, line in enumerate(lines if lines != [""] else [], 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as e:
            raise ValueError(f"{path} line {n} is not JSON ({e.msg}); "
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


adapter = functools.cache(TypeAdapter)  # made in milliseconds, and asked for every row


def checked(kind, values, where: str):
    """A dict as the dataclass `kind`, text as a Path where its field says so, and the like.

    where: how a message begins. Raises ValueError for the first value that is not allowed.
    """
    try:
        return adapter(kind).validate_python(values)
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


# where and when, nothing that changes a number
UNRECORDED = ("out", "resume", "fork", "at", "device")


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
        if name not in UNRECORDED:
            kept[name] = value
    return json.loads(json.dumps(kept, default=str))  # tuples as lists, as they will be read back


def write_config(config, folder: Path) -> None:
    """config.json: the settings, and relative paths also as they were given."""
    kept = settings(config)
    given = {name: str(getattr(config, name)) for name in kept if str(kept[name]).startswith("./")}
    kept["given"] = {name: path for name, path in given.items() if not os.path.isabs(path)}
    write_text(folder / "config.json", json.dumps(kept, indent=2) + "\n")


def read_config(config_class, folder: Path):
    """The settings of a run folder as a config_class. Raises ValueError for what is not a run."""
    # 1. the file, and whether it has every setting
    file = Path(folder) / "config.json"
    if not file.exists():
        raise ValueError(f"{folder} is not a run folder (no config.json); "
                         "fix: give the --out of an earlier run")
    try:
        values = dict(json.loads(read_text(file)))
    except (TypeError, ValueError) as e:
        raise ValueError(f"{file} is malformed ({e}); "
                         "fix: restore it, or start a new run") from None
    missing = {field.name for field in fields(config_class)} - {*values, *UNRECORDED}
    if missing:  # it would silently be the default
        raise ValueError(f"{file} lacks '{min(missing)}', as of an earlier version; "
                         "fix: restore it, start a new run, or use that version")

    # 2. its paths: as they resolved or, where nothing lies there any more, as they were given
    given = values.pop("given", {})
    for name, value in values.items():
        if str(value).startswith("./"):
            path = (HERE / value).resolve()
            values[name] = str(path if path.exists() else given.get(name, path))
    return checked(config_class, values, f"{file}: ")


def refuse_other_settings(config, folder: Path, free: tuple[str, ...] = (), fix: str = "") -> None:
    """Raises ValueError for the first setting, not in `free`, that differs from the run's."""
    before, asked = settings(read_config(type(config), folder)), settings(config)
    for name in asked:
        if name not in free and asked[name] != before[name]:
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

    With --resume or --fork, what no flag says is as the earlier run had it. rest: a field, itself a
    dataclass, whose flags are what config_class does not know.
    Exit codes: 0 done, 1 bad input or data, 2 flags that do not parse (tyro's words),
    130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # λ is ? where a terminal has none
    kwargs = dict(prog=Path(sys.argv[0]).name, config=(tyro.conf.OmitArgPrefixes,),
                  description=sys.modules[main.__module__].__doc__)
    try:
        # 1. the flags, those that config_class does not know into its field `rest`
        for flag, word in itertools.pairwise(sys.argv):
            if word.encode(errors="replace").decode() != word:  # bytes that are no character
                flag = "" if word.startswith("--") else flag  # --flag=word names its own
                raise ValueError(f"{flag} {word!r} is not text in this terminal's encoding; "
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
    except (ValueError, OSError, SafetensorError) as e:
        message = " ".join(str(e).split())
        if "fix:" not in message and not isinstance(e, ValueError):  # the system's own words
            message += "; fix: a path that can be read and written, on a disk with room"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
