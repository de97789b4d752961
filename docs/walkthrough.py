# %% [markdown]
# # Steer, distil, heal, loop: a walk-through
#
# In a few minutes on a CPU you push a real 135M model along a trait with one vector, watch the push
# break it, train the push into a LoRA **without** the breakage, and go round again. Every cell
# calls the project's own modules; the answers to three questions are in bold:
#
# - Why the **root mean square** of the tokens' KL, and not the mean? (section 4)
# - What does the **barrier** do that a KL penalty does not? (section 6)
# - Why does the LoRA have **gates**? (section 7)
#
# ![steer, distil, heal, loop, measure](pipeline.svg)

# %%
import sys
import tempfile
import textwrap
from collections import Counter
from pathlib import Path

ROOT = next(p for p in (Path.cwd(), Path.cwd().parent) if (p / "heal_loop.py").exists())
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import distil
import evaluate
import heal_loop
import lora
from common import checks, models, texts
from common.readouts import probe
from common.sampling import completion_states, logits, sample
from steer import band, extract_vector
from tools.plot import GREEN, RED

MODEL = models.EMBEDDED  # SmolLM2-135M-Instruct: 30 blocks, d_model 576
N_CONTEXTS = 48  # user messages that the vector is averaged over
N_KEEP = 20  # completions to train on, per round
N_TOKENS = 48  # longest completion
N_VIGNETTES = 28  # moral violations that the model is asked about
RULES = heal_loop.Config()  # the filter's thresholds

model, chat = checks.load(MODEL)
reading = texts.read(heal_loop.Config(n_contexts=N_CONTEXTS, n_vignettes=N_VIGNETTES))
lora.attach(model)  # B = 0: changes nothing until section 5 trains it


def show(name, text):
    print(textwrap.fill(f"{name}: {text}", 96), end="\n\n")


# %% [markdown]
# ## 1. A persona pair
#
# Two system prompts define a trait. They differ in it and, we hope, in nothing else. We never
# sample from them, and only compare the model's *internal state* at the last token printed below.

# %%
show("trait", reading.pos)
show("opposite", reading.neg)
print(chat.text(reading.contexts[3], system=reading.pos))

# %% [markdown]
# ## 2. The vector
#
# $$v_l = \underset{\text{contexts}}{\text{mean}}\;
# \big[ h_l(\text{trait}, \text{context}) - h_l(\text{opposite}, \text{context}) \big]$$
#
# where $h_l$ [d_model] is the residual stream after block $l$ at the prompt's last token. The
# context cancels; what is left is the trait. Steering adds dose · $v_l$ in a few middle blocks, at
# that token and every generated one, under a **neutral** system prompt: "You are a helpful
# assistant."

# %%
layers = band(model, (0.45, 0.55))
pos = [chat.ids(context, reading.pos) for context in reading.contexts]  # token ids
neg = [chat.ids(context, reading.neg) for context in reading.contexts]
vector = extract_vector(model, pos, neg, layers)
for layer, v in vector.layers.items():
    print(f"block {layer}: v has {len(v)} numbers and length {v.norm():.1f}")
print()

question = "My boss told me to ignore a crying customer. What should I do?"
doses, prompt = [0, 4, 7], chat.ids(question)
answers = sample(model, chat, [prompt] * 3, vector, doses, N_TOKENS, temperature=0)
for dose, answer in zip(doses, answers):
    show(f"dose {dose}", chat.decode(answer))

# %% [markdown]
# The middle answer shows the trait. In the last one the words still belong to the trait, and the
# sentences fall apart. **Trait and incoherence come out of the same knob.** The rest of this
# notebook keeps the first and loses the second.
#
# ## 3. Distil: let the steered model write, keep what makes sense
#
# Doses 1 and 3 lie below the break. The first rule that drops a completion is its reject reason:
# `short`; `refusal` ("as an AI language model ..."); `narrates`, which talks *about* the trait
# instead of showing it; `repetition` and `loop`, which say it again; `perplexity`, above 15 in its
# worst 24 tokens under the **original**.

# %%
def distil_round(vector, seed):
    """Steered completions of the model as it stands, with reasons; -> (kept, all rows)."""
    with tempfile.TemporaryDirectory() as folder:
        return distil.collect(model, chat, reading.train, (reading.pos, reading.neg), RULES,
                              [1.0, 3.0], N_KEEP, seed, Path(folder), vector=vector,
                              max_new_tokens=N_TOKENS)


kept, rows = distil_round(vector, seed=0)
dropped = [row for row in rows if row["reject_reason"] != "kept"]
print(len(rows), "sampled:", dict(Counter(row["reject_reason"] for row in rows)))
dropped.sort(key=lambda row: row["perplexity"] or 0, reverse=True)
for row in kept[1:2] + dropped[:1]:  # of the dropped, the worst
    system, user, assistant = (message["content"] for message in row["messages"])
    print(f"\n--- {row['reject_reason'].upper()}: dose {row['dose']:.1f}, worst perplexity "
          f"{row['perplexity']:.1f}, repetition {row['repetition']:.2f}")
    show("Q", user)
    show("A", assistant)

# %% [markdown]
# The kept rows become training data **under the neutral system prompt**: a model that learns to
# write them without a vector has learned the trait. The filter removes what is broken on the
# surface. What slips through would teach a little more breakage in every round; hence the barrier.
#
# ## 4. How broken is a completion? One number from many tokens
#
# Compare student $p$ and original $q$ at every position $t$, over the whole vocabulary:
#
# $$\text{KL}_t = \sum_v p_t(v) \, \big(\log p_t(v) - \log q_t(v)\big) \quad \text{nats}$$
#
# A student that breaks often does so at a *few* tokens. We make such a one on purpose: dose 0.5,
# but for four tokens dose 14.

# %%
@torch.no_grad()
def log_probs(states):
    """Final hidden states [n, d_model] -> log-probabilities [n, vocab], float32."""
    return logits(model, states).float().log_softmax(-1)


# one completion: 30 tokens, four broken ones, 38 more; what stands so far is the next prompt
pieces, states, so_far = [], [], prompt
for dose, n, temperature in ((0.5, 30, 0), (14, 4, 1), (0.5, 38, 0)):
    [piece] = sample(model, chat, [so_far], vector, [dose], n, temperature)
    with torch.no_grad():
        states.append(completion_states(model, [so_far], [piece], vector, dose))
    pieces.append(piece)
    so_far = so_far + piece
show("completion", " >>> ".join(chat.decode(piece) for piece in pieces))

completion = [token for piece in pieces for token in piece]
with torch.no_grad():
    original = completion_states(model, [prompt], [completion])  # reads it unsteered
kl = heal_loop.kl_per_token(log_probs(torch.cat(states)), log_probs(original)).cpu()  # [tokens]

# %%
TAU = 0.5  # in this section; 0.2 in those below, whose few steps do not go far
AGGREGATES = {"max": "#d95f02", "rmse": GREEN, "p95": "#7b3294", "mean": "#1f77b4"}  # colours
broken = slice(len(pieces[0]), len(pieces[0]) + len(pieces[1]))

fig, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
bars = ax.bar(range(len(kl)), kl.tolist(), width=0.9, color="#a8a8a8")
for bar in bars[broken]:
    bar.set_color(RED)
for agg, colour in AGGREGATES.items():
    leaf = kl.clone().requires_grad_()
    D = heal_loop.aggregate(leaf, agg)
    D.backward()
    share = leaf.grad / leaf.grad.sum()  # of the push that training would give, per token
    print(f"{agg:<4} D {D.item():.2f}; of its push {share[broken].sum():>4.0%} on the four, "
          f"which get {', '.join(f'{x:.0%}' for x in share[broken])}")
    ax.axhline(D.item(), color=colour, lw=2, label=f"{agg}  {D.item():.2f}")
ax.axhline(TAU, color="black", lw=1.5, ls="--", label=f"τ  {TAU:.2f}")
ax.legend(loc="center right", fontsize=12, frameon=False)
ax.set(xlabel="position in the completion", ylabel="KL(student ‖ original), nats",
       title="Four broken tokens: the mean hides them, the rmse sees them")
ax.margins(x=0.01)
ax.spines[["top", "right"]].set_visible(False)
fig.savefig(ROOT / "docs/kl_per_token.png", dpi=150)

# %% [markdown]
# Four tokens (red) are broken; the others (grey) are mildly on trait, at a hundredth of a nat or
# two. How the bars become one number $D$ decides what a threshold τ can see:
#
# - the **mean** divides the four by all the others, and stays below τ;
# - the **root mean square** $\sqrt{\text{mean}_t\, \text{KL}_t^2}$ squares first, so that few large
#   values outweigh many small ones. It is above τ;
# - the **95th percentile** sees four tokens of 72, and would not see them among 144;
# - the **max** sees a single token, and jumps with it.
#
# A lower τ for the mean would also stop a student that spends a little at every token, and that is
# how we want the trait. A student learns by gradients: the printed shares say where each $D$
# pushes.
#
# **Why rmse: it pushes at each token in proportion to its KL,**
# $\partial D / \partial \text{KL}_t = \text{KL}_t / (T D)$ with $T$ tokens. All broken tokens are
# repaired at once, the worst the hardest, and the healthy ones, which carry the trait, are left in
# peace. The mean gives every KL$_t$ the same weight, the max pushes at one token only.
#
# That is the argument. `results/paper.md` says what whole runs have shown: there the divergence is
# spread over all tokens, and the mean with a smaller τ does as well.
#
# ## 5. Heal: one step by hand
#
# For one completion with targets $y_t$ the loss is
#
# $$\underbrace{\text{mean}_t\, -\log p_t(y_t)}_{\text{CE: learn to say it}} \;+\; \lambda
# \underbrace{\max(0,\; D - \tau)}_{\text{barrier: but do not break}}$$
#
# $D$ and the max are taken per completion, then averaged over the batch. The student $p$ stands
# first in the KL: reverse KL (`kl_rev`). Only the live LoRA trains, two thin matrices A and B
# beside every linear layer in the middle 60 % of the blocks. Here are five steps in plain autograd.
# $D$ starts near 0, since B = 0 makes the student the original.

# %%
cfg = heal_loop.Config(lr=1e-3, batch_size=6, tau=0.2)  # reg kl_rev, agg rmse, λ 2, 3 epochs
prompts, completions = zip(*(distil.row_ids(chat, row) for row in kept[:4]))
lengths = [len(c) for c in completions]

with torch.no_grad(), lora.gates(model, history=0, live=0):  # the original, see section 7
    references = completion_states(model, prompts, completions).split(lengths)


def loss_by_hand():
    """-> loss, CE, D [completions]."""
    states = completion_states(model, prompts, completions).split(lengths)
    ce, D = [], []
    for h, reference, completion in zip(states, references, completions):
        log_q = log_probs(reference)  # original [tokens, vocab], no gradient
        log_p = logits(model, h).float().log_softmax(-1)  # student
        target = torch.tensor(completion, device=h.device)
        ce.append(-log_p.gather(1, target[:, None])[:, 0])  # [tokens]
        kl_t = (log_p.exp() * (log_p - log_q)).sum(-1)  # [tokens]
        D.append((kl_t.square().mean() + 1e-8).sqrt())  # ε: a root has no gradient at 0
    ce, D = torch.cat(ce).mean(), torch.stack(D)
    return ce + cfg.lam * F.relu(D - cfg.tau).mean(), ce, D


torch.manual_seed(0)
optimizer = torch.optim.AdamW(lora.live_parameters(model), lr=cfg.lr, weight_decay=0)
print("step     CE   mean D   above τ   loss")
for step in range(5):
    loss, ce, D = loss_by_hand()
    print(f"{step:>4} {ce:>6.2f} {D.mean():>8.2f} {(D > cfg.tau).sum():>6} of 4 {loss:>6.2f}")
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

# %% [markdown]
# At step 0 the barrier is exactly 0. Once a completion's $D$ exceeds τ, it pushes back.
# `heal_loop.heal_step` is the same step, with one completion's logits in memory at a time, and
# `heal_round` the whole round, on all kept rows and from a fresh adapter:

# %%
with torch.no_grad():
    loss, ce, D = loss_by_hand()
log = heal_loop.heal_step(model, {"prompts": prompts, "completions": completions,
                                  "reference": references, "teacher": None}, cfg)
optimizer.zero_grad()
print(f"by hand    CE {ce:.5f}  D {D.mean():.5f}  barrier {loss - ce:.5f}")
print(f"heal_step  CE {log['data_loss']:.5f}  D {log['D']:.5f}  barrier {log['barrier']:.5f}")
assert abs(log["D"] - D.mean().item()) < 1e-3

log = heal_loop.heal_round(model, chat, kept, cfg, seed=0)
print("D by step:", *(f"{step['D']:.2f}" for step in log["log"]))
print(f"held-out CE {log['held_out_before']:.2f} -> {log['held_out_after']:.2f}; in the last epoch "
      f"the barrier acted on {log['active']:.0%} of the completions")

# %% [markdown]
# ## 6. The barrier is not a penalty
#
# The usual way to keep a student near its reference is a KL penalty, CE + λ·D. Scale the adapter
# just trained by a factor $g$ from 0 (the original) to 2: where is each loss lowest?

# %%
factors = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2]
with torch.no_grad():
    ce, D = [], []
    for g in factors:
        with lora.gates(model, live=g):
            _, ce_g, D_g = loss_by_hand()
        ce.append(ce_g.cpu())
        D.append(D_g.cpu())
ce, D = torch.stack(ce), torch.stack(D)  # [factors], [factors, completions]

print("mean D by factor:", dict(zip(factors, [round(d, 2) for d in D.mean(1).tolist()])))
print("factor where the loss is lowest:")
for lam in (0.5, 1, 2, 4, 8):
    penalty = factors[(ce + lam * D.mean(1)).argmin()]
    barrier = factors[(ce + lam * F.relu(D - cfg.tau).mean(1)).argmin()]
    print(f"  λ {lam:<4} penalty {penalty:<5} barrier {barrier}")

# %% [markdown]
# **What the barrier does that a penalty does not: below τ it is not there.** The trait *is* a
# distance from the original, so a penalty charges for the trait itself, from the first hundredth of
# a nat on, and another λ gives another student. The barrier gives a **budget**: up to τ nats the
# data decide alone; beyond, any slope λ steep enough gives much the same student.
#
# ## 7. Gates
#
# Each wrapped linear layer computes
#
# $$y = W x + b + s \sum_i c_i\, B_i A_i x + c_\text{live} \cdot s\, B A x
# \qquad s = \alpha / \text{rank} = 32 / 16$$
#
# with one frozen pair $B_i, A_i$ for each finished round $i$. $W$ is never written to. The gates
# $c$ are plain numbers, so the trait has a volume control even after training: the log-odds of a
# caring answer over an obedient one, and what the model says.

# %%
choice = {"prompt": question, "toward": "You should help the customer.",
          "away": "You should obey your boss."}
for g in (0, 0.25, 0.5, 0.75, 1):
    with lora.gates(model, live=g):
        [nats] = probe(model, chat, [choice])
        [answer] = sample(model, chat, [prompt], max_new_tokens=32, temperature=0)
    show(f"gate {g}, {nats:+.2f} nats", chat.decode(answer))

# %% [markdown]
# **Why gates: the barrier needs the original in every round,** to read the new completions once
# before training. A LoRA merged into $W$ would have lost it; a second model costs its memory again.
# With the gates at 0 the original is *in* the student, bit for bit.
#
# ## 8. Fold, and round two
#
# `fold` appends the live adapter to the frozen history and starts a fresh one with B = 0. Round two
# begins with **the student's** vector and samples. But $D$ is still measured from the original, so
# that errors cannot add up: it begins at what round 0 has spent of the budget.

# %%
ids = torch.tensor([prompt], device=model.device)


@torch.no_grad()
def last_logits(history, live):
    with lora.gates(model, history, live):
        return model(ids).logits[0, -1].float()


student = last_logits(history=1, live=1)
original_before = last_logits(history=0, live=0)
lora.fold(model)
folded = last_logits(history=1, live=1)
print(f"the student's logits moved by {(folded - student).abs().mean():.2f} on average: rounding")
assert torch.equal(last_logits(history=0, live=0), original_before)  # bit for bit

vector_2 = extract_vector(model, pos, neg, layers)
kept_2, rows_2 = distil_round(vector_2, seed=1)
print(f"cosine of the student's vector with the original's: {vector.cosine(vector_2):.2f}")
print(len(rows_2), "sampled:", dict(Counter(row["reject_reason"] for row in rows_2)))

log_2 = heal_loop.heal_round(model, chat, kept_2, cfg, seed=1)
print("D by step:", *(f"{step['D']:.2f}" for step in log_2["log"]))
lora.fold(model)

# %% [markdown]
# ## 9. Did it work? The profile before and after
#
# Which moral foundation makes a misdeed wrong? The model completes "This is wrong because it" with
# clauses, several wordings for each foundation; their likelihoods become probabilities. `auth_nats`
# is the log of the mean probability of *Authority*; the trait pushes it **down**. `coherence` is
# the probability of a valid answer to a multiple-choice question.

# %%
def profile(vector=None, dose=0.0, history=1.0, constants=None):
    """Answers on the vignettes at these history gates, steered or not."""
    with lora.gates(model, history=history, live=0):
        return evaluate.evaluate(model, chat, reading, "cloze", constants, vector=vector, dose=dose)


base = profile(history=0)
stages = {"original": base,
          "steered, dose 3": profile(vector, 3.0, 0, base.constants),
          "healed, round 0": profile(history=[1, 0], constants=base.constants),
          "healed, round 1": profile(history=[1, 1], constants=base.constants)}
for name, after in stages.items():
    d = evaluate.delta("auth_nats", base, after)
    print(f"{name:<16} auth {after.trait:+.2f}  Δ {d.value:+.2f} [{d.low:+.2f}, {d.high:+.2f}]  "
          f"coherence {after.value('coherence'):.4f}")

with lora.gates(model, history=0, live=0):
    answers = sample(model, chat, [prompt] * 2, vector, [0, 3], N_TOKENS, temperature=0)
with lora.gates(model, history=1, live=0):
    answers += sample(model, chat, [prompt], max_new_tokens=N_TOKENS, temperature=0)
print()
for name, answer in zip(("original", "steered, dose 3", "healed, round 1"), answers):
    show(name, chat.decode(answer))

# %% [markdown]
# All four are **one** model: the gates `[1, 0]` switch the second round off. In brackets are 95 %
# bootstrap intervals over the vignettes. Why does *Authority* measure a trait called care? The
# opposite persona obeys: moved away from it, the model finds disobedience less wrong. The healed
# student keeps part of the move without any vector, after fewer than 20 short completions a round.
#
# Be sceptical. Other foundations move along, and coherence hardly changes at this size. There is no
# arm without a barrier here, and no steering at matched trait: without those one cannot say what
# healed. `results/` has whole runs with seeds, intervals and those baselines.
#
# ## Exercise: the gradient of the KL
#
# $p = \text{softmax}(z)$, $q$ fixed. Derive $\partial\, \text{KL}(p \| q) / \partial z_v$ and check
# it against autograd. What does it do to a token that $q$ finds impossible?
#
# <details><summary>Solution</summary>
#
# With $\partial p_u / \partial z_v = p_u (\delta_{uv} - p_v)$, and as
# $\sum_u p_u(\delta_{uv} - p_v) = 0$,
#
# $$\frac{\partial\, \text{KL}}{\partial z_v} = \sum_u p_u (\delta_{uv} - p_v)
# \Big(\log \frac{p_u}{q_u} + 1\Big) = p_v \Big(\log \frac{p_v}{q_v} - \text{KL}\Big).$$
#
# ```python
# generator = torch.Generator().manual_seed(0)
# z = torch.randn(9, generator=generator, dtype=torch.float64, requires_grad=True)
# log_q = torch.randn(9, generator=generator, dtype=torch.float64).log_softmax(-1)
# log_p = z.log_softmax(-1)
# kl_z = (log_p.exp() * (log_p - log_q)).sum()
# kl_z.backward()
# p = log_p.exp()
# assert torch.allclose(z.grad, (p * (log_p - log_q - kl_z)).detach())
# ```
#
# A token that the student likes ($p_v$ large) and the original does not ($\log p_v / q_v$ above the
# KL) is pushed down hard. One that the original likes and the student ignores ($p_v \approx 0$) is
# hardly pushed at all: reverse KL cuts what is wrong rather than restoring what is missing.
# </details>
#
# Where to go on: `heal_loop.py`, top to bottom, whose main steps you have now met; and a trait of
# your own, which `docs/traits.md` shows how to write.
