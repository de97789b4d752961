"""steer → distil → heal → loop: bake a steering vector into the weights, and stay coherent.

One round: extract the trait vector from the student, sample it steered, keep what is coherent, and
train a fresh LoRA on that with a barrier against drifting from the original:

    KL_t = Σ_v p_t(v) · (log p_t(v) − log q_t(v))   kl_rev: p student, q original;  kl_fwd: swapped
    D    = mean_t KL_t, or sqrt(mean_t KL_t² + ε), or quantile_95, or max_t    of a completion
    loss = CE + λ · mean over completions of relu(D − τ)                    nats

Then freeze the adapter beside those of earlier rounds (all switched off, the original is back, bit
for bit), measure, and go round again.

    python heal_loop.py --reg kl_rev --agg rmse            # embedded 135M model, CPU, a few minutes
    python heal_loop.py --model google/gemma-3-4b-it --readout tinymfv --rounds 8     # a GPU
    python heal_loop.py --resume runs/X                    # on, after its last finished round
    python heal_loop.py --fork runs/X --at 2 --tau 0.2     # round 2's data healed another way
"""
import functools
import math
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

from tools import check
import distil
import evaluate
import lora
from common import models
from common import runs
from common import texts
from common.sampling import completion_states, logits, score
from steer import SteeringVector, band, calibrate, chat_ids, extract_vector


@dataclass
class Config:
    # the model
    model: str = models.EMBEDDED  # smollm2, a local folder, or a hub id
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"  # auto: bf16 where native
    seed: runs.Seed = 0  # of everything that is drawn
    rounds: runs.AtLeast1 = 3  # how often the loop goes round
    date: runs.Day = models.DATE  # what chat templates print as today's
    # 1. steer
    trait: str = "care"  # name of a trait in data/personas.json
    pos: str | None = None  # system prompt of the trait, instead of --trait
    neg: str | None = None  # system prompt of its opposite
    n_contexts: runs.AtLeast1 = 128  # contexts the vector is averaged over
    steer_layers: runs.DepthRange = (0.45, 0.55)  # depth range that is steered, as fractions
    # 2. distil
    prompts: Path | None = None  # JSON of prompts to sample on and to ask; default: the trait's
    doses: runs.Doses | None = None  # of the sampled completions; default: the trait's own
    dose_nats: runs.DoseNats | None = None  # instead of --doses, each round: see steer.calibrate
    n_keep: runs.AtLeast2 = 48  # completions to keep
    max_new_tokens: runs.AtLeast1 = 64  # longest completion, in tokens
    min_words: runs.WholeFrom0 = 8  # completions with fewer words teach nothing
    max_repetition: runs.Above0To1 = 0.2  # largest share of repeated n-grams (sampling.repetition)
    min_diversity: runs.ZeroTo1 = 0.7  # smallest share of distinct words in any run of 16
    max_perplexity: runs.Above1 = 15.0  # of the worst 24 tokens, under the original
    # 3. heal
    rank: runs.AtLeast1 = 16  # of each round's LoRA
    alpha: runs.Above0 = 32.0  # the LoRA's scale is alpha / rank
    lora_layers: runs.DepthRange = (0.2, 0.8)  # depth range that is adapted, as fractions
    reg: Literal["nll", "kl_fwd", "kl_rev", "wd"] = "kl_rev"  # D, or none, or weight decay
    agg: Literal["mean", "rmse", "p95", "max"] = "rmse"  # how per-position KL becomes D
    lam: runs.From0 = 2.0  # λ, the barrier's weight
    lam_power: runs.Finite = 0.0  # round r has λ · (1 + r)^power
    tau: runs.From0 = 0.8  # τ in nats: the barrier acts where D exceeds it
    ref: Literal["base", "prev", "good"] = "base"  # D from: original, last, or last fluent student
    weight_decay: runs.From0 = 100.0  # under --reg wd; a step shrinks the adapter by lr · decay
    lr: runs.Rate = 3e-4  # peak learning rate
    epochs: runs.AtLeast1 = 3  # passes over the kept data per round
    batch_size: runs.AtLeast1 = 8  # completions per step
    # 5. measure
    readout: Literal["cloze", "tinymfv", "probe"] | None = None  # default: the trait's own
    probes: Path | None = None  # JSON of probes, for --readout probe; default: the trait's own
    think_tokens: runs.AtLeast1 = 64  # tinymfv's thinking before it answers
    vignettes: Path = texts.DATA / "vignettes.json"  # or tinymfv:classic
    n_vignettes: int = 0  # how many, balanced over the foundations; 0 is all
    baselines: bool = True  # also the persona as a prompt, and steering alone at equal trait
    # the run folder
    out: Path | None = None  # new or empty; default runs/<time>_<trait>_<reg>_<agg>_s<seed>
    resume: Path | None = None  # go on with this run after its last finished round
    fork: Path | None = None  # take this run's first --at rounds, and round --at up to its healing
    at: runs.WholeFrom0 = 0  # the round that --fork heals again, counted from 0


# what a fork may change
HEALING = ("rank", "alpha", "lora_layers", "reg", "agg", "lam", "lam_power", "tau", "ref",
           "weight_decay", "lr", "epochs", "batch_size", "rounds", "baselines")


# ---- the barrier ---------------------------------------------------------------------------------


def kl_per_token(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """KL(p‖q) at each position, exact over the vocabulary: twice [tokens, vocab] -> [tokens]."""
    return (logp.exp() * (logp - logq)).sum(-1).clamp(min=0)


def aggregate(kl: torch.Tensor, agg: str, eps: float = 1e-8) -> torch.Tensor:
    """D of one completion: per-position KL [tokens] -> scalar, nats."""
    if agg == "mean":
        return kl.mean()
    if agg == "rmse":  # ε: the root has no slope at KL = 0, where a round begins
        return (kl.square().mean() + eps).sqrt()
    if agg == "p95":
        return kl.quantile(0.95)
    return kl.max()


def barrier_loss(logp, logq, targets, reg: str = "kl_rev", agg: str = "rmse", tau: float = 0.8):
    """One completion under the barrier -> CE_t [tokens], D and relu(D − τ), all in nats.

    logp, logq: float32 log-probabilities of student and original [tokens, vocab]; targets [tokens].
    Under nll and wd D is measured all the same, as kl_rev's, and acts on nothing.
    """
    ce = -logp.gather(1, targets[:, None])[:, 0]
    kl = kl_per_token(logq, logp) if reg == "kl_fwd" else kl_per_token(logp, logq)
    D = aggregate(kl if reg.startswith("kl") else kl.detach(), agg)  # nll, wd: measured, no force
    return ce, D, F.relu(D - tau)


def heal_step(model, prompts, completions, references, cfg: Config, diagnose: bool = False) -> dict:
    """Forward, barrier and backward of one batch; gradients stay in the live factors. -> its log.

    references: per completion the reference's final hidden states [tokens, d_model].
    diagnose: also log |∂barrier/∂hidden| / |∂CE/∂hidden|.
    """
    lengths = [len(c) for c in completions]
    lam = cfg.lam if cfg.reg.startswith("kl") else 0.0
    # 1. the student's hidden states, one pass for the batch; the graph is cut at the leaf
    hidden = completion_states(model, prompts, completions)  # [Σ tokens, d_model]
    leaf = hidden.detach().requires_grad_()
    losses, Ds, from_barrier = [], [], torch.zeros_like(leaf)
    # 2. one completion at a time, so that memory holds the logits of one; gradients onto the leaf
    for h, completion, h_ref in zip(leaf.split(lengths), completions, references):
        logp = logits(model, h).float().log_softmax(-1)  # [tokens, vocab]
        with torch.no_grad():
            logq = logits(model, h_ref).float().log_softmax(-1)
        targets = torch.tensor(completion, device=h.device)
        ce, D, over = barrier_loss(logp, logq, targets, cfg.reg, cfg.agg, cfg.tau)
        data, barrier = ce.sum() / sum(lengths), lam * over / len(lengths)  # shares of the batch
        if diagnose and barrier.requires_grad:
            from_barrier += torch.autograd.grad(barrier, leaf, retain_graph=True)[0]
        (data + barrier).backward()
        losses.append(torch.stack([data, barrier]).detach())
        Ds.append(D.detach())
    # 3. from the leaf through the blocks, once
    hidden.backward(leaf.grad)

    (data, barrier), D = torch.stack(losses).sum(0).tolist(), torch.stack(Ds)
    log = {"data_loss": data, "barrier": barrier, "D": D.mean().item(), "D_max": D.max().item(),
           "active": (D > cfg.tau).float().mean().item()}
    if diagnose:
        from_data = leaf.grad - from_barrier
        log["grad_ratio"] = (from_barrier.float().norm() / from_data.float().norm()).item()
    return log


# ---- one round of healing ------------------------------------------------------------------------


class Diverged(runs.Ended):
    """Training met a value that is not finite; the rounds before are untouched."""


def warmup_and_cosine(steps: int):
    """Share of the peak rate at step t: up over a tenth of the steps, under a cosine to 0."""
    warmup = math.ceil(0.1 * steps)
    return lambda t: min((t + 1) / warmup, 0.5 * (1 + math.cos(math.pi * t / steps)))


def heal_round(model, tok, kept: list[dict], cfg: Config, seed: int,
               reference: list[float] = ()) -> dict:
    """Train the live adapter on the kept data under the barrier; -> the round's log.

    reference: history gates of the model that D is measured from, one per folded round; all 0 is
    the original. Raises Diverged where a loss or gradient is not finite.
    """
    # 1. an eighth is held out, the rest is batched: equal prompts share a batch, and are run once
    pairs = [distil.row_ids(tok, row) for row in kept]  # (prompt ids, completion ids)
    n_held = max(1, len(pairs) // 8)
    held = list(zip(*pairs[:n_held]))  # [all prompts, all completions]
    train = sorted(pairs[n_held:], key=lambda pair: (len(pair[0]), pair))
    batches = [list(zip(*train[i:i + cfg.batch_size]))  # the same of each batch
               for i in range(0, len(train), cfg.batch_size)]

    # 2. the reference's hidden states, once: a round leaves it as it is. All gates 0: the original;
    # merged: a student as the reference is rounded like the one in training
    references = []
    with torch.no_grad(), lora.merged(model), lora.gates(model, history=reference or 0, live=0):
        for prompts, completions in batches:
            states = completion_states(model, prompts, completions)
            references.append(states.split([len(c) for c in completions]))

    # 3. a fresh adapter, AdamW, warm-up and a cosine to 0
    torch.manual_seed(seed)
    for module in lora.adapters(model).values():
        module.reset()
    parameters = lora.live_parameters(model)
    decay = cfg.weight_decay if cfg.reg == "wd" else 0.0
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=decay)
    steps = cfg.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_cosine(steps))

    # 4. train; the first batch of an epoch is looked at more closely
    log = []
    with lora.merged(model), tqdm(total=steps, desc="heal", leave=False, disable=None) as bar:
        before = -torch.cat(score(model, *held)).mean().item()  # CE per token, nats
        for epoch in range(cfg.epochs):
            generator = torch.Generator().manual_seed(seed + epoch)
            for k, b in enumerate(torch.randperm(len(batches), generator=generator).tolist()):
                stats = heal_step(model, *batches[b], references[b], cfg, diagnose=k == 0)
                stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
                if not all(map(math.isfinite, stats.values())):
                    said = tok.decode(batches[b][1][0])[:60]
                    raise Diverged(f"loss or gradient not finite at step {len(log) + 1} of "
                                   f"{steps}, {stats}, on '{said}'; "
                                   "fix: lower --lr or --dtype float32")
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                log.append(stats)
                bar.update()
        after = -torch.cat(score(model, *held)).mean().item()

    # 5. the last epoch, which saw every completion once, is the round's summary
    last = log[-len(batches):]
    mean = {key: sum(stats[key] for stats in last) / len(last) for key in last[0]
            if key != "grad_ratio"}
    return {**mean, "grad_ratio": last[0]["grad_ratio"], "steps": steps, "held_out_before": before,
            "held_out_after": after, "log": log}


# ---- the loop ------------------------------------------------------------------------------------


def main(cfg: Config, loaded=None) -> Path:
    """A run from flags to pictures; -> its folder. loaded: (model, tokenizer), if at hand."""
    from tools import plot
    if cfg.reg == "wd" and cfg.lr * cfg.weight_decay >= 1:
        raise ValueError(f"--weight-decay {cfg.weight_decay} is out of range; fix: below 1 / lr")
    if cfg.resume and cfg.fork:
        raise ValueError("--resume and --fork exclude each other; fix: give one of them")
    if cfg.at and not cfg.fork:
        raise ValueError(f"--at {cfg.at} says where a fork begins; fix: --fork RUN")
    if cfg.doses and cfg.dose_nats:
        raise ValueError("--doses and --dose-nats exclude each other; fix: give one of them")
    # what it reads comes first: a mistake there is told before a folder appears
    cfg = texts.complete(cfg)
    reading = texts.read(cfg)
    if not loaded:
        models.find_source(cfg.model)
    with runs.begin(cfg, f"{cfg.trait}_{cfg.reg}_{cfg.agg}_s{cfg.seed}", HEALING) as run:
        print(f"{cfg.model}: {cfg.trait}, {cfg.reg} {cfg.agg}, λ {cfg.lam:g}, τ {cfg.tau:g}, "
              f"{cfg.rounds} rounds, seed {cfg.seed} -> {run.folder}", flush=True)
        model, tok = loaded or models.load(cfg.model, cfg.device, cfg.dtype)
        tok.chat_date = date.fromisoformat(cfg.date)
        check.quick(model, cfg.model)  # raises where a cheap check fails
        lora.attach(model, cfg.rank, cfg.alpha, cfg.lora_layers)
        lora.load(model, [run.folder / f"round_{r}/adapter.safetensors"
                          for r in range(run.rounds_done)])
        # rows at once, and whether history is merged: both round numbers, so once for a whole run
        longest = max(len(chat_ids(tok, prompt)) for prompt in reading.dilemmas)
        fits = run.find("memory", -1) or run.record(
            "memory", -1, **models.fit_memory(model, longest + cfg.max_new_tokens))
        model.sample_rows, model.lora_merge = fits["rows"], fits["merge"]
        try:
            loop(cfg, run, model, tok, reading)
        except runs.Ended:
            plot.draw(run.folder)
            raise
        plot.main(plot.Config(run.folder))
    return run.folder


def loop(cfg: Config, run: runs.Run, model, tok, reading: texts.Texts) -> None:
    """Round after round on a model that carries the finished ones; all numbers go on record."""
    persona, contexts, layers = reading.persona, reading.contexts, band(model, cfg.steer_layers)
    rules = distil.Rules(cfg.min_words, cfg.max_repetition, cfg.min_diversity, cfg.max_perplexity)
    measure = functools.partial(evaluate.measure, model, tok, reading, readout=cfg.readout,
                                think_tokens=cfg.think_tokens)

    # 0. the original, and the persona as its system prompt
    with lora.gates(model, history=0, live=0):
        event = run.find("base", -1) or run.record("base", -1, **measure("base"))
        base = evaluate.Profile.from_dict(event["profile"])
        measure = functools.partial(measure, constants=base.constants)
        if cfg.baselines and not run.find("prompted", -1):
            run.record("prompted", -1, **measure("prompted", system=persona.pos))

    for r in range(run.rounds_done, cfg.rounds):
        if r and run.find("healed", r - 1)["coherence"] < evaluate.COHERENCE_FLOOR:
            if not run.find("ended", r - 1):
                run.record("ended", r - 1, why=f"coherence fell below {evaluate.COHERENCE_FLOOR}")
            break
        with run.new_round(r) as folder:  # renamed to round_r, for good, once the block ends well
            if run.find("steered", r):  # --fork brought this round's vector and data
                vector = SteeringVector.load(folder / "vector.safetensors")
                kept = runs.read_jsonl(folder / "kept.jsonl")
            else:
                with lora.merged(model), lora.gates(model, history=1, live=0):
                    # 1. steer
                    vector = extract_vector(model, tok, persona, contexts, layers)
                    vector.save(folder / "vector.safetensors")
                    doses = cfg.doses or [
                        calibrate(model, tok, vector, reading.dilemmas[:16], nats)
                        for nats in cfg.dose_nats]
                    run.record("extract", r, doses=doses)
                    # 2. distil
                    kept, sampled = distil.collect(
                        model, tok, vector, reading.dilemmas, persona, rules, doses, cfg.n_keep,
                        runs.stage_seed(cfg.seed, r, "sample"), folder,
                        max_new_tokens=cfg.max_new_tokens)
                    dose = run.record("distil", r, **distil.summary(kept, sampled))["dose"]
                    run.record("steered", r, **measure(f"steered r{r}", vector=vector, dose=dose))
            # 3. heal
            reference = reference_gates(cfg.ref, run, r)
            now = replace(cfg, lam=cfg.lam * (1 + r) ** cfg.lam_power)
            log = heal_round(model, tok, kept, now, runs.stage_seed(cfg.seed, r, "heal"), reference)
            # 4. loop: the live adapter joins the frozen history
            lora.fold(model)
            lora.save(model, folder / "adapter.safetensors")
            # 5. measure
            moved = evaluate.internalised(model, tok, contexts[:64], vector)
            run.record("heal", r, **log, reference=reference, internalised=moved)
            with lora.merged(model), lora.gates(model, history=1, live=0):
                run.record("healed", r, **measure(f"healed r{r}"))

    # 6. steering alone, nothing trained, at the dose that moves the trait as far as the student
    if cfg.baselines and not run.find("matched", cfg.rounds):
        v0 = SteeringVector.load(run.folder / "round_0/vector.safetensors")
        wanted = run.find("healed", run.rounds_done - 1)[base.axis]
        dose, reached = run.find("distil", 0)["dose"], run.find("steered", 0)[base.axis]
        with lora.gates(model, history=0, live=0):
            event = evaluate.matched_steering(measure, v0, base, wanted, dose, reached)
        run.record("matched", cfg.rounds, **event)


def reference_gates(ref: str, run: runs.Run, r: int) -> list[float]:
    """History gates of the model that round r's D is measured from, one per finished round."""
    n = r if ref == "prev" else 0  # rounds that the reference has
    if ref == "good":  # up to the newest student at most twice as perplexing as the original
        limit = 2 * run.find("base", -1)["perplexity"]
        good = [k + 1 for k in range(r) if run.find("healed", k)["perplexity"] <= limit]
        n = max(good, default=0)
    return [1.0] * n + [0.0] * (r - n)


if __name__ == "__main__":
    runs.cli(Config, main)
