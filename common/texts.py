"""What a model is given to read, from data/ and checked: a trait, contexts, plain text, vignettes.

    config = texts.complete(config)    # what no flag sets, the trait says
    reading = texts.read(config)       # a mistake in any file ends it here, before a model loads
    reading.pos, reading.contexts, reading.train, reading.heldout, reading.vignettes

A trait is ONE file: data/traits/NAME.json, or your own (docs/traits.md says how to write one).
Every mistake in a file is a ValueError of one line: the file, the entry and field, and a fix.
"""
import importlib.util
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import MinLen
from pydantic import AfterValidator, ConfigDict, FiniteFloat, Strict
from typing_extensions import TypedDict  # pydantic's own, before Python 3.12

from common.runs import checked, read_json

DATA = Path(__file__).parent.parent / "data"
SUFFIX = "Answer in one sentence."  # so that most answers end within 64 tokens
FOUNDATIONS = ("Care", "Fairness", "Loyalty", "Authority", "Sanctity", "Liberty", "SocialNorms")
NATS = ("care_nats", "fairness_nats", "loyalty_nats", "auth_nats", "sanctity_nats", "liberty_nats",
        "norms_nats")  # the metric of each foundation


def not_empty(text: str) -> str:
    text.encode()  # a ValueError for half a surrogate pair, which no tokenizer can take
    if not text.strip():
        raise ValueError("give it a text")
    return text


def two_answers(probe: dict) -> dict:
    if probe["toward"].strip() == probe["away"].strip():
        raise ValueError("two different answers, toward and away")
    return probe


Text = Annotated[str, AfterValidator(not_empty)]
Dose = Annotated[FiniteFloat, Strict()]  # no text, no true
Lines = Annotated[list[Text], MinLen(1)]


class Question(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid")
    prompt: Text
    toward: Text  # shows the trait, or is the right answer
    away: Text


Probe = Annotated[Question, AfterValidator(two_answers)]


class Vignette(TypedDict):
    id: Text
    foundation: Literal[FOUNDATIONS]
    text: Text


@dataclass
class Trait:
    """A persona pair, how it is measured, and the prompts it is trained and measured on."""
    __pydantic_config__ = ConfigDict(extra="forbid")
    name: str  # its file's, without .json; custom for --pos and --neg
    pos: Text  # system prompt of the trait
    neg: Text  # system prompt of its opposite
    readout: Literal["cloze", "tinymfv", "probe"]  # unless a flag says otherwise
    axis: Literal[(*NATS, "probe_nats")]  # the metric that is the trait
    direction: Literal["up", "down"]  # where more of the trait is on it
    doses: Annotated[tuple[Dose, ...], MinLen(1)]  # unless a flag says otherwise
    train: Lines  # prompts that training data is sampled on
    heldout: Lines  # prompts that a model answers when it is measured
    controls: Annotated[list[Probe], MinLen(2)]  # what should stay: toward is the right answer
    probes: list[Probe] = field(default_factory=list)  # toward shows the trait

    def __post_init__(self):
        if len(self.probes) == 1:
            raise ValueError("two or more 'probes', as an interval needs")
        if self.pos.strip() == self.neg.strip():
            raise ValueError("two different texts for pos and neg")
        with_probes = {self.readout == "probe", self.axis == "probe_nats", bool(self.probes)}
        if len(with_probes) == 2:
            raise ValueError("'readout' probe, 'axis' probe_nats and 'probes' go together: "
                             "all three or none")


def load_rows(path, key: str, kind=Text) -> list:
    """The list under `key` of a JSON file, one or more of `kind`."""
    table = TypedDict("table", {key: Annotated[list[kind], MinLen(1)]})
    return checked(table, read_json(path), f"{path}: ")[key]


def load_trait(path) -> Trait:
    """The trait in a JSON file, every field of it checked."""
    fields = read_json(path)
    fields.pop("source", None)
    if "name" in fields:
        raise ValueError(f"{path}: name is unknown; fix: remove it, the file's own name counts")
    fields.setdefault("controls", read_json(DATA / "controls.json")["controls"])
    return checked(Trait, {"name": Path(path).stem, **fields}, f"{path}: ")


def load_traits() -> dict[str, Trait]:
    """{name: trait} of every file in data/traits."""
    return {path.stem: load_trait(path) for path in sorted((DATA / "traits").glob("*.json"))}


def find_trait(name: str, pos: str | None = None, neg: str | None = None) -> Trait:
    """The trait of that name or file; with pos and neg this pair, and all else as care has it."""
    if (pos is None) != (neg is None):
        raise ValueError("--pos and --neg go together; fix: give both")
    if pos is not None:
        care = vars(load_trait(DATA / "traits/care.json"))
        return checked(Trait, care | {"name": "custom", "pos": pos, "neg": neg}, "--pos, --neg: ")
    path = Path(name) if name.endswith(".json") else DATA / f"traits/{name}.json"
    if not path.is_file():
        raise ValueError(f"unknown trait '{name}'; fix: one of {', '.join(load_traits())}, "
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
        vignettes = load_rows(path, "vignettes", Vignette)
    ids = [v["id"] for v in vignettes]
    for vignette_id in ids:
        if ids.count(vignette_id) > 1:
            raise ValueError(f"{path}: vignette id '{vignette_id}' stands twice; "
                             "fix: make ids unique")
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
    contexts: list[str] = field(default_factory=list)  # user messages the vector is averaged over
    plain: list[str] = field(default_factory=list)  # prose on which a model's own loss is measured
    vignettes: list[dict] = field(default_factory=list)  # moral violations it is asked about


def complete(config):
    """A copy of the config in which each None is replaced by the trait's own value."""
    trait = find_trait(config.trait, getattr(config, "pos", None), getattr(config, "neg", None))
    if getattr(config, "pos", None) is not None:  # measured as care is, whatever --trait says
        config = replace(config, trait="custom")
    by_nats = getattr(config, "dose_nats", None)  # instead of doses
    if by_nats and config.doses:
        raise ValueError("--doses and --dose-nats exclude each other; fix: give one of them (a "
                         "resumed or forked run has its own)")
    usual = {"readout": trait.readout, "doses": None if by_nats else trait.doses}
    return replace(config, **{name: value for name, value in usual.items()
                              if getattr(config, name, 0) is None})


def read(config) -> Texts:
    """Read and check all at once. config: any command's; flags that it lacks get their defaults."""
    flags = {"pos": None, "neg": None, "n_contexts": None, "readout": None, "n_vignettes": 0,
             "vignettes": DATA / "vignettes.json", "prompt_suffix": SUFFIX} | vars(config)
    trait = find_trait(flags["trait"], flags["pos"], flags["neg"])
    readout = flags["readout"] or trait.readout
    if readout == "tinymfv":
        tinymfv_package()  # told before a model loads
    if (readout == "probe") != (trait.readout == "probe"):
        raise ValueError(f"--readout {readout} cannot measure '{trait.name}', which has "
                         f"{'' if trait.probes else 'no '}probes; fix: leave out --readout")
    contexts = load_rows(DATA / "contexts.json", "contexts")
    if (flags["n_contexts"] or 0) > len(contexts):
        raise ValueError(f"--n-contexts {flags['n_contexts']} of {len(contexts)} in "
                         f"{DATA / 'contexts.json'}; fix: at most {len(contexts)}")
    suffix = flags["prompt_suffix"]
    train = [f"{prompt} {suffix}".strip() for prompt in trait.train]
    heldout = [f"{prompt} {suffix}".strip() for prompt in trait.heldout]
    trait = replace(trait, readout=readout, train=train, heldout=heldout)
    return Texts(**vars(trait), contexts=contexts[:flags["n_contexts"]],
                 plain=load_rows(DATA / "plain.json", "texts")[:12],
                 vignettes=load_vignettes(flags["vignettes"], flags["n_vignettes"]))
