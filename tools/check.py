"""Does this code tell the truth about this model? Each check, with its largest error.

    python -m tools.check --model google/gemma-3-4b-it    # every check; exit status 1 if one fails
    python -m tools.check --all                           # tiny random models of architectures
    python -m tools.check --all --table docs/models.md    # and their table, written into that page

Those of `common.checks`, which every command makes, here also on rows longer than a sliding window
or a switch of long rope; and

    gradient    prompt and completion as healing runs them, at the first block's parameters
    attention   the attention that runs (sdpa) against plain products (eager)
    stream      token by token as chat does it, alone: how far from the model's best next token
    peft        two LoRA rounds exported, and loaded back by PEFT

Errors are the largest (in sixteen bits the mean): of log-probabilities in nats, of gradients
relative to their norm.
"""
import copy
import tempfile
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import transformers

import lora
from common import checks, models, runs
from common.checks import off, plain_logp, plain_scored, scored_logp, token_rows
from common.sampling import stream, training
from tools import export


def gradient(model, rows) -> float:
    """Of the completions' log-probabilities, at the parameters of the first block."""
    block, gradients = model.get_decoder().layers[0].requires_grad_(True), []
    targets = [token for row, n in zip(rows, checks.ANSWERS) for token in row[-n:]]
    for function, context in ((scored_logp, training(model)), (plain_scored, nullcontext())):
        with context:  # healing's own attention against the usual one
            loss = function(model, rows)[range(len(targets)), targets].sum()
        parts = torch.autograd.grad(loss, list(block.parameters()), allow_unused=True)
        gradients.append(torch.cat([g.float().flatten() for g in parts if g is not None]))
    block.requires_grad_(False)
    ours, plain = gradients
    return ((ours - plain).norm() / plain.norm()).item()


@torch.no_grad()
def attention(model, rows) -> float:
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return off(model, plain_logp(model, rows[0], 24), plain_logp(eager, rows[0], 24))


def streamed(model, rows, new: int = 6) -> float:
    """Greedy: how far below the likeliest token each one is in the model's own forward, nats."""
    no_template = SimpleNamespace(tok=SimpleNamespace(eos_token_id=None), end_of_turn=list)
    tokens = list(stream(model, no_template, rows[0][:-new], max_new_tokens=new, temperature=0))
    logp = plain_logp(model, rows[0][:-new] + tokens, len(tokens) + 1)[:-1]
    short = logp.max(-1).values - logp[range(len(tokens)), tokens]
    return max(short.tolist(), default=0.0)  # no token: it began with a stop


@torch.no_grad()
def peft(model, rows) -> float:
    """NaN without PEFT, or where there is nothing to wrap."""
    student = copy.deepcopy(model)
    with warnings.catch_warnings(), torch.random.fork_rng(), tempfile.TemporaryDirectory() as out:
        warnings.simplefilter("ignore")
        try:
            from peft import PeftModel
            lora.attach(student, rank=2, alpha=2, layers=(0, 1))
        except (ImportError, ValueError):
            return float("nan")
        for _ in range(2):
            for m in lora.adapters(student).values():
                m.B.normal_(std=0.1)
            lora.fold(student)
        export.export_peft(student, out)
        expected = plain_scored(student, rows)
        lora.detach(student)
        student = PeftModel.from_pretrained(student, out, trust_remote_code=False)
        return off(model, plain_scored(student, rows), expected)


CHECKS = {**checks.QUICK, "gradient": gradient, "attention": attention, "stream": streamed,
          "peft": peft}


def switch_length(model) -> int:
    """The longest length at which this model changes its ways; 0 for none up to 2048."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    lengths = [rope.get("original_max_position_embeddings"), *(
        getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size"))]
    room = min(2072, getattr(config, "max_position_embeddings", None) or 2072)
    return max(n for n in [0, *lengths] if isinstance(n, int) and n + 24 <= room)


def every_check(model, ids: list[int]) -> dict[str, float]:
    """{check: its largest error}, on rows shorter and longer than a switch."""
    n, errors = switch_length(model), [checks.run(model, token_rows(ids, 32), CHECKS)]
    if n > 8:  # shorter ones are passed already
        errors.append(checks.run(model, token_rows(ids, n + 24, apart=9), CHECKS))
    return {name: max(e[name] for e in errors if name in e) for name in CHECKS}


def architectures() -> dict[str, dict]:
    """{name: {class, config, parts, expect}}, the settings that all share filled in."""
    file = Path(__file__).parent.parent / "data/architectures.json"
    table = runs.read_json(file)
    for entry in table["architectures"].values():
        settings = table["base"] | entry.get("config", {})
        entry["config"] = {key: value for key, value in settings.items() if value is not None}
    return table["architectures"]


def tiny(entry: dict) -> torch.nn.Module:
    """A random model of this architecture, float32, its biases not zero."""
    model_class, settings = getattr(transformers, entry["class"]), entry["config"]
    if "parts" in entry:  # a multimodal model: its text side has the settings
        settings = {"text_config": settings, **entry["parts"]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**settings)).float()
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(p, std=0.1)
    return model.eval().requires_grad_(False)


def result(name: str, entry: dict) -> tuple[str, dict[str, float]]:
    """-> "right", or why it is refused, and the errors."""
    model = tiny(entry)
    try:
        models.find_blocks(model, name)
        checks.blocks(model, name)
    except ValueError as e:
        why = str(e).partition("; fix")[0].partition(")")[2]  # without the model's name and class
        return f"refused: {why.strip(': ')}", {}
    errors = every_check(model, list(range(3, model.config.get_text_config().vocab_size)))
    wrong = checks.failed(errors, model.dtype)
    if wrong and wrong != ["peft"]:
        return f"refused by the check '{wrong[0]}'", errors
    if errors["gates"] != errors["gates"]:  # NaN
        return "steered only: no nn.Linear to wrap", errors
    return "right" + (", but exported as merged only" if wrong else ""), errors


MARK = "<!-- python -m tools.check --all --table docs/models.md writes what follows -->"


@dataclass
class Config:
    model: str = models.EMBEDDED  # smollm2, a local folder, or a hub id
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "float32"  # tells rounding apart
    all: bool = False  # instead, tiny random models of every architecture of the table
    table: Path | None = None  # a page whose table, after its mark, is written anew


def check_all(cfg: Config) -> None:
    """Print the table, write it; ValueError names architectures whose result is not as expected."""
    lines = [" | ".join(["architecture", "result", *CHECKS]), "--- | " * (len(CHECKS) + 1) + "---"]
    surprises = []
    for name, entry in architectures().items():
        outcome, errors = result(name, entry)
        if not outcome.startswith(entry.get("expect", "right")):
            surprises.append(name)
        numbers = [f"{errors[check]:.0e}" if check in errors else "" for check in CHECKS]
        lines.append(" | ".join([name, outcome, *numbers]))
        print(lines[-1], flush=True)
    if cfg.table:
        before = cfg.table.read_text(encoding="utf-8").partition(MARK)[0]
        runs.write_text(cfg.table, before + MARK + "\n\n" + "\n".join(lines) + "\n")
    if surprises:
        raise ValueError(f"{', '.join(surprises)}: not as data/architectures.json expects; "
                         "fix: see the lines above")


def main(cfg: Config) -> None:
    models.quiet()
    if cfg.all:
        return check_all(cfg)
    model, chat = checks.load(cfg.model, cfg.device, cfg.dtype)
    errors = every_check(model, checks.words(chat.tok))
    wrong = checks.failed(errors, model.dtype)
    for name, error in errors.items():
        print(f"{name:10} {'FAILS' if name in wrong else 'ok':6} {error:.1e}")
    if wrong:
        raise ValueError(f"model '{cfg.model}' fails {', '.join(wrong)}; fix: another model")


if __name__ == "__main__":
    runs.cli(Config, main)
