"""Imports point one way, lines are narrow, the method is what meets the eye, README's code runs."""
import ast
import graphlib
import re

import pytest
import torch

import lora
from conftest import ROOT, python

# from what stands alone to what is made from it: each imports from its own line and those above
ORDER = [["steer", "lora"], ["common.prompts", "common.models", "common.runs"],
         ["common.texts", "common.sampling"],
         ["common.readouts", "common.generation", "common.checks", "common.filter"],
         ["distil", "evaluate"], ["heal_loop"], ["tools", "studies", "docs"]]
# and these within their command alone
ALSO = [("heal_loop", "tools.plot"), *((name, "tools.commands")
                                       for name in ("steer", "distil", "evaluate"))]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
         for at in ("", "common/", "tools/", "studies/", "docs/") for path in ROOT.glob(f"{at}*.py")
         if path.name != "__init__.py"}


def line_of(name):
    """Where in ORDER a module stands."""
    return next(n for n, names in enumerate(ORDER) if name in names or name.split(".")[0] in names)


def imports(path):
    """(module of ours, is it within a function or behind __main__) of every import in the file."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from ((name, node not in tree.body) for name in names if name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name):
    for other, is_inner in imports(FILES[name]):
        if not (is_inner and (name, other) in ALSO):
            assert line_of(other) <= line_of(name), f"{name} imports {other}"
            assert line_of(name) > 0, f"{name} stands alone, and imports {other}"


def test_imports_make_no_circle():
    graph = {name: {other for other, is_inner in imports(path) if not is_inner}
             for name, path in FILES.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(FILES)


def test_only_the_five_method_files_lie_at_the_top():
    assert {path.stem for path in ROOT.glob("*.py")} == {
        "heal_loop", "steer", "distil", "lora", "evaluate"}


def test_lines_are_narrow_and_every_name_is_known_and_used():
    done = python("-m", "ruff", "check", "--no-cache", "--output-format", "concise", ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_python_runs_as_it_stands(embedded, tmp_path, monkeypatch):
    """One block after the other, in one namespace that has a model and something to read."""
    monkeypatch.chdir(tmp_path)
    model, chat = embedded
    contexts = ["What is for dinner?", "Why is the sky blue?", "Write a haiku.", "Which day is it?"]
    pos, neg = ([chat.ids(text, persona) for text in contexts]
                for persona in ("You care.", "You obey."))
    logp, logq = torch.randn(2, 5, 9).log_softmax(-1)

    def train(parameters):
        for p in parameters:
            p.data += 1e-3 * torch.randn_like(p)
    names = dict(model=model, chat=chat, tok=chat.tok, train=train, torch=torch, pos=pos, neg=neg,
                 ids=torch.tensor([chat.ids("Good morning.")]), logp=logp, logq=logq,
                 targets=torch.arange(5), contexts=contexts)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    try:
        for block in blocks:
            exec(block, names)
    finally:
        if lora.is_attached(model):
            lora.detach(model)
    assert len(blocks) >= 2
