"""Checks that our code gives the model's own numbers; the model of every command must pass them.

    model, chat = load("google/gemma-3-4b-it")      # or one line that says what is wrong with it

    finite      every weight, and the log-probabilities of a text
    template    the user's and the persona's words stand in a prompt, as tokens the model knows
    blocks      every block puts out one residual stream, [batch, seq, d_model]

Ours against the model's own forward, without a cache, one row at a time:

    head        `logits` of the final hidden states
    sampled     padded, batched, cached, token by token, a row leaving: the loop of `sample`
    scored      padded, batched, prompt and completion as `score` and healing do it
    gates       LoRA with its gates at (0, 0), and after `detach`, against the untouched model

Errors are the largest over positions and vocabulary (in sixteen bits the mean), in nats.
`python -m tools.check` makes the same checks on longer rows, and more.
"""
import contextlib
import inspect
import sys
import warnings

import torch

import lora
from common import models
from common.prompts import DATE, Chat
from common.sampling import Decoder, completion_states, logits
from steer import left_pad, residual

# sixteen bits round a logit near 32 by 0.1: there the checks see wrong mechanisms only
LIMITS = {torch.float32: 0.01, torch.bfloat16: 0.3, torch.float16: 0.3}  # nats, or relative


def load(name: str, device: str = "auto", dtype: str = "auto", date: str = DATE):
    """-> (model, chat) that have passed the checks above, on a few short rows.

    name, device, dtype: see `models.load`. date: what chat templates print as today's.
    Raises ValueError or OSError with one line that names the check.
    """
    model, tok = models.load(name, device, dtype)
    chat = Chat(tok, date)
    finite(model, tok, name)
    template(model, chat, name)
    blocks(model, name)
    errors = run(model, token_rows(words(tok), 24), QUICK)
    for check in failed(errors, model.dtype):
        raise ValueError(f"model '{name}' fails the check '{check}': {errors[check]:.2g} nats off "
                         "its own forward; fix: another model")
    return model, chat


def lengths(model, chat: Chat, reading, new: int) -> None:
    """Raises ValueError for the first text of a run that the model's context has no room for."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    longest_persona = max(reading.pos, reading.neg, key=len)
    for name in ("train", "heldout", "contexts"):
        for n, text in enumerate(getattr(reading, name), 1):
            tokens = len(chat.ids(text, longest_persona)) + new
            if tokens > room:
                raise ValueError(f"entry {n} of '{name}' takes {tokens} tokens with persona and "
                                 f"answer, the model has room for {room}; fix: a shorter text")


def words(tok) -> list[int]:
    """Ids of the tokenizer's ordinary tokens: no role, no image, no padding of the vocabulary."""
    return sorted(set(tok.get_vocab().values()) - set(tok.added_tokens_decoder))


@torch.no_grad()
def finite(model, tok, name: str) -> None:
    """Raises ValueError naming the first tensor with a value that is not finite, or an overflow.

    Embeddings of ids that the tokenizer never gives are named only.
    """
    table = model.get_input_embeddings().weight
    for key, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.is_meta or not t.numel() or not t.is_floating_point() or t.itemsize < 2:
            continue
        if torch.stack(t.aminmax()).isfinite().all():  # without a second array of its size
            continue
        if t is table:  # where it is the head too, the log-probabilities below tell
            rows = (~t.isfinite().all(1)).nonzero()[:, 0].tolist()
            if not set(rows) & set(tok.get_vocab().values()):
                print(f"{key} is not finite at ids {rows[:4]}, which no text has", file=sys.stderr)
                continue
        raise ValueError(f"the weights of model '{name}' are not finite in {t.dtype}: {key}; "
                         "fix: a whole copy of it, or --dtype float32")
    if not plain_logp(model, token_rows(words(tok), 24)[0], 24).isfinite().all():
        raise ValueError(f"the log-probabilities of model '{name}' are not finite in "
                         f"{model.dtype}; fix: --dtype float32, or another model")


def template(model, chat: Chat, name: str) -> None:
    """Raises ValueError where a prompt lacks the words it is given, or the model one of its tokens.

    Both texts have what some templates escape: quotes and a line break.
    """
    ids = chat.ids('He said "no".\nWhy?', 'You say "yes".\nAlways.') + chat.end_of_turn()
    rows = model.get_input_embeddings().weight.shape[0]
    unknown = [i for i in ids if i >= rows]
    if unknown:
        token = chat.tok.convert_ids_to_tokens(unknown[0])
        raise ValueError(f"the chat template of model '{name}' uses '{token}', id {unknown[0]}, "
                         f"and the model has {rows} tokens; fix: the tokenizer that belongs to it")


@torch.no_grad()
def blocks(model, name: str) -> None:
    """Raises ValueError where a decoder asks for more than text, or has no one stream to steer."""
    decoder, d_model = model.get_decoder(), model.config.get_text_config().hidden_size
    what = f"model '{name}' ({type(model).__name__})"
    asked = inspect.signature(type(decoder).forward).parameters
    needed = [p.name for p in list(asked.values())[1:] if p.default is p.empty
              and p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "input_ids"]
    if needed or "input_ids" not in asked:
        raise ValueError(f"{what} needs {', '.join(needed) or 'no input_ids'} beside a text; "
                         "fix: use a causal language model")
    if "past_key_values" not in asked:
        raise ValueError(f"{what} keeps its past in another way than past_key_values, so rows of a "
                         "batch cannot be continued; fix: use a model with attention layers")
    ids, mask, positions = left_pad([list(range(3, 27)), list(range(3, 22))], model.device)
    shapes = []
    with contextlib.ExitStack() as hooks:
        for block in decoder.layers:
            hooks.enter_context(block.register_forward_hook(
                lambda block, args, output: shapes.append(list(residual(output).shape))))
        decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    wrong = [shape for shape in shapes if shape != [2, 24, d_model]]
    if wrong:
        raise ValueError(f"{what}: a block puts out {wrong[0]} where the residual stream would be "
                         f"[2, 24, {d_model}], so there is no one place to steer; "
                         "fix: use a model with a plain residual stream")


def token_rows(ids: list[int], longest: int, apart: int | None = None) -> list[list[int]]:
    """Three rows of tokens drawn from `ids`, which begin alike, as prompts with one system turn do.

    The first is `longest` long, the second a third of it, or `apart` shorter, the third between.
    """
    generator = torch.Generator().manual_seed(1)
    shortest = longest - apart if apart else longest // 3
    rows = [[ids[k] for k in torch.randint(len(ids), (n,), generator=generator).tolist()]
            for n in (longest, shortest, shortest + 5)]
    return [rows[0][:2] + row[2:] for row in rows]


def plain_logp(model, row: list[int], last: int) -> torch.Tensor:
    """The model's own forward, uncached and alone: its last positions [last, vocab], nats."""
    ids = torch.tensor([row], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0, -last:].float().log_softmax(-1)


def off(model, ours: torch.Tensor, plain: torch.Tensor) -> float:
    """The largest difference of log-probabilities, nats; infinite where one is not a number.

    In sixteen bits the mean: there a rounded logit or an expert that flips moves some word by much,
    while a wrong mechanism moves them all.
    """
    differences = (ours - plain.to(ours.device)).abs()
    error = (differences.max() if model.dtype == torch.float32 else differences.mean()).item()
    return error if error == error else float("inf")


@torch.no_grad()
def head(model, rows) -> float:
    ids = torch.tensor([rows[0]], device=model.device)
    states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, -24:]
    logp = logits(model, states).float().log_softmax(-1)
    return off(model, logp, plain_logp(model, rows[0], 24))


@torch.no_grad()
def sampled(model, rows, new: int = 6) -> float:
    """The last `new` tokens of each row are taken one by one, in place of drawn ones.

    Halfway the first row leaves and the others change places.
    """
    expected = [plain_logp(model, row, new + 1) for row in rows]
    decoder = Decoder(model, [row[:-new] for row in rows], None, torch.zeros(len(rows)),
                      torch.zeros(len(rows), new), {-1}, dict(temperature=0, top_k=0, top_p=1))
    decoder.record()
    ours, plain = [], []
    for t in range(new):
        decoder.advance()
        ours.append(decoder.z.float().log_softmax(-1))  # [batch, vocab]
        plain += [expected[k][t] for k in decoder.rows]
        if t == new // 2:
            decoder.keep([2, 1])
            decoder.record()
        decoder.state["token"].copy_(torch.tensor([rows[k][t - new] for k in decoder.rows]))
    return off(model, torch.cat(ours), torch.stack(plain))


ANSWERS = (6, 5, 3)  # of each row, so many last tokens are its completion


def scored_logp(model, rows) -> torch.Tensor:
    """Log-probabilities at the completions' positions, one batch: [Σ tokens, vocab]."""
    prompts = [row[:-n] for row, n in zip(rows, ANSWERS)]
    completions = [row[-n:] for row, n in zip(rows, ANSWERS)]
    states = completion_states(model, prompts, completions)
    return logits(model, states).float().log_softmax(-1)


def plain_scored(model, rows) -> torch.Tensor:
    """The same of the model's own forward, row by row."""
    return torch.cat([plain_logp(model, row, n + 1)[:-1] for row, n in zip(rows, ANSWERS)])


@torch.no_grad()
def scored(model, rows) -> float:
    return off(model, scored_logp(model, rows), plain_scored(model, rows))


@torch.no_grad()
def gates(model, rows) -> float:
    """Also after `detach`. NaN where nothing can be wrapped: it is steered, not healed."""
    untouched = plain_logp(model, rows[0], 24)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run that attaches for good says what is left out
        try:
            lora.attach(model, rank=1, layers=(0, 1), merge=False)
        except ValueError:
            return float("nan")
        for p in lora.live_parameters(model):
            p.normal_()
        with lora.gates(model, history=0, live=0):
            error = off(model, plain_logp(model, rows[0], 24), untouched)
    lora.detach(model)
    return max(error, off(model, plain_logp(model, rows[0], 24), untouched))


QUICK = {"head": head, "sampled": sampled, "scored": scored, "gates": gates}


def run(model, rows: list[list[int]], checks: dict = QUICK) -> dict[str, float]:
    """{check: its largest error}; infinite for a check that could not be made."""
    errors = {}
    for name, check in checks.items():
        try:
            errors[name] = check(model, rows)
        except Exception as e:  # whatever a model's own code raises
            errors[name] = float("inf")
            print(f"{name}: {type(e).__name__}: {str(e)[:200]}", file=sys.stderr)
    return errors


def failed(errors: dict[str, float], dtype: torch.dtype) -> list[str]:
    """The checks whose error is beyond what rounding explains."""
    return [name for name, error in errors.items()
            if error > (0 if name == "gates" else LIMITS[dtype])]
