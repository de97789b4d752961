"""The walk-through runs, its solutions are right, and the committed notebook is made from it."""
import json
import re

import matplotlib
import pytest

from conftest import ROOT

SCRIPT = (ROOT / "docs/walkthrough.py").read_text(encoding="utf-8")
SMALL = {"N_CONTEXTS": "4", "N_KEEP": "6", "N_TOKENS": "10", "N_VIGNETTES": "14",
         "RULES": "heal_loop.Config(max_repetition=1, min_diversity=0, max_perplexity=1e9)"}


def cells():
    """(is it markdown, its text) of every cell of the script, as a notebook would hold it."""
    parts = re.split(r"^# %%(.*)\n", SCRIPT, flags=re.M)[1:]
    for head, body in zip(parts[::2], parts[1::2]):
        is_markdown = "markdown" in head
        body = re.sub(r"^# ?", "", body, flags=re.M) if is_markdown else body
        yield is_markdown, body.strip()


MARKDOWN = "\n".join(body for is_markdown, body in cells() if is_markdown)
CODE = "\n\n".join(body for is_markdown, body in cells() if not is_markdown)
SOLUTIONS = re.findall(r"```python\n(.*?)```", MARKDOWN, re.S)


@pytest.fixture(scope="module")
def walked(tiny_folder, tmp_path_factory):
    """The names that the cells leave behind, run on a tiny model, with small numbers."""
    root = tmp_path_factory.mktemp("walk")
    (root / "docs").mkdir()
    code, changes = CODE, {"MODEL": f'"{tiny_folder}"', "ROOT": f'Path("{root}")', **SMALL}
    for name, value in changes.items():
        code, n = re.subn(rf"^{name} = .*", f"{name} = {value}", code, flags=re.M)
        assert n == 1, name
    matplotlib.use("agg")
    names = {"__name__": "walkthrough"}
    with matplotlib.rc_context():
        exec(compile(code, "walkthrough.py", "exec"), names)
    names["plt"].close("all")
    return names


def test_cells_run_from_the_vector_to_the_second_round(walked):
    assert walked["lora"].n_rounds(walked["model"]) == 2
    assert (walked["ROOT"] / "docs/kl_per_token.png").stat().st_size > 5000


def test_the_solution_runs_and_is_right(walked):
    [solution] = SOLUTIONS
    exec(compile(solution, "solution", "exec"), dict(walked))


def test_notebook_is_made_from_the_script_and_has_run():
    notebook = json.loads((ROOT / "docs/walkthrough.ipynb").read_text(encoding="utf-8"))
    made = [(cell["cell_type"] == "markdown", "".join(cell["source"]).strip())
            for cell in notebook["cells"]]
    assert made == list(cells()), "fix: make walkthrough"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not any(out["output_type"] == "error" for cell in code for out in cell["outputs"])
