"""Does this code tell the truth about this model? Each check, with its largest error.

    python -m tools.check --model google/gemma-3-4b-it       # every check; exit status 1 where one fails
    python -m tools.check --all                              # tiny random models of many architectures
    python -m tools.check --all --table docs/models.md       # and their table, written into that page

Those of `common.checks` that every command makes, here also on rows longer than a sliding window or
a switch of long rope; and

    gradient    prompt and completion as healing runs them, at the first block's parameters
    attention   the attention that runs (sdpa) against plain products (eager), gradients too
    stream      token by token as chat does it, alone: how far from the model's best next token
    peft        two LoRA rounds exported, and loaded back by PEFT

Errors are the largest over positions and vocabulary: of log-probabilities in nats, of gradients
relative to their norm.
"""
import copy
import importlib.util
import json
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

import lora
from common import checks, models, runs
from common.checks import off, plain_logp, plain_scored, scored_logp, token_rows
from common.sampling import stream
from tools import export

ARCHITECTURES = Path(__file__).parent.parent / "data/architectures.json"


# ---- the checks that a command has no time for ---------------------------------------------------


def gradient_of(model, rows, function) -> torch.Tensor:
    """Of the completions' log-probabilities, at the parameters of the first block."""
    parameters = [p for p in model.get_decoder().layers[0].parameters() if p.is_floating_point()]
    for p in parameters:
        p.requires_grad_(True)
    try:
        completions = [row[-n:] for row, n in zip(rows, checks.ANSWERS)]
        losses = [logp.gather(1, torch.tensor(c, device=logp.device)[:, None]).sum()
                  for logp, c in zip(function(model, rows), completions)]
        gradients = torch.autograd.grad(sum(losses), parameters, allow_unused=True)
        return torch.cat([g.float().flatten() for g in gradients if g is not None])
    finally:
        for p in parameters:
            p.requires_grad_(False)


def gradient(model, rows) -> float:
    plain = gradient_of(model, rows, plain_scored)
    return ((gradient_of(model, rows, scored_logp) - plain).norm() / plain.norm()).item()


def attention(model, rows) -> float:
    """Of log-probabilities; the gradient's relative error counts where it is larger."""
    own = model.config._attn_implementation
    if own == "eager":
        return 0.0
    with torch.no_grad():
        logp = plain_logp(model, rows[0], 24)
    slope = gradient_of(model, rows, plain_scored)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            error = off(model, logp, plain_logp(model, rows[0], 24))
        eager = gradient_of(model, rows, plain_scored)
    finally:
        model.set_attn_implementation(own)
    return max(error, ((slope - eager).norm() / eager.norm()).item())


def streamed(model, rows, new: int = 6) -> float:
    """Greedy: how far below the likeliest token each one is in the model's own forward, nats."""
    no_template = SimpleNamespace(tok=SimpleNamespace(eos_token_id=None), end_of_turn=list)
    tokens = list(stream(model, no_template, rows[0][:-new], max_new_tokens=new, temperature=0))
    if not tokens:
        return 0.0  # it begins with a stop
    logp = plain_logp(model, rows[0][:-new] + tokens, len(tokens) + 1)[:-1]
    return (logp.max(-1).values - logp[range(len(tokens)), tokens]).max().item()


@torch.no_grad()
def peft(model, rows) -> float:
    """NaN where PEFT is not installed, or there is nothing to wrap."""
    if not importlib.util.find_spec("peft"):
        return float("nan")
    from peft import PeftModel
    student = copy.deepcopy(model)
    with warnings.catch_warnings(), torch.random.fork_rng(), tempfile.TemporaryDirectory() as out:
        warnings.simplefilter("ignore")
        try:
            lora.attach(student, rank=2, layers=(0, 1))
        except ValueError:
            return float("nan")
        for _ in range(2):
            for m in lora.adapters(student).values():
                m.B.normal_(std=0.1)
            lora.fold(student)
        expected = [plain_logp(student, row, len(row)) for row in rows]
        export.export_peft(student, out)
        lora.detach(student)
        student = PeftModel.from_pretrained(student, out, trust_remote_code=False)
        return max(off(model, plain_logp(student, row, len(row)), logp)
                   for row, logp in zip(rows, expected))


SLOW = {"gradient": gradient, "attention": attention, "stream": streamed, "peft": peft}


def switch_length(model) -> int:
    """The longest length at which this model changes its ways; 0 for none up to 2048."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    lengths = [getattr(config, "sliding_window", None),
               getattr(config, "attention_chunk_size", None),
               rope.get("rope_type") == "longrope" and rope["original_max_position_embeddings"]]
    return max(n for n in [0, *lengths] if isinstance(n, int) and n <= 2048)


def every_check(model, ids: list[int]) -> dict[str, float]:
    """{check: its largest error}, on rows shorter and longer than a switch, and on both at once."""
    short, errors = token_rows(ids, 32), {}
    parts = [(short, {**checks.QUICK, **SLOW})]
    n = switch_length(model)
    if n > 8:
        long = token_rows(ids, n + 24, apart=9)
        parts += [(long, {**checks.QUICK, **SLOW}),
                  ([long[0], *short[1:]], {"scored": checks.scored, "gradient": gradient})]
    for rows, functions in parts:
        for name, error in checks.run(model, rows, functions).items():
            errors[name] = max(error, errors.get(name, error))
    return errors


# ---- tiny random models --------------------------------------------------------------------------


def architectures(path: Path = ARCHITECTURES) -> dict[str, dict]:
    """{name: {class, config, parts, expect}}, the settings that all share filled in."""
    table = json.loads(path.read_text(encoding="utf-8"))
    for entry in table["architectures"].values():
        settings = table["base"] | entry.get("config", {})
        entry["config"] = {key: value for key, value in settings.items() if value is not None}
    return table["architectures"]


def tiny(entry: dict) -> torch.nn.Module:
    """A random model of this architecture, float32, its biases not zero."""
    model_class = getattr(transformers, entry["class"])
    settings = entry["config"]
    if "parts" in entry:  # a multimodal model: its text side has the settings
        settings = {"text_config": settings, **entry["parts"]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**settings)).float()
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(p, std=0.1)
    model.generation_config.eos_token_id = 2
    return model.eval().requires_grad_(False)


def result(name: str, entry: dict) -> tuple[str, dict[str, float]]:
    """-> "right", or why it is refused, and the errors."""
    try:
        model = tiny(entry)
        models.find_blocks(model, name)
        checks.blocks(model, name)
    except ValueError as e:
        why = str(e).partition("; fix")[0].partition(")")[2]  # without the model's name and class
        return f"refused: {why.strip(': ')}", {}
    errors = every_check(model, list(range(3, model.config.get_text_config().vocab_size)))
    wrong = checks.failed(errors, model.dtype)
    if [name for name in wrong if name != "peft"]:
        return f"refused by the check '{wrong[0]}'", errors
    if errors["gates"] != errors["gates"]:
        return "steered only: no nn.Linear to wrap", errors
    return "right" + (", but exported as merged only" if wrong else ""), errors


def as_row(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def all_architectures(only: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """-> the table's lines, and the architectures whose result is not the expected one."""
    names = [*checks.QUICK, *SLOW]
    lines = [as_row(["architecture", "result", *names]), "|" + " --- |" * (2 + len(names))]
    surprises = []
    print("\n".join(lines))
    for name, entry in architectures().items():
        if only and name not in only:
            continue
        start = time.time()
        found, errors = result(name, entry)
        if not found.startswith(entry.get("expect", "right")):
            surprises.append(name)
        lines.append(as_row([name, found, *(f"{errors[check]:.0e}" if check in errors else ""
                                            for check in names)]))
        print(lines[-1], f"{time.time() - start:.1f} s", flush=True)
    return lines, surprises


MARK = "<!-- python -m tools.check --all --table docs/models.md writes what follows -->"


@dataclass
class Config:
    model: str = models.EMBEDDED  # smollm2, a local folder, or a hub id
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: str = "float32"  # float32 tells rounding from mistakes; auto, bfloat16, float16
    all: bool = False  # instead, tiny random models of every architecture of the table
    only: tuple[str, ...] = ()  # of these, only such as llama qwen3
    table: Path | None = None  # a page whose table, after its mark, is written anew


def main(cfg: Config) -> None:
    models.quiet()
    if cfg.all:
        lines, surprises = all_architectures(cfg.only)
        if cfg.table:
            before = cfg.table.read_text(encoding="utf-8").partition(MARK)[0]
            runs.write_text(cfg.table, before + MARK + "\n\n" + "\n".join(lines) + "\n")
        if surprises:
            raise ValueError(f"{', '.join(surprises)}: not as data/architectures.json expects; "
                             "fix: see the lines above")
        return
    model, chat = checks.load(cfg.model, cfg.device, cfg.dtype)
    errors = every_check(model, checks.words(chat.tok))
    wrong = checks.failed(errors, model.dtype)
    for name, error in errors.items():
        print(f"{name:10} {'FAILS' if name in wrong else 'ok':6} {error:.1e}")
    if wrong:
        raise ValueError(f"model '{cfg.model}' fails {', '.join(wrong)}; fix: another model")


if __name__ == "__main__":
    runs.cli(Config, main)
