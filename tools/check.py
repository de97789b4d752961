"""Does this code tell the truth about this model? Each check, with its largest error.

    python -m tools.check --model google/gemma-3-4b-it       # every check; exit status 1 where one fails
    python -m tools.check --all                              # tiny random models of many architectures
    python -m tools.check --all --table docs/models.md       # and their table, written into that page

Ours against the model's own forward, without a cache, one row at a time:

    blocks      every block puts out one residual stream, [batch, seq, d_model]
    head        `logits` of the final hidden states
    sampled     padded, batched, cached, token by token, rows leaving: as `sample` does it
    scored      padded, batched, prompt and completion as `score` and healing do it
    gradient    the same path, differentiated: the gradient at the first block's parameters
    attention   our attention on a CPU against the model's own, log-probabilities and gradient
    gates       LoRA with its gates at (0, 0) against the untouched model, bit for bit

Errors are the largest over positions and vocabulary: of log-probabilities in nats, of gradients
relative to their norm. `quick` is what every run makes at its start.
"""
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

import lora
from common import models
from common import runs
from common.sampling import RoomyLayer, completion_states, logits, prefill

ARCHITECTURES = Path(__file__).parent.parent / "data/architectures.json"
# sixteen bits round a logit near 32 by 0.1: there the checks see wrong mechanisms only
LIMITS = {torch.float64: dict(nats=1e-4, relative=1e-4),
          torch.float32: dict(nats=1e-2, relative=1e-2),
          torch.bfloat16: dict(nats=0.3, relative=0.3), torch.float16: dict(nats=0.3, relative=0.3)}


# ---- what is compared ---------------------------------------------------------------------------


def token_rows(model, longest: int) -> list[list[int]]:
    """Three rows of random tokens, the first `longest` tokens long, the second a third of it.

    They begin alike, as prompts with one system turn do.
    """
    words = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(words, (n,), generator=generator).tolist()
            for n in (longest, longest // 3, longest // 3 + 5)]
    return [rows[0][:2] + row[2:] for row in rows]


def plain_logp(model, row: list[int]) -> torch.Tensor:
    """The model's own forward, uncached and alone: [len(row), vocab], nats."""
    ids = torch.tensor([row], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)


def off(model, ours: torch.Tensor, plain: torch.Tensor) -> float:
    """The largest difference of log-probabilities, nats; infinite where one is not a number.

    In sixteen bits the mean: there a rounded logit or an expert that flips moves some word by much,
    while a wrong mechanism moves them all.
    """
    differences = (ours - plain.to(ours.device)).abs()
    exact = model.dtype in (torch.float32, torch.float64)
    error = (differences.max() if exact else differences.mean()).item()
    return error if error == error else float("inf")


# ---- the checks ---------------------------------------------------------------------------------


@torch.no_grad()
def head(model, rows) -> float:
    ids = torch.tensor([rows[0]], device=model.device)
    states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    logp = logits(model, states).float().log_softmax(-1)
    return off(model, logp, plain_logp(model, rows[0]))


@torch.no_grad()
def sampled(model, rows, new: int = 6) -> float:
    """The last `new` tokens of each row are taken one by one, in place of drawn ones."""
    expected = [plain_logp(model, row) for row in rows]
    at = [len(row) - new for row in rows]  # where each row's next token stands
    order, ours, plain = list(range(len(rows))), [], []
    cache, token, mask, position = prefill(model, [r[:k] for r, k in zip(rows, at)], RoomyLayer)
    for t in range(new):
        # 1. the newest token on top of the cache
        states = model.get_decoder()(
            input_ids=token[:, None], attention_mask=mask, position_ids=position[:, None],
            past_key_values=cache, use_cache=True).last_hidden_state
        logp = logits(model, states[:, -1]).float().log_softmax(-1)  # [batch, vocab]
        ours.append(logp)
        plain += [expected[i][at[i] + t - 1] for i in order]
        # 2. halfway the first row leaves and the others change places
        if t == new // 2:
            keep = torch.tensor([2, 1], device=model.device)
            cache.reorder_cache(keep)
            order, mask, position = [2, 1], mask[keep], position[keep]
        token = torch.tensor([rows[i][at[i] + t] for i in order], device=model.device)
        mask, position = F.pad(mask, (0, 1), value=1), position + 1
    return off(model, torch.cat(ours), torch.stack(plain))


def scored_logp(model, rows) -> list[torch.Tensor]:
    """Per row the log-probabilities at its completion's positions, by `completion_states`."""
    at = [len(row) - n for row, n in zip(rows, (6, 5, 3))]
    completions = [row[k:] for row, k in zip(rows, at)]
    states = completion_states(model, [row[:k] for row, k in zip(rows, at)], completions)
    logp = logits(model, states).float().log_softmax(-1)
    return list(logp.split([len(c) for c in completions]))


def plain_scored(model, rows) -> list[torch.Tensor]:
    return [plain_logp(model, row)[-n - 1:-1] for row, n in zip(rows, (6, 5, 3))]


@torch.no_grad()
def scored(model, rows) -> float:
    return off(model, torch.cat(scored_logp(model, rows)), torch.cat(plain_scored(model, rows)))


def gradient_of(model, rows, how) -> torch.Tensor:
    """Of the completions' log-probabilities, at the parameters of the first block."""
    parameters = [p for p in model.get_decoder().layers[0].parameters() if p.is_floating_point()]
    for p in parameters:
        p.requires_grad_(True)
    try:
        targets = [torch.tensor(row[-n:], device=model.device) for row, n in zip(rows, (6, 5, 3))]
        losses = [logp.gather(1, t[:, None].to(logp.device)).sum()
                  for logp, t in zip(how(model, rows), targets)]
        found = torch.autograd.grad(sum(losses), parameters, allow_unused=True)
        return torch.cat([g.float().flatten() for g in found if g is not None])
    finally:
        for p in parameters:
            p.requires_grad_(False)


def gradient(model, rows) -> float:
    plain = gradient_of(model, rows, plain_scored)
    return ((gradient_of(model, rows, scored_logp) - plain).norm() / plain.norm()).item()


def attention(model, rows) -> float:
    """Of log-probabilities; the gradient's relative error counts where it is larger."""
    if model.config._attn_implementation != "grouped":
        return 0.0  # the model's own is what runs
    logp, slope = plain_logp(model, rows[0]), gradient_of(model, rows, plain_scored)
    model.set_attn_implementation("sdpa")
    try:
        error = off(model, logp, plain_logp(model, rows[0]))
        own = gradient_of(model, rows, plain_scored)
    finally:
        model.set_attn_implementation("grouped")
    return max(error, ((slope - own).norm() / own.norm()).item())


@torch.no_grad()
def gates(model, rows) -> float:
    """Also after `detach`. NaN where nothing can be wrapped: it is steered, not healed."""
    untouched = plain_logp(model, rows[0])
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run that attaches for good says what is left out
        try:
            lora.attach(model, rank=1, layers=(0, 1))
        except ValueError:
            return float("nan")
        for p in lora.live_parameters(model):
            p.normal_()
        with lora.gates(model, history=0, live=0):
            error = off(model, plain_logp(model, rows[0]), untouched)
    lora.detach(model)
    return max(error, off(model, plain_logp(model, rows[0]), untouched))


CHECKS = {"head": head, "sampled": sampled, "scored": scored, "gradient": gradient,
          "attention": attention, "gates": gates}
QUICK = ("head", "sampled", "scored", "gates")


def run_checks(model, names=tuple(CHECKS), longest: int = 32) -> dict[str, float]:
    """{check: its largest error}; infinite for a check that could not be made."""
    rows, errors = token_rows(model, longest), {}
    for name in names:
        try:
            errors[name] = CHECKS[name](model, rows)
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError,
                NotImplementedError) as e:
            errors[name] = float("inf")
            print(f"{name}: {type(e).__name__}: {str(e)[:200]}")
    return errors


def failed(errors: dict[str, float], dtype: torch.dtype) -> list[str]:
    """The checks whose error is beyond what rounding explains."""
    limit = LIMITS[dtype]
    allowed = {"gradient": limit["relative"], "gates": 0.0}
    return [name for name, error in errors.items() if error > allowed.get(name, limit["nats"])]


def quick(model, name: str) -> None:
    """What every run checks at its start, half a dozen short forward passes.

    Raises ValueError naming the first check that fails.
    """
    errors = run_checks(model, QUICK, longest=24)
    for check in failed(errors, model.dtype):
        raise ValueError(f"model '{name}' fails the check '{check}': {errors[check]:.2g} nats off "
                         "its own forward, so no number could be trusted; "
                         f"fix: `python -m tools.check --model {name}` shows all checks; another model")


def past_the_window(model) -> int:
    """A row's length: beyond the sliding window or chunk where that is at most 2048, else 32."""
    config = model.config.get_text_config()
    windows = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
    return max([32] + [w + 24 for w in windows if isinstance(w, int) and w <= 2048])


# ---- tiny random models -------------------------------------------------------------------------


def architectures(path: Path = ARCHITECTURES) -> dict[str, dict]:
    """{name: {class, config, refused}}, the settings that all share filled in."""
    table = json.loads(path.read_text())
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
    return model


def verdict(name: str, entry: dict) -> tuple[str, dict[str, float]]:
    """-> "right", or why it is refused, and the errors."""
    model = tiny(entry)
    try:
        models.prepare(model, name)
    except ValueError as e:
        why = str(e).partition("; fix")[0].partition(")")[2]  # without the model's name and class
        return f"refused: {why.strip(': ')}", {}
    errors = run_checks(model)
    wrong = failed(errors, model.dtype)
    if wrong:
        return f"refused by the check '{wrong[0]}'", errors
    if errors["gates"] != errors["gates"]:
        return "steered only: no nn.Linear to wrap", errors
    own = model.config._attn_implementation != "grouped"
    return "right" + (", with its own attention" if own else ""), errors


def as_row(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def all_architectures(only: tuple[str, ...] = ()) -> tuple[list[str], int]:
    """-> the table's lines, and how many verdicts are not the expected ones."""
    lines = [as_row(["architecture", "verdict", *CHECKS]), "|" + " --- |" * (2 + len(CHECKS))]
    surprises = 0
    print("\n".join(lines))
    for name, entry in architectures().items():
        if only and name not in only:
            continue
        start = time.time()
        said, errors = verdict(name, entry)
        surprises += not said.startswith(entry.get("expect", "right"))
        numbers = [f"{errors[check]:.0e}" if check in errors else "" for check in CHECKS]
        lines.append(as_row([name, said, *numbers]))
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
            before = cfg.table.read_text().partition(MARK)[0]
            runs.write_text(cfg.table, before + MARK + "\n\n" + "\n".join(lines) + "\n")
        if surprises:
            raise ValueError(f"{surprises} architectures are not as data/architectures.json expects; "
                             "fix: see the lines above")
        return
    model, _ = models.load(cfg.model, cfg.device, cfg.dtype)
    errors = run_checks(model, longest=past_the_window(model))
    wrong = failed(errors, model.dtype)
    for name, error in errors.items():
        print(f"{name:10} {'FAILS' if name in wrong else 'ok':6} {error:.1e}")
    if wrong:
        raise ValueError(f"model '{cfg.model}' fails {', '.join(wrong)}; fix: another model")


if __name__ == "__main__":
    runs.cli(Config, main)
