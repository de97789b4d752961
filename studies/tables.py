"""How a study runs and prints: device, a table, a share with its interval, a page."""
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import scipy.stats
from tabulate import tabulate

from common import models, runs


@dataclass(kw_only=True)
class OnDevice:
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"  # auto: bfloat16 where native


@dataclass(kw_only=True)
class Study(OnDevice):
    out: Path = Path("results")  # folder for the page


def markdown(rows: list[list], head: list[str]) -> str:
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def ran_on(model) -> str:
    """`SmolLM2-135M-Instruct-Q4_1, 2 cores, cpu, bfloat16`"""
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{models.base_name(model)}, {os.cpu_count()} cores, {model.device.type}, {dtype}"


def proportion(k: int, n: int) -> str:
    """`12/20 = 0.60 [0.39, 0.78]`, with Wilson's 95 % interval."""
    if not n:
        return "0/0"
    ci = scipy.stats.binomtest(int(k), int(n)).proportion_ci(method="wilson")
    return f"{k}/{n} = {k / n:.2f} [{ci.low:.2f}, {ci.high:.2f}]"


def publish(text: str, file: Path) -> None:
    """Write a page, and print it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    runs.write_text(file, text)
    print(text)
