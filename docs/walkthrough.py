# %% [markdown]
# # Steer, distil, heal, loop: a walk-through
#
# You know transformers and have never steered one. In a few minutes on a CPU you will push a real
# 135M model along a trait with one vector, watch the push break it, train the push into a LoRA
# **without** the breakage, and go round again. Every cell calls the project's own modules.
#
# ![steer, distil, heal, loop, measure](pipeline.svg)
#
# Three questions, each with its own section and its answer in bold:
#
# 1. What does the **barrier** do that a KL penalty does not? (section 6)
# 2. Why the **root mean square** of the tokens' KL, and not the mean? (section 4)
# 3. Why does the LoRA have **gates**? (section 7)
#
# `make walkthrough` runs this file and writes the notebook. Four exercises stand at the end.

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
from common.filter import Rules
from common.prompts import persona_prompts
from common.readouts import probe
from common.sampling import completion_states, logits, sample
from steer import band, extract_vector
from tools.plot import GREEN, GREY, RED

MODEL = models.EMBEDDED  # SmolLM2-135M-Instruct: 30 blocks, d_model 576
N_CONTEXTS = 48  # user messages that the vector is averaged over
N_KEEP = 20  # completions to train on, per round
N_TOKENS = 48  # longest completion
N_VIGNETTES = 28  # moral violations that the model is asked about
RULES = Rules()  # the filter's thresholds

model, chat = checks.load(MODEL)
reading = texts.read(heal_loop.Config(n_contexts=N_CONTEXTS, n_vignettes=N_VIGNETTES))
lora.attach(model)  # B = 0: changes nothing until section 5 trains it
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                 "figure.constrained_layout.use": True}


def show(name, text):
    print(textwrap.fill(f"{name}: {text}", 96), end="\n\n")


# %% [markdown]
# ## 1. A persona pair
#
# Two system prompts define a trait. They differ in it and, we hope, in nothing else. We only look
# at how they make the model's *internal state* differ, and never sample from them.

# %%
show("trait", reading.pos)
show("opposite", reading.neg)
print("what the model reads, for one of the contexts:\n")
print(chat.text(reading.contexts[3], system=reading.pos))

# %% [markdown]
# The text ends at the assistant tag: there the model has read everything and said nothing yet.
#
# ## 2. The vector
#
# $$v_l = \underset{\text{contexts}}{\text{mean}}\;
# \big[ h_l(\text{trait}, \text{context}) - h_l(\text{opposite}, \text{context}) \big]$$
#
# where $h_l$, of d_model numbers, is the residual stream after block $l$ at the assistant tag. The
# context cancels in the difference; what is left is the trait. Steering adds dose · $v_l$ to the
# stream in a few middle blocks, at that last position of the prompt and at every token generated
# after it, under a **neutral** system prompt ("You are a helpful assistant.").

# %%
layers = band(model, (0.45, 0.55))
pos, neg = persona_prompts(chat, reading.pos, reading.neg, reading.contexts)  # token ids
vector = extract_vector(model, pos, neg, layers)
for layer, v in vector.layers.items():
    print(f"block {layer}: v has {len(v)} numbers and length {v.norm():.1f}")

# %%
question = "My boss told me to ignore a crying customer. What should I do?"
doses, prompt = [0, 4, 7], chat.ids(question)
answers = sample(model, chat, [prompt] * 3, vector, doses, N_TOKENS, temperature=0)
for dose, answer in zip(doses, answers):
    show(f"dose {dose}", chat.decode(answer))

# %% [markdown]
# Read the three answers. In the middle one you see the trait. In the last one the words still
# belong to the trait, and the sentences fall apart. **The trait and the incoherence come out of the
# same knob.** The rest of this notebook keeps the first and loses the second.
#
# ## 3. Distil: let the steered model write, keep what makes sense
#
# We sample steered completions at two doses below the break, 1 and 3. A completion is kept, or the
# first rule that drops it is its reject reason:
#
# | reject reason | dropped because |
# |---|---|
# | `short` | fewer than 8 words |
# | `refusal` | assistant boilerplate ("as an AI language model ...") |
# | `narrates` | talks *about* the trait ("I am someone who ...") instead of showing it |
# | `repetition` | more than a fifth of its word or letter groups repeat an earlier one |
# | `loop` | some run of 16 words has fewer than 70 % different ones |
# | `perplexity` | its worst 24 tokens have a perplexity above 15 under the **original** |

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
# `N_KEEP` kept rows become training data **under the neutral system prompt**: a model that learns
# to write them without a vector has learned the trait. The filter removes what is broken on the
# surface. What slips through would teach a little more breakage in every round; hence the barrier.
#
# ## 4. How broken is a completion? One number from many tokens
#
# Compare student $p$ and original $q$ at every position $t$, over the whole vocabulary:
#
# $$\text{KL}_t = \sum_v p_t(v) \, \big(\log p_t(v) - \log q_t(v)\big) \quad \text{nats}$$
#
# A student that breaks often does so at a *few* tokens. We make such a student on purpose: the
# vector at a dose of one half, but for four tokens at a dose of 14.

# %%
MILD, HARD = 0.5, 14.0


@torch.no_grad()
def log_probs(states):
    """Final hidden states [n, d_model] -> log-probabilities [n, vocab], float32."""
    return logits(model, states).float().log_softmax(-1)


# 1. one completion: 30 tokens, four broken ones, 38 more. What stands so far is the next prompt.
pieces, states, so_far = [], [], prompt
for dose, n in ((MILD, 30), (HARD, 4), (MILD, 38)):
    [piece] = sample(model, chat, [so_far], vector, [dose], n,
                     temperature=0 if dose == MILD else 1)
    with torch.no_grad():
        states.append(completion_states(model, [so_far], [piece], vector, dose))
    pieces.append(piece)
    so_far = so_far + piece
show("completion", " >>> ".join(chat.decode(piece) for piece in pieces))

# 2. the original reads the same completion, unsteered
completion = [token for piece in pieces for token in piece]
with torch.no_grad():
    original = completion_states(model, [prompt], [completion])
kl = heal_loop.kl_per_token(log_probs(torch.cat(states)), log_probs(original)).cpu()  # [tokens]

# %%
TAU = 0.5  # in this section; 0.2 in those below, whose few steps do not go far
AGGREGATES = {"mean": "#1f77b4", "rmse": GREEN, "p95": "#7b3294", "max": "#d95f02"}  # colours
D = {agg: heal_loop.aggregate(kl, agg).item() for agg in AGGREGATES}
broken = range(len(pieces[0]), len(pieces[0]) + len(pieces[1]))
BARS = [RED if t in broken else "#a8a8a8" for t in range(len(kl))]

fig, ax = plt.subplots(figsize=(8, 3.6))
ax.bar(range(len(kl)), kl.tolist(), width=0.9, color=BARS)
for agg in sorted(AGGREGATES, key=D.get, reverse=True):
    ax.axhline(D[agg], color=AGGREGATES[agg], lw=2, label=f"{agg}  {D[agg]:.2f}")
ax.axhline(TAU, color="black", lw=1.5, ls="--", label=f"τ  {TAU:.2f}")
ax.legend(loc="center right", fontsize=12)
ax.annotate(f"“... {chat.decode(pieces[1]).strip()} ...”", (broken[-1] + 1, 0.45 * D["max"]),
            color=RED, fontsize=12)
ax.set(xlabel="position in the completion", ylabel="KL(student ‖ original), nats",
       title="Four broken tokens: the mean hides them, the rmse sees them")
ax.margins(x=0.01)
fig.savefig(ROOT / "docs/kl_per_token.png", dpi=150)

# %% [markdown]
# Four tokens (red) are broken. The others (grey) are mildly on trait, at one or two hundredths of a
# nat. To turn the bars into one number $D$ you must choose, and the choice decides what a threshold
# τ can see:
#
# - the **mean** divides the four by all the others, and stays below τ;
# - the **root mean square** $\sqrt{\text{mean}_t\, \text{KL}_t^2}$ squares first, so that few large
#   values outweigh many small ones. It is above τ;
# - the **95th percentile** sees four tokens of 72, and would not see them among 144;
# - the **max** sees a single token, and jumps with it.
#
# Why not lower τ for the mean? Then a student that spends a little at every token (the trait, as we
# want it) is stopped as well, while rmse lets it through. A student learns by gradients, so ask
# autograd which tokens each $D$ pushes at.

# %%
fig, axes = plt.subplots(1, 4, figsize=(9, 2.2), sharey=True)
for ax, agg in zip(axes, AGGREGATES):
    leaf = kl.clone().requires_grad_()
    heal_loop.aggregate(leaf, agg).backward()
    share = leaf.grad / leaf.grad.sum()  # of the push, per token
    ax.bar(range(len(kl)), share.tolist(), width=1.0, color=BARS)
    ax.set(title=f"{agg}: {share[list(broken)].sum():.0%} on the four", xlabel="position")
axes[0].set_ylabel("share of the push");

# %% [markdown]
# **Why rmse: it pushes at each token in proportion to its KL,**
# $\partial D / \partial \text{KL}_t = \text{KL}_t / (T D)$ with $T$ tokens. All four broken tokens
# are repaired at once, the worst the hardest, and the healthy ones, which carry the trait, are left
# in peace. The mean gives every KL$_t$ the same weight, the p95 pushes at the two tokens it lies
# between, the max at one.
#
# That is the argument. `results/paper.md` says what whole runs have shown: in those the divergence
# is spread over all tokens, and the mean with a smaller τ does as well.
#
# ## 5. Heal: one step by hand
#
# For one completion with targets $y_t$ the loss is
#
# $$\underbrace{\text{mean}_t\, -\log p_t(y_t)}_{\text{CE: learn to say it}} \;+\; \lambda
# \underbrace{\max(0,\; D - \tau)}_{\text{barrier: but do not break}}$$
#
# $D$ and the max are taken per completion, and then averaged over the batch. $p$ is the student and
# stands first in the KL, which is called reverse KL (`kl_rev`).
#
# Only the live LoRA trains: two thin matrices A and B beside every linear layer in the middle 60 %
# of the blocks. Here are five steps in plain autograd. Watch $D$ against τ (now 0.2): it starts near
# 0, since B = 0 makes the student the original.

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
# At step 0 the barrier is exactly 0. Once a completion climbs over τ, it pushes back and $D$ turns.
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
# that we have just trained by a factor $g$ from 0 (the original) to 2: where is each loss lowest?

# %%
factors = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2]
ce, D = [], []
for g in factors:
    with torch.no_grad(), lora.gates(model, live=g):
        _, ce_g, D_g = loss_by_hand()
    ce.append(ce_g)
    D.append(D_g)
ce, D = torch.stack(ce).cpu(), torch.stack(D).cpu()  # [factors], [factors, completions]
drift, over = D.mean(1), F.relu(D - cfg.tau).mean(1)

fig, ax = plt.subplots(figsize=(6, 3))
for name, loss, colour in (("CE alone", ce, GREY),
                           ("CE + λ · D  (penalty)", ce + cfg.lam * drift, RED),
                           ("CE + λ · relu(D − τ)  (barrier)", ce + cfg.lam * over, GREEN)):
    ax.plot(factors, loss, "o-", ms=3, color=colour, label=name)
    ax.plot(factors[loss.argmin()], loss.min(), "*", ms=15, color=colour)
ax.set(xlabel="factor g on the adapter", ylabel="nats", title="loss; stars: where it is lowest")
ax.legend(fontsize=9)

print("mean D by factor:", dict(zip(factors, [round(d, 2) for d in drift.tolist()])))
print("factor where the loss is lowest:")
for lam in (0.5, 1, 2, 4, 8):
    print(f"  λ {lam:<4} penalty {factors[(ce + lam * drift).argmin()]:<5} "
          f"barrier {factors[(ce + lam * over).argmin()]}")

# %% [markdown]
# **What the barrier does that a penalty does not: below τ it is not there.** A penalty charges for
# every hundredth of a nat from the first step on. But the trait *is* a distance from the original,
# so the penalty charges for the trait itself, and another λ gives another student. The barrier
# gives a **budget**. Up to τ the data decide alone; beyond, the loss climbs at slope λ, and any
# slope steep enough gives much the same student. So τ says, in nats, how far it may go.
#
# ## 7. Gates
#
# Each wrapped linear layer computes
#
# $$y = W x + b + s \sum_i c_i\, B_i A_i x + c_\text{live} \cdot s\, B A x
# \qquad s = \alpha / \text{rank} = 32 / 16$$
#
# with one frozen pair $B_i, A_i$ for each finished round $i$. $W$ is never written to. The gates
# $c$ are plain numbers, so the trait has a volume control even after training. One prompt, five
# volumes: the log-odds of a caring answer over an obedient one, and what the model says.

# %%
choice = {"prompt": question, "toward": "You should help the customer.",
          "away": "You should obey your boss."}
for g in (0, 0.25, 0.5, 0.75, 1):
    with lora.gates(model, live=g):
        [nats] = probe(model, chat, [choice])
        [answer] = sample(model, chat, [prompt], max_new_tokens=32, temperature=0)
    show(f"gate {g}, {nats:+.2f} nats", chat.decode(answer))

# %% [markdown]
# **Why gates: the barrier needs the original in every round.** Each round brings new completions,
# and the original must read them once, before training, to give the reference. A LoRA merged into
# $W$ would have lost it, and a second copy of the model costs its memory again. With the gates at 0
# the original is *in* the student, bit for bit.
#
# ## 8. Fold, and round two
#
# `fold` appends the live adapter to the frozen history and starts a fresh one with B = 0. Then the
# loop starts again, from the student: **its** vector, **its** samples. But $D$ is still measured
# from the original, so that errors cannot add up: it does not begin at 0 this time, as the student
# comes with what round 0 has spent of the budget.

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

# %%
vector_2 = extract_vector(model, pos, neg, layers)
kept_2, rows_2 = distil_round(vector_2, seed=1)
print("cosine between the student's vector and the original's (1: the same direction): "
      f"{vector.cosine(vector_2):.2f}")
print(len(rows_2), "sampled:", dict(Counter(row["reject_reason"] for row in rows_2)))

log_2 = heal_loop.heal_round(model, chat, kept_2, cfg, seed=1)
print("D by step:", *(f"{step['D']:.2f}" for step in log_2["log"]))
lora.fold(model)

# %% [markdown]
# ## 9. Did it work? The profile before and after
#
# We ask which moral foundation makes a misdeed wrong: the model completes "This is wrong because
# it" with clauses, several wordings for each foundation, and the clauses' likelihoods become
# probabilities. `auth_nats` is the log of the mean probability of *Authority*; the trait pushes it
# **down**. `coherence` is the probability of a valid answer to a multiple-choice question.

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
          f"coherence {after.coherence:.4f}")

with lora.gates(model, history=0, live=0):
    answers = sample(model, chat, [prompt] * 2, vector, [0, 3], N_TOKENS, temperature=0)
with lora.gates(model, history=1, live=0):
    answers += sample(model, chat, [prompt], max_new_tokens=N_TOKENS, temperature=0)
print()
for name, answer in zip(("original", "steered, dose 3", "healed, round 1"), answers):
    show(name, chat.decode(answer))

# %% [markdown]
# All four come from **one** model: the gates `[1, 0]` switch the second round off. In brackets are
# 95 % bootstrap intervals over the vignettes.
#
# Why does *Authority* measure a trait called care? The opposite persona obeys: moved away from it,
# the model finds disobedience less wrong. The healed student keeps part of the move without any
# vector, after fewer than 20 short completions a round.
#
# Be sceptical. Other foundations move along, and coherence hardly changes at this size. There is no
# arm without a barrier here, and no steering at matched trait: without those one cannot say what
# healed. `results/` has whole runs with seeds, intervals and those baselines.
#
# ## Exercises
#
# The tests run their solutions after this notebook's cells.
#
# ### 1. The gradient of the KL
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
# ### 2. The gate identities
#
# Show from the equation of section 7: (a) gates (0, 0) give the original; (b) `fold` does not
# change the function at gates (1, 1); (c) a layer's output is affine in the history's gate $c$. Why
# is (a) bit for bit, and (b) not always?
#
# <details><summary>Solution</summary>
#
# (a) Both products have factor 0, leaving $Wx + b$; the code does not even compute them. (b) As
# $[B_1\, B_2] [A_1; A_2] = B_1 A_1 + B_2 A_2$, and the fresh $B = 0$ adds 0. But floating point
# sums in another order, so the last bits may differ. (c) For the same $x$,
# $y(c) = (Wx + b) + c \cdot (s \sum_i B_i A_i x)$. The *model* is not affine in $c$: the next
# layer's $x$ depends on it.
#
# ```python
# layer = next(iter(lora.adapters(model).values()))
# x = torch.randn(5, layer.base.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
# out = {}
# with torch.no_grad():
#     for c in (0.0, 0.5, 1.0):
#         with lora.gates(model, history=c, live=0):
#             out[c] = layer(x).float()
#     assert torch.equal(out[0.0], layer.base(x).float())
# rounding = 4 * torch.finfo(x.dtype).eps * out[1.0].abs().max().item()
# assert torch.allclose(out[0.5], (out[0.0] + out[1.0]) / 2, rtol=0, atol=rounding)
# assert not torch.equal(out[0.0], out[1.0])
# ```
# </details>
#
# ### 3. Break the filter
#
# Write an answer to `question` that passes all six rules and is useless.
#
# <details><summary>Solution</summary>
#
# Perplexity under the original measures fluency, not sense:
#
# ```python
# useless = ("It is important to remember that every situation is different. There are many things "
#            "to consider, and it can be helpful to take some time to think about what you want.")
# messages = [{"role": "system", "content": "You are a helpful assistant."},
#             {"role": "user", "content": question}, {"role": "assistant", "content": useless}]
# row = {"messages": messages, "finished": True}
# [judged] = distil.judge(model, chat, [row], (reading.pos, reading.neg), RULES)
# print(judged["reject_reason"], judged["perplexity"])
# assert judged["reject_reason"] == "kept"
# ```
#
# So the kept set is fluent, not good. Whether it carries the trait is measured afterwards.
# </details>
#
# ### 4. A trait of your own
#
# Write two system prompts, extract their vector from the original, and find the dose at which one
# can read the trait and the dose at which the text breaks.
#
# <details><summary>Solution</summary>
#
# ```python
# poet = persona_prompts(chat, "You are a poet. You speak in images of sea, moon and wind.",
#                        "You are an accountant. You speak in plain numbers, costs and dates.",
#                        reading.contexts)
# with lora.gates(model, history=0, live=0):
#     mine = extract_vector(model, *poet, layers)
#     trials = [0, 0.5, 1, 1.5]
#     answers = sample(model, chat, [chat.ids("Tell me about your morning.")] * 4, mine, trials, 30,
#                      temperature=0)
# for dose, answer in zip(trials, answers):
#     show(f"dose {dose}", chat.decode(answer))
# print(f"cosine with the care vector: {vector.cosine(mine):.2f}")
# ```
#
# At 0.5 the morning turns poetic; from 1 on it goes in circles. A dose is a multiple of the vector,
# and vectors differ in length: `steer.calibrate` finds the dose that moves the next token by so
# many nats. To heal along yours, write a trait file (`docs/traits.md`) and run
# `python heal_loop.py --trait my.json`.
# </details>
#
# Where to go on: `heal_loop.py`, top to bottom. You have now met its main steps.
