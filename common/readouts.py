"""How a model is asked which moral foundation a vignette violates: cloze, or the package tinymfv.

    before = cloze(model, tok, vignettes)                                  # the original
    after = cloze(student, tok, vignettes, constants=before.constants)     # compared with it

    p(foundation) = softmax(log p(its clause | vignette, "This is wrong because") − its constant)

`cloze` is for models too small for multiple choice: likelihood rather than letters, as OLMES has it
(Gu et al. 2024, arXiv 2406.08446). A clause's constant is its mean log-probability over the
vignettes under the original (contextual calibration, Zhao et al. 2021, arXiv 2102.09690).
`tinymfv` is for models of about 1B and up: multiple choice.

These two return an `Answers`; `probe` asks for any trait at all and returns [probes], nats.
"""
import contextlib
import io
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

from common.sampling import completion_states, halving, logits, rows_at_once, score
from steer import NEUTRAL, SteeringVector, chat_text
from common.texts import FOUNDATIONS, tinymfv_package

CLAUSES = {"Care": " it is cruel and hurts someone",
           "Fairness": " it is unfair and dishonest",
           "Loyalty": " it betrays their own group",
           "Authority": " it disobeys authority",
           "Sanctity": " it is disgusting and unclean",
           "Liberty": " it takes away someone's freedom",
           "SocialNorms": " it is strange and unusual"}
BECAUSE, ANSWER = "This is wrong because", "Answer: ("  # how the answers are begun
LETTERS = "ABCDEFG"
OPTIONS = "Options:\n" + "\n".join(
    f"({letter}){clause}" for letter, clause in zip(LETTERS, CLAUSES.values()))


@dataclass
class Answers:
    """What a readout found out."""
    p: np.ndarray  # [vignettes, 7], rows sum to 1, columns as FOUNDATIONS
    mass: np.ndarray  # [vignettes], probability that the answer is one of the allowed ones
    constants: np.ndarray | None = None  # [7] nats, a clause's mean log-probability in the original
    notes: dict[str, float] = field(default_factory=dict)  # what else the readout says of itself


# ---- cloze --------------------------------------------------------------------------------------


def suffix_ids(tok, before: str, text: str) -> list[int]:
    """The token ids of `text` as it stands after `before`.

    Tokenised alone it might begin with the mark of a new word (SentencePiece). Where a token would
    straddle the boundary, `text` is taken from behind a symbol that merges with nothing instead.
    Raises ValueError for a tokenizer that merges even with that.
    """
    for context in (before, "\u241f"):
        prefix = tok(context, add_special_tokens=False).input_ids
        ids = tok(context + text, add_special_tokens=False).input_ids
        if ids[:len(prefix)] == prefix:
            return ids[len(prefix):]
    raise ValueError(f"the tokenizer cannot split {text[:40]!r} from what stands before it; "
                     "fix: another start of the answer")


@torch.no_grad()
def cloze(model, tok, vignettes: list[dict], constants=None, system: str = NEUTRAL,
          vector: SteeringVector | None = None, dose: float = 0.0,
          batch_size: int | None = None) -> Answers:
    """The small-model readout.

    constants: [7] nats, those of the original's Answers; None on the original itself.
    The vector acts from the assistant tag on, as in `sampling.sample`.
    """
    batch_size = batch_size or max(1, 28 * rows_at_once(model) // 96)  # vignettes; rows are short

    # 1. how likely each clause is as the reason: every vignette with every clause
    texts = [chat_text(tok, f"{v['text']} Why is this wrong?", system) for v in vignettes]
    prompts = tok(texts, add_special_tokens=False).input_ids
    because = suffix_ids(tok, texts[0], BECAUSE)  # all prompts end in the same assistant tag
    clauses = [suffix_ids(tok, texts[0] + BECAUSE, CLAUSES[f]) for f in FOUNDATIONS]
    asked = [prompt for prompt in prompts for _ in clauses]  # equal prompts are run once
    answers = [because + clause for _ in prompts for clause in clauses]
    scored = score(model, asked, answers, vector, dose, batch_size=len(clauses) * batch_size)
    raw = [logp[len(because):].double().sum().item() for logp in scored]
    raw = rearrange(np.array(raw), "(v f) -> v f", f=len(clauses))

    # 2. asked for a letter, how much probability falls on the seven
    texts = [chat_text(tok, f"{OPTIONS}\n{v['text']} Why is this wrong?", system)
             for v in vignettes]
    prompts = tok(texts, add_special_tokens=False).input_ids
    answer = suffix_ids(tok, texts[0], ANSWER)
    letters = [suffix_ids(tok, texts[0] + ANSWER, letter)[0] for letter in LETTERS]
    mass = np.zeros(len(vignettes))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths in a batch

    def ask_rows(rows):
        states = completion_states(model, [prompts[i] for i in rows],
                                   [answer + letters[:1]] * len(rows), vector, dose)
        last = rearrange(states, "(b t) d -> b t d", b=len(rows))[:, -1]  # predicts the letter
        p = logits(model, last).float().softmax(-1)
        mass[rows] = p[:, letters].sum(-1).double().cpu().numpy()

    for start in tqdm(range(0, len(order), batch_size), "ask", leave=False, disable=None):
        halving(ask_rows, order[start:start + batch_size])

    # 3. calibrate and normalise
    constants = raw.mean(0) if constants is None else constants
    z = raw - constants  # [vignettes, 7]
    p = np.exp(z - z.max(1, keepdims=True))
    return Answers(p / p.sum(1, keepdims=True), mass, constants)


# ---- probes -------------------------------------------------------------------------------------


@torch.no_grad()
def probe(model, tok, probes: list[dict], system: str = NEUTRAL,
          vector: SteeringVector | None = None, dose: float = 0.0) -> np.ndarray:
    """log p(toward) − log p(away) of each {prompt, toward, away}, [probes], nats.

    Each answer is the sum over its tokens, from the assistant tag on.
    """
    asked = [chat_text(tok, p["prompt"], system) for p in probes]
    prompts = tok(asked, add_special_tokens=False).input_ids
    sides = []
    for side in ("toward", "away"):
        answers = [suffix_ids(tok, text, p[side]) for text, p in zip(asked, probes)]
        scored = score(model, prompts, answers, vector, dose)
        sides.append(np.array([logp.double().sum().item() for logp in scored]))
    toward, away = sides
    return toward - away


# ---- tinymfv ------------------------------------------------------------------------------------


NOTES = {"frac_unscorable": "frac_unscorable", "nll_prefill": "mean_nll_prefill",
         "informedness": "informedness"}  # our name: the package's


@contextlib.contextmanager
def steered_after_prompt(model, vector: SteeringVector, dose: float):
    """`vector.at` for code that runs prompt and answer itself.

    A pass on an empty cache is the prompt, and unsteered; the passes after it are steered.
    """
    with contextlib.ExitStack() as steering:
        def switch(decoder, args, kwargs):
            steering.close()  # what the pass before entered
            cache = kwargs.get("past_key_values")
            if cache is not None and cache.get_seq_length():
                steering.enter_context(vector.at(model, dose))
        hook = model.get_decoder().register_forward_pre_hook(switch, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def tinymfv_rows(vignettes: list[dict], system: str) -> list[dict]:
    """Our vignettes as the package's rows.

    It has no system turn: a `system` goes in front of the text.
    """
    rows = []
    for v in vignettes:
        text = v["text"] if system == NEUTRAL else f"{system}\n\n{v['text']}"
        human = {f"human_{f}": 100.0 * (f == v["foundation"]) for f in FOUNDATIONS}
        rows.append({"id": v["id"], "foundation_coarse": v["foundation"],
                     "other_violate": text, **human})
    return rows


def tinymfv(model, tok, vignettes: list[dict], constants=None, system: str = NEUTRAL,
            vector: SteeringVector | None = None, dose: float = 0.0, batch_size: int = 8,
            think_tokens: int = 64) -> Answers:
    """A forced choice among seven options in both orders, after `think_tokens` of thinking.

    github.com/wassname/tinymfv. `constants` are not used. A vignette that the package cannot score,
    as in a collapse, has mass 0 and an even p. Raises ValueError where the package is missing.
    """
    package = tinymfv_package()
    from loguru import logger  # comes with the package, which logs at every call
    side = tok.padding_side  # the package sets it

    # 1. ask, with the package's log and progress bar silenced
    logger.disable(package.__name__)
    steered = steered_after_prompt(model, vector, dose) if vector else contextlib.nullcontext()
    try:
        with steered, contextlib.redirect_stderr(io.StringIO()):
            answer = package.evaluate(
                model, tok, vignettes=tinymfv_rows(vignettes, system), batch_size=batch_size,
                max_think_tokens=think_tokens, return_per_row=True, verbose=0)
    finally:
        tok.padding_side = side
        logger.enable(package.__name__)

    # 2. its columns in our order
    theirs = list(answer["profile"]["foundation"])
    columns = [theirs.index(f) for f in FOUNDATIONS]
    p = np.array([row["p"][columns] for row in answer["per_row"]], dtype=float)
    mass = np.array([row["pmass_allowed"] for row in answer["per_row"]], dtype=float)

    # 3. what cannot be scored counts as incoherent, and says nothing about the foundations
    scorable = np.isfinite(p).all(1) & np.isfinite(mass)
    p[~scorable], mass[~scorable] = 1 / len(FOUNDATIONS), 0.0
    notes = {name: float(answer[key]) for name, key in NOTES.items() if key in answer}
    return Answers(p, mass, notes=notes)
