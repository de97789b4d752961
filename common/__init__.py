"""What the method stands on: models and their checks, prompts, sampling, filter, readouts, runs."""
import importlib.util
from pathlib import Path

_evaluate = importlib.util.find_spec("evaluate")
if _evaluate and Path(_evaluate.origin).parent != Path(__file__).parent.parent:
    raise ImportError(f"another package 'evaluate' hides ours: {_evaluate.origin}; "
                      "fix: sys.path.insert(0, the folder of heal_loop.py)")
