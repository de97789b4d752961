"""steer → distil → heal → loop: bake a steering vector into the weights, and stay coherent.

One round: extract the trait vector from the student, sample it steered, keep what is coherent, and
train a fresh LoRA on that with a barrier against drifting from the original:

    KL_t = Σ_v p_t(v) · (log p_t(v) − log q_t(v))   kl_rev: p student, q original;  kl_fwd: swapped
    D    = mean_t KL_t, or sqrt(mean_t KL_t² + ε), or quantile_95, or max_t    of a completion
    loss = CE + λ · mean over completions of relu(D − τ)                    nats

Then freeze the adapter beside those of earlier rounds, measure, and go round again.

    python heal_loop.py --reg kl_rev --agg rmse            # embedded 135M model, CPU, a few minutes
    python heal_loop.py --model google/gemma-3-4b-it --readout tinymfv --rounds 8     # a GPU
    python heal_loop.py --resume runs/X                    # on, after its last finished round
"""
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

import distil
import evaluate
import lora
from common import checks, models, prompts, runs, texts
from common.sampling import completion_states, even_batches, logits, score, training
from steer import SteeringVector


@dataclass
class Config:
    # the model
    model: str = models.EMBEDDED  # smollm2, a local folder, or a hub id
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"  # auto: bf16 where native
    seed: runs.Seed = 0  # of everything that is drawn
    rounds: runs.AtLeast1 = 3  # how often the loop goes round
    date: runs.Day = prompts.DATE  # what chat templates print as today's
    # 1. steer
    trait: str = "care"  # a trait of data/traits, or a file such as my.json
    pos: str | None = None  # system prompt of the trait, instead of --trait
    neg: str | None = None  # system prompt of its opposite
    n_contexts: runs.AtLeast1 = 128  # contexts the vector is averaged over
    steer_layers: runs.DepthRange = (0.45, 0.55)  # depth range that is steered, as fractions
    # 2. distil
    teacher: Literal["steered", "prompted"] = "steered"  # by the vector, or by the persona prompt
    doses: runs.Doses | None = None  # of the sampled completions; default: the trait's own
    dose_nats: runs.DoseNats | None = None  # doses by effect: nats of KL of the next token
    n_keep: runs.AtLeast2 = 48  # completions to keep
    max_new_tokens: runs.AtLeast1 = 64  # longest completion, in tokens
    prompt_suffix: str = texts.SUFFIX  # appended to each prompt; "" for longer answers
    top_k: runs.WholeFrom0 = 64  # sample from the k most probable tokens; 0: from all
    top_p: runs.Above0To1 = 0.95  # and from the fewest that have this probability; 1: no cut
    min_words: runs.WholeFrom0 = 8  # completions with fewer words teach nothing
    max_repetition: runs.Above0To1 = 0.2  # largest share of repeated n-grams (sampling.repetition)
    min_diversity: runs.ZeroTo1 = 0.7  # smallest share of distinct words in any run of 16
    max_perplexity: runs.Above1 = 15.0  # of the worst 24 tokens, under the original
    # 3. heal
    rank: runs.AtLeast1 = 16  # of each round's LoRA
    alpha: runs.Above0 = 32.0  # the LoRA's scale is alpha / rank
    lora_layers: runs.DepthRange = (0.2, 0.8)  # depth range that is adapted, as fractions
    merge: bool = True  # keep a merged copy of the adapted weights: faster, more memory
    targets: Literal["samples", "soft"] = "samples"  # CE, or KL(teacher ‖ student) per token
    reg: Literal["nll", "kl_fwd", "kl_rev", "wd"] = "kl_rev"  # nll: no barrier
    agg: Literal["mean", "rmse", "p95", "max"] = "rmse"  # how per-position KL becomes D
    lam: runs.From0 = 2.0  # λ, the barrier's weight
    tau: runs.From0 = 0.8  # τ in nats: the barrier acts where D exceeds it
    ref: Literal["base", "prev", "good"] = "base"  # D from: original, previous, last fluent
    weight_decay: runs.From0 = 100.0  # under --reg wd; a step shrinks the adapter by lr · decay
    lr: runs.Rate = 3e-4  # peak learning rate
    epochs: runs.AtLeast1 = 3  # passes over the kept data per round
    batch_size: runs.AtLeast1 = 8  # completions per step, at most
    # 5. measure
    readout: Literal["cloze", "tinymfv", "probe"] | None = None  # default: the trait's own
    think_tokens: runs.AtLeast1 = 64  # tinymfv's thinking before it answers
    vignettes: Path = texts.DATA / "vignettes.json"  # or tinymfv:classic
    n_vignettes: int = 42  # how many, balanced over the foundations; 0 is all
    baselines: bool = True  # also the persona as a prompt, and steering alone at matched trait
    # the run folder
    out: Path | None = None  # new or empty; default runs/<time>_<trait>_<reg>_<agg>_s<seed>
    resume: Path | None = None  # go on with this run after its last finished round
    fork: Path | None = None  # take this run's first --at rounds, and round --at up to its healing
    at: runs.WholeFrom0 = 0  # the round that --fork heals again, counted from 0


# what a fork may change
HEALING = ("rank", "alpha", "lora_layers", "merge", "targets", "reg", "agg", "lam", "tau",
           "ref", "weight_decay", "lr", "epochs", "batch_size", "rounds", "baselines")


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
    """One completion under the barrier -> loss_t [tokens], D and relu(D − τ), all in nats.

    logp, logq: float32 log-probabilities of student and original [tokens, vocab]. targets: token
    ids [tokens], or as soft targets the teacher's log-probabilities [tokens, vocab].
    Under nll and wd D is measured all the same, as kl_rev's, and has no gradient.
    """
    if targets.is_floating_point():
        loss = kl_per_token(targets, logp)
    else:
        loss = -logp.gather(1, targets[:, None])[:, 0]
    kl = kl_per_token(logq, logp) if reg == "kl_fwd" else kl_per_token(logp, logq)
    D = aggregate(kl if reg.startswith("kl") else kl.detach(), agg)
    return loss, D, F.relu(D - tau)


def heal_step(model, batch: dict, cfg: Config) -> dict:
    """Forward, barrier and backward of one batch; gradients stay in the live factors. -> its log.

    batch: prompts, completions, and per completion the final hidden states [tokens, d_model] of
    the reference and, for soft targets, of the teacher.
    """
    def log_probabilities(h):
        return logits(model, h).float().log_softmax(-1)  # [tokens, vocab]
    lengths = [len(completion) for completion in batch["completions"]]
    lam = cfg.lam if cfg.reg.startswith("kl") else 0.0
    # 1. the student's hidden states, one pass for the batch; the graph is cut at the leaf
    hidden = completion_states(model, batch["prompts"], batch["completions"])
    leaf = hidden.detach().requires_grad_()  # [Σ tokens, d_model]
    losses, Ds = [], []
    # 2. one completion at a time, so that memory holds the logits of one; gradients onto the leaf
    for k, h in enumerate(leaf.split(lengths)):
        with torch.no_grad():
            logq = log_probabilities(batch["reference"][k])
            targets = torch.tensor(batch["completions"][k], device=h.device)
            if batch["teacher"]:
                targets = log_probabilities(batch["teacher"][k])
        loss, D, over = barrier_loss(log_probabilities(h), logq, targets, cfg.reg, cfg.agg, cfg.tau)
        data, barrier = loss.sum() / sum(lengths), lam * over / len(lengths)  # shares of the batch
        (data + barrier).backward()
        losses.append(torch.stack([data, barrier]).detach())
        Ds.append(D.detach())
    # 3. from the leaf through the blocks, once
    hidden.backward(leaf.grad)

    (data, barrier), D = torch.stack(losses).sum(0).tolist(), torch.stack(Ds)
    return {"data_loss": data, "barrier": barrier, "D": D.mean().item(), "D_max": D.max().item(),
            "active": (D > cfg.tau).float().mean().item()}


def heal_round(model, chat, kept: list[dict], cfg: Config, seed: int, reference: list[float] = (),
               teacher: dict | None = None) -> dict:
    """Train the live adapter on the kept data under the barrier; -> the round's log.

    reference: history gates of the model that D is measured from, one per folded round; all 0 is
    the original. teacher: of distil.teacher_of, for soft targets.
    Raises runs.Ended where a loss or gradient is not finite.
    """
    # 1. an eighth is held out, the rest is batched: equal prompts share a batch, and are run once
    rows = [(*distil.row_ids(chat, row), row) for row in kept]  # prompt ids, completion ids, row
    n_held = max(1, len(rows) // 8)
    held_prompts, held_completions, _ = zip(*rows[:n_held])
    train = sorted(rows[n_held:], key=lambda row: (len(row[0]), row[:2]))

    # 2. the hidden states of reference and teacher, once: a round leaves both as they are
    data, sizes = [], [len(prompt) + len(completion) - 1 for prompt, completion, _ in train]
    for part in even_batches(model, sizes, cfg.batch_size):
        asked, completions, part_rows = zip(*(train[i] for i in part))
        lengths, soft = [len(c) for c in completions], None
        with torch.no_grad(), training(model), lora.gates(model, history=reference or 0, live=0):
            states = completion_states(model, asked, completions)
            if cfg.targets == "soft":  # at gates of its own
                soft = distil.teacher_states(model, chat, part_rows, **teacher).split(lengths)
        data.append({"prompts": asked, "completions": completions, "teacher": soft,
                     "reference": states.split(lengths)})

    # 3. a fresh adapter, AdamW, warm-up and a cosine to 0
    torch.manual_seed(seed)
    for module in lora.adapters(model).values():
        module.reset()
    parameters = lora.live_parameters(model)
    decay = cfg.weight_decay if cfg.reg == "wd" else 0.0
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=decay)
    steps = cfg.epochs * len(data)
    warmup = math.ceil(0.1 * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(
        (t + 1) / warmup, 0.5 * (1 + math.cos(math.pi * t / steps))))

    # 4. train, every epoch in an order of its own
    log, order = [], []
    for epoch in range(cfg.epochs):
        generator = torch.Generator().manual_seed(seed + epoch)
        order += torch.randperm(len(data), generator=generator).tolist()
    with lora.gates(model, history=1, live=1), training(model):
        before = -torch.cat(score(model, held_prompts, held_completions)).mean().item()  # CE, nats
        for k in tqdm(order, "heal", leave=False, disable=None):
            stats = heal_step(model, data[k], cfg)
            stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
            if not all(map(math.isfinite, stats.values())):
                raise runs.Ended(f"loss or gradient not finite at step {len(log) + 1} of {steps}: "
                                 f"{stats}; fix: lower --lr or --dtype float32")
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            log.append(stats)
        after = -torch.cat(score(model, held_prompts, held_completions)).mean().item()

    # 5. the last epoch, which saw every completion once, is the round's summary
    last, sizes = log[-len(data):], [len(data[k]["completions"]) for k in order[-len(data):]]
    mean = {key: sum(n * s[key] for n, s in zip(sizes, last)) / sum(sizes) for key in last[0]}
    return {**mean, "steps": steps, "held_out_before": before, "held_out_after": after, "log": log}


def loop(cfg: Config, run: runs.Run, model, chat, reading: texts.Texts) -> None:
    """Round after round on a model that carries the finished ones; every result is recorded."""
    measure = functools.partial(evaluate.measure, model, chat, reading, readout=cfg.readout,
                                think_tokens=cfg.think_tokens, max_new_tokens=cfg.max_new_tokens)
    # 0. the original, and the persona as its system prompt
    with lora.gates(model, history=0, live=0):
        event = run.find("base", -1) or run.record("base", -1, **measure("base"))
        base = evaluate.Profile(**event["profile"])
        measure = functools.partial(measure, constants=base.constants)
        if cfg.baselines and not run.find("prompted", -1):
            run.record("prompted", -1, **measure("prompted", system=reading.pos))

    for r in range(run.rounds_done, cfg.rounds):
        if r and (run.find("healed", r - 1)["coherence"] or 0) < evaluate.COHERENCE_FLOOR:
            run.find("ended", r - 1) or run.record(
                "ended", r - 1, why=f"coherence fell below {evaluate.COHERENCE_FLOOR}")
            break
        # the folder is renamed to round_r, for good, once the block ends well
        with run.new_round(r) as folder, lora.gates(model, history=1, live=0):
            # 1. steer, 2. distil; a fork brought this round's vector and data
            is_new = not run.find("steered", r)
            if is_new:
                run.record("distil", r, **distil.make_data(cfg, model, chat, reading, r, folder))
            vector = SteeringVector.load(folder / "vector.safetensors")
            kept = runs.check_rows(folder / "kept.jsonl", len(model.get_input_embeddings().weight))
            teacher = distil.teacher_of(cfg, reading, vector)
            if is_new:
                dose = run.find("distil", r)["dose"]
                run.record("steered", r, **measure(f"{cfg.teacher} r{r}", dose=dose, **teacher))
            # 3. heal
            reference, seed = run.reference(cfg.ref, r), runs.stage_seed(cfg.seed, r, "heal")
            log = heal_round(model, chat, kept, cfg, seed, reference, teacher)
            run.record("heal", r, reference=reference, **log)
            # 4. loop: the live adapter joins the frozen history
            lora.fold(model)
            lora.save(model, folder / "adapter.safetensors")
            # 5. measure
            run.record("healed", r, **measure(f"healed r{r}"))

    # 6. steering alone, nothing trained, at the dose that moves the trait as far as the student
    if cfg.baselines and run.rounds_done and not run.find("matched", cfg.rounds):
        vector = SteeringVector.load(run.folder / "round_0/vector.safetensors")
        student = evaluate.Profile(**run.find("healed", run.rounds_done - 1)["profile"])
        with lora.gates(model, history=0, live=0):
            dose = evaluate.matched_dose(model, chat, reading, cfg.readout, base, student,
                                         cfg.think_tokens, vector)
            run.record("matched", cfg.rounds, dose=dose, wanted=student.trait,
                       **measure(f"dose {dose:.2f}", vector=vector, dose=dose))


def main(cfg: Config, loaded=None) -> Path:
    """A run from flags to pictures; -> its folder. loaded: (model, chat), if at hand."""
    from tools import plot
    if cfg.reg == "wd" and cfg.lr * cfg.weight_decay >= 1:
        raise ValueError(f"--weight-decay {cfg.weight_decay} is out of range; fix: below 1 / lr")
    cfg = texts.complete(cfg)
    reading = texts.read(cfg)  # a mistake in what it reads is reported before a folder appears
    with runs.begin(cfg, f"{reading.name}_{cfg.reg}_{cfg.agg}_s{cfg.seed}", HEALING) as run:
        print(f"{cfg.model}: {reading.name}, {cfg.reg} {cfg.agg}, λ {cfg.lam:g}, τ {cfg.tau:g}, "
              f"{cfg.rounds} rounds, seed {cfg.seed} -> {run.folder}", flush=True)
        model, chat = loaded or checks.load(cfg.model, cfg.device, cfg.dtype, cfg.date)
        checks.lengths(model, chat, reading, cfg.max_new_tokens)
        lora.attach(model, cfg.rank, cfg.alpha, cfg.lora_layers, merge=cfg.merge)
        lora.load(model, [run.folder / f"round_{r}/adapter.safetensors"
                          for r in range(run.rounds_done)])
        try:
            loop(cfg, run, model, chat, reading)
        except runs.Ended:
            plot.draw(run.folder)
            raise
        plot.main(plot.Config(run.folder))
    return run.folder


if __name__ == "__main__":
    runs.cli(Config, main)
