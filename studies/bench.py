"""How fast is each step: against what one would otherwise write, and decoding against its floor?

    ratio   other / ours, medians of alternating repeats in one process
    floor   bytes that the decode steps must read (weights once a step, keys and values of every
            row) / bandwidth of a copy on this device, measured in this run

    python -m studies.bench > results/bench.md                        # some minutes on 2 cores
    python -m studies.bench --model google/gemma-3-4b-it --tokens 256                 # a GPU

The alternatives stand below in full, from standard parts: `model.generate` with forward hooks, PEFT
with a reference pass at every step and whole logits, one forward per clause.
Needs PEFT: pip install -r requirements-dev.txt
"""
import copy
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from unittest import mock

import peft
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import distil
import heal_loop
import lora
from common import checks, models, runs, sampling, texts
from common.prompts import NEUTRAL, persona_prompts
from common.readouts import ANSWER, BECAUSE, LETTERS, OPTIONS, cloze
from common.sampling import sample
from heal_loop import aggregate, heal_round, kl_per_token
from steer import SteeringVector, band, extract_vector, left_pad
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


def peft_model(model, cfg: heal_loop.Config):
    """PEFT's LoRA on the linears of the same blocks."""
    blocks = model.get_decoder().layers
    first, end = (round(share * len(blocks)) for share in cfg.lora_layers)
    names = {name.rpartition(".")[2] for name, module in blocks.named_modules()
             if isinstance(module, nn.Linear)}
    return peft.get_peft_model(model, peft.LoraConfig(
        r=cfg.rank, lora_alpha=cfg.alpha, target_modules=sorted(names),
        layers_to_transform=list(range(first, end)), layers_pattern="layers"))


def full_logits_loss(model, original, prompts, completions,
                     cfg: heal_loop.Config) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (CE, barrier) of one batch in nats, by plain autograd over logits [batch, seq, vocab].

    original(): a context in which the model is the original; its pass is part of the step.
    """
    # 1. student and original on the whole batch, padded on the right
    rows = [torch.tensor(p + c, device=model.device) for p, c in zip(prompts, completions)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    student = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    with torch.no_grad(), original():
        reference = model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    # 2. the losses, row by row, at the positions that predict the completion
    ce, D = [], []
    for i, (p, c) in enumerate(zip(prompts, completions)):
        predicting = slice(len(p) - 1, len(p) + len(c) - 1)
        logp, logq = (z[i, predicting].float().log_softmax(-1) for z in (student, reference))
        ce.append(F.nll_loss(logp, rows[i][len(p):], reduction="none"))
        kl = kl_per_token(logq, logp) if cfg.reg == "kl_fwd" else kl_per_token(logp, logq)
        D.append(aggregate(kl, cfg.agg))
    return torch.cat(ce).mean(), cfg.lam * F.relu(torch.stack(D) - cfg.tau).mean()


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
    def logp_after(before, answer):  # [answer tokens, vocab] and the answer's ids
        start = len(chat.tok(before, add_special_tokens=False).input_ids)
        ids = chat.tok(before + answer, add_special_tokens=False).input_ids
        z = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
        return z[start - 1:-1].float().log_softmax(-1), ids[start:]

    letters = [ids[0] for ids in chat.tok(list(LETTERS), add_special_tokens=False).input_ids]
    scores = []
    for vignette in vignettes:
        question = f"{vignette['text']} Why is this wrong?"
        row = []
        for clause in clauses:
            logp, ids = logp_after(chat.text(question) + BECAUSE, clause)
            row.append(logp[range(len(ids)), ids].sum())
        logp, _ = logp_after(chat.text(f"{OPTIONS}\n{question}") + ANSWER, LETTERS[0])
        scores.append(torch.stack([*row, logp[0, letters].logsumexp(-1)]))
    return torch.stack(scores)


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


def operations(step) -> tuple[int, int]:
    """Of one call: torch operations that no other operation called, and launches on a GPU."""
    with torch.profiler.profile() as profiler:
        step()
    events = profiler.events()
    top = [e for e in events if e.name.startswith("aten::")
           and not (e.cpu_parent and e.cpu_parent.name.startswith("aten::"))]
    return len(top), sum("Launch" in e.name for e in events)


def operations_per_step(run, few: int, many: int) -> str:
    """`1,234`, on a GPU `1,234, 567 launches`: of a step, where run(n) is a start and n steps."""
    first, second = operations(partial(run, few)), operations(partial(run, many))
    top, launches = ((b - a) / (many - few) for a, b in zip(first, second))
    return f"{top:,.0f}" + f", {launches:,.0f} launches" * torch.cuda.is_available()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes, the best of five."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8,
                         device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(clock(lambda: target.copy_(source)) for _ in range(5))


@torch.no_grad()
def bytes_read(model, prompts: list[list[int]], tokens: int) -> float:
    """Bytes that decoding `tokens` tokens a row must read at least, in a dense model.

    All weights at every step, and the keys and values of each row, half grown on the mean.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings().weight
    weights = {id(p): p.nbytes for p in [*decoder.parameters(), head]}
    embedding = model.get_input_embeddings().weight
    untied = 0 if embedding is head else embedding.nbytes  # of which a row is looked up
    ids = torch.tensor(prompts[:1], device=model.device)
    cache = decoder(input_ids=ids, use_cache=True).past_key_values
    filled = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    positions = sum(len(p) + tokens / 2 for p in prompts)
    return tokens * (sum(weights.values()) - untied + filled / ids.shape[1] * positions)


def twin(model):
    """A second skeleton on the same weights: adapters and hooks on one do not touch the other."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def endless():
    """A context in which no token ends a completion of ours: all run to max_new_tokens."""
    return mock.patch.object(sampling, "stop_tokens", lambda model, chat: [BEYOND])


class Bench:
    """The two sides on the same weights: `plain` for the alternatives, `student` for ours.

    The student carries a folded round and a live adapter. A step returns the seconds of ours and of
    the other, and the cells of the table's last four columns.
    """

    def __init__(self, model, chat, cfg: Config):
        self.plain, self.student, self.chat, self.cfg = model, twin(model), chat, cfg
        self.plain.set_attn_implementation("sdpa")  # what transformers chooses; ours may differ
        self.loop = texts.complete(heal_loop.Config())
        self.reading = texts.read(self.loop)
        pair = persona_prompts(chat, self.reading.pos, self.reading.neg, self.reading.contexts[:16])
        self.vector = extract_vector(model, *pair, band(model, self.loop.steer_layers))
        self.bandwidth = copy_bandwidth(model.device)
        lora.attach(self.student, self.loop.rank, self.loop.alpha, self.loop.lora_layers)
        for module in lora.adapters(self.student).values():
            nn.init.normal_(module.B, std=1e-4)
        lora.fold(self.student)

    def prompts(self, rows: int) -> list[list[int]]:
        """Training prompts, one for each row; where these run out, from the first again."""
        return [self.chat.ids(text) for text in islice(cycle(self.reading.train), rows)]

    def sample(self, rows: int, tokens: int) -> list[list[int]]:
        """Ours: steered completions of the student, each of `tokens` tokens."""
        with endless(), lora.gates(self.student, history=1, live=0):
            return sample(self.student, self.chat, self.prompts(rows), self.vector, [2.0] * rows,
                          tokens, batch_size=rows, **SAMPLER)

    def generate(self, rows: int, tokens: int) -> list[list[int]]:
        """The other: the same by `model.generate`."""
        return generate(self.plain, self.prompts(rows), self.vector, [2.0] * rows, do_sample=True,
                        max_new_tokens=tokens, **SAMPLER)

    def decode(self, rows: int) -> tuple[list[float], list[str]]:
        tokens, sides = self.cfg.tokens, (partial(self.sample, rows), partial(self.generate, rows))
        seconds = medians(f"{rows} rows", *(partial(side, tokens) for side in sides))
        is_first = rows == self.cfg.rows[0]  # more rows take as many operations
        counts = [operations_per_step(side, 4, 8) if is_first else "" for side in sides]
        floor = bytes_read(self.plain, self.prompts(rows), tokens) / self.bandwidth
        return seconds, [f"{rows * tokens / seconds[0]:,.0f}", f"{floor / seconds[0]:.0%}", *counts]

    def heal(self) -> tuple[list[float], list[str]]:
        kept, completions = [], self.sample(COMPLETIONS, self.cfg.tokens)
        for text, tokens in zip(self.reading.train, completions):
            contents = {"system": NEUTRAL, "user": text, "assistant": self.chat.decode(tokens)}
            messages = [{"role": role, "content": words} for role, words in contents.items()]
            kept.append({"messages": messages, "tokens": tokens})
        rival = peft_model(twin(self.plain), self.loop)

        def ours(epochs):
            heal_round(self.student, self.chat, kept, replace(self.loop, epochs=epochs), seed=0)

        def other(epochs):
            peft_round(rival, self.chat, kept, replace(self.loop, epochs=epochs))

        seconds = medians("heal", *(partial(side, self.loop.epochs) for side in (ours, other)))
        return seconds, ["", "", *(operations_per_step(side, 1, 2) for side in (ours, other))]

    def evaluate(self) -> tuple[list[float], list[str]]:
        vignettes = self.reading.vignettes[:VIGNETTES]
        wordings = [words for of_one in texts.load_clauses().values() for words in of_one]
        with lora.gates(self.student, history=1, live=0):
            seconds = medians("evaluation", partial(cloze, self.student, self.chat, vignettes),
                              partial(clause_by_clause, self.plain, self.chat, vignettes, wordings))
        return seconds, [""] * 4


def main(cfg: Config) -> None:
    # 1. measure
    model, chat = checks.load(cfg.model, cfg.device, cfg.dtype)
    bench = Bench(model, chat, cfg)
    steps = [(f"decode {n} × {cfg.tokens} tokens, steered; `model.generate` with hooks",
              *bench.decode(n)) for n in cfg.rows]
    steps.append((f"heal, {bench.loop.epochs} steps of {COMPLETIONS - 1} × {cfg.tokens} tokens; "
                  "PEFT, whole logits", *bench.heal()))
    steps.append((f"evaluation, {VIGNETTES} vignettes; one forward per clause", *bench.evaluate()))

    # 2. a default round, in proportion
    n_keep, n_vignettes = bench.loop.n_keep, bench.loop.n_vignettes
    decoded, healed, evaluated = (seconds for _, seconds, _ in steps[-3:])
    seconds = [2 * n_keep / cfg.rows[-1] * decoded[k] + n_keep / COMPLETIONS * healed[k]
               + 2 * n_vignettes / VIGNETTES * evaluated[k] for k in (0, 1)]
    steps.append((f"a round: {2 * n_keep} decoded, {n_keep} healed on, two evaluations of "
                  f"{n_vignettes} vignettes, from the rows above", seconds, [""] * 4))

    # 3. write
    rows = [[name, f"{ours:.2f}", f"{other:.2f}", f"{other / ours:.2f}", *cells]
            for name, (ours, other), cells in steps]
    flags = f"--rows {' '.join(map(str, cfg.rows))} --tokens {cfg.tokens}"
    print(f"`python -m studies.bench {flags}` · {ran_on(model)} · {runs.machine(cfg.device)} · "
          f"medians of {REPEATS} alternating repeats in one process · a copy reads and writes "
          f"{bench.bandwidth / 1e9:,.0f} GB/s\n")
    print(markdown(rows, ["ours; the other", "ours (s)", "other (s)", "ratio", "ours, tok/s",
                          "floor / ours", "operations a step", "the other's"]))


if __name__ == "__main__":
    runs.cli(Config, main)
