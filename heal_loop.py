"""steer → distil → heal → loop: bake a steering vector into the weights, round after round, and stay coherent.

One round: extract the trait vector from the student, sample it steered, keep what is coherent, and train a fresh LoRA
on that with a barrier against drifting from the original:

    KL_t = Σ_v p_t(v) · (log p_t(v) − log q_t(v))           kl_rev: p student, q original;  kl_fwd: swapped
    D    = mean_t KL_t | sqrt(mean_t KL_t² + ε) | quantile_95 | max_t          over one completion's positions t
    loss = CE + λ · mean over completions of relu(D − τ)                       nats

Then freeze the adapter into the history (gates at 0 still give the original, bit for bit), evaluate, and go round again.

    python heal_loop.py --reg kl_rev --agg rmse                     # embedded 135M model, CPU, a few minutes
    python heal_loop.py --model google/gemma-3-4b-it --readout tinymfv --doses 0.5 1 --rounds 8     # a GPU
"""
import json
import math
import os
import sys
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from safetensors import safe_open

import distil
import lora
import models
import plot
from evaluate import COHERENCE_FLOOR, Profile, evaluate, load_vignettes, speak
from steer import NEUTRAL, SteeringVector, band, check_flags, completion_states, extract_vector, logits, mean_residual


@dataclass
class Config(distil.Config):
    out: Path | None = None
    """Run folder, new or empty; default runs/<time>_<trait>_<reg>_<agg>_s<seed>."""
    resume: Path | None = None
    """Go on with this run folder after its last finished stage, with its settings."""
    rounds: int = 3
    """How often the loop goes round."""
    rank: int = 16
    """Of each round's LoRA."""
    alpha: float = 32.0
    """LoRA scale is alpha / rank."""
    lora_layers: tuple[float, float] = (0.2, 0.8)
    """Depth range that is adapted, as fractions."""
    reg: Literal["nll", "kl_fwd", "kl_rev", "wd"] = "kl_rev"
    """Divergence: none, KL(original‖student), KL(student‖original), or weight decay on the adapter alone."""
    agg: Literal["mean", "rmse", "p95", "max"] = "rmse"
    """How a completion's per-position KL becomes D."""
    lam: float = 2.0
    """λ, the barrier's weight."""
    tau: float = 0.2
    """τ in nats: the barrier acts where D exceeds it."""
    ref: Literal["base", "prev"] = "base"
    """What D is measured from: the round-0 original, or the previous student."""
    weight_decay: float = 100.0
    """AdamW's decoupled decay under --reg wd (a step shrinks the adapter by lr · decay)."""
    lr: float = 3e-4
    """Peak learning rate."""
    epochs: int = 3
    """Passes over the kept data per round."""
    batch_size: int = 8
    """Completions per step."""
    vignettes: Path = models.DATA / "vignettes.json"
    """The evaluation's vignettes."""
    n_vignettes: int = 0
    """How many of them, balanced over the foundations; 0 is all."""
    baselines: bool = True
    """Also measure the persona as a system prompt, and steering alone at the healed model's trait."""
    readout: Literal["cloze", "tinymfv"] = "cloze"
    """How the model is asked: cloze suits models below about 1B, tinymfv (requirements-tinymfv.txt) those above."""

    def __post_init__(self):
        super().__post_init__()
        first, last = self.lora_layers
        at_least_1, not_negative = "at least 1", "a number from 0 up"
        check_flags(("rounds", self.rounds, self.rounds >= 1, at_least_1), ("rank", self.rank, self.rank >= 1, at_least_1),
                    ("alpha", self.alpha, 0 < self.alpha < math.inf, "a number above 0"),
                    ("lora-layers", self.lora_layers, 0 <= first < last <= 1, "fractions of the depth, 0 <= from < to <= 1, such as 0.2 0.8"),
                    ("lam", self.lam, 0 <= self.lam < math.inf, not_negative), ("tau", self.tau, 0 <= self.tau < math.inf, not_negative),
                    ("lr", self.lr, 0 < self.lr < 1, "between 0 and 1, such as 3e-4"),
                    ("weight-decay", self.weight_decay, 0 <= self.weight_decay * self.lr < 1, "0 up to 1 / lr"),
                    ("epochs", self.epochs, self.epochs >= 1, at_least_1), ("batch-size", self.batch_size, self.batch_size >= 1, at_least_1),
                    ("n-keep", self.n_keep, self.n_keep >= 2, "at least 2, one of which is held out"))


# ---- the barrier ------------------------------------------------------------------------------------------------------


def kl_per_token(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """KL(p‖q) at each position, exact over the vocabulary: [tokens, vocab], [tokens, vocab] -> [tokens], nats."""
    return (logp.exp() * (logp - logq)).sum(-1).clamp(min=0)


def aggregate(kl: torch.Tensor, agg: str, eps: float = 1e-8) -> torch.Tensor:
    """D of one completion: per-position KL [tokens] -> scalar, nats. ε keeps the gradient of the root finite at KL = 0 (B = 0)."""
    return {"mean": lambda: kl.mean(), "rmse": lambda: (kl.square().mean() + eps).sqrt(),
            "p95": lambda: kl.quantile(0.95), "max": lambda: kl.max()}[agg]()


def token_losses(model, hidden: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None, reg: str,
                 budget: int = 2**22) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> CE_t, KL_t [tokens], float32 nats, and their gradients ∂CE_t/∂h_t, ∂KL_t/∂h_t [tokens, d_model].

    hidden, reference: final hidden states of student and original [tokens, d_model]; targets [tokens].
    Both losses at t depend on h_t alone, so a chunk of positions can be projected, differentiated and forgotten:
    no tensor is larger than `budget` logits, whatever the vocabulary and the batch. With z the student's logits,

        ∂CE/∂z = p − onehot(target)      ∂KL(p‖q)/∂z = p · (log p − log q − KL)      ∂KL(q‖p)/∂z = p − q
    """
    parts = []
    chunk = max(1, budget // model.config.get_text_config().vocab_size)
    references = hidden.split(chunk) if reference is None else reference.split(chunk)
    for h, target, ref in zip(hidden.detach().split(chunk), targets.split(chunk), references):
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            z = logits(model, h)
        logp = z.detach().float().log_softmax(-1)
        ce, p = -logp.gather(1, target[:, None])[:, 0], logp.exp()
        ce_z = p.scatter_add(1, target[:, None], -torch.ones_like(ce)[:, None])
        d_ce, = torch.autograd.grad(z, h, ce_z.to(z.dtype), retain_graph=True)
        if reference is None:
            parts.append((ce, torch.zeros_like(ce), d_ce, torch.zeros_like(h)))
            continue
        with torch.no_grad():
            logq = logits(model, ref).float().log_softmax(-1)
        kl = kl_per_token(logp, logq) if reg == "kl_rev" else kl_per_token(logq, logp)
        kl_z = p * (logp - logq - kl[:, None]) if reg == "kl_rev" else p - logq.exp()
        d_kl, = torch.autograd.grad(z, h, kl_z.to(z.dtype))
        parts.append((ce, kl, d_ce, d_kl))
    return tuple(map(torch.cat, zip(*parts)))


def heal_step(model, prompts, completions, references, cfg) -> dict:
    """Forward, barrier and backward of one batch; gradients are left in the live factors. -> what is worth logging.

    references: per completion the original's final hidden states [len(completion), d_model], None without a KL.
    """
    hidden = completion_states(model, prompts, completions)  # [tokens, d_model]
    targets = torch.tensor([t for c in completions for t in c], device=hidden.device)
    has_kl = cfg.reg in ("kl_fwd", "kl_rev")
    ce, kl, d_ce, d_kl = token_losses(model, hidden, targets, torch.cat(references) if has_kl else None, cfg.reg)

    ce.requires_grad_(), kl.requires_grad_()
    data_loss = ce.mean()
    D = torch.stack([aggregate(kl_of_one, cfg.agg) for kl_of_one in kl.split(list(map(len, completions)))])  # [batch]
    barrier = (cfg.lam if has_kl else 0.0) * F.relu(D - cfg.tau).mean()

    w_ce, = torch.autograd.grad(data_loss, ce)  # chain rule by hand: ∂loss/∂h_t = Σ ∂loss/∂L_t · ∂L_t/∂h_t
    w_kl, = torch.autograd.grad(barrier, kl)
    from_data, from_barrier = w_ce[:, None] * d_ce, w_kl[:, None] * d_kl
    hidden.backward((from_data + from_barrier).to(hidden.dtype))
    return {"data_loss": data_loss.item(), "barrier": barrier.item(), "D": D.mean().item(), "D_max": D.max().item(),
            "active": (D > cfg.tau).float().mean().item(), "grad_ratio": (from_barrier.norm() / from_data.norm()).item()}


# ---- one round of healing ---------------------------------------------------------------------------------------------


def held_out(n_kept: int) -> int:
    """Completions kept from training: an eighth, at least one."""
    return max(1, n_kept // 8)


@torch.no_grad()
def held_out_loss(model, pairs) -> float:
    """Mean CE per token of the student on (prompt, completion) pairs, nats."""
    targets = torch.tensor([t for _, c in pairs for t in c], device=model.device)
    return token_losses(model, completion_states(model, *zip(*pairs)), targets, None, "nll")[0].mean().item()


class Diverged(ValueError):
    """Training met a value that is not finite; the adapter of the rounds before is untouched."""


def store(path: Path, parameters, optimizer, log: list[dict]) -> None:
    """A round under way: the live factors, AdamW's moments and the log so far."""
    moments = [optimizer.state[p] for p in parameters]
    tensors = {f"{i}.{name}": t for i, (p, m) in enumerate(zip(parameters, moments))
               for name, t in (("value", p), ("exp_avg", m["exp_avg"]), ("exp_avg_sq", m["exp_avg_sq"]))}
    lora.save_tensors(tensors, path, {"log": json.dumps(log)})


def restore(path: Path, parameters, optimizer, schedule) -> list[dict]:
    """Continue from `store`; -> the log so far."""
    with safe_open(str(path), framework="pt") as f:
        log = json.loads(f.metadata()["log"])
        for i, p in enumerate(parameters):
            p.data.copy_(f.get_tensor(f"{i}.value"))
            optimizer.state[p] = {"step": torch.tensor(float(len(log))), **{
                name: f.get_tensor(f"{i}.{name}").to(p.device) for name in ("exp_avg", "exp_avg_sq")}}
    for _ in log:  # the rate is a function of the step count
        schedule.step()
    return log


def heal_round(model, tok, kept: list[dict], cfg, seed: int, bar=None, checkpoint: Path | None = None) -> dict:
    """Train the live adapter on the kept data under the barrier; -> the round's log. The history is merged meanwhile.

    An eighth of the data is held out. The original's hidden states are computed once: they do not change in a round.
    checkpoint: written after each epoch and continued from, so an interrupted round ends in the same adapter.
    """
    pairs = [distil.row_ids(tok, row) for row in kept]
    n_held = held_out(len(pairs))
    held, train = pairs[:n_held], sorted(pairs[n_held:], key=lambda pc: (len(pc[0]), pc))  # equal prompts share a batch, and are run once
    batches = [range(i, min(i + cfg.batch_size, len(train))) for i in range(0, len(train), cfg.batch_size)]
    references = [None] * len(train)
    if cfg.reg.startswith("kl"):
        with torch.no_grad(), lora.gates(model, history=float(cfg.ref == "prev"), live=0):
            for rows in batches:
                states = completion_states(model, *zip(*(train[i] for i in rows)))
                references[rows.start:rows.stop] = states.split([len(train[i][1]) for i in rows])

    torch.manual_seed(seed)
    for module in lora.adapters(model).values():
        module.reset()
    parameters = lora.live_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay if cfg.reg == "wd" else 0.0)
    steps = cfg.epochs * len(batches)
    warmup = math.ceil(0.1 * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warmup, 0.5 * (1 + math.cos(math.pi * t / steps))))  # warm-up, then cosine to 0
    with lora.merged(model):
        before = held_out_loss(model, held)
        log = restore(checkpoint, parameters, optimizer, schedule) if checkpoint and checkpoint.exists() else []
        for epoch in range(len(log) // len(batches), cfg.epochs):
            order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed + epoch))
            for b in order.tolist():
                rows = batches[b]
                stats = heal_step(model, *zip(*(train[i] for i in rows)), references[rows.start:rows.stop], cfg)
                stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
                if not math.isfinite(stats["data_loss"] + stats["barrier"] + stats["grad_norm"]):
                    raise Diverged(f"loss or gradient not finite at step {len(log) + 1} of {steps}: data {stats['data_loss']}, barrier "
                                   f"{stats['barrier']}, gradient {stats['grad_norm']}; first completion of the batch: "
                                   f"'{tok.decode(train[rows[0]][1])[:60]}'; fix: lower --lr or --dtype float32")
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                log.append(stats)
                if bar is not None:
                    bar.set_postfix(CE=f"{stats['data_loss']:.2f}", D=f"{stats['D']:.2f}")
                    bar.update(len(rows))
            if checkpoint:
                store(checkpoint, parameters, optimizer, log)
        after = held_out_loss(model, held)
    last = log[-len(batches):]  # the last epoch, every training completion once
    return {**{k: sum(s[k] for s in last) / len(last) for k in last[0]}, "steps": steps, "held_out_before": before,
            "held_out_after": after, "log": log}


# ---- the loop ---------------------------------------------------------------------------------------------------------


class Run:
    """A run folder. events.jsonl has one line per finished stage; a stage on record is not done again.

    A stage leaves its files first and its line last, and the next stage reads the files: a run that was killed and
    resumed takes the same road, to the same bytes (times aside), as one that was not.
    """

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "events.jsonl"
        self.events = distil.read_jsonl(self.file, log=True) if self.file.exists() else []
        for n, event in enumerate(self.events, 1):
            if not isinstance(event, dict) or not {"stage", "round"} <= event.keys():
                raise ValueError(f"{self.file} line {n} is not an event of a run; fix: restore the file, or start a new run")

    def find(self, name: str, round: int) -> dict | None:
        return next((e for e in self.events if (e["stage"], e["round"]) == (name, round)), None)

    def record(self, event: dict) -> dict:
        self.events.append(event)
        models.write_text(self.file, distil.to_jsonl(self.events))
        return event

    def stage(self, name: str, round: int, compute) -> dict:
        """The recorded event of this stage and round, or compute() -> dict, recorded."""
        start = time.perf_counter()
        return self.find(name, round) or self.record(
            {"stage": name, "round": round, **compute(), "seconds": float(f"{time.perf_counter() - start:.3g}")})


def stage_seed(seed: int, round: int, stage: str) -> int:
    """Randomness is drawn per run, round and stage, so that no stage depends on how much an earlier one drew."""
    return zlib.crc32(f"{seed} {round} {stage}".encode())


def recorded(cfg: Config) -> dict:
    """The settings as config.json keeps them: no absolute path of this machine, and nothing that does not change a number."""
    def portable(v):
        return os.path.relpath(v, models.DATA.parent) if isinstance(v, Path) or (v == cfg.model and Path(v).is_dir()) else v
    settings = {k: portable(v) for k, v in asdict(cfg).items() if k not in ("out", "resume", "device")}
    return json.loads(json.dumps(settings))


def resumed(cfg: Config) -> Config:
    """The recorded settings of --resume RUN. Raises ValueError where a flag asks for something else."""
    file = cfg.resume / "config.json"
    if not file.exists():
        raise ValueError(f"--resume {cfg.resume} is not a run folder (no config.json); fix: give the --out of an earlier run")
    try:
        before = json.loads(file.read_text())
        default, asked = recorded(Config()), recorded(cfg)
        for name, value in asked.items():
            if value != default[name] and value != before[name]:
                raise ValueError(f"--{name.replace('_', '-')} {value} was {before[name]} when {cfg.resume} began; "
                                 "fix: resume without the flag, or start a new run")
        def back(name, v):
            if isinstance(getattr(cfg, name), Path) or (name == "model" and (models.DATA.parent / v).is_dir()):
                return type(getattr(cfg, name))(models.DATA.parent / v)
            return tuple(v) if isinstance(v, list) else v
        return Config(**{k: back(k, v) for k, v in before.items()}, out=cfg.resume, resume=cfg.resume, device=cfg.device)
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"{file} is malformed ({e}); fix: restore it, or start a new run") from None


def main(cfg: Config) -> Path:
    """Run the loop; -> the run folder."""
    cfg = resumed(cfg) if cfg.resume else cfg
    folder = cfg.out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}_{cfg.trait}_{cfg.reg}_{cfg.agg}_s{cfg.seed}"
    if not cfg.resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out {folder} is not empty; fix: another folder, or --resume {folder}")
    checked(cfg)  # before a folder appears
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock").acquire(timeout=0):
            models.write_text(folder / "config.json", json.dumps(recorded(cfg), indent=2) + "\n")
            loop(cfg, Run(folder))
    except Timeout:
        raise ValueError(f"another process is at work in {folder}; fix: wait for it, or choose another --out") from None
    except OSError as e:
        if (folder / "config.json").exists():
            raise OSError(f"{e}; nothing finished is lost; fix: free space or permissions, then python heal_loop.py --resume {folder}") from None
        raise
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on with: python heal_loop.py --resume {folder}", file=sys.stderr)
        raise
    return folder


def checked(cfg: Config):
    """-> persona, vignettes, contexts, prompts, held-out prompts. Raises ValueError or FileNotFoundError."""
    strings = {name: distil.load_strings(models.DATA / file, name) for name, file in
               (("contexts", "contexts.json"), ("dilemmas", "prompts.json"), ("heldout", "prompts.json"))}
    return (distil.find_persona(cfg.trait, cfg.pos, cfg.neg), load_vignettes(cfg.vignettes, cfg.n_vignettes),
            strings["contexts"][:cfg.n_contexts], strings["dilemmas"], strings["heldout"])


def loop(cfg: Config, run: Run) -> None:
    folder = run.folder
    persona, vignettes, contexts, prompts, heldout = checked(cfg)
    model, tok = models.load(cfg.model, cfg.device, cfg.dtype)
    layers = band(model, cfg.steer_layers)
    lora.attach(model, cfg.rank, cfg.alpha, cfg.lora_layers)
    if healed := sum(e["stage"] == "heal" for e in run.events):
        lora.load(model, folder / "adapter.safetensors")
        lora.truncate(model, healed)  # a kill between the file and its event leaves one round too many
    run.events = [e for e in run.events if e["stage"] != "ended"]
    print(f"{cfg.model}: {cfg.trait}, {cfg.reg}{f'·{cfg.agg}, λ {cfg.lam:g}, τ {cfg.tau:g}' if cfg.reg.startswith('kl') else ''}, "
          f"{cfg.rounds} rounds, seed {cfg.seed} -> {folder}", flush=True)
    done, stages = len(run.events), 1 + 5 * cfg.rounds + 2 * cfg.baselines

    @contextmanager
    def progress(what: str, total: int):
        nonlocal done
        done += 1
        with models.Bar(total=total, desc=f"[{done}/{stages}] {what}", leave=False, dynamic_ncols=True) as bar:
            yield bar

    def measure(name: str, history: float = 1.0, constants=None, **how) -> dict:
        """Evaluate the student (the original at history 0) and let it speak; -> one event."""
        with progress(f"evaluate {name}", len(vignettes)) as bar, lora.merged(model), lora.gates(model, history, live=0):
            profile = evaluate(model, tok, vignettes, cfg.readout, constants=constants, bar=bar, **how)
            said = speak(model, tok, heldout, **how)
        print(f"  {name:<12} auth {profile.auth_nats:+.2f}  care {profile.care_nats:+.2f}  coherence {profile.coherence:.4f}  "
              f"perplexity {said['perplexity']:.1f}  repetition {said['repetition']:.2f}", flush=True)
        return {**profile.summary(), **said, "profile": profile.to_dict()}

    base = Profile.from_dict(run.stage("base", -1, lambda: measure("base", 0))["profile"])
    if cfg.baselines:  # the persona as a system prompt, nothing trained
        run.stage("prompted", -1, lambda: measure("prompted", 0, base.constants, system=persona.pos))
    v0, why = None, ""
    try:
        for r in range(cfg.rounds):
            vector_file, kept_file, sampled_file = (folder / f for f in (f"vector_r{r}.safetensors", f"kept_r{r}.jsonl", f"sampled_r{r}.jsonl"))

            def extract():
                with progress(f"extract r{r}", 2 * len(contexts)) as bar, lora.merged(model), lora.gates(model, live=0):
                    vector = extract_vector(model, tok, persona, contexts, layers, bar=bar)
                vector.save(vector_file)
                return {"cos_v0": vector.cosine(v0 or vector), "norm": sum(v.norm().item() for v in vector.layers.values()) / len(layers)}
            run.stage("extract", r, extract)
            vector = SteeringVector.load(vector_file)
            v0 = v0 or vector

            def distill():
                before = distil.read_jsonl(sampled_file) if sampled_file.exists() else []
                with progress(f"sample and filter r{r}", None) as bar:
                    kept, rows = distil.collect(
                        model, tok, vector, prompts, persona, cfg, cfg.doses, cfg.n_keep, stage_seed(cfg.seed, r, "sample"), before,
                        lambda rows: models.write_text(sampled_file, distil.to_jsonl(rows)), bar=bar, max_new_tokens=cfg.max_new_tokens)
                models.write_text(kept_file, distil.to_jsonl(kept))
                return {"sampled": len(rows), "kept": len(kept), "dose": sum(k["dose"] for k in kept) / len(kept),
                        "verdicts": dict(sorted(Counter(row["verdict"] for row in rows).items()))}
            dose = run.stage("distil", r, distill)["dose"]
            kept = distil.read_jsonl(kept_file)
            run.stage("steered", r, lambda: measure(f"steered r{r}", 1, base.constants, vector=vector, dose=dose))

            def heal():
                checkpoint = folder / f"heal_r{r}.safetensors"
                with progress(f"heal r{r}", cfg.epochs * (len(kept) - held_out(len(kept)))) as bar:
                    log = heal_round(model, tok, kept, cfg, stage_seed(cfg.seed, r, "heal"), bar, checkpoint)
                torch.manual_seed(stage_seed(cfg.seed, r, "fold"))
                lora.fold(model)
                lora.save(model, folder / "adapter.safetensors")
                checkpoint.unlink()
                print(f"  heal r{r}      held-out CE {log['held_out_before']:.2f} -> {log['held_out_after']:.2f}  D {log['D']:.2f}  barrier active "
                      f"{log['active']:.0%}  gradient ratio {log['grad_ratio']:.2f}", flush=True)
                return {**log, "internalised": internalisation(model, tok, contexts[:64], vector)}
            run.stage("heal", r, heal)
            profile = Profile.from_dict(run.stage("healed", r, lambda: measure(f"healed r{r}", 1, base.constants))["profile"])
            if profile.coherence < COHERENCE_FLOOR:
                why = f"coherence {profile.coherence:.2f} fell below {COHERENCE_FLOOR} in round {r}"
                break
        if cfg.baselines:
            run.stage("matched", cfg.rounds, lambda: matched_steering(v0, base, profile.auth_nats, run.find("distil", 0)["dose"],
                                                                      run.find("steered", 0)["auth_nats"], measure))
    except (distil.Starved, Diverged) as e:
        why = str(e)
        raise
    finally:
        if why:
            run.record({"stage": "ended", "round": r, "why": why})
        if run.find("base", -1):
            plot.draw(folder)
    print(f"\n{plot.table(run.events)}\n\n{plot.verdict(run.events)}{why and chr(10) + why}\n{folder / 'report.html'}")


def matched_steering(vector: SteeringVector, base: Profile, wanted: float, dose: float, auth: float, measure) -> dict:
    """Steering alone, no training: the original with round 0's vector at the dose that gives `wanted` auth_nats; -> its event.

    One secant step from (0, base) and the known (dose, auth), then regula falsi until within 0.15 nats, at most four evaluations.
    """
    known = [(0.0, base.auth_nats), (dose, auth)]
    for _ in range(4):
        known.sort(key=lambda point: abs(point[1] - wanted))
        (d1, a1), (d2, a2) = known[:2]
        dose = min(max(d1 + (wanted - a1) * (d2 - d1) / (a2 - a1), 0.0), 2 * max(d for d, _ in known)) if a1 != a2 else d1
        event = measure(f"steering alone at {dose:.2f}", 0, base.constants, vector=vector, dose=dose)
        if abs(event["auth_nats"] - wanted) < 0.15:
            break
        known.append((dose, event["auth_nats"]))
    return {**event, "dose": dose, "wanted": wanted}


def internalisation(model, tok, contexts: list[str], vector: SteeringVector) -> float:
    """Cosine between what the student moved at the assistant tag under the neutral prompt and the teacher's vector."""
    layers = list(vector.layers)
    with lora.merged(model), lora.gates(model, live=0):
        student = mean_residual(model, tok, NEUTRAL, contexts, layers)
    with lora.gates(model, history=0, live=0):
        original = mean_residual(model, tok, NEUTRAL, contexts, layers)
    return SteeringVector({l: student[l] - original[l] for l in layers}).cosine(vector)


if __name__ == "__main__":
    models.cli(Config, main)
