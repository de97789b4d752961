"""How fast is each hot step: against what one would write without this repository, and against its matrix products alone?

    ratio        other / ours, medians of alternating repeats in one process
    floor share  floor / ours; floor = FLOPs of the linears the step cannot do without / rate of those linears, timed in this run

    python bench.py > results/bench.md                            # a few minutes on 2 cores; any device
    python bench.py --only sampling heal --json bench.json        # {key: {"ours", "other", "ratio", "floor_share"}}, seconds
    python bench.py --scaling results/scaling.png                 # how time grows with tokens, completions and rounds

The alternatives stand below in full, each from standard parts: `model.generate` with hooks, PEFT, one forward per clause or
prompt. Needs PEFT: pip install --no-deps -r requirements-bench.txt
"""
import copy
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

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
import models
from evaluate import CLAUSES, OPTIONS, evaluate, load_vignettes
from heal_loop import aggregate, heal_round, heal_step, kl_per_token
from steer import SteeringVector, band, chat_ids, completion_states, extract_vector, left_pad, load_personas, sample

Key = Literal["sampling", "sampling_batch1", "sampling_ragged", "heal", "heal_history8", "evaluation", "extraction", "round"]
REPEATS = 5


@dataclass
class Config:
    model: str = models.EMBEDDED
    """smollm2, a local folder, or a hub id."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    """Of the weights; auto is bfloat16 where the hardware has it."""
    only: tuple[Key, ...] = get_args(Key)
    """Steps to time; fewer than all leaves out the memory table."""
    json: Path | None = None
    """Write the numbers here too."""
    scaling: Path | None = None
    """Draw this picture of how time grows, instead of the table."""


# ---- the alternatives -------------------------------------------------------------------------------------------------


def generate(model, tok, prompts: list[list[int]], vector: SteeringVector, doses: list[float], **settings) -> torch.Tensor:
    """`model.generate` with forward hooks that add dose · v from the assistant tag on; -> new ids [batch, new tokens]."""
    ids, mask, _ = left_pad(prompts, tok.pad_token_id, model.device)
    def add(v):
        step = (torch.tensor(doses)[:, None, None] * v).to(model.device, model.dtype)
        def hook(block, args, output):
            h = output if torch.is_tensor(output) else output[0]
            h[:, -1:] += step
        return hook
    hooks = [model.get_decoder().layers[l].register_forward_hook(add(v)) for l, v in vector.layers.items()]
    try:
        return model.generate(ids, attention_mask=mask, pad_token_id=tok.pad_token_id, **settings)[:, ids.shape[1]:]
    finally:
        for h in hooks:
            h.remove()


def peft_model(model, cfg):
    """PEFT's LoRA on the linears of the same blocks, at its defaults. Raises ValueError where PEFT is missing."""
    try:
        import peft
    except ImportError:
        raise ValueError("PEFT is missing; fix: pip install --no-deps -r requirements-bench.txt") from None
    depth = len(model.get_decoder().layers)
    first, end = (round(share * depth) for share in cfg.lora_layers)
    names = {name.rpartition(".")[2] for name, m in model.get_decoder().layers.named_modules() if isinstance(m, nn.Linear)}
    return peft.get_peft_model(model, peft.LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, target_modules=sorted(names),
                                                      layers_to_transform=list(range(first, end)), layers_pattern="layers"))


def full_logits_loss(model, without_adapter, prompts, completions, cfg) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (CE, barrier) of one batch in nats, by plain autograd over whole logits [batch, seq, vocab], reference pass included.

    without_adapter: a context manager in which the model is the original.
    """
    rows = [torch.tensor(p + c, device=model.device) for p, c in zip(prompts, completions)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    student = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    with torch.no_grad(), without_adapter():
        original = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    ce, D = [], []
    for i, (p, c) in enumerate(zip(prompts, completions)):
        predicting = slice(len(p) - 1, len(p) + len(c) - 1)
        logp, logq = (z[i, predicting].float().log_softmax(-1) for z in (student, original))
        ce.append(F.nll_loss(logp, rows[i][len(p):], reduction="none"))
        D.append(aggregate(kl_per_token(logp, logq) if cfg.reg == "kl_rev" else kl_per_token(logq, logp), cfg.agg))
    return torch.cat(ce).mean(), cfg.lam * F.relu(torch.stack(D) - cfg.tau).mean()


def peft_round(model, tok, kept: list[dict], cfg) -> None:
    """`heal_loop.heal_round` in PEFT: the same split, batches, steps and held-out losses."""
    pairs = [distil.row_ids(tok, row) for row in kept]
    n_held = heal_loop.held_out(len(pairs))
    train = sorted(pairs[n_held:], key=lambda pc: len(pc[0]) + len(pc[1]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)

    def held_out_loss():
        with torch.no_grad():
            for p, c in pairs[:n_held]:
                z = model(input_ids=torch.tensor([p + c], device=model.device), use_cache=False).logits[0, len(p) - 1:-1]
                F.cross_entropy(z.float(), torch.tensor(c, device=model.device)).item()

    held_out_loss()
    for _ in range(cfg.epochs):
        for i in range(0, len(train), cfg.batch_size):
            ce, barrier = full_logits_loss(model, model.disable_adapter, *zip(*train[i:i + cfg.batch_size]), cfg)
            (ce + barrier).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    held_out_loss()


def cloze_sequences(tok, vignette: dict) -> tuple[list[int], list[list[int]], list[int]]:
    """(prompt ids up to "This is wrong because", ids of the seven clauses, ids up to the letter) of one vignette."""
    def asked(question, opening):
        return chat_ids(tok, f"{question}{vignette['text']} Why is this wrong?") + tok(opening, add_special_tokens=False).input_ids
    clauses = [tok(c, add_special_tokens=False).input_ids for c in CLAUSES.values()]
    return asked("", "This is wrong because"), clauses, asked(OPTIONS + "\n", "Answer: (")


@torch.no_grad()
def clause_by_clause(model, tok, vignettes: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """The cloze scores by one forward per clause; -> log-probabilities [vignettes, 7] in nats, answer mass [vignettes]."""
    letters = [tok(letter, add_special_tokens=False).input_ids[0] for letter in "ABCDEFG"]
    def logp(ids):  # [seq, vocab]
        return model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().log_softmax(-1)
    scores, mass = [], []
    for v in vignettes:
        prompt, clauses, question = cloze_sequences(tok, v)
        scores.append([logp(prompt + c)[range(len(prompt) - 1, len(prompt) + len(c) - 1), c].sum().item() for c in clauses])
        mass.append(logp(question)[-1, letters].exp().sum().item())
    return torch.tensor(scores), torch.tensor(mass)


@torch.no_grad()
def prompt_by_prompt(model, tok, persona, contexts: list[str], layers: list[int]) -> dict[int, torch.Tensor]:
    """The steering vector by one forward per prompt, all hidden states kept; -> {layer: [d_model]}."""
    def tag(system, context):  # [layers, d_model]
        ids = torch.tensor([chat_ids(tok, context, system)], device=model.device)
        states = model(input_ids=ids, output_hidden_states=True).hidden_states  # embeddings first
        return torch.stack([states[l + 1][0, -1].float() for l in layers])
    mean = torch.stack([tag(persona.pos, c) - tag(persona.neg, c) for c in contexts]).mean(0)
    return dict(zip(layers, mean))


# ---- clocks and floors ------------------------------------------------------------------------------------------------


def clock(run) -> float:
    """Seconds of one call, the device's queue emptied before and after."""
    def wait():
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def medians(name: str, *runs) -> list[float]:
    """Median seconds of each callable, taken in turn REPEATS times: a slow moment of the machine meets all alike."""
    seconds = [[clock(run) for run in runs] for _ in tqdm(range(REPEATS), desc=name, leave=False)]
    return [statistics.median(s) for s in zip(*seconds)]


def linears(module) -> list[nn.Linear]:
    """The base linears of a module, adapters left aside."""
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def flops(modules) -> int:
    """Of one token through the given linears: 2 · d_in · d_out each."""
    return sum(2 * m.in_features * m.out_features for m in modules)


def products(modules, rows: int):
    """A run of the given linears alone, one after the other, on `rows` positions in their own dtype."""
    inputs = {m.in_features: torch.randn(rows, m.in_features).to(m.weight) for m in modules}
    @torch.no_grad()
    def run():
        for m in modules:
            m(inputs[m.in_features])
    return run


def distinct(sequences: list[list[int]]) -> int:
    """Positions a causal model has to run at least: sequences share the states of their common beginnings."""
    return len({tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)})


# ---- the steps --------------------------------------------------------------------------------------------------------


@dataclass
class Timing:
    """Medians in seconds; floor None where the products alone say nothing."""
    ours: float
    other: float
    ratio: float
    floor_share: float | None = None


def against(ours: float, other: float, floor: float | None = None) -> Timing:
    return Timing(ours, other, other / ours, floor and floor / ours)


def twin(model):
    """A second skeleton on the same weights: adapters and hooks on one do not touch the other."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@contextmanager
def endless(*skeletons):
    """No token ends a completion: all rows run to max_new_tokens."""
    before = [m.generation_config.eos_token_id for m in skeletons]
    for m in skeletons:
        m.generation_config.eos_token_id = m.config.get_text_config().vocab_size
    try:
        yield
    finally:
        for m, ends in zip(skeletons, before):
            m.generation_config.eos_token_id = ends


class Bench:
    """What the steps share: `plain` for the alternatives, `student` (the same weights, an adapter, a vector) for ours."""

    def __init__(self, model, tok):
        self.plain, self.tok, self.cfg = model, tok, heal_loop.Config()
        self.attention = model.config._attn_implementation
        self.student = self.after(rounds=0)
        self.plain.set_attn_implementation("sdpa")  # what transformers chooses; models.load differs on a CPU
        self.blocks, self.head = linears(model.get_decoder().layers), [model.get_output_embeddings()]
        self.persona, self.layers = load_personas()[self.cfg.trait], band(model, self.cfg.steer_layers)
        self.contexts = distil.load_strings(models.DATA / "contexts.json", "contexts")
        self.dilemmas = distil.load_strings(models.DATA / "prompts.json", "dilemmas")
        self.vector = extract_vector(model, tok, self.persona, self.contexts[:16], self.layers)

    def after(self, rounds: int):
        """A student with this many folded rounds. Its factors are random and small: time does not depend on them."""
        student = twin(self.plain)
        student.set_attn_implementation(self.attention)
        lora.attach(student, self.cfg.rank, self.cfg.alpha, self.cfg.lora_layers)
        for _ in range(rounds):
            for m in lora.adapters(student).values():
                nn.init.normal_(m.B, std=1e-4)
            lora.fold(student)
        return student

    def kept(self, n: int) -> list[dict]:
        """n rows as `distil.collect` leaves them: dilemmas answered at the default doses."""
        return distil.sample_doses(self.student, self.tok, self.vector, self.dilemmas, list(self.cfg.doses), n, seed=0,
                                   max_new_tokens=self.cfg.max_new_tokens)

    @contextmanager
    def running(self):
        """The student as heal_loop.py runs it outside the heal step."""
        with lora.merged(self.student), lora.gates(self.student, live=0):
            yield

    def sampling(self, rows: int = 64, new_tokens: int = 64) -> dict[Key, Timing]:
        prompts = [chat_ids(self.tok, p) for p in self.dilemmas[:rows // 2] for _ in range(2)]
        doses = list(self.cfg.doses) * (rows // 2)
        settings = dict(max_new_tokens=new_tokens, temperature=1.0, top_k=64, top_p=0.95)
        with endless(self.student, self.plain), self.running():
            ours, batch, one, step, prefill = medians(
                "sampling", lambda: sample(self.student, self.tok, prompts, self.vector, doses, **settings),
                lambda: generate(self.plain, self.tok, prompts, self.vector, doses, do_sample=True, **settings),
                lambda: generate(self.plain, self.tok, prompts[:1], self.vector, doses[:1], do_sample=True, **settings),
                products(self.blocks + self.head, rows), products(self.blocks, 1024))
        floor = prefill * distinct(prompts) / 1024 + step * new_tokens
        return {"sampling": against(ours, batch, floor), "sampling_batch1": against(ours, rows * one)}

    def ragged(self, rows: int = 64, limit: int = 128) -> dict[Key, Timing]:
        prompts = [chat_ids(self.tok, c, "Answer in one or two short sentences.") for c in self.contexts[:rows]]
        with self.running():
            longest = max(map(len, sample(self.student, self.tok, prompts, max_new_tokens=limit)))
            def to_the_longest():
                with endless(self.student):
                    sample(self.student, self.tok, prompts, max_new_tokens=longest)
            return {"sampling_ragged": against(*medians("sampling_ragged", lambda: sample(
                self.student, self.tok, prompts, max_new_tokens=limit), to_the_longest))}

    def heal(self, train: int = 8) -> dict[Key, Timing]:
        kept = self.kept(train + 1)  # heal_round holds one of them out
        old, rival = self.after(rounds=8), peft_model(twin(self.plain), self.cfg)
        pairs = [distil.row_ids(self.tok, row) for row in kept[1:]]
        tokens, read = distinct([p + c[:-1] for p, c in pairs]), sum(len(c) for _, c in pairs)
        ours, other, ours8, forward, projection = medians(
            "heal", lambda: heal_round(self.student, self.tok, kept, self.cfg, seed=0), lambda: peft_round(rival, self.tok, kept, self.cfg),
            lambda: heal_round(old, self.tok, kept, self.cfg, seed=0), products(self.blocks, tokens), products(self.head, read))
        layers = self.plain.get_decoder().layers
        above = flops(linears(layers[round(self.cfg.lora_layers[0] * len(layers)):]))  # the first adapted block and those above
        low_rank = sum(2 * p.numel() for p in lora.live_parameters(self.student))
        # Once: all blocks, for the reference. Each epoch: above, forward and ∂/∂input; low-rank products, also ∂/∂factors;
        # the head on student and reference, and its ∂/∂input.
        each_epoch = (2 * above + 3 * low_rank) / flops(self.blocks)
        floor = forward * (1 + self.cfg.epochs * each_epoch) + projection * 3 * self.cfg.epochs
        return {"heal": against(ours, other, floor), "heal_history8": Timing(ours8, ours, ours8 / ours)}

    def loss_gap(self) -> float:
        """Largest relative difference between our CE and barrier and PEFT's: float32, the same factors, two completions, τ = 0."""
        cfg, exact = replace(self.cfg, tau=0.0), copy.deepcopy(self.plain).to(torch.float32)
        ours, rival = twin(exact), peft_model(twin(exact), cfg)
        lora.attach(ours, cfg.rank, cfg.alpha, cfg.lora_layers)
        for name, m in lora.adapters(ours).items():
            nn.init.normal_(m.B, std=0.05)
            theirs = rival.base_model.model.get_submodule(name)
            theirs.lora_A["default"].weight.data.copy_(m.A)
            theirs.lora_B["default"].weight.data.copy_(m.B)
        prompts, completions = zip(*(distil.row_ids(self.tok, row) for row in self.kept(2)))
        with torch.no_grad(), lora.gates(ours, history=0, live=0):
            references = [completion_states(ours, [p], [c]) for p, c in zip(prompts, completions)]
        log = heal_step(ours, prompts, completions, references, cfg)
        theirs = full_logits_loss(rival, rival.disable_adapter, prompts, completions, cfg)
        return max(abs(mine / loss.item() - 1) for mine, loss in zip((log["data_loss"], log["barrier"]), theirs))

    def evaluation(self, n: int = 132, share: int = 11) -> dict[Key, Timing]:
        vignettes = load_vignettes(self.cfg.vignettes, n)
        some = sorted(vignettes, key=lambda v: len(v["text"]))[share // 2::share]
        asked = [cloze_sequences(self.tok, v) for v in vignettes]
        positions = distinct([s for prompt, clauses, question in asked for s in (*(prompt + c[:-1] for c in clauses), question)])
        read = sum(1 + sum(map(len, clauses)) for _, clauses, _ in asked)
        with self.running():
            ours, other, forward, projection = medians("evaluation", lambda: evaluate(self.student, self.tok, vignettes), lambda: clause_by_clause(
                self.plain, self.tok, some), products(self.blocks, 1024), products(self.head, 256))
        floor = forward * positions / 1024 + projection * read / 256
        return {"evaluation": against(ours, other * n / len(some), floor)}

    def extraction(self, pairs: int = 256, share: int = 16) -> dict[Key, Timing]:
        contexts = self.contexts[:pairs]
        some = sorted(contexts, key=len)[share // 2::share]
        positions = distinct([chat_ids(self.tok, c, system) for c in contexts for system in (self.persona.pos, self.persona.neg)])
        with self.running():
            ours, other, forward = medians(
                "extraction", lambda: extract_vector(self.student, self.tok, self.persona, contexts, self.layers), lambda: prompt_by_prompt(
                    self.plain, self.tok, self.persona, some, self.layers),
                products(linears(self.plain.get_decoder().layers[:max(self.layers) + 1]), 1024))
        return {"extraction": against(ours, other * len(contexts) / len(some), forward * positions / 1024)}

    def whole_round(self, timings: dict[Key, Timing]) -> Timing:
        """The steps of a default round at their default sizes, put together from the timings above."""
        cfg = self.cfg
        times = {"extraction": cfg.n_contexts / 256, "sampling": 2 * cfg.n_keep / 64, "evaluation": 2 * len(load_vignettes(cfg.vignettes)) / 132,
                 "heal": (cfg.n_keep - heal_loop.held_out(cfg.n_keep)) / 8}
        ours, other, floor = (sum(n * value(timings[key]) for key, n in times.items())
                              for value in (lambda t: t.ours, lambda t: t.other, lambda t: t.floor_share * t.ours))
        return against(ours, other, floor)


# ---- memory -----------------------------------------------------------------------------------------------------------


def heal_memory(vocab: int, full_logits: bool, device: str, rows: int = 8, prompt: int = 384, completion: int = 128) -> int:
    """Peak bytes of one heal step beyond the loaded weights, on a narrow random model. A peak never falls: one process each."""
    config = transformers.LlamaConfig(vocab_size=vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2,
                                      num_key_value_heads=2, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=models.best_dtype(device)).to(device).eval()
    if device == "cpu":
        model.set_attn_implementation("grouped")  # as models.load does
    cfg = heal_loop.Config()
    lora.attach(model, cfg.rank, cfg.alpha, (0, 1))
    ids = torch.randint(vocab, (rows, prompt + completion), generator=torch.Generator().manual_seed(0)).tolist()
    prompts, completions = [row[:prompt] for row in ids], [row[prompt:] for row in ids]

    def peak():
        if device.startswith("cuda"):
            return torch.cuda.max_memory_allocated()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    if device == "cpu":  # Linux: forget the peak so far, which a child inherits from its parent
        Path("/proc/self/clear_refs").write_text("5")
    loaded = peak()
    if full_logits:
        ce, barrier = full_logits_loss(model, lambda: lora.gates(model, history=0, live=0), prompts, completions, cfg)
        (ce + barrier).backward()
    else:
        with torch.no_grad(), lora.gates(model, history=0, live=0):
            references = [completion_states(model, [p], [c]) for p, c in zip(prompts, completions)]
        heal_step(model, prompts, completions, references, cfg)
    return peak() - loaded


def memory_table(device: str) -> str:
    """`heal_memory` in fresh processes, vocabularies of SmolLM2 and Gemma 3."""
    def measured(vocab, full_logits):
        code = f"import bench; print(bench.heal_memory({vocab}, {full_logits}, '{device}'))"
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # glibc gives freed tensors back: what is live counts, not its free lists
        child = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, env=env)
        return None if child.returncode else int(child.stdout.split()[-1]) / 2**20
    rows = []
    for vocab in tqdm((49_152, 262_144), desc="memory", leave=False):
        ours, full = measured(vocab, False), measured(vocab, True)
        rows.append([f"{vocab:,}", *("out of memory" if mb is None else f"{mb:,.0f}" for mb in (ours, full)),
                     "" if None in (ours, full) else f"{ours / full:.2f}"])
    return tabulate(rows, ["vocabulary", "ours (MiB)", "full logits (MiB)", "ours / full"], tablefmt="github", disable_numparse=True)


# ---- how time grows ---------------------------------------------------------------------------------------------------


def scaling(b: Bench) -> Figure:
    """Time per new token over completion length, per round of healing over completions, per round of the loop over rounds."""
    cfg, quick = b.cfg, replace(b.cfg, epochs=1)
    prompts = [chat_ids(b.tok, p) for p in b.dilemmas[:8]]
    lengths, trained, rounds = (64, 128, 256, 512), (8, 16, 32, 48), range(8)
    with b.running(), endless(b.student):
        token = medians("tokens", *(lambda n=n: sample(b.student, b.tok, prompts, b.vector, [2.0] * 8, max_new_tokens=n) for n in lengths))
    rows = b.kept(max(trained) + 8)
    healing = medians("completions", *(lambda n=n: heal_round(b.student, b.tok, rows[:n + n // 7], quick, seed=0) for n in trained))
    students, vignettes = [b.after(r) for r in rounds], load_vignettes(cfg.vignettes, 7)

    def go_round(student):
        with lora.merged(student), lora.gates(student, live=0):
            vector = extract_vector(student, b.tok, b.persona, b.contexts[:16], b.layers)
            sample(student, b.tok, prompts, vector, [2.0] * 8, max_new_tokens=16)
        heal_round(student, b.tok, rows[:9], quick, seed=0)
        with lora.merged(student):
            evaluate(student, b.tok, vignettes)
    whole = medians("rounds", *(lambda s=s: go_round(s) for s in students))

    figure = Figure(figsize=(7.2, 2.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(lengths, [1e3 * t / n for t, n in zip(token, lengths)], "o-")
    left.set(title="sampling, 8 rows", xlabel="new tokens", ylabel="ms per step")
    middle.plot(trained, healing, "o-", label="measured")
    middle.plot(trained, [healing[0] * n / trained[0] for n in trained], ":", color="#555555", label="linear from the first")
    middle.legend(fontsize=7, frameon=False)
    middle.set(title="healing, one epoch", xlabel="completions", ylabel="s")
    right.plot(rounds, whole, "o-")
    right.set(title="a small round of the loop", xlabel="rounds in the history", ylabel="s")
    for axis in (left, middle, right):
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.title.set_size(8), axis.xaxis.label.set_size(7), axis.yaxis.label.set_size(7)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


# ---- the command ------------------------------------------------------------------------------------------------------

AGAINST = {"sampling": "64 rows × 64 tokens, mixed doses: `model.generate` with hooks, same batch",
           "sampling_batch1": "the same: `model.generate` at batch 1 (1 row timed, × 64)",
           "sampling_ragged": "64 short answers of up to 128 tokens: ours, every row to the longest",
           "heal": "a 3-epoch round on 8 completions: PEFT LoRA, reference every step, full logits",
           "heal_history8": "the same after eight folded rounds: ours after none (ratio: eight / none)",
           "evaluation": "cloze, 132 vignettes: one forward per clause (12 vignettes timed, × 11)",
           "extraction": "256 pairs: one prompt at a time (16 pairs timed, × 16)",
           "round": "a default round: extraction, sampling, heal and two evaluations, from the rows above at default sizes"}


def machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def main(cfg: Config) -> None:
    model, tok = models.load(cfg.model, cfg.device, cfg.dtype)
    b = Bench(model, tok)
    if cfg.scaling:
        scaling(b).savefig(cfg.scaling, dpi=200, metadata={"Software": None})
        return
    wanted = set(cfg.only) | ({"sampling", "heal", "evaluation", "extraction"} if "round" in cfg.only else set())
    gap = b.loss_gap() if wanted & {"heal", "heal_history8"} else 0.0  # first: it notices a missing PEFT
    if gap > 1e-3:
        raise ValueError(f"heal losses differ from PEFT's by {gap:.1e} relative in float32, more than 1e-3; the two do not do the same work")
    timings: dict[Key, Timing] = {}
    for keys, step in {("sampling", "sampling_batch1"): b.sampling, ("sampling_ragged",): b.ragged, ("heal", "heal_history8"): b.heal,
                       ("evaluation",): b.evaluation, ("extraction",): b.extraction}.items():
        if wanted & set(keys):
            timings |= step()
    if "round" in cfg.only:
        timings["round"] = b.whole_round(timings)
    timings = {key: timings[key] for key in get_args(Key) if key in cfg.only}

    print(f"`python bench.py` on {machine(str(model.device))}, torch {torch.__version__}, {cfg.model} in {str(model.dtype).removeprefix('torch.')}; "
          f"medians of {REPEATS} alternating repeats in one process.\n")
    rows = [[key, AGAINST[key], f"{t.ours:.2f}", f"{t.other:.2f}", f"{t.ratio:.2f}", "" if t.floor_share is None else f"{t.floor_share:.0%}"]
            for key, t in timings.items()]
    print(tabulate(rows, ["key", "step and alternative", "ours (s)", "other (s)", "ratio", "floor share"], tablefmt="github", disable_numparse=True))
    print("\nratio: other / ours. floor share: matrix products alone / ours; their FLOPs are those of the linears on the positions a causal model "
          "must run (common beginnings once),\ntheir rate is that of the same linears in this run.")
    if gap:
        print(f"heal: CE and barrier agree with PEFT's within {gap:.0e} relative (float32, same factors).")
    if set(cfg.only) == set(get_args(Key)):
        print(f"\nPeak memory of a heal step beyond the weights, 8 × 512 tokens, 128 of each completion, in fresh processes:\n\n{memory_table(str(model.device))}")
    if cfg.json:
        models.write_text(cfg.json, json.dumps({key: asdict(t) for key, t in timings.items()}, indent=2) + "\n")


if __name__ == "__main__":
    models.cli(Config, main)
