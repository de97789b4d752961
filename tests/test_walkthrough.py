"""The walk-through runs, its solutions are right, and the committed notebook is made from it."""
import json
import re

import matplotlib
import pytest

from conftest import ROOT

SCRIPT = (ROOT / "docs/walkthrough.py").read_text()
SMALL_NUMBERS = {"N_CONTEXTS": "4", "N_KEEP": "6", "N_TOKENS": "10", "N_VIGNETTES": "14",
                 "RULES": "distil.Rules(max_repetition=1, min_diversity=0, max_perplexity=1e9)"}


def cells():
    """(is it markdown, its text) of every cell of the script, as a notebook would hold it."""
    found = re.split(r"^# %%(.*)\n", SCRIPT, flags=re.M)
    assert found[0] == ""
    for head, body in zip(found[1::2], found[2::2]):
        is_markdown = "markdown" in head
        body = re.sub(r"^# ?", "", body, flags=re.M) if is_markdown else body
        yield is_markdown, body.strip()


def solutions():
    text = "\n".join(body for is_markdown, body in cells() if is_markdown)
    return re.findall(r"```python\n(.*?)```", text, re.S)


def small(source, model):
    """The code with a tiny model and small numbers, each of which stands in it exactly once."""
    for name, value in {"MODEL": repr(str(model)), **SMALL_NUMBERS}.items():
        source, n = re.subn(rf"^{name} = .*", f"{name} = {value}", source, flags=re.M)
        assert n == 1, name
    return source


@pytest.fixture(scope="module")
def walked(tiny_folder, tmp_path_factory):
    """What the walk-through leaves behind: its names, and the folder that it wrote to."""
    code = "\n\n".join(body for is_markdown, body in cells() if not is_markdown)
    folder, names = tmp_path_factory.mktemp("walk"), {"__name__": "walkthrough"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        matplotlib.use("agg")
        exec(compile(small(code, tiny_folder), "walkthrough.py", "exec"), names)
        names["plt"].close("all")
    return names, folder


def test_the_walkthrough_runs_from_the_vector_to_the_second_round(walked):
    names, folder = walked
    assert names["lora"].n_rounds(names["model"]) == 2
    assert (folder / "docs/kl_per_token.png").stat().st_size > 5000
    assert len(names["stages"]) == 4


@pytest.mark.parametrize("exercise", range(5))
def test_its_solutions_are_right(walked, exercise):
    exec(compile(solutions()[exercise], f"solution {exercise + 1}", "exec"), dict(walked[0]))


def test_there_is_a_solution_to_every_exercise():
    text = "\n".join(body for is_markdown, body in cells() if is_markdown)
    exercises = re.findall(r"^### \d", text.split("## Exercises")[1], re.M)
    assert len(exercises) == len(solutions()) == text.count("<details>") == 5


def test_the_notebook_is_made_from_the_script_and_every_cell_has_run():
    notebook = json.loads((ROOT / "walkthrough.ipynb").read_text())
    made = [(cell["cell_type"] == "markdown", "".join(cell["source"]).strip())
            for cell in notebook["cells"]]
    assert made == list(cells()), "fix: make walkthrough"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not any(out["output_type"] == "error" for cell in code for out in cell["outputs"])
