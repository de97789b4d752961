"""What a model is given to read, from data/ and checked: traits, contexts, prompts, vignettes.

    config = texts.complete(config)    # what no flag says is as the trait has it
    given = texts.read(config)         # a mistake in any file is told here, before a run begins
    given.persona, given.contexts, given.dilemmas, given.heldout, given.vignettes

Vignettes carry the moral foundation that their violation is of. They come from a JSON file, or from
the package tinymfv (requirements-tinymfv.txt) as tinymfv:classic (Clifford et al. 2015),
tinymfv:scifi and tinymfv:ai-actor.
"""
import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path

from steer import Persona

DATA = Path(__file__).parent.parent / "data"
FOUNDATIONS = ("Care", "Fairness", "Loyalty", "Authority", "Sanctity", "Liberty", "SocialNorms")


def read_json(path, key: str, shape: str):
    """What a JSON file has under `key`.

    Raises FileNotFoundError, or ValueError naming the file and the shape it should have.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no file {path}; fix: give an existing file")
    try:
        return json.loads(Path(path).read_text())[key]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is malformed ({e}); fix: {{\"{key}\": {shape}}}") from None


def load_strings(path, key: str) -> list[str]:
    """The non-empty strings under `key` of a JSON file. Raises ValueError naming file and entry."""
    strings = read_json(path, key, '["...", ...]')
    if not isinstance(strings, list) or not strings:
        raise ValueError(f"{path}: '{key}' is empty; fix: give at least one string")
    for k, s in enumerate(strings, 1):
        if not isinstance(s, str) or not s.strip():
            raise ValueError(f"{path}: entry {k} of '{key}' is empty or not a string; "
                             "fix: remove it")
    return strings


# ---- traits -------------------------------------------------------------------------------------


@dataclass
class Trait:
    """A persona pair, and how it is measured and trained if no flag says otherwise."""
    persona: Persona
    readout: str = "cloze"  # one of cloze, tinymfv, probe
    axis: str = "auth_nats"  # the number that is the trait; probe_nats under the readout probe
    direction: str = "down"  # where more of the trait is: down or up
    probes: str | None = None  # file of the trait's own probes, beside personas.json
    prompts: str = "prompts.json"  # file of the prompts to sample on and to be measured on
    doses: tuple[float, ...] = (1.0, 2.0)  # of the sampled completions


def load_traits() -> dict[str, Trait]:
    """{name: Trait} of data/personas.json. Raises ValueError where it is malformed."""
    path = DATA / "personas.json"
    shape = '{name: {"pos": "...", "neg": "...", "axis": "auth_nats", ...}}'
    entries = read_json(path, "personas", shape)
    try:
        traits = {}
        for name, entry in entries.items():
            about = dict(entry)
            persona = Persona(about.pop("pos"), about.pop("neg"))
            traits[name] = Trait(persona, **about)
        return traits
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"{path} is malformed ({e}); fix: {{\"personas\": {shape}}}") from None


def find_trait(name: str, pos: str | None = None, neg: str | None = None) -> Trait:
    """The trait of that name; with --pos and --neg a trait of those, measured as nothing else says.

    Raises ValueError for an unknown name or half a pair.
    """
    if (pos is None) != (neg is None):
        raise ValueError("--pos and --neg go together; fix: give both")
    if pos is not None:
        return Trait(Persona(pos, neg))
    known = load_traits()
    if name not in known:
        raise ValueError(f"unknown trait '{name}'; "
                         f"fix: one of {', '.join(known)}, or --pos and --neg")
    return known[name]


def load_probes(path) -> tuple[list[dict], list[dict]]:
    """[{prompt, toward, away}] of a JSON file's "probes", and of its "controls" if it has some.

    Probes ask for the trait, controls for what should stay as it is: toward is the right answer.
    Raises FileNotFoundError, or ValueError naming file and entry.
    """
    shape = '[{"prompt", "toward", "away"}, ...]'
    probes = read_json(path, "probes", shape)
    controls = json.loads(Path(path).read_text()).get("controls", [])
    for key, entries in (("probes", probes), ("controls", controls)):
        fewest = 2 if key == "probes" or entries else 0  # an interval needs two
        if not isinstance(entries, list) or len(entries) < fewest:
            raise ValueError(f"{path}: '{key}' is not a list of two entries or more; "
                             f"fix: {{\"{key}\": {shape}}}")
        for k, probe in enumerate(entries, 1):
            is_whole = isinstance(probe, dict) and all(
                isinstance(probe.get(part), str) and probe[part].strip()
                for part in ("prompt", "toward", "away"))
            if not is_whole or probe["toward"] == probe["away"]:
                raise ValueError(f"{path}: entry {k} of '{key}' is {str(probe)[:80]}; "
                                 "fix: give it a prompt and two different answers, toward and away")
    return probes, controls


# ---- vignettes ----------------------------------------------------------------------------------


def load_vignettes(path, n: int = 0) -> list[dict]:
    """[{id, foundation, text}], the first n, taken in turn from each foundation and so balanced.

    n: 0 for all. path: a JSON file, or tinymfv:NAME.
    Raises FileNotFoundError, or ValueError naming file and entry.
    """
    # 1. from the package or from a file
    path = Path(path)
    if path.name.startswith("tinymfv:"):
        found = tinymfv_vignettes(path.name.removeprefix("tinymfv:"))
    elif not path.exists():
        raise FileNotFoundError(f"no vignette file {path}; fix: --vignettes data/vignettes.json")
    else:
        shape = '[{"id", "foundation", "text"}, ...]'
        found = read_json(path, "vignettes", shape)
        if not isinstance(found, list):
            raise ValueError(f"{path} is malformed ('vignettes' is not a list); "
                             f"fix: {{\"vignettes\": {shape}}}")

    # 2. checked
    check_vignettes(found, path)
    if n < 0 or n > len(found):
        raise ValueError(f"--n-vignettes {n} of {len(found)} in {path}; "
                         f"fix: 0 (all) to {len(found)}")

    # 3. the first of every foundation, then the second of every foundation, and so on
    by_foundation = [[v for v in found if v["foundation"] == f] for f in FOUNDATIONS]
    return in_turn(by_foundation)[:n or None]


def in_turn(groups: list[list]) -> list:
    """The first of every group, then the second of every group, and so on."""
    taken = []
    for k in range(max(map(len, groups))):
        for group in groups:
            taken += group[k:k + 1]  # nothing where it has fewer
    return taken


def check_vignettes(found: list, path) -> None:
    """Raises ValueError for no vignettes, or for the first that is malformed."""
    if not found:
        raise ValueError(f"{path} holds no vignettes; "
                         "fix: add some, or --vignettes data/vignettes.json")
    seen = set()
    for k, v in enumerate(found, 1):
        is_whole = isinstance(v, dict) and all(
            isinstance(v.get(key), str) and v[key].strip() for key in ("id", "foundation", "text"))
        if not is_whole:
            raise ValueError(f"{path}: vignette {k} is {str(v)[:80]}; "
                             "fix: give it a non-empty id, foundation and text")
        if v["foundation"] not in FOUNDATIONS:
            raise ValueError(f"{path}: vignette '{v['id']}' has unknown foundation "
                             f"'{v['foundation']}'; fix: one of {', '.join(FOUNDATIONS)}")
        if v["id"] in seen:
            raise ValueError(f"{path}: vignette id '{v['id']}' stands twice; "
                             "fix: make ids unique")
        seen.add(v["id"])


def tinymfv_package():
    """The module tinymfv, or moralmaps as it is called since July 2026.

    Raises ValueError where neither is installed.
    """
    for name in ("tinymfv", "moralmaps"):
        if importlib.util.find_spec(name):
            return importlib.import_module(name)
    raise ValueError("'tinymfv' is not installed; fix: pip install -r requirements-tinymfv.txt, "
                     "or --readout cloze on data/vignettes.json")


def tinymfv_vignettes(name: str) -> list[dict]:
    """A vignette set of the package; the label is the one that most of its human raters chose."""
    package = tinymfv_package()
    if name not in package.CONFIGS:
        known = ", ".join(f"tinymfv:{config}" for config in package.CONFIGS)
        raise ValueError(f"--vignettes tinymfv:{name} is unknown; fix: one of {known}")
    vignettes = []
    for row in package.load_vignettes(name):
        label = max(FOUNDATIONS, key=lambda f: row[f"human_{f}"])
        vignettes.append({"id": row["id"], "foundation": label, "text": row["other_violate"]})
    return vignettes


# ---- all that a run reads -----------------------------------------------------------------------


@dataclass
class Texts:
    """Everything one run reads."""
    persona: Persona
    axis: str  # the number that is the trait, such as auth_nats
    direction: str  # where more of it is: down or up
    contexts: list[str]  # everyday user messages, over which the steering vector is averaged
    dilemmas: list[str]  # the prompts that training data is sampled on
    heldout: list[str]  # the prompts that a model answers when it is measured
    plain: list[str]  # plain prose, on which a model's own loss is measured
    vignettes: list[dict]  # the moral violations it is asked about
    probes: list[dict]  # {prompt, toward, away} of the trait, under the readout probe
    controls: list[dict]  # the same for what should stay as it is


def complete(config):
    """The config with what its flags left open (None) as its trait has it; -> a new one."""
    trait = find_trait(config.trait, getattr(config, "pos", None), getattr(config, "neg", None))
    if getattr(config, "pos", None) and config.trait == "care":  # the default's name is not its
        config = replace(config, trait="custom")
    doses = None if getattr(config, "dose_nats", None) else trait.doses
    usual = {"readout": "probe" if getattr(config, "probes", None) else trait.readout,
             "probes": trait.probes and DATA / trait.probes,
             "prompts": DATA / trait.prompts, "doses": doses}
    open_fields = {name: value for name, value in usual.items()
                   if getattr(config, name, 0) is None}
    return replace(config, **open_fields)


def read(config) -> Texts:
    """Read and check everything at once, before a run begins. Raises as the functions above.

    config: of heal_loop, distil or evaluate; what it has no flag for is as usual.
    """
    asked = {"pos": None, "neg": None, "n_contexts": None, "readout": "cloze", "probes": None,
             "prompts": DATA / "prompts.json", "vignettes": DATA / "vignettes.json",
             "n_vignettes": 0} | vars(complete(config))
    trait = find_trait(asked["trait"], asked["pos"], asked["neg"])
    axis, direction = trait.axis, trait.direction
    probes, controls = [], []
    if asked["readout"] == "probe":
        if not asked["probes"]:
            raise ValueError(f"--readout probe needs probes, and '{asked['trait']}' has none of "
                             "its own; fix: --probes FILE")
        probes, controls = load_probes(asked["probes"])
        axis, direction = "probe_nats", "up"
    elif asked["probes"]:
        raise ValueError(f"--readout {asked['readout']} takes no probes, and '{asked['trait']}' "
                         "is measured by some; fix: --readout probe")
    contexts = load_strings(DATA / "contexts.json", "contexts")
    if (asked["n_contexts"] or 0) > len(contexts):
        raise ValueError(f"--n-contexts {asked['n_contexts']} of {len(contexts)} in "
                         f"{DATA / 'contexts.json'}; fix: at most {len(contexts)}")
    return Texts(
        trait.persona, axis, direction,
        contexts=contexts[:asked["n_contexts"]],
        dilemmas=load_strings(asked["prompts"], "dilemmas"),
        heldout=load_strings(asked["prompts"], "heldout"),
        plain=load_strings(DATA / "plain.json", "texts")[:12],
        vignettes=load_vignettes(asked["vignettes"], asked["n_vignettes"]),
        probes=probes, controls=controls)
