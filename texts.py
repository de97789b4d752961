"""What a model is given to read, from data/ and checked: personas, contexts, prompts, vignettes.

    given = texts.read("care")     # a mistake in any file is told here, before a run begins
    given.persona, given.contexts, given.dilemmas, given.heldout, given.vignettes

Vignettes carry the moral foundation that their violation is of. They come from a JSON file, or from
the package tinymfv (requirements-tinymfv.txt) as tinymfv:classic (Clifford et al. 2015),
tinymfv:scifi and tinymfv:ai-actor.
"""
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from steer import Persona

DATA = Path(__file__).parent / "data"
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


# ---- personas -----------------------------------------------------------------------------------


def load_personas() -> dict[str, Persona]:
    """{trait: Persona} of data/personas.json. Raises ValueError where it is malformed."""
    path = DATA / "personas.json"
    shape = '{name: {"pos": "...", "neg": "..."}}'
    pairs = read_json(path, "personas", shape)
    try:
        return {name: Persona(pair["pos"], pair["neg"]) for name, pair in pairs.items()}
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is malformed ({e}); fix: {{\"personas\": {shape}}}") from None


def find_persona(trait: str, pos: str | None = None, neg: str | None = None) -> Persona:
    """The pair of --pos and --neg where they are given, else that of the trait.

    Raises ValueError for an unknown name or half a pair.
    """
    if (pos is None) != (neg is None):
        raise ValueError("--pos and --neg go together; fix: give both")
    known = load_personas()
    if pos is not None:
        return Persona(pos, neg)
    if trait not in known:
        raise ValueError(f"unknown trait '{trait}'; "
                         f"fix: one of {', '.join(known)}, or --pos and --neg")
    return known[trait]


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
    by_foundation = {f: [v for v in found if v["foundation"] == f] for f in FOUNDATIONS}
    longest = max(map(len, by_foundation.values()))
    in_turn = []
    for k in range(longest):
        for of_foundation in by_foundation.values():
            in_turn += of_foundation[k:k + 1]  # nothing where it has fewer
    return in_turn[:n or None]


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
    contexts: list[str]  # everyday user messages, over which the steering vector is averaged
    dilemmas: list[str]  # the prompts that training data is sampled on
    heldout: list[str]  # the prompts that a model answers when it is measured
    vignettes: list[dict]  # the moral violations it is asked about


def read(trait: str, pos: str | None = None, neg: str | None = None, n_contexts: int = 128,
         vignettes=DATA / "vignettes.json", n_vignettes: int = 0) -> Texts:
    """Read and check everything at once, before a run begins. Raises as the functions above."""
    return Texts(
        persona=find_persona(trait, pos, neg),
        contexts=load_strings(DATA / "contexts.json", "contexts")[:n_contexts],
        dilemmas=load_strings(DATA / "prompts.json", "dilemmas"),
        heldout=load_strings(DATA / "prompts.json", "heldout"),
        vignettes=load_vignettes(vignettes, n_vignettes))
