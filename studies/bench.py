"""How fast is each step: against what one would otherwise write, and decoding against its floor?

    ratio   other / ours, medians of alternating repeats in one process
    floor   bytes that the decode steps must read (weights once a step, keys and values of every
            row) / bandwidth of a copy on this device, measured in this run

    python -m studies.bench > results/bench.md                  # a quarter of an hour on 2 cores
    python -m studies.bench --model google/gemma-3-4b-it --tokens 256                 # a GPU

The alternatives stand below in full, from standard parts: `model.generate` with forward hooks, PEFT
with a reference pass at every step and whole logits, one forward per clause.
Needs PEFT: pip install -r requirements-dev.txt
"""
import copy
import time
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from unittest import mock

import numpy as np
import peft
import torch
from torch import nn
from tqdm import tqdm

import distil
import heal_loop
import lora
from common import checks, models, runs, sampling, texts
from common.readouts import ANSWER, BECAUSE, LETTERS, OPTIONS, cloze
from common.sampling import sample
from heal_loop import barrier_loss, heal_round
from steer import SteeringVector, left_pad
from studies.tables import OnDevice, markdown, ran_on

REPEATS = 3
COMPLETIONS = 9  # healed on: one is held out, the others are the batch of a step
VIGNETTES = 7  # asked about, one of each foundation
BEYOND = 2**30  # a token that no model has
SAMPLER = dict(temperature=1.0, top_k=64, top_p=0.95)


@dataclass(kw_only=True)
class Config(OnDevice):
    model: str = models.EMBEDDED  # smollm2, a local folder, or a hub id
    rows: tuple[runs.AtLeast1, ...] = (1, 32, 96, 192)  # completions decoded at once
    tokens: runs.AtLeast2 = 64  # of each completion


def generate(model, prompts: list[list[int]], vector: SteeringVector, doses: list[float],
             **settings) -> list[list[int]]:
    """`model.generate` with the vector's forward hooks; no token ends a row. -> new ids."""
    ids, mask, _ = left_pad(prompts, model.device)
    settings |= dict(pad_token_id=0, eos_token_id=BEYOND)
    with vector.at(model, torch.tensor(doses), last_only=True):
        out = model.generate(input_ids=ids, attention_mask=mask, **settings)
    return out[:, ids.shape[1]:].tolist()


def peft_model(model, linears: list[str], cfg: heal_loop.Config):
    """PEFT's LoRA on the linears of these names."""
    return peft.get_peft_model(model, peft.LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha,
                                                      target_modules=linears))


def full_logits_loss(model, original, prompts, completions,
                     cfg: heal_loop.Config) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (CE, barrier) of one batch in nats, by plain autograd over logits [batch, seq, vocab].

    original(): a context in which the model is the original; its pass is part of the step.
    """
    rows = [torch.tensor(p + c, device=model.device) for p, c in zip(prompts, completions)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    student = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    with torch.no_grad(), original():
        reference = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    ce, over = [], []
    for i, (p, c) in enumerate(zip(prompts, completions)):
        predicting = slice(len(p) - 1, len(p) + len(c) - 1)  # the positions before the completion's
        logp, logq = (z[i, predicting].float().log_softmax(-1) for z in (student, reference))
        loss = barrier_loss(logp, logq, rows[i][len(p):], cfg.reg, cfg.agg, cfg.tau)
        ce.append(loss[0])
        over.append(loss[2])
    return torch.cat(ce).mean(), cfg.lam * torch.stack(over).mean()


def peft_round(model, chat, kept: list[dict], cfg: heal_loop.Config) -> None:
    """`heal_loop.heal_round` in PEFT: the same steps, without the losses on what is held out."""
    train = [distil.row_ids(chat, row) for row in kept[max(1, len(kept) // 8):]]
    train.sort(key=lambda pair: len(pair[0]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(cfg.epochs):
        for k in range(0, len(train), cfg.batch_size):
            batch = zip(*train[k:k + cfg.batch_size])
            ce, barrier = full_logits_loss(model, model.disable_adapter, *batch, cfg)
            (ce + barrier).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def clause_by_clause(model, chat, vignettes: list[dict], clauses: list[str]) -> torch.Tensor:
    """The cloze scores by one forward per clause, and one for the letter; -> nats.

    [vignettes, clauses + 1]: log-probability of each clause, and of any valid letter.
    """
    letters = [ids[0] for ids in chat.tok(list(LETTERS), add_special_tokens=False).input_ids]
    scores = []
    for vignette in vignettes:
        question = f"{vignette['text']} Why is this wrong?"
        pairs = [(chat.text(question) + BECAUSE, clause) for clause in clauses]
        pairs.append((chat.text(f"{OPTIONS}\n{question}") + ANSWER, LETTERS[0]))
        row = []
        for before, answer in pairs:
            start = len(chat.tok(before, add_special_tokens=False).input_ids)
            ids = chat.tok(before + answer, add_special_tokens=False).input_ids
            z = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
            logp = z[0, start - 1:-1].float().log_softmax(-1)  # [answer tokens, vocab]
            row.append(logp[range(len(logp)), ids[start:]].sum())
        row[-1] = logp[0, letters].logsumexp(-1)
        scores.append(torch.stack(row))
    return torch.stack(scores)


def now() -> float:
    """Seconds on a clock, once the device has done all that it was asked to."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def medians(name: str, *steps) -> list[float]:
    """Median seconds of each callable.

    They are taken in turn, REPEATS times: a slow moment of the machine meets all alike.
    """
    seconds = []
    for _ in tqdm(range(REPEATS), name, leave=False, disable=None):
        times = [now()]
        for step in steps:
            step()
            times.append(now())
        seconds.append(np.diff(times))
    return np.median(seconds, axis=0).tolist()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    [seconds] = medians("copy", partial(torch.empty_like(source).copy_, source))
    return 2 * source.nbytes / seconds


@torch.no_grad()
def bytes_read(model, prompts: list[list[int]], tokens: int) -> float:
    """Bytes that decoding `tokens` tokens a row must read at least, in a dense model.

    All weights at every step, and the keys and values of each row, half grown on the mean.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    weights = sum(p.nbytes for p in [*decoder.parameters(), head.weight])
    weights -= model.get_input_embeddings().weight.nbytes  # of it one row a token is looked up
    ids = torch.tensor(prompts[:1], device=model.device)
    cache = decoder(input_ids=ids, use_cache=True).past_key_values
    filled = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    positions = sum(len(p) + tokens / 2 for p in prompts)
    return tokens * (weights + filled / ids.shape[1] * positions)


def twin(model):
    """A second skeleton on the same weights: adapters and hooks on one do not touch the other."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def student_of(model, cfg: heal_loop.Config):
    """A twin of the model with a folded round, which changes it little, and a live adapter."""
    student = twin(model)
    lora.attach(student, cfg.rank, cfg.alpha, cfg.lora_layers)
    for module in lora.adapters(student).values():
        nn.init.normal_(module.B, std=1e-4)
    lora.fold(student)
    return student


def endless():
    """A context in which no token ends a completion of ours: all run to max_new_tokens."""
    return mock.patch.object(sampling, "stop_tokens", lambda model, chat: [BEYOND])


def main(cfg: Config) -> None:
    # 1. both sides on the same weights, ours with a folded round and a live adapter
    plain, chat = checks.load(cfg.model, cfg.device, cfg.dtype)
    loop = texts.complete(heal_loop.Config(n_contexts=16))
    reading = texts.read(loop)
    vector = distil.trait_vector(plain, chat, reading)
    student = student_of(plain, loop)
    plain.set_attn_implementation("sdpa")  # what transformers chooses; ours may differ

    # 2. decode
    bandwidth, steps = copy_bandwidth(plain.device), []
    for n in cfg.rows:
        prompts = [chat.ids(text) for text in islice(cycle(reading.train), n)]
        with endless(), lora.gates(student, history=1, live=0):
            decoded = medians(f"{n} rows",
                              partial(sample, student, chat, prompts, vector, [2.0] * n,
                                      cfg.tokens, batch_size=n, **SAMPLER),
                              partial(generate, plain, prompts, vector, [2.0] * n, do_sample=True,
                                      max_new_tokens=cfg.tokens, **SAMPLER))
        floor = bytes_read(plain, prompts, cfg.tokens) / bandwidth
        steps.append((f"decode {n} × {cfg.tokens} tokens, steered; `model.generate` with hooks",
                      decoded, f"{n * cfg.tokens / decoded[0]:,.0f}", f"{floor / decoded[0]:.0%}"))

    # 3. heal
    with endless(), lora.gates(student, history=1, live=0):
        kept = distil.sample_teacher(student, chat, reading.train, [2.0], COMPLETIONS, 0, vector,
                                     max_new_tokens=cfg.tokens)
    rival = peft_model(twin(plain), list(lora.adapters(student)), loop)
    healed = medians("heal", partial(heal_round, student, chat, kept, loop, seed=0),
                     partial(peft_round, rival, chat, kept, loop))
    steps.append((f"heal, {loop.epochs} steps of {COMPLETIONS - 1} × {cfg.tokens} tokens; "
                  "PEFT, whole logits", healed))

    # 4. evaluate
    vignettes = reading.vignettes[:VIGNETTES]
    wordings = [words for of_one in texts.load_clauses().values() for words in of_one]
    with lora.gates(student, history=1, live=0):
        evaluated = medians("evaluation", partial(cloze, student, chat, vignettes),
                            partial(clause_by_clause, plain, chat, vignettes, wordings))
    steps.append((f"evaluation, {VIGNETTES} vignettes; one forward per clause", evaluated))

    # 5. a default round, in proportion
    a_round = [2 * loop.n_keep / cfg.rows[-1] * decoded[k] + loop.n_keep / COMPLETIONS * healed[k]
               + 2 * loop.n_vignettes / VIGNETTES * evaluated[k] for k in (0, 1)]
    steps.append((f"a round: {2 * loop.n_keep} decoded, {loop.n_keep} healed on, two evaluations "
                  f"of {loop.n_vignettes} vignettes, from the rows above", a_round))

    # 6. write
    rows = [[name, f"{ours:.2f}", f"{other:.2f}", f"{other / ours:.2f}", *cells]
            for name, (ours, other), *cells in steps]
    flags = f"--rows {' '.join(map(str, cfg.rows))} --tokens {cfg.tokens}"
    print(f"`python -m studies.bench {flags}` · {ran_on(plain)} · {runs.machine(cfg.device)} · "
          f"medians of {REPEATS} alternating repeats in one process · a copy reads and writes "
          f"{bandwidth / 1e9:,.0f} GB/s\n")
    print(markdown(rows, ["ours; the other", "ours (s)", "other (s)", "ratio", "ours, tok/s",
                          "floor / ours"]))


if __name__ == "__main__":
    runs.cli(Config, main)
