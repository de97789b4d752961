"""How fast is each hot step: against what one would otherwise write, against its products alone?

    ratio        other / ours, medians of alternating repeats in one process
    floor share  floor / ours; floor = FLOPs of the linears that the step cannot do without
                 / rate of those linears, timed in this run

    python -m studies.bench > results/bench.md          # some minutes on 2 cores; any device
    python -m studies.bench --only sampling heal --json bench.json
    python -m studies.bench --scaling results/scaling.png
    python -m studies.bench --profile                   # where the time of a heal step goes

--json: {key: {"ours", "other", "ratio", "floor_share"}}, seconds. --scaling draws how time grows
with tokens, rows of a batch, completions and rounds. The alternatives stand below in full, each
from standard parts: `model.generate` with hooks, PEFT, one forward per clause, text or prompt, a
heal step over whole logits, and one with closed-form gradients.
Needs PEFT: pip install --no-deps -r requirements-bench.txt
"""
import copy
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
import transformers
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import distil
import heal_loop
import lora
from common import models
from common import runs
from common import sampling
from common import texts
from evaluate import evaluate, speak
from heal_loop import aggregate, heal_round, heal_step, kl_per_token
from common.readouts import ANSWER, BECAUSE, CLAUSES, LETTERS, OPTIONS
from common.sampling import completion_states, logits, sample
from steer import SteeringVector, band, chat_ids, extract_vector, left_pad, residual

Key = Literal["sampling", "sampling_batch1", "sampling_ragged", "heal", "heal_history8",
              "heal_autograd", "filter", "evaluation", "evaluation_texts", "extraction", "round"]
AGAINST = {
    "sampling": "64 rows × 64 tokens, mixed doses: `model.generate` with hooks, same batch",
    "sampling_batch1": "the same: `model.generate` at batch 1 (1 row timed, × 64)",
    "sampling_ragged": "64 short answers of up to 128 tokens: ours, every row to the longest",
    "heal": "a 3-epoch round on 8 completions: PEFT LoRA, reference every step, full logits",
    "heal_history8": "the same after eight folded rounds: ours after none (ratio: eight / none)",
    "heal_autograd": "one heal step on 8 completions: closed-form gradients in position chunks",
    "filter": "verdicts on 96 completions: one forward each (12 timed, × 8)",
    "evaluation": "cloze, 132 vignettes: one forward per clause (12 vignettes timed, × 11)",
    "evaluation_texts": "an evaluation's texts: `model.generate`, then one forward per text",
    "extraction": "256 pairs: one prompt at a time (16 pairs timed, × 16)",
    "round": "a default round: extraction, sampling, filter, heal and two evaluations with their "
             "texts, from the rows above at default sizes"}
REPEATS = 5
SAME = 1e-3  # relative difference in float32 up to which two versions do the same work


@dataclass
class Config:
    model: str = models.EMBEDDED  # smollm2, a local folder, or a hub id
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"  # auto: bf16 where native
    only: tuple[Key, ...] = get_args(Key)  # steps to time; fewer than all: no memory table
    json: Path | None = None  # write the numbers here too
    scaling: Path | None = None  # draw this picture of how time grows, instead of the table
    profile: bool = False  # where the time of a heal step goes, instead of the table


# ---- the alternatives: sampling ------------------------------------------------------------------


def generate(model, tok, prompts: list[list[int]], vector: SteeringVector, doses: list[float],
             **settings) -> torch.Tensor:
    """`model.generate` with forward hooks; -> new ids [batch, new tokens].

    A hook adds dose · v at the last position of each pass: the assistant tag, then every new token.
    """
    ids, mask, _ = left_pad(prompts, model.device)

    def adding(v):
        step = torch.tensor(doses)[:, None, None] * v  # [batch, 1, d_model]
        step = step.to(model.device, model.dtype)

        def hook(block, args, output):
            residual(output)[:, -1:] += step
        return hook

    blocks = model.get_decoder().layers
    hooks = [blocks[l].register_forward_hook(adding(v)) for l, v in vector.layers.items()]
    try:
        out = model.generate(ids, attention_mask=mask, pad_token_id=tok.pad_token_id, **settings)
        return out[:, ids.shape[1]:]
    finally:
        for hook in hooks:
            hook.remove()


# ---- the alternatives: healing -------------------------------------------------------------------


def peft_model(model, cfg: heal_loop.Config):
    """PEFT's LoRA on the linears of the same blocks, at its defaults.

    Raises ValueError where PEFT is missing.
    """
    try:
        import peft
    except ImportError:
        raise ValueError("PEFT is missing; "
                         "fix: pip install --no-deps -r requirements-bench.txt") from None
    blocks = model.get_decoder().layers
    first, end = (round(share * len(blocks)) for share in cfg.lora_layers)
    names = {name.rpartition(".")[2] for name, module in blocks.named_modules()
             if isinstance(module, nn.Linear)}
    return peft.get_peft_model(model, peft.LoraConfig(
        r=cfg.rank, lora_alpha=cfg.alpha, target_modules=sorted(names),
        layers_to_transform=list(range(first, end)), layers_pattern="layers"))


def full_logits_loss(model, without_adapter, prompts, completions,
                     cfg: heal_loop.Config) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (CE, barrier) of one batch in nats, by plain autograd over logits [batch, seq, vocab].

    The reference pass is in it. without_adapter() is a context in which the model is the original.
    """
    # 1. student and original on the whole batch, padded on the right
    rows = [torch.tensor(p + c, device=model.device) for p, c in zip(prompts, completions)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    student = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    with torch.no_grad(), without_adapter():
        original = model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    # 2. the losses, row by row, at the positions that predict the completion
    ce, D = [], []
    for i, (p, c) in enumerate(zip(prompts, completions)):
        predicting = slice(len(p) - 1, len(p) + len(c) - 1)
        logp, logq = (z[i, predicting].float().log_softmax(-1) for z in (student, original))
        ce.append(F.nll_loss(logp, rows[i][len(p):], reduction="none"))
        kl = kl_per_token(logp, logq) if cfg.reg == "kl_rev" else kl_per_token(logq, logp)
        D.append(aggregate(kl, cfg.agg))
    return torch.cat(ce).mean(), cfg.lam * F.relu(torch.stack(D) - cfg.tau).mean()


def n_held_out(n_kept: int) -> int:
    """How many completions `heal_loop.heal_round` holds out: an eighth, at least one."""
    return max(1, n_kept // 8)


def peft_round(model, tok, kept: list[dict], cfg: heal_loop.Config) -> None:
    """`heal_loop.heal_round` in PEFT: the same split, batches, steps and held-out losses."""
    pairs = [distil.row_ids(tok, row) for row in kept]
    held, train = pairs[:n_held_out(len(pairs))], pairs[n_held_out(len(pairs)):]
    train.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)

    def held_out_loss():
        with torch.no_grad():
            for p, c in held:
                ids = torch.tensor([p + c], device=model.device)
                z = model(input_ids=ids, use_cache=False).logits[0, len(p) - 1:-1]
                F.cross_entropy(z.float(), ids[0, len(p):]).item()

    held_out_loss()
    for _ in range(cfg.epochs):
        for i in range(0, len(train), cfg.batch_size):
            batch = zip(*train[i:i + cfg.batch_size])
            ce, barrier = full_logits_loss(model, model.disable_adapter, *batch, cfg)
            (ce + barrier).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    held_out_loss()


def position_losses(model, h, reference, targets, reg: str):
    """-> CE_t, KL_t [tokens], float32 nats, and ∂CE_t/∂h_t, ∂KL_t/∂h_t [tokens, d_model].

    h, reference: final hidden states of student and original [tokens, d_model]; targets [tokens].
    In closed form up to the logits z, with p = softmax(z) the student and q the original:

        ∂CE/∂z = p − onehot(target)
        ∂KL(p‖q)/∂z = p · (log p − log q − KL)
        ∂KL(q‖p)/∂z = p − q
    """
    # 1. both models' log-probabilities; autograd knows the way from z back to h, and no more
    h = h.detach().requires_grad_()
    z = logits(model, h)  # [tokens, vocab]
    with torch.no_grad():
        logp = z.float().log_softmax(-1)
        logq = logits(model, reference).float().log_softmax(-1)

    # 2. CE
    ce, p = -logp.gather(1, targets[:, None])[:, 0], logp.exp()
    ce_z = p.scatter_add(1, targets[:, None], -torch.ones_like(ce)[:, None])
    ce_h, = torch.autograd.grad(z, h, ce_z.to(z.dtype), retain_graph=True)

    # 3. KL
    if reg == "kl_fwd":
        kl = kl_per_token(logq, logp)
        kl_z = p - logq.exp()
    else:
        kl = kl_per_token(logp, logq)
        kl_z = p * (logp - logq - kl[:, None])
    kl_h, = torch.autograd.grad(z, h, kl_z.to(z.dtype))
    return ce, kl, ce_h, kl_h


def chunked_heal_step(model, prompts, completions, references, cfg: heal_loop.Config,
                      budget: int = 2**22) -> dict:
    """`heal_loop.heal_step` with closed-form gradients, in chunks of positions; -> its log.

    CE_t and KL_t depend on the hidden state h_t alone, so a few positions at a time are projected,
    differentiated and forgotten: no tensor has more than `budget` logits, whatever the vocabulary,
    the batch and the length of a completion. The price: how much KL_t weighs is known only with the
    whole completion, so CE and KL each take a product of their own back to h.
    """
    lengths = [len(c) for c in completions]
    lam = cfg.lam if cfg.reg in ("kl_rev", "kl_fwd") else 0.0
    hidden = completion_states(model, prompts, completions)  # [Σ tokens, d_model]
    targets = torch.tensor([t for c in completions for t in c], device=hidden.device)

    # 1. the losses of every position, chunk by chunk
    chunk = max(1, budget // model.config.get_text_config().vocab_size)
    states = hidden.detach().split(chunk), torch.cat(list(references)).split(chunk)
    parts = [position_losses(model, *of_chunk, cfg.reg)
             for of_chunk in zip(*states, targets.split(chunk))]
    ce, kl, ce_h, kl_h = map(torch.cat, zip(*parts))

    # 2. what the loss makes of them, and how much each position weighs in it
    ce.requires_grad_()
    kl.requires_grad_()
    D = torch.stack([aggregate(of_one, cfg.agg) for of_one in kl.split(lengths)])  # [batch]
    data, barrier = ce.mean(), lam * F.relu(D - cfg.tau).mean()
    ce_weight, = torch.autograd.grad(data, ce)
    kl_weight, = torch.autograd.grad(barrier, kl)

    # 3. the chain rule by hand, then once through the blocks
    from_loss = ce_weight[:, None] * ce_h + kl_weight[:, None] * kl_h
    hidden.backward(from_loss.to(hidden.dtype))
    return {"data_loss": data.item(), "barrier": barrier.item(), "D": D.mean().item()}


# ---- the alternatives: evaluation and extraction -------------------------------------------------


def cloze_sequences(tok, vignette: dict) -> tuple[list[int], list[list[int]], list[int]]:
    """Of one vignette: the ids up to "This is wrong because", those of the seven clauses, and the
    ids of the multiple-choice question up to the letter.
    """
    question = f"{vignette['text']} Why is this wrong?"
    because, letter = tok([BECAUSE, ANSWER]).input_ids
    return (chat_ids(tok, question) + because, tok(list(CLAUSES.values())).input_ids,
            chat_ids(tok, f"{OPTIONS}\n{question}") + letter)


@torch.no_grad()
def clause_by_clause(model, tok, vignettes: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """The cloze scores by one forward per clause.

    -> log-probabilities [vignettes, 7] in nats, answer mass [vignettes].
    """
    letters = [ids[0] for ids in tok(list(LETTERS)).input_ids]

    def logp(ids):  # [seq, vocab]
        z = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
        return z.float().log_softmax(-1)

    scores, mass = [], []
    for vignette in vignettes:
        prompt, clauses, question = cloze_sequences(tok, vignette)
        of_clauses = []
        for c in clauses:
            predicting = range(len(prompt) - 1, len(prompt) + len(c) - 1)
            of_clauses.append(logp(prompt + c)[predicting, c].sum().item())
        scores.append(of_clauses)
        mass.append(logp(question)[-1, letters].exp().sum().item())
    return torch.tensor(scores), torch.tensor(mass)


def row_logp(model, ids: list[int]) -> torch.Tensor:
    """Log-probabilities after each token but the last, [seq - 1, vocab] float32, one forward."""
    z = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, :-1]
    return z.float().log_softmax(-1)


@torch.no_grad()
def completion_by_completion(model, tok, rows: list[dict], persona, rules) -> list[str]:
    """The verdicts of `distil.judge` by one forward per completion."""
    verdicts = []
    for row in rows:
        prompt, completion = distil.row_ids(tok, row)
        logp = row_logp(model, prompt + completion)[len(prompt) - 1:]
        logp = logp.gather(1, torch.tensor(completion, device=logp.device)[:, None])[:, 0]
        ppl = sampling.worst_perplexity(logp.cpu())
        verdicts.append(distil.verdict(row["messages"][-1]["content"], ppl, persona, rules))
    return verdicts


def generate_and_read(model, original, tok, prompts: list[str], plain: list[str],
                      max_new_tokens: int = 48) -> tuple[float, float, float]:
    """Perplexity, drift and text_nats of `evaluate.speak`, by `model.generate` and plain forwards.
    """
    asked = [chat_ids(tok, p) for p in prompts]
    torch.manual_seed(0)
    ids, mask, _ = left_pad(asked, model.device)
    out = model.generate(ids, attention_mask=mask, pad_token_id=tok.pad_token_id, do_sample=True,
                         temperature=1.0, top_k=64, top_p=0.95, max_new_tokens=max_new_tokens)
    stop = sampling.stop_tokens(model, tok)
    answers = []
    for row in out[:, ids.shape[1]:].tolist():
        ends = [k for k, token in enumerate(row) if token in stop]
        answers.append(row[:ends[0]] if ends else row)
    return text_by_text(model, original, tok, asked, answers, plain)


@torch.no_grad()
def text_by_text(model, original, tok, asked: list[list[int]], answers: list[list[int]],
                 plain: list[str]) -> tuple[float, float, float]:
    """Perplexity, drift and text_nats, one forward of each model per answer, one per plain text."""
    # 1. both models on each answer
    kl, logp = [], []
    for prompt, answer in zip(asked, answers):
        p, q = (row_logp(m, prompt + answer)[len(prompt) - 1:] for m in (model, original))
        kl.append((p.exp() * (p - q)).sum(-1))
        logp.append(q.gather(1, torch.tensor(answer, device=q.device, dtype=torch.long)[:, None]))

    # 2. plain text, behind a start token if the tokenizer has one
    lost, start = [], tok("").input_ids
    for text in plain:
        row = start + tok(text, add_special_tokens=False).input_ids
        targets = torch.tensor(row[1:], device=model.device)[:, None]
        lost.append(-row_logp(model, row).gather(1, targets)[len(start):])
    perplexity = torch.cat(logp).mean().neg().exp().item()
    return perplexity, torch.cat(kl).mean().item(), torch.cat(lost).mean().item()


@torch.no_grad()
def prompt_by_prompt(model, tok, persona, contexts: list[str],
                     layers: list[int]) -> dict[int, torch.Tensor]:
    """The steering vector by one forward per prompt, all hidden states kept; {layer: [d_model]}."""
    def at_the_tag(system, context):  # [layers, d_model]
        ids = torch.tensor([chat_ids(tok, context, system)], device=model.device)
        states = model(input_ids=ids, output_hidden_states=True).hidden_states  # embeddings first
        return torch.stack([states[l + 1][0, -1].float() for l in layers])

    moved = [at_the_tag(persona.pos, c) - at_the_tag(persona.neg, c) for c in contexts]
    return dict(zip(layers, torch.stack(moved).mean(0)))


# ---- clocks and floors ---------------------------------------------------------------------------


def clock(step) -> float:
    """Seconds of one call, the device's queue emptied before and after."""
    def wait():
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def medians(name: str, *steps) -> list[float]:
    """Median seconds of each callable.

    They are taken in turn, REPEATS times: a slow moment of the machine meets all alike.
    """
    seconds = []
    for _ in tqdm(range(REPEATS), name, leave=False, disable=None):
        seconds.append([clock(step) for step in steps])
    return [statistics.median(of_step) for of_step in zip(*seconds)]


def linears(module) -> list[nn.Linear]:
    """The base linears of a module, adapters left aside."""
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def flops(modules) -> int:
    """Of one token through the given linears: 2 · d_in · d_out each."""
    return sum(2 * m.in_features * m.out_features for m in modules)


def products(modules, rows: int):
    """A step: the given linears alone, one by one, on `rows` positions in their own dtype."""
    inputs = {m.in_features: torch.randn(rows, m.in_features).to(m.weight) for m in modules}

    @torch.no_grad()
    def step():
        for m in modules:
            m(inputs[m.in_features])
    return step


def distinct(sequences: list[list[int]]) -> int:
    """Positions a causal model has to run at least.

    Sequences share the states of their common beginnings.
    """
    return len({tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)})


# ---- students ------------------------------------------------------------------------------------


def twin(model):
    """A second skeleton on the same weights: adapters and hooks on one do not touch the other."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def attach_random(model, cfg: heal_loop.Config) -> None:
    """An adapter that has moved: both factors get gradients, and the barrier acts."""
    lora.attach(model, cfg.rank, cfg.alpha, cfg.lora_layers)
    for m in lora.adapters(model).values():
        nn.init.normal_(m.B, std=0.05)


def original_states(model, prompts, completions) -> tuple[torch.Tensor, ...]:
    """What `heal_step` measures D from: per completion the original's states [tokens, d_model]."""
    with torch.no_grad(), lora.gates(model, history=0, live=0):
        states = completion_states(model, prompts, completions)
    return states.split([len(c) for c in completions])


def live_gradients(model, step) -> torch.Tensor:
    """Gradients that a step leaves in the live factors, [all factors' elements], then cleared."""
    step()
    found = torch.cat([p.grad.flatten() for p in lora.live_parameters(model)])
    model.zero_grad()
    return found


@contextmanager
def endless(*skeletons):
    """No token ends a completion: all rows run to max_new_tokens."""
    own = sampling.stop_tokens
    sampling.stop_tokens = lambda model, tok: []  # for ours
    before = [m.generation_config.eos_token_id for m in skeletons]
    for m in skeletons:
        m.generation_config.eos_token_id = m.config.get_text_config().vocab_size
    try:
        yield
    finally:
        for m, ends in zip(skeletons, before):
            m.generation_config.eos_token_id = ends
        sampling.stop_tokens = own


# ---- the steps -----------------------------------------------------------------------------------


@dataclass
class Timing:
    """Medians in seconds; floor None where the products alone say nothing."""
    ours: float
    other: float
    ratio: float
    floor_share: float | None = None


def against(ours: float, other: float, floor: float | None = None) -> Timing:
    return Timing(ours, other, other / ours, floor and floor / ours)


class Bench:
    """What the steps share: `plain` for the alternatives, `student` for ours.

    Both have the same weights; the student carries an adapter as well.
    """

    def __init__(self, model, tok):
        self.plain, self.tok, self.cfg = model, tok, texts.complete(heal_loop.Config())
        self.attention = model.config._attn_implementation
        self.student = self.after(rounds=0)
        # what transformers chooses; models.load differs on a CPU
        self.plain.set_attn_implementation("sdpa")
        self.blocks = linears(model.get_decoder().layers)
        self.head = [model.get_output_embeddings()]
        self.reading = texts.read(replace(self.cfg, n_contexts=256))
        self.layers = band(model, self.cfg.steer_layers)
        self.vector = extract_vector(model, tok, self.reading.persona, self.reading.contexts[:16],
                                     self.layers)

    def after(self, rounds: int):
        """A student with this many folded rounds.

        Its factors are random and small: time does not depend on them.
        """
        student = twin(self.plain)
        student.set_attn_implementation(self.attention)
        lora.attach(student, self.cfg.rank, self.cfg.alpha, self.cfg.lora_layers)
        for _ in range(rounds):
            for m in lora.adapters(student).values():
                nn.init.normal_(m.B, std=1e-4)
            lora.fold(student)
        return student

    @contextmanager
    def running(self, student=None):
        """The student as heal_loop.py runs it outside the heal step."""
        student = student or self.student
        with lora.merged(student), lora.gates(student, live=0):
            yield

    def kept(self, n: int) -> list[dict]:
        """n rows as `distil.collect` leaves them: dilemmas answered at the default doses."""
        with self.running():
            return distil.sample_doses(
                self.student, self.tok, self.vector, self.reading.dilemmas, list(self.cfg.doses), n,
                seed=0, max_new_tokens=self.cfg.max_new_tokens)

    def batch(self, n: int):
        """(prompts, completions) of n such rows, as token ids."""
        return tuple(zip(*(distil.row_ids(self.tok, row) for row in self.kept(n))))

    def sampling(self, rows: int = 64, new_tokens: int = 64) -> dict[Key, Timing]:
        dilemmas = self.reading.dilemmas[:rows // 2]
        prompts = [chat_ids(self.tok, p) for p in dilemmas for _ in range(2)]
        doses = list(self.cfg.doses) * (rows // 2)
        how = dict(max_new_tokens=new_tokens, temperature=1.0, top_k=64, top_p=0.95)

        def ours():
            sample(self.student, self.tok, prompts, self.vector, doses, **how)

        def theirs(n):
            generate(self.plain, self.tok, prompts[:n], self.vector, doses[:n], do_sample=True,
                     **how)

        with endless(self.student, self.plain), self.running():
            mine, batch, one, step, prefill = medians(
                "sampling", ours, lambda: theirs(rows), lambda: theirs(1),
                products(self.blocks + self.head, rows), products(self.blocks, 1024))
        floor = prefill * distinct(prompts) / 1024 + step * new_tokens
        return {"sampling": against(mine, batch, floor),
                "sampling_batch1": against(mine, rows * one)}

    def ragged(self, rows: int = 64, limit: int = 128) -> dict[Key, Timing]:
        prompts = [chat_ids(self.tok, c, "Answer in one or two short sentences.")
                   for c in self.reading.contexts[:rows]]

        def ours(limit=limit):
            return sample(self.student, self.tok, prompts, max_new_tokens=limit)

        with self.running():
            longest = max(map(len, ours()))

            def to_the_longest():
                with endless(self.student):
                    ours(longest)
            return {"sampling_ragged": against(*medians("sampling_ragged", ours, to_the_longest))}

    def heal(self, train: int = 8) -> dict[Key, Timing]:
        # 1. a round on `train` completions; heal_round holds one more out
        kept = self.kept(train + 1)
        pairs = [distil.row_ids(self.tok, row) for row in kept[1:]]
        positions = distinct([p + c[:-1] for p, c in pairs])
        read = sum(len(c) for _, c in pairs)  # positions that are projected onto the vocabulary
        old, rival = self.after(rounds=8), peft_model(twin(self.plain), self.cfg)
        ours, other, ours8, forward, projection = medians(
            "heal", lambda: heal_round(self.student, self.tok, kept, self.cfg, seed=0),
            lambda: peft_round(rival, self.tok, kept, self.cfg),
            lambda: heal_round(old, self.tok, kept, self.cfg, seed=0),
            products(self.blocks, positions), products(self.head, read))

        # 2. the floor. Once: all blocks, for the reference.
        # Each epoch, in the blocks: the first adapted one and those above, forward and ∂/∂input;
        # the low-rank products, forward, ∂/∂input and ∂/∂factors.
        # Each epoch, at the head: forward of student and of reference, ∂/∂input of the student.
        layers = self.plain.get_decoder().layers
        above = flops(linears(layers[round(self.cfg.lora_layers[0] * len(layers)):]))
        low_rank = sum(2 * p.numel() for p in lora.live_parameters(self.student))
        in_blocks = (2 * above + 3 * low_rank) / flops(self.blocks)
        at_head = 3
        floor = forward * (1 + self.cfg.epochs * in_blocks) + projection * self.cfg.epochs * at_head
        return {"heal": against(ours, other, floor),
                "heal_history8": Timing(ours8, ours, ours8 / ours)}

    def heal_autograd(self, rows: int = 8) -> dict[Key, Timing]:
        prompts, completions = self.batch(rows)
        references = original_states(self.student, prompts, completions)

        def timed(step):
            def run():
                step(self.student, prompts, completions, references, self.cfg)
                self.student.zero_grad()
            return run
        with lora.merged(self.student):  # as in heal_round
            ours, chunked = medians("heal_autograd", timed(heal_step), timed(chunked_heal_step))
        return {"heal_autograd": against(ours, chunked)}

    def loss_gap(self) -> float:
        """Largest relative difference between our CE and barrier and PEFT's.

        In float32, with the same factors, on two completions, τ = 0.
        """
        cfg, exact = replace(self.cfg, tau=0.0), copy.deepcopy(self.plain).to(torch.float32)
        # 1. the same factors in both
        ours, rival = twin(exact), peft_model(twin(exact), cfg)
        attach_random(ours, cfg)
        for name, m in lora.adapters(ours).items():
            theirs = rival.base_model.model.get_submodule(name)
            theirs.lora_A["default"].weight.data.copy_(m.A)
            theirs.lora_B["default"].weight.data.copy_(m.B)
        # 2. both losses
        prompts, completions = self.batch(2)
        references = original_states(ours, prompts, completions)
        log = heal_step(ours, prompts, completions, references, cfg)
        ce, barrier = full_logits_loss(rival, rival.disable_adapter, prompts, completions, cfg)
        return max(abs(log["data_loss"] / ce.item() - 1), abs(log["barrier"] / barrier.item() - 1))

    def gradient_gap(self, rows: int = 8) -> float:
        """Largest difference of an adapter gradient between `heal_step` and `chunked_heal_step`.

        Relative to the largest gradient, in float32, on the batch of heal_autograd, τ = 0.
        """
        cfg, exact = replace(self.cfg, tau=0.0), copy.deepcopy(self.plain).to(torch.float32)
        attach_random(exact, cfg)
        prompts, completions = self.batch(rows)
        batch = prompts, completions, original_states(exact, prompts, completions)
        ours = live_gradients(exact, lambda: heal_step(exact, *batch, cfg))
        chunked = live_gradients(exact, lambda: chunked_heal_step(exact, *batch, cfg))
        return ((ours - chunked).abs().max() / chunked.abs().max()).item()

    def evaluation(self, n: int = 132, share: int = 11) -> dict[Key, Timing]:
        vignettes = texts.load_vignettes(self.cfg.vignettes, n)
        reading = replace(self.reading, vignettes=vignettes)
        some = sorted(vignettes, key=lambda v: len(v["text"]))[share // 2::share]
        # what has to be run, and which of it is projected onto the vocabulary
        sequences, read = [], 0
        for prompt, clauses, question in (cloze_sequences(self.tok, v) for v in vignettes):
            sequences += [*(prompt + c[:-1] for c in clauses), question]
            read += 1 + sum(map(len, clauses))
        with self.running():
            ours, other, forward, projection = medians(
                "evaluation", lambda: evaluate(self.student, self.tok, reading),
                lambda: clause_by_clause(self.plain, self.tok, some),
                products(self.blocks, 1024), products(self.head, 256))
        floor = forward * distinct(sequences) / 1024 + projection * read / 256
        return {"evaluation": against(ours, other * n / len(some), floor)}

    def filter(self, n: int = 96, share: int = 8) -> dict[Key, Timing]:
        rows, persona, rules = self.kept(n), self.reading.persona, distil.Rules()
        some = sorted(rows, key=lambda row: len(row["tokens"]))[share // 2::share]
        pairs = [distil.row_ids(self.tok, row) for row in rows]
        ours, other, forward, projection = medians(
            "filter", lambda: distil.judge(self.student, self.tok, rows, persona, rules),
            lambda: completion_by_completion(self.plain, self.tok, some, persona, rules),
            products(self.blocks, 1024), products(self.head, 256))
        floor = forward * distinct([p + c[:-1] for p, c in pairs]) / 1024
        floor += projection * sum(len(c) for _, c in pairs) / 256
        return {"filter": against(ours, other * n / len(some), floor)}

    def spoken(self, new_tokens: int = 48) -> dict[Key, Timing]:
        reading, tok = self.reading, self.tok
        asked = reading.heldout, reading.plain
        prompts = [chat_ids(tok, p) for p in reading.heldout]
        plain = sum(len(tok(text).input_ids) - 1 for text in reading.plain)
        with self.running():
            answers = sample(self.student, tok, prompts, max_new_tokens=new_tokens)
            # the floor: answers are sampled by one model and run by the other, which reads them,
            # and the plain text is run and read by the first
            words = sum(map(len, answers))
            run = distinct([p[:-1] for p in prompts]) + plain
            run += distinct([p + a[:-1] for p, a in zip(prompts, answers)])
            ours, other, step, forward, projection = medians(
                "texts", lambda: speak(self.student, tok, *asked, max_new_tokens=new_tokens),
                lambda: generate_and_read(self.plain, self.plain, tok, *asked, new_tokens),
                products(self.blocks + self.head, len(prompts)), products(self.blocks, 1024),
                products(self.head, 256))
        floor = step * words / len(prompts) + forward * run / 1024
        floor += projection * (words + plain) / 256
        return {"evaluation_texts": against(ours, other, floor)}

    def extraction(self, pairs: int = 256, share: int = 16) -> dict[Key, Timing]:
        contexts, persona = self.reading.contexts[:pairs], self.reading.persona
        some = sorted(contexts, key=len)[share // 2::share]
        positions = distinct([chat_ids(self.tok, context, system) for context in contexts
                              for system in (persona.pos, persona.neg)])
        up_to_the_band = linears(self.plain.get_decoder().layers[:max(self.layers) + 1])
        with self.running():
            ours, other, forward = medians(
                "extraction",
                lambda: extract_vector(self.student, self.tok, persona, contexts, self.layers),
                lambda: prompt_by_prompt(self.plain, self.tok, persona, some, self.layers),
                products(up_to_the_band, 1024))
        other *= len(contexts) / len(some)
        return {"extraction": against(ours, other, forward * positions / 1024)}

    def whole_round(self, timings: dict[Key, Timing]) -> Timing:
        """A default round at its default sizes, put together from the timings of its steps."""
        cfg = self.cfg
        times = {"extraction": cfg.n_contexts / 256,
                 "sampling": 2 * cfg.n_keep / 64,
                 "filter": 2 * cfg.n_keep / 96,
                 "evaluation": 2 * len(texts.load_vignettes(cfg.vignettes)) / 132,
                 "evaluation_texts": 2,
                 "heal": (cfg.n_keep - n_held_out(cfg.n_keep)) / 8}
        ours = other = floor = 0.0
        for key, n in times.items():
            timing = timings[key]
            ours += n * timing.ours
            other += n * timing.other
            floor += n * timing.floor_share * timing.ours
        return against(ours, other, floor)


# ---- memory --------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Of a heal step: vocabulary, completions in the batch, tokens of each."""
    vocab: int
    rows: int
    tokens: int


SMOLLM2, GEMMA3 = 49_152, 262_144  # entries in the vocabulary
SHAPES = [Shape(SMOLLM2, 1, 128), Shape(SMOLLM2, 8, 128), Shape(SMOLLM2, 16, 128),
          Shape(SMOLLM2, 8, 512), Shape(GEMMA3, 8, 128), Shape(GEMMA3, 8, 512)]
VERSIONS = ["ours", "positions in chunks", "full logits"]


def heal_memory(version: str, shape: Shape, device: str, prompt: int = 384) -> int:
    """Peak bytes of one heal step beyond the loaded weights, on a narrow random model.

    Its blocks hold little, so that the logits show. A peak never falls: one process each.
    """
    # 1. model and batch
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True,
        max_position_embeddings=prompt + shape.tokens)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=models.best_dtype(device))
    model.to(device).eval()
    if device == "cpu":
        model.set_attn_implementation("grouped")  # as models.load does
    cfg = texts.complete(heal_loop.Config())
    lora.attach(model, cfg.rank, cfg.alpha, (0, 1))
    drawn = torch.randint(shape.vocab, (shape.rows, prompt + shape.tokens),
                          generator=torch.Generator().manual_seed(0)).tolist()
    prompts, completions = [row[:prompt] for row in drawn], [row[prompt:] for row in drawn]

    # 2. the peak so far
    def peak():
        if device.startswith("cuda"):
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    if device == "cpu":  # Linux: forget that of loading
        Path("/proc/self/clear_refs").write_text("5")
    loaded = peak()

    # 3. one step, the reference's pass included
    if version == "full logits":
        def original():
            return lora.gates(model, history=0, live=0)
        ce, barrier = full_logits_loss(model, original, prompts, completions, cfg)
        (ce + barrier).backward()
    else:
        references = original_states(model, prompts, completions)
        if version == "ours":  # with diagnose, as the first step of an epoch: the hungriest
            heal_step(model, prompts, completions, references, cfg, diagnose=True)
        else:
            chunked_heal_step(model, prompts, completions, references, cfg)
    return peak() - loaded


def stay_in_free_memory() -> None:
    """Linux: asking for more than is free fails at once, before the kernel ends some process."""
    free = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(free), hard))


def in_fresh_process(version: str, shape: Shape, device: str, **how) -> int | None:
    """`heal_memory` in a process of its own; None where memory did not suffice."""
    guard = "bench.stay_in_free_memory()" if device == "cpu" else "pass"
    code = (f"from studies import bench; {guard}\n"
            f"print(bench.heal_memory({version!r}, bench.{shape}, {device!r}, **{how}))")
    # glibc gives freed tensors back: what is live counts, not its free lists
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    child = subprocess.run([sys.executable, "-c", code], cwd=runs.HERE, env=env,
                           capture_output=True, text=True)
    if child.returncode == 0:
        return int(child.stdout.split()[-1])
    refused = re.search("(allocate|out of) memory|MemoryError", child.stderr, re.I)
    if refused or child.returncode == -9:  # or killed for it
        return None
    raise ValueError(f"memory of '{version}' at {shape} was not measured: {child.stderr[-300:]}")


def memory_table(device: str) -> str:
    rows = []
    for shape in tqdm(SHAPES, "memory", leave=False, disable=None):
        one_completion = 4 * shape.tokens * shape.vocab / 2**20
        row = [f"{shape.vocab:,}", shape.rows, shape.tokens, f"{one_completion:,.0f}"]
        for version in VERSIONS:
            peak = in_fresh_process(version, shape, device)
            row.append("out of memory" if peak is None else f"{peak / 2**20:,.0f}")
        rows.append(row)
    head = ["vocabulary", "completions", "tokens of each", "logits of one (MiB)",
            *(f"{version} (MiB)" for version in VERSIONS)]
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


# ---- how time grows ------------------------------------------------------------------------------

LENGTHS, ROWS = (64, 128, 256, 512), (1, 4, 16, 64, 256)
TRAINED, ROUNDS = (8, 16, 32, 48), range(8)


def growth(b: Bench) -> tuple[list[float], list[float], list[float], list[float]]:
    """Seconds of sampling at LENGTHS and at ROWS, of healing at TRAINED, of small ROUNDS."""
    quick, reading = replace(b.cfg, epochs=1), b.reading
    prompts, doses = [chat_ids(b.tok, p) for p in reading.dilemmas[:8]], [2.0] * 8

    # 1. sampling, over new tokens
    def sample_to(n):
        return lambda: sample(b.student, b.tok, prompts, b.vector, doses, max_new_tokens=n)
    with b.running(), endless(b.student):
        tokens = medians("tokens", *map(sample_to, LENGTHS))

    # 2. sampling, over the rows of a batch, each with a prompt of its own
    def sample_rows(n):
        asked = [chat_ids(b.tok, context) for context in reading.contexts[:n]]
        return lambda: sample(b.student, b.tok, asked, b.vector, [2.0] * n, max_new_tokens=32,
                              batch_size=n)
    with b.running(), endless(b.student):
        batches = medians("rows", *map(sample_rows, ROWS))

    # 3. healing, over completions: an eighth on top is held out
    rows = b.kept(max(TRAINED) + 8)

    def heal_on(n):
        return lambda: heal_round(b.student, b.tok, rows[:n + n // 7], quick, seed=0)
    completions = medians("completions", *map(heal_on, TRAINED))

    # 4. a small round of the loop, over the rounds before it
    asked = replace(reading, vignettes=texts.load_vignettes(b.cfg.vignettes, 7))

    def go_round(student):
        def step():
            with b.running(student):
                vector = extract_vector(student, b.tok, reading.persona, reading.contexts[:16],
                                        b.layers)
                sample(student, b.tok, prompts, vector, doses, max_new_tokens=16)
            heal_round(student, b.tok, rows[:9], quick, seed=0)
            with b.running(student):
                evaluate(student, b.tok, asked)
        return step
    rounds = medians("rounds", *(go_round(b.after(r)) for r in ROUNDS))
    return tokens, batches, completions, rounds


def scaling(b: Bench) -> Figure:
    """Time of a step over new tokens, of a row over rows, of an epoch, of a round over rounds."""
    tokens, batches, completions, rounds = growth(b)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    (longer, wider), (trained, later) = figure.subplots(2, 2)
    longer.plot(LENGTHS, [1e3 * t / n for t, n in zip(tokens, LENGTHS)], "o-")
    longer.set(title="sampling, 8 rows", xlabel="new tokens", ylabel="ms per step")
    wider.plot(ROWS, [1e3 * t / n for t, n in zip(batches, ROWS)], "o-")
    wider.set(title="sampling, 32 new tokens", xlabel="rows in the batch", ylabel="ms per row")
    wider.set_xscale("log", base=2)
    wider.set_xticks(ROWS, map(str, ROWS))
    trained.plot(TRAINED, completions, "o-", label="measured")
    trained.plot(TRAINED, [completions[0] * n / TRAINED[0] for n in TRAINED], ":", color="#555555",
                 label="linear from the first")
    trained.legend(fontsize=7, frameon=False)
    trained.set(title="healing, one epoch", xlabel="completions", ylabel="s")
    later.plot(ROUNDS, rounds, "o-")
    later.set(title="a small round of the loop", xlabel="rounds in the history", ylabel="s")
    for axis in (longer, wider, trained, later):
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.title.set_size(8)
        axis.xaxis.label.set_size(7)
        axis.yaxis.label.set_size(7)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


# ---- where the time goes -------------------------------------------------------------------------


KINDS = {"products": ("aten::mm", "aten::addmm"),
         "attention": ("aten::bmm", "aten::_softmax", "aten::_softmax_backward_data"),
         "over the vocabulary": ("aten::_log_softmax", "aten::_log_softmax_backward_data",
                                 "aten::exp", "aten::sub", "aten::gather", "aten::scatter_add_"),
         "copies, casts, zeros": ("aten::copy_", "aten::cat", "aten::fill_"),
         "multiplications and additions, one by one": ("aten::mul", "aten::add", "aten::add_")}


def profile(b: Bench, rows: int = 8) -> str:
    """Milliseconds of one heal step by the kind of operation, a table.

    No shapes are recorded: the profiler would hold on to the tensors, and distort the times.
    """
    prompts, completions = b.batch(rows)
    references = original_states(b.student, prompts, completions)
    with lora.merged(b.student):  # as in heal_round
        for _ in range(2):  # the first is slower
            heal_step(b.student, prompts, completions, references, b.cfg)
        with torch.profiler.profile() as found:
            heal_step(b.student, prompts, completions, references, b.cfg)
    b.student.zero_grad()
    on_gpu = b.plain.device.type == "cuda"
    times = {event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
             for event in found.key_averages()}
    table = []
    for kind, names in KINDS.items():
        table.append([kind, sum(times.pop(name, 0) for name in names)])
    table.append(["the rest: norms, activations, bookkeeping", sum(times.values())])
    total = sum(time for _, time in table)
    table = [[kind, f"{time / 1e3:.0f}", f"{time / total:.0%}"] for kind, time in table]
    positions = distinct([p + c[:-1] for p, c in zip(prompts, completions)])
    tokens = sum(map(len, completions))
    return (f"One heal step on {rows} completions: {tokens} tokens, {positions} positions to run."
            "\n\n"
            + tabulate([*table, ["all", f"{total / 1e3:.0f}", ""]], ["kind", "ms", "share"],
                       tablefmt="github", disable_numparse=True))


# ---- the command ---------------------------------------------------------------------------------


def gaps(b: Bench, wanted: set[Key]) -> list[str]:
    """What makes the comparisons of healing fair, a sentence each.

    Raises ValueError where two versions do not do the same work, or PEFT is missing.
    """
    found = []
    if wanted & {"heal", "heal_history8"}:
        found.append(("heal: CE and barrier", "PEFT's", "same factors", b.loss_gap()))
    if "heal_autograd" in wanted:
        found.append(("heal_autograd: the adapter's gradients", "those in closed form",
                      "largest difference over largest gradient", b.gradient_gap()))
    for what, other, how, gap in found:
        if not gap <= SAME:
            raise ValueError(f"{what} differ from {other} by {gap:.1e} relative in float32, more "
                             f"than {SAME:.0e}; the two do not do the same work")
    return [f"{what} agree with {other} within {gap:.0e} relative (float32, {how})."
            for what, other, how, gap in found]


def time_steps(b: Bench, wanted: set[Key]) -> dict[Key, Timing]:
    """The timings of the steps that have a wanted key, in the order of `Key`."""
    timings: dict[Key, Timing] = {}
    steps = [(b.sampling, {"sampling", "sampling_batch1"}), (b.ragged, {"sampling_ragged"}),
             (b.heal, {"heal", "heal_history8"}), (b.heal_autograd, {"heal_autograd"}),
             (b.filter, {"filter"}), (b.evaluation, {"evaluation"}),
             (b.spoken, {"evaluation_texts"}), (b.extraction, {"extraction"})]
    for step, keys in steps:
        if wanted & keys:
            timings |= step()
    if "round" in wanted:
        timings["round"] = b.whole_round(timings)
    return timings


def main(cfg: Config) -> None:
    model, tok = models.load(cfg.model, cfg.device, cfg.dtype)
    b, device = Bench(model, tok), str(model.device)
    if cfg.scaling:
        scaling(b).savefig(cfg.scaling, dpi=200, metadata={"Software": None})
        return
    dtype = str(model.dtype).removeprefix("torch.")
    where = f"{runs.machine(device)}, {cfg.model} in {dtype}"
    if cfg.profile:
        print(f"`python -m studies.bench --profile` on {where}.\n\n{profile(b)}")
        return

    # 1. measure
    wanted = set(cfg.only)
    if "round" in wanted:
        wanted |= {"sampling", "heal", "filter", "evaluation", "evaluation_texts", "extraction"}
    same_work = gaps(b, wanted)  # first: it notices a missing PEFT
    timings = time_steps(b, wanted)
    timings = {key: timings[key] for key in get_args(Key) if key in cfg.only}
    if cfg.json:
        numbers = {key: asdict(timing) for key, timing in timings.items()}
        runs.write_text(cfg.json, json.dumps(numbers, indent=2) + "\n")

    # 2. the table
    print(f"`python -m studies.bench` on {where}; "
          f"medians of {REPEATS} alternating repeats in one process.\n")
    rows = []
    for key, t in timings.items():
        share = "" if t.floor_share is None else f"{t.floor_share:.0%}"
        rows.append([key, AGAINST[key], f"{t.ours:.2f}", f"{t.other:.2f}", f"{t.ratio:.2f}", share])
    head = ["key", "step and alternative", "ours (s)", "other (s)", "ratio", "floor share"]
    print(tabulate(rows, head, tablefmt="github", disable_numparse=True))
    print("\nratio: other / ours. floor share: matrix products alone / ours; their FLOPs are those "
          "of the linears on the\npositions a causal model must run (common beginnings once), "
          "their rate is that of the same linears in this run.")
    for sentence in same_work:
        print(sentence)

    # 3. memory, with all steps only
    if set(cfg.only) == set(get_args(Key)):
        print("\nPeak memory of a heal step beyond the weights, prompts of 384 tokens, in fresh "
              "processes.\nLogits of one: one completion's, in float32. Ours may grow with these; "
              "with the number of\ncompletions it grows only by what the blocks keep of each:\n\n"
              + memory_table(device))


if __name__ == "__main__":
    runs.cli(Config, main)
