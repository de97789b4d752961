"""The docs say what the code does: every logged number, every flag, every default, every link."""
import ast
import re
from dataclasses import fields
from types import SimpleNamespace

import pytest

import evaluate
import heal_loop
from common import readouts
from common import runs
from common import texts
from conftest import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
OTHERS = ("pip ", "vllm ", "curl ", "llama-", "git ", "python convert_")  # programs that are not ours
METRICS = (ROOT / "docs/metrics.md").read_text()


def explained(name):
    return re.search(rf"`{name}`", METRICS)


# ---- numbers ------------------------------------------------------------------------------------


def test_every_number_of_a_run_is_explained(run):
    events = runs.read_events(run)
    keys = {key for event in events for key in event}
    heal, healed = (next(e for e in events if e["stage"] == s) for s in ("heal", "healed"))
    keys |= {key for step in heal["log"] for key in step} | healed["profile"].keys()
    base = SimpleNamespace(trait=0.0, axis="auth_nats")
    keys |= evaluate.matched_steering(lambda name, vector, dose: {"auth_nats": -dose}, None, base,
                                      wanted=-1.0, dose=2.0, reached=-2.0).keys()
    assert not [key for key in sorted(keys) if not explained(key)]


def test_every_number_that_other_readouts_add_is_explained():
    keys = [*evaluate.NATS, "probe_nats", "control_nats", *readouts.NOTES]
    assert not [key for key in keys if not explained(key)]


def test_every_stage_and_every_verdict_is_explained():
    source = "".join((ROOT / f"{name}.py").read_text() for name in ("heal_loop", "runs"))
    stages = set(re.findall(r'record\("(\w+)"|"stage": "(\w+)"', source))
    verdicts = re.findall(r'^    (?:    )?return "(\w+)"$', (ROOT / "distil.py").read_text(), re.M)
    names = {name for pair in stages for name in pair if name} | set(verdicts)
    assert {"base", "ended", "forked", "short", "kept"} <= names
    assert not [name for name in sorted(names) if not explained(name)]


# ---- flags --------------------------------------------------------------------------------------


def flags_of(script):
    """The flags of a script's Config, read without running it; a sweep's runs add heal_loop's."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            found |= {line.target.id for line in node.body if isinstance(line, ast.AnnAssign)}
    if script == "sweep.py":
        found |= flags_of("heal_loop.py")
    return found


def commands(page):
    """(script or None, flag as a field's name) of every flag in the code of a page."""
    code = re.sub(r"\\\n\s*", "", page.read_text())  # one command, one line
    for line in re.findall(r"^(?: {4}|\t)(.+)$", code, re.M) + re.findall(r"`([^`\n]+)`", code):
        if line.startswith(OTHERS):
            continue
        script = re.search(r"python (?:-m )?([\w/.]+)", line)
        name = script and re.sub(r"\.py$", "", script[1]).replace(".", "/") + ".py"
        for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", line):
            yield name, flag.replace("-", "_")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_flag_that_a_page_names_exists(page):
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("studies/*.py")]
    anywhere = set().union(*(flags_of(path.relative_to(ROOT)) for path in scripts))
    for script, flag in commands(page):
        known = (flags_of(script) if script else anywhere) | {"help"}
        assert flag in known or flag.removeprefix("no_") in known, f"{script or page.name} --{flag}"


def test_what_differences_gives_as_ours_is_the_default():
    defaults = texts.complete(heal_loop.Config())
    rows = [line.split(" | ") for line in (ROOT / "docs/differences.md").read_text().splitlines()]
    given = {flag: value for row in rows if len(row) >= 4
             for flag, value in re.findall(r"`--([a-z-]+) ([^`]+)`", row[2])}
    given.pop("reg"), given.pop("readout"), given.pop("trait")  # named to be told apart
    assert len(given) > 15
    known = {field.name for field in fields(heal_loop.Config)}
    for flag, value in given.items():
        assert flag.replace("-", "_") in known
        default = getattr(defaults, flag.replace("-", "_"))
        assert type(default)(value) == default, flag


def test_doses_in_the_docs_are_those_of_the_traits():
    row = re.search(r"^\| doses .*$", (ROOT / "docs/differences.md").read_text(), re.M)[0]
    said = re.search(r"`care` and `authority` (\S+) and (\S+), `love` (\S+) and (\S+);", row)
    traits = texts.load_traits()
    doses = [*traits["care"].doses, *traits["love"].doses]
    assert list(map(float, said.groups())) == doses
    assert traits["authority"].doses == traits["care"].doses


# ---- links --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_of_a_page_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    for link in links:
        if not re.match(r"https?://", link):
            assert (page.parent / link).exists(), f"{page.name} -> {link}"
