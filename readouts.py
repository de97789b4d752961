"""How a model is asked which moral foundation a vignette violates: cloze, or the package tinymfv.

`cloze`, for models too small for multiple choice: the log-probability of one short clause per foundation
after "This is wrong because", minus the clause's mean over the vignettes under the original (contextual
calibration, Zhao et al. 2021, arXiv 2102.09690; likelihood rather than letters for small models: OLMES,
Gu et al. 2024, arXiv 2406.08446), softmax. `tinymfv`, for models of about 1B and up: multiple choice.

Each readout takes model, tokenizer and vignettes, and returns an `Answers`.
"""
import contextlib
import io
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, repeat
from tqdm import tqdm
from transformers.cache_utils import Cache

from sampling import RoomyLayer, logits, token_logp
from steer import NEUTRAL, SteeringVector, chat_ids, check_room, left_pad
from texts import FOUNDATIONS, tinymfv_package

CLAUSES = {"Care": " it is cruel and hurts someone", "Fairness": " it is unfair and dishonest",
           "Loyalty": " it betrays their own group", "Authority": " it disobeys authority",
           "Sanctity": " it is disgusting and unclean", "Liberty": " it takes away someone's freedom",
           "SocialNorms": " it is strange and unusual"}
LETTERS = "ABCDEFG"
OPTIONS = "Options:\n" + "\n".join(f"({a}){clause}" for a, clause in zip(LETTERS, CLAUSES.values()))


@dataclass
class Answers:
    """What a readout found out."""
    p: np.ndarray  # [vignettes, 7], rows sum to 1, columns as FOUNDATIONS
    mass: np.ndarray  # [vignettes], probability that the answer is one of the allowed ones
    constants: np.ndarray | None = None  # [7] nats, each clause's mean log-probability under the original


# ---- cloze --------------------------------------------------------------------------------------


def token_rows(tok, texts: list[str]) -> list[list[int]]:
    return [tok(text, add_special_tokens=False).input_ids for text in texts]


def opened_answers(model, tok, question: str, opening: str, vignettes, system, vector, dose, batch_size,
                   room: int = 0):
    """Run `question` over the vignettes up to `opening`, the start of the answer, in batches.

    Yields (rows, h, cache, mask, position): the vignettes' indices, the final hidden states at the last
    token [batch, d_model], and what it takes to go on: room more tokens will be run.
    The text before the vignette is the same for all and runs once. The vector acts from the assistant
    tag on, as in `sampling.sample`, and still does while the caller goes on.
    """
    slot = "\u241f"  # a symbol no vignette holds marks where the text goes
    prompt = tok.decode(chat_ids(tok, question.format(slot), system))
    head, tail = token_rows(tok, prompt.split(slot))
    opening_ids = [tail[-1]] + token_rows(tok, [opening])[0]  # from the assistant tag on
    texts = [row + tail[:-1] for row in token_rows(tok, [v["text"] for v in vignettes])]
    check_room(model, len(head) + max(map(len, texts)) + len(opening_ids), room)

    decoder, device = model.get_decoder(), model.device
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths share a batch
    for start in tqdm(range(0, len(order), batch_size), "ask", leave=False, disable=None):
        rows = order[start:start + batch_size]
        # 1. the common head, once, and its cache for every row
        cache = Cache(layer_class_to_replicate=RoomyLayer)
        decoder(input_ids=torch.tensor([head], device=device), past_key_values=cache, use_cache=True)
        cache.batch_select_indices(torch.zeros(len(rows), dtype=torch.long, device=device))
        # 2. each vignette and the rest of the prompt, unsteered
        ids, mask, _ = left_pad([texts[i] for i in rows], device)
        first = torch.tensor([opening_ids] * len(rows), device=device)
        mask = torch.cat([mask.new_ones(len(rows), len(head)), mask, torch.ones_like(first)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        split = mask.shape[1] - first.shape[1]
        decoder(input_ids=ids, attention_mask=mask[:, :split], past_key_values=cache, use_cache=True,
                position_ids=positions[:, len(head):split])
        # 3. the assistant tag and the opening, steered
        with vector.at(model, dose) if vector else contextlib.nullcontext():
            out = decoder(input_ids=first, attention_mask=mask, position_ids=positions[:, split:],
                          past_key_values=cache, use_cache=True)
            yield rows, out.last_hidden_state[:, -1], cache, mask, positions[:, -1:]


def clause_logp(model, clauses: list[list[int]], h, cache, mask, position) -> torch.Tensor:
    """Log-probability of every clause after every row of `opened_answers`, [batch, clauses], nats."""
    batch, n, longest = len(h), len(clauses), max(map(len, clauses))
    device = h.device
    ids = torch.tensor([c + [0] * (longest - len(c)) for c in clauses], device=device)  # [n, longest]
    real = torch.tensor([[1] * len(c) + [0] * (longest - len(c)) for c in clauses], device=device)

    # every row of the cache once per clause, and the clauses after it, padded on the right
    cache.batch_select_indices(torch.arange(batch, device=device).repeat_interleave(n))
    tokens = repeat(ids, "n t -> (b n) t", b=batch)
    is_real = repeat(real, "n t -> (b n) t", b=batch)
    grown = torch.cat([repeat(mask, "b t -> (b n) t", n=n), is_real], 1)
    after = repeat(position, "b 1 -> (b n) 1", n=n) + torch.arange(1, longest, device=device)
    out = model.get_decoder()(input_ids=tokens[:, :-1], attention_mask=grown[:, :-1],
                              position_ids=after, past_key_values=cache, use_cache=True)

    # the state before each token predicts it: h the first, the clause's own states the others
    states = torch.cat([repeat(h, "b d -> (b n) 1 d", n=n), out.last_hidden_state], 1)
    wanted = is_real.bool()  # [batch·n, longest]
    logp = token_logp(model, states[wanted], tokens[wanted])
    row = torch.arange(batch * n, device=device).repeat_interleave(is_real.sum(1))
    total = torch.zeros(batch * n, device=device).index_add_(0, row, logp)
    return rearrange(total, "(b n) -> b n", n=n)


@torch.no_grad()
def cloze(model, tok, vignettes: list[dict], constants=None, system: str = NEUTRAL,
          vector: SteeringVector | None = None, dose: float = 0.0, batch_size: int = 28) -> Answers:
    """The small-model readout. constants: [7] of the original's Answers; None on the original itself."""
    clauses = token_rows(tok, [CLAUSES[f] for f in FOUNDATIONS])
    letters = [ids[0] for ids in token_rows(tok, list(LETTERS))]
    raw = np.zeros((len(vignettes), len(clauses)))
    mass = np.zeros(len(vignettes))

    how = vignettes, system, vector, dose
    for rows, *answer in opened_answers(
            model, tok, "{} Why is this wrong?", "This is wrong because", *how, batch_size,
            room=max(map(len, clauses))):
        raw[rows] = clause_logp(model, clauses, *answer).double().cpu().numpy()

    for rows, h, *_ in opened_answers(
            model, tok, OPTIONS + "\n{} Why is this wrong?", "Answer: (", *how, 4 * batch_size):
        p = logits(model, h).float().softmax(-1)
        mass[rows] = p[:, letters].sum(-1).double().cpu().numpy()

    constants = raw.mean(0) if constants is None else constants
    z = raw - constants
    p = np.exp(z - z.max(1, keepdims=True))
    return Answers(p / p.sum(1, keepdims=True), mass, constants)


# ---- tinymfv ------------------------------------------------------------------------------------


@contextlib.contextmanager
def steered_after_prompt(model, vector: SteeringVector, dose: float):
    """`vector.at` for code that runs prompt and answer itself: the pass on an empty cache is unsteered."""
    with contextlib.ExitStack() as steering:
        def switch(decoder, args, kwargs):
            steering.close()
            if (cache := kwargs.get("past_key_values")) is not None and cache.get_seq_length():
                steering.enter_context(vector.at(model, dose))
        hook = model.get_decoder().register_forward_pre_hook(switch, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def tinymfv_rows(vignettes: list[dict], system: str) -> list[dict]:
    """Our vignettes as the package's rows. It has no system turn: a `system` goes in front of the text."""
    rows = []
    for v in vignettes:
        text = v["text"] if system == NEUTRAL else f"{system}\n\n{v['text']}"
        human = {f"human_{f}": 100.0 * (f == v["foundation"]) for f in FOUNDATIONS}
        rows.append({"id": v["id"], "foundation_coarse": v["foundation"], "other_violate": text, **human})
    return rows


def tinymfv(model, tok, vignettes: list[dict], constants=None, system: str = NEUTRAL,
            vector: SteeringVector | None = None, dose: float = 0.0, batch_size: int = 8,
            max_think_tokens: int = 64) -> Answers:
    """A forced choice among seven options in both orders, each after `max_think_tokens` of thinking.

    github.com/wassname/tinymfv. `constants` are not used. Raises ValueError where the package is
    missing or a vignette's logits are not finite.
    """
    package = tinymfv_package()
    from loguru import logger  # comes with the package, which logs at every call
    rows = tinymfv_rows(vignettes, system)
    p, mass, side = [], [], tok.padding_side
    logger.disable(package.__name__)
    try:
        with steered_after_prompt(model, vector, dose) if vector else contextlib.nullcontext():
            for start in tqdm(range(0, len(rows), batch_size), "ask", leave=False, disable=None):
                with contextlib.redirect_stderr(io.StringIO()):  # its own progress bar
                    answer = package.evaluate(
                        model, tok, vignettes=rows[start:start + batch_size], batch_size=batch_size,
                        max_think_tokens=max_think_tokens, return_per_row=True, verbose=0)
                columns = [list(answer["profile"]["foundation"]).index(f) for f in FOUNDATIONS]
                for row in answer["per_row"]:
                    p.append(row["p"][columns])
                    mass.append(row["pmass_allowed"])
    finally:
        tok.padding_side = side  # the package sets it
        logger.enable(package.__name__)
    for v, row, m in zip(vignettes, p, mass):
        if not np.isfinite([*row, m]).all():
            raise ValueError(f"readout tinymfv cannot score vignette '{v['id']}': the model's logits are "
                             "not finite; fix: a lower --dose, or --dtype float32")
    return Answers(np.array(p), np.array(mass))


READOUTS = {"cloze": cloze, "tinymfv": tinymfv}
