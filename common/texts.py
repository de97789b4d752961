"""What a model is given to read, from data/ and checked: a trait, contexts, plain text, vignettes.

    config = texts.complete(config)    # what no flag sets is as the trait has it
    reading = texts.read(config)       # a mistake in any file ends it here, before a model loads
    reading.pos, reading.contexts, reading.train, reading.heldout, reading.vignettes

A trait is ONE file: data/traits/NAME.json, or your own (docs/traits.md says how to write one).
Every mistake in a file is a ValueError of one line: the file, the entry and field, and a fix.
"""
import importlib.util
import json
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path

DATA = Path(__file__).parent.parent / "data"
FOUNDATIONS = ("Care", "Fairness", "Loyalty", "Authority", "Sanctity", "Liberty", "SocialNorms")
NATS = ("care_nats", "fairness_nats", "loyalty_nats", "auth_nats", "sanctity_nats", "liberty_nats",
        "norms_nats")  # the metric of each foundation


def read_json(path, *keys: str) -> dict:
    """The JSON object in a UTF-8 file, whatever the locale, with or without a byte-order mark.

    keys: fields that it must have. Raises OSError where there is no such file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if "\0" in text:  # UTF-16 without a mark is valid UTF-8
            raise UnicodeError
        found = json.loads(text)
        json.dumps(found, allow_nan=False)  # Python reads NaN and Infinity; JSON has neither
    except UnicodeError:
        raise ValueError(f"{path} is not UTF-8 text; fix: save it in encoding UTF-8") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is malformed ({e}); fix: make it valid JSON") from None
    for key in keys:
        if not isinstance(found, dict) or key not in found:
            raise ValueError(f"{path} lacks '{key}'; fix: {{\"{key}\": ..., ...}}")
    return found


def shown(value) -> str:
    """A wrong value as an error shows it: short, and printable whatever it holds."""
    return "missing" if value is None else json.dumps(value)[:60]


def check_text(text, where: str) -> None:
    """Raises ValueError for what is empty, or what no tokenizer can take."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} is {shown(text)}; fix: give it a text")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{where} holds half a surrogate pair, not Unicode: {shown(text)}; "
                         "fix: write the character itself, in UTF-8")


def load_rows(path, key: str, fields: tuple[str, ...] = (), fewest: int = 1) -> list:
    """The list under `key` of a JSON file: texts, or objects with a text in each of `fields`."""
    rows = read_json(path, key)[key]
    if not isinstance(rows, list) or len(rows) < fewest:
        raise ValueError(f"{path}: '{key}' is {shown(rows)}; fix: a list of {fewest} or more")
    for k, row in enumerate(rows, 1):
        where = f"{path}: entry {k} of '{key}'"
        if not fields:
            check_text(row, where)
        for field in fields:
            check_text(row.get(field) if isinstance(row, dict) else None, f"{where}: '{field}'")
    return rows


REQUIRED = ("pos", "neg", "readout", "axis", "direction", "doses", "train", "heldout")
KNOWN = ("source", *REQUIRED, "probes", "controls")
CHOICES = {"readout": ("cloze", "tinymfv", "probe"), "axis": (*NATS, "probe_nats"),
           "direction": ("up", "down")}
PROBE = ("prompt", "toward", "away")


@dataclass
class Trait:
    """A persona pair, how it is measured, and the prompts it is trained and measured on."""
    name: str  # its file's, without .json; custom for --pos and --neg
    pos: str  # system prompt of the trait
    neg: str  # system prompt of its opposite
    readout: str  # cloze, tinymfv or probe, unless a flag says otherwise
    axis: str  # the metric that is the trait: that of a foundation, or probe_nats
    direction: str  # where more of the trait is on it: up or down
    doses: tuple[float, ...]  # of the sampled completions, unless a flag says otherwise
    train: list[str]  # prompts that training data is sampled on
    heldout: list[str]  # prompts that a model answers when it is measured
    probes: list[dict]  # {prompt, toward, away}: toward shows the trait; [] unless readout probe
    controls: list[dict]  # the same for what should stay as it is: toward is the right answer


def load_trait(path) -> Trait:
    """The trait in a JSON file, every field of it checked."""
    found = read_json(path, *REQUIRED)
    for field in found:
        if field not in KNOWN:
            raise ValueError(f"{path}: unknown field {shown(field)}; fix: {', '.join(KNOWN)}")
    check_pair(found["pos"], found["neg"], f"{path}: ")
    for field, choices in CHOICES.items():
        if found[field] not in choices:
            raise ValueError(f"{path}: '{field}' is {shown(found[field])}; "
                             f"fix: one of {', '.join(choices)}")
    doses = found["doses"]
    is_list = isinstance(doses, list) and doses
    if not is_list or not all(type(d) in (int, float) and abs(d) < 1e9 for d in doses):
        raise ValueError(f"{path}: 'doses' is {shown(doses)}; fix: finite numbers, such as [1, 2]")
    if len({found["readout"] == "probe", found["axis"] == "probe_nats", "probes" in found}) == 2:
        raise ValueError(f"{path}: 'readout' probe, 'axis' probe_nats and 'probes' go together; "
                         "fix: give all three or none")
    probes = load_probes(path, "probes") if "probes" in found else []
    controls = load_probes(path if "controls" in found else DATA / "controls.json", "controls")
    return Trait(Path(path).stem, *(found[field] for field in REQUIRED[:5]),
                 tuple(map(float, doses)), load_rows(path, "train"), load_rows(path, "heldout"),
                 probes, controls)


def check_pair(pos, neg, where: str) -> None:
    """Raises ValueError where these are not two different texts."""
    check_text(pos, f"{where}pos")
    check_text(neg, f"{where}neg")
    if pos.strip() == neg.strip():
        raise ValueError(f"{where}pos and neg are both {shown(pos)}; fix: two different texts")


def load_probes(path, key: str) -> list[dict]:
    """[{prompt, toward, away}] under `key` of a JSON file: two or more, as an interval needs."""
    probes = load_rows(path, key, PROBE, fewest=2)
    for k, probe in enumerate(probes, 1):
        if probe["toward"].strip() == probe["away"].strip() or set(probe) != set(PROBE):
            raise ValueError(f"{path}: entry {k} of '{key}' is {shown(probe)}; fix: a prompt and "
                             "two different answers, toward and away, nothing else")
    return probes


def load_traits() -> dict[str, Trait]:
    """{name: trait} of every file in data/traits."""
    return {path.stem: load_trait(path) for path in sorted((DATA / "traits").glob("*.json"))}


def find_trait(name: str, pos: str | None = None, neg: str | None = None) -> Trait:
    """The trait of that name or file; with pos and neg this pair, and all else as care has it."""
    if (pos is None) != (neg is None):
        raise ValueError("--pos and --neg go together; fix: give both")
    if pos is not None:
        check_pair(pos, neg, "--")
        return replace(load_trait(DATA / "traits/care.json"), name="custom", pos=pos, neg=neg)
    path = Path(name) if name.endswith(".json") else DATA / f"traits/{name}.json"
    if not path.is_file():
        raise ValueError(f"unknown trait {shown(name)}; fix: one of {', '.join(load_traits())}, "
                         "an existing file such as my_trait.json, or --pos and --neg")
    return load_trait(path)


def load_clauses() -> dict[str, list[str]]:
    """{foundation: wordings}, each of them a continuation of "This is wrong because it"."""
    return {foundation: load_rows(DATA / "clauses.json", foundation) for foundation in FOUNDATIONS}


def load_vignettes(path, n: int = 0) -> list[dict]:
    """[{id, foundation, text}], the first n, taken in turn from each foundation and so balanced.

    n: 0 for all. path: a JSON file, or of the package tinymfv one of tinymfv:classic (Clifford et
    al. 2015), tinymfv:scifi and tinymfv:ai-actor.
    """
    # 1. from the package or from a file, and checked
    name = Path(path).name
    if name.startswith("tinymfv:"):
        vignettes = tinymfv_vignettes(name.removeprefix("tinymfv:"))
    else:
        vignettes = load_rows(path, "vignettes", ("id", "foundation", "text"))
    ids = [v["id"] for v in vignettes]
    for v in vignettes:
        if v["foundation"] not in FOUNDATIONS:
            raise ValueError(f"{path}: vignette '{v['id']}' has unknown foundation "
                             f"{shown(v['foundation'])}; fix: one of {', '.join(FOUNDATIONS)}")
        if ids.count(v["id"]) > 1:
            raise ValueError(f"{path}: vignette id '{v['id']}' stands twice; fix: make ids unique")
    if n < 0 or n > len(vignettes):
        raise ValueError(f"--n-vignettes {n} of {len(vignettes)} in {path}; "
                         f"fix: 0 (all) to {len(vignettes)}")

    # 2. the first of every foundation, then the second of every foundation, and so on
    by_foundation = [[v for v in vignettes if v["foundation"] == f] for f in FOUNDATIONS]
    return [v for v in chain(*zip_longest(*by_foundation)) if v][:n or None]


def tinymfv_package():
    """The module tinymfv, or moralmaps as it is called since July 2026. Raises ValueError."""
    for name in ("tinymfv", "moralmaps"):
        if importlib.util.find_spec(name):
            return importlib.import_module(name)
    raise ValueError("'tinymfv' is not installed; fix: install it as requirements-dev.txt says, "
                     "or --readout cloze on data/vignettes.json")


def tinymfv_vignettes(name: str) -> list[dict]:
    """A vignette set of the package; the label is the one that most of its human raters chose."""
    package = tinymfv_package()
    if name not in package.CONFIGS:
        known = ", ".join(f"tinymfv:{config}" for config in package.CONFIGS)
        raise ValueError(f"--vignettes tinymfv:{name} is unknown; fix: one of {known}")
    return [{"id": row["id"], "text": row["other_violate"],
             "foundation": max(FOUNDATIONS, key=lambda f: row[f"human_{f}"])}
            for row in package.load_vignettes(name)]


@dataclass
class Texts(Trait):
    """Everything one run reads: its trait's texts, and those that all traits share."""
    contexts: list[str]  # everyday user messages, over which the steering vector is averaged
    plain: list[str]  # plain prose, on which a model's own loss is measured
    vignettes: list[dict]  # the moral violations it is asked about


def complete(config):
    """The config with what its flags left open (None) as its trait has it; -> a new one."""
    trait = find_trait(config.trait, getattr(config, "pos", None), getattr(config, "neg", None))
    if trait.name == "custom" and config.trait == "care":  # the default, which nobody asked for
        config = replace(config, trait="custom")
    by_nats = getattr(config, "dose_nats", None)  # instead of doses
    if by_nats and config.doses:
        raise ValueError("--doses and --dose-nats exclude each other; fix: give one of them")
    usual = {"readout": trait.readout, "doses": None if by_nats else trait.doses}
    return replace(config, **{name: value for name, value in usual.items()
                              if getattr(config, name, 0) is None})


def read(config) -> Texts:
    """Read and check everything at once. config: any command's; for what has no flag, the usual."""
    flags = {"pos": None, "neg": None, "n_contexts": None, "readout": None, "n_vignettes": 0,
             "vignettes": DATA / "vignettes.json"} | vars(config)
    trait = find_trait(flags["trait"], flags["pos"], flags["neg"])
    readout = flags["readout"] or trait.readout
    if (readout == "probe") != (trait.readout == "probe"):
        raise ValueError(f"--readout {readout} cannot measure '{trait.name}', which has "
                         f"{'' if trait.probes else 'no '}probes; fix: leave out --readout")
    contexts = load_rows(DATA / "contexts.json", "contexts")
    if (flags["n_contexts"] or 0) > len(contexts):
        raise ValueError(f"--n-contexts {flags['n_contexts']} of {len(contexts)} in "
                         f"{DATA / 'contexts.json'}; fix: at most {len(contexts)}")
    return Texts(**vars(replace(trait, readout=readout)), contexts=contexts[:flags["n_contexts"]],
                 plain=load_rows(DATA / "plain.json", "texts")[:12],
                 vignettes=load_vignettes(flags["vignettes"], flags["n_vignettes"]))
