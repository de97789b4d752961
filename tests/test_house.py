"""The house keeps its order: imports point one way, lines stay narrow, what README shows runs."""
import ast
import re

import pytest

from conftest import ROOT

# each floor may import those below it, and nothing of its own but what ALSO says
FLOORS = [["sweep", "export", "chat", "walkthrough", "studies"], ["heal_loop", "plot", "frontier"],
          ["distil", "evaluate", "check"], ["readouts"], ["sampling", "texts"],
          ["steer", "lora", "models", "runs"]]
ALSO = {("heal_loop", "plot"), ("steer", "models"), ("steer", "runs")}
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("studies/*.py")])


def floor(name):
    return next(k for k, names in enumerate(FLOORS) if name in names)


def house_name(path):
    return "studies" if path.parent.name == "studies" else path.stem


def imports(path):
    """(module of ours, is it inside a function or behind __main__) of every import in the file."""
    ours = {house_name(p) for p in FILES}
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found = [node.module.split(".")[0]]
        for name in found:
            if name in ours:
                yield name, id(node) not in top


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_imports_point_one_way_and_never_back(path):
    name = house_name(path)
    for other, inner in imports(path):
        if (name, other) in ALSO:
            assert inner, f"{name} may import {other} for its command alone"
        elif not name == other == "studies":
            assert floor(name) < floor(other), f"{path.name} imports {other}"


def test_lines_are_narrow():
    lines = [line for path in FILES for line in path.read_text().splitlines()]
    wide = [line for line in lines if len(line) > 100]
    assert len(wide) <= 0.02 * len(lines), wide[:5]
    assert all(len(line) <= 120 for line in lines)


def snippets():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    return blocks


def test_the_python_that_readme_shows_runs_as_it_stands(embedded, tmp_path, monkeypatch):
    """One after the other, in one namespace that has a model, its tokenizer and some texts."""
    import torch

    import lora
    from common import texts
    monkeypatch.chdir(tmp_path)
    model, tok = embedded
    ids = torch.tensor([tok("Good morning.").input_ids])

    def train(parameters):
        for p in parameters:
            p.data += 1e-3 * torch.randn_like(p)
    given = dict(model=model, tok=tok, ids=ids, train=train, torch=torch,
                 contexts=texts.load_strings(texts.DATA / "contexts.json", "contexts")[:4])
    try:
        for block in snippets():
            exec(block, given)
    finally:
        if hasattr(model, "lora_config"):
            lora.detach(model)
