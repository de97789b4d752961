"""The docs say what the code does: every logged metric, flag, command, default and link."""
import ast
import re

import pytest

import evaluate
import heal_loop
from common import readouts, runs, texts
from conftest import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
OTHERS = ("pip ", "vllm ", "curl ", "llama-", "git ", "python convert_")  # programs not ours


def text(path):
    return (ROOT / path).read_text(encoding="utf-8")


def unexplained(names):
    """Those of the names that docs/metrics.md does not give in backticks."""
    return [name for name in sorted(names) if f"`{name}`" not in text("docs/metrics.md")]


def test_every_metric_of_a_run_is_explained(run):
    events = runs.read_events(run)
    keys = {key for event in events for key in event}
    for event in events:
        keys |= event.get("profile", {}).keys()
        keys |= {key for step in event.get("log", []) for key in step}
    assert {"base", "distil", "healed"} <= {event["stage"] for event in events}
    assert unexplained(keys | {event["stage"] for event in events}) == []


def test_metrics_that_not_every_run_has_are_explained():
    only_some = {*evaluate.NATS, "probe_nats", "control_nats", "judge_perplexity", *readouts.NOTES}
    code = text("heal_loop.py") + text("common/runs.py")
    recorded = set(re.findall(r'(?:record\(|"stage": )"(\w+)"', code))
    assert {"prompted", "matched", "ended", "forked"} <= recorded
    assert unexplained(only_some | recorded) == []


def test_every_reject_reason_is_explained():
    reasons = re.findall(r'return "(\w+)"', text("common/filter.py"))
    assert len(reasons) == 7 and unexplained(reasons) == []


def flags_of(script):
    """The fields of a script's Config, read without running it, and heal_loop's if it has those."""
    flags = flags_of("heal_loop.py") if script in ("distil.py", "tools/sweep.py") else set()
    apart = {"steer.py": "SteerConfig", "evaluate.py": "EvaluateConfig"}.get(script)
    for node in ast.walk(ast.parse(text("tools/commands.py" if apart else script))):
        if isinstance(node, ast.ClassDef) and node.name == (apart or "Config"):
            flags |= {line.target.id for line in node.body if isinstance(line, ast.AnnAssign)}
    return flags


def commands(page):
    """Every command and every other piece of code of a page, on one line each."""
    code = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    lines = re.findall(r"^(?: {4}|\t)(.+)$", code, re.M) + re.findall(r"`([^`\n]+)`", code)
    return [line for line in lines if not line.startswith(OTHERS)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_and_flag_of_a_page_exists(page):
    files = [path.relative_to(ROOT) for pattern in ("*.py", "tools/*.py", "studies/*.py")
             for path in ROOT.glob(pattern)]
    anywhere = set().union(*map(flags_of, map(str, files)))
    for line in commands(page):
        script = re.search(r"python (?:-m )?([\w/.]+)", line)
        known = anywhere
        if script:
            known = flags_of(script[1].removesuffix(".py").replace(".", "/") + ".py")
        for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", line):
            field = flag.replace("-", "_")
            assert {field, field.removeprefix("no_")} & (known | {"help"}), line


def test_defaults_in_differences_are_the_defaults():
    defaults = vars(texts.complete(heal_loop.Config()))
    rows = [line.split(" | ") for line in text("docs/differences.md").splitlines()]
    given = {flag.replace("-", "_"): value for row in rows if len(row) == 4
             for flag, value in re.findall(r"`--([a-z-]+) ([^`]+)`", row[2])}
    for flag in ("reg", "readout", "trait", "targets"):  # named to tell arms apart
        given.pop(flag)
    assert len(given) > 15
    assert {flag: type(defaults[flag])(value) for flag, value in given.items()} == \
        {flag: defaults[flag] for flag in given}


def test_doses_in_differences_are_the_traits_own():
    row = re.search(r"^\| doses \|.*$", text("docs/differences.md"), re.M)[0]
    traits = {name: texts.find_trait(name).doses for name in ("care", "authority", "love")}
    found = re.search(r"`authority` (\S+) and (\S+), `love` (\S+) and (\S+);", row)
    doses = tuple(map(float, found.groups()))
    assert traits["care"] == traits["authority"] == doses[:2] and traits["love"] == doses[2:]


def test_readme_has_at_most_1200_words():
    assert len(text("README.md").split()) <= 1200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert re.match(r"https?://", link) or (page.parent / link).exists(), link
