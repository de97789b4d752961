"""The barrier and the heal step against definitions, float64, finite differences and autograd."""
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import lora
from conftest import tiny
from heal_loop import Config, aggregate, barrier_loss, heal_step, kl_per_token
from common.sampling import completion_states, logits
from test_lora import of_every_architecture, train_a_little

pytestmark = pytest.mark.filterwarnings("ignore:LoRA reaches")  # of mixtral's experts

AGGREGATES = ["mean", "rmse", "p95", "max"]
DIVERGENCES = ["kl_rev", "kl_fwd"]


def config(reg, agg, lam=3.0, tau=0.01):
    return Config(reg=reg, agg=agg, lam=lam, tau=tau)


# ---- the equation -------------------------------------------------------------------------------


def float64_reference(logits_p, logits_q):
    """KL(p‖q) per position by the definition, in float64, without log_softmax."""
    p, q = (torch.exp(z.double()) / torch.exp(z.double()).sum(-1, keepdim=True)
            for z in (logits_p, logits_q))
    return (p * (p / q).log()).sum(-1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), scale=st.sampled_from([0.01, 1, 10]),
       apart=st.sampled_from([0, 1e-6, 1e-3, 1, 10]))
def test_kl_is_never_negative_zero_at_equality_and_agrees_with_float64_in_both_directions(
        seed, scale, apart):
    a, step = torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(seed))
    a, b = scale * a, scale * a + apart * step
    logp, logq = a.log_softmax(-1), b.log_softmax(-1)
    for kl, expected in ((kl_per_token(logp, logq), float64_reference(a, b)),
                         (kl_per_token(logq, logp), float64_reference(b, a))):
        assert (kl >= 0).all()
        torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-5)
    assert (kl_per_token(logp, logp) == 0).all() and (kl_per_token(logq, logq) == 0).all()


@settings(max_examples=25, deadline=None)
@given(kl=st.lists(st.floats(0, 50), min_size=1, max_size=40))
def test_aggregates_are_their_formulas_and_are_ordered(kl):
    of = torch.tensor(kl, dtype=torch.float64)
    mean, rmse, p95, most = (aggregate(of, agg).item() for agg in AGGREGATES)
    assert mean == pytest.approx(sum(kl) / len(kl), rel=1e-9)
    assert rmse == pytest.approx(math.sqrt(sum(x * x for x in kl) / len(kl) + 1e-8), rel=1e-9)
    s, place = sorted(kl), 0.95 * (len(kl) - 1)  # linear interpolation between order statistics
    below, above = s[int(place)], s[math.ceil(place)]
    assert p95 == pytest.approx(below + place % 1 * (above - below), rel=1e-9)
    assert most == max(kl)
    assert mean <= rmse <= math.hypot(most, 1e-4) * (1 + 1e-12)  # ε = 1e-8 lies under the root
    assert p95 <= most


def test_rmse_sees_the_four_broken_tokens_that_a_mean_hides():
    kl = torch.full((60,), 0.03)
    kl[-4:] = 5.0
    assert aggregate(kl, "mean") < 0.5 < aggregate(kl, "rmse")


def log_probabilities(dtype=torch.float64):
    """-> of a student and of the original, random, [9 tokens, 11 words], and 9 targets."""
    g = torch.Generator().manual_seed(3)
    student, original = torch.randn(2, 9, 11, generator=g, dtype=dtype).log_softmax(-1)
    return student, original, torch.randint(0, 11, (9,), generator=g)


@pytest.mark.parametrize("agg", AGGREGATES)
@pytest.mark.parametrize("reg", DIVERGENCES)
def test_the_barriers_gradient_agrees_with_finite_differences(reg, agg):
    student, original, targets = log_probabilities()

    def loss(z):
        ce, D, over = barrier_loss(z.log_softmax(-1), original, targets, reg, agg, tau=0.1)
        return ce, D, over, ce.mean() + 3.0 * over
    assert loss(student)[2] > 0
    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("agg", AGGREGATES)
@pytest.mark.parametrize("reg", DIVERGENCES)
def test_the_barrier_acts_by_how_far_d_exceeds_tau_and_not_at_all_below(reg, agg):
    student, original, targets = log_probabilities()
    student.requires_grad_()
    kl = float64_reference(*((student, original) if reg == "kl_rev" else (original, student)))
    ce, D, _ = barrier_loss(student, original, targets, reg, agg)
    torch.testing.assert_close(ce, F.nll_loss(student, targets, reduction="none"))
    torch.testing.assert_close(D, aggregate(kl, agg), rtol=1e-9, atol=0)
    for tau in (0.5 * D.item(), 2 * D.item()):
        over = barrier_loss(student, original, targets, reg, agg, tau)[2]
        gradient, = torch.autograd.grad(over, student)
        assert over.item() == pytest.approx(max(0.0, D.item() - tau))
        assert gradient.any() == (tau < D)


def test_the_three_functions_copied_out_run_alone():
    alone = {"torch": torch, "F": F}
    for function in (kl_per_token, aggregate, barrier_loss):
        exec(inspect.getsource(function), alone)
    for reg in (*DIVERGENCES, "nll", "wd"):
        for agg in AGGREGATES:
            asked = *log_probabilities(torch.float32), reg, agg, 0.1
            for a, b in zip(alone["barrier_loss"](*asked), barrier_loss(*asked), strict=True):
                assert torch.equal(a, b)


# ---- the heal step ------------------------------------------------------------------------------

LENGTHS = st.lists(st.tuples(st.sampled_from([1, 6, 9]), st.integers(1, 11)),
                   min_size=1, max_size=4)


def batch(lengths=((6, 5), (9, 8), (4, 11))):
    """-> prompts, the same one for the same length, and completions, all random."""
    g = torch.Generator().manual_seed(5)
    text = torch.randint(3, 128, (9,), generator=g).tolist()
    completions = [torch.randint(3, 128, (n,), generator=g).tolist() for _, n in lengths]
    return [text[:n] for n, _ in lengths], completions


def healing(name, trained=True, **how):
    """-> a student, and prompts, completions and the original's hidden states to heal it with."""
    model = tiny(name)
    lora.attach(model, rank=4, alpha=8, layers=(0, 1))
    prompts, completions = batch(**how)
    with torch.no_grad():
        references = [completion_states(model, [p], [c]) for p, c in zip(prompts, completions)]
    if trained:
        train_a_little(model, size=0.2)
    return model, prompts, completions, references


def step(model, *args, **how):
    """-> the log of a heal step, and the gradients of the live factors."""
    model.zero_grad()
    stats = heal_step(model, *args, **how)
    return stats, [p.grad.clone() for p in lora.live_parameters(model)]


def assert_gradients_close(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-5 + 1e-3 * b.abs().max().item())


def plain_loss(model, prompts, completions, cfg):
    """The module docstring's loss, row by row over full logits, by autograd alone."""
    ce, barriers = [], []
    for p, c in zip(prompts, completions):
        ids, at = torch.tensor([p + c]), slice(len(p) - 1, len(p) + len(c) - 1)
        logp = model(input_ids=ids).logits[0, at].float().log_softmax(-1)
        with torch.no_grad(), lora.gates(model, history=0, live=0):
            logq = model(input_ids=ids).logits[0, at].float().log_softmax(-1)
        ce.append(-logp[range(len(c)), c])
        if cfg.reg == "kl_fwd":
            kl = (logq.exp() * (logq - logp)).sum(-1)
        else:
            kl = (logp.exp() * (logp - logq)).sum(-1)
        barriers.append(torch.relu(aggregate(kl, cfg.agg) - cfg.tau))
    return torch.cat(ce).mean(), cfg.lam * torch.stack(barriers).mean()


@of_every_architecture(max_examples=6, reg=st.sampled_from(DIVERGENCES),
                       agg=st.sampled_from(AGGREGATES), tau=st.sampled_from([0.0, 0.02]),
                       lengths=LENGTHS)
def test_heal_step_equals_plain_autograd_over_full_logits(name, reg, agg, tau, lengths):
    cfg = config(reg, agg, tau=tau)
    model, prompts, completions, references = healing(name, lengths=lengths)
    stats, ours = step(model, prompts, completions, references, cfg)
    model.zero_grad()
    data, barrier = plain_loss(model, prompts, completions, cfg)
    assert stats["data_loss"] == pytest.approx(data.item(), rel=1e-5)
    assert stats["barrier"] == pytest.approx(barrier.item(), rel=1e-4, abs=1e-6)
    assert barrier > 0 or tau
    (data + barrier).backward()
    assert_gradients_close(ours, [p.grad for p in lora.live_parameters(model)])


@pytest.mark.parametrize("agg", AGGREGATES)
@pytest.mark.parametrize("reg", ["nll", "wd"])
def test_without_a_divergence_the_loss_is_the_data_loss_and_d_is_measured_as_kl_revs(reg, agg):
    cfg = config(reg, agg, tau=0.0)
    model, *given = healing("llama")
    stats, ours = step(model, *given, cfg, diagnose=True)
    assert stats["barrier"] == 0 and stats["grad_ratio"] == 0
    model.zero_grad()
    data, _ = plain_loss(model, *given[:2], cfg)
    data.backward()
    assert stats["data_loss"] == pytest.approx(data.item(), rel=1e-5)
    assert_gradients_close(ours, [p.grad for p in lora.live_parameters(model)])
    rev, _ = step(model, *given, config("kl_rev", agg, tau=0.0))
    assert stats["D"] == rev["D"] > 0.01 and stats["D_max"] == rev["D_max"]
    assert stats["active"] == rev["active"] == 1


@pytest.mark.parametrize("agg", AGGREGATES)
def test_gradients_are_finite_at_a_fresh_adapter(agg):
    model, *given = healing("llama", trained=False)
    stats, gradients = step(model, *given, config("kl_rev", agg, tau=0.0), diagnose=True)
    assert stats["D"] < 1e-3 and all(map(math.isfinite, stats.values()))
    assert all(g.isfinite().all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("reg", DIVERGENCES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_one_completion_at_a_time_changes_no_number(name, reg):
    """A batch is the sum of its completions: data by share of tokens, barriers equally."""
    model, prompts, completions, references = healing(name)
    cfg, data_only = config(reg, "rmse"), config(reg, "rmse", lam=0.0)
    whole, ours = step(model, prompts, completions, references, cfg)
    n, tokens = len(completions), sum(map(len, completions))
    alone, expected = [], [0] * len(ours)
    for p, c, reference in zip(prompts, completions, references):
        stats, both = step(model, [p], [c], [reference], cfg)
        _, data = step(model, [p], [c], [reference], data_only)
        for k, (b, d) in enumerate(zip(both, data)):
            expected[k] = expected[k] + len(c) / tokens * d + (b - d) / n
        alone.append(stats)
    shares = [len(c) / tokens for c in completions]
    data = sum(share * stats["data_loss"] for share, stats in zip(shares, alone))
    assert whole["data_loss"] == pytest.approx(data, rel=1e-5)
    for key in ("barrier", "D", "active"):
        assert whole[key] == pytest.approx(sum(stats[key] for stats in alone) / n, rel=1e-4)
    assert whole["D_max"] == pytest.approx(max(stats["D"] for stats in alone), rel=1e-4)
    assert_gradients_close(ours, expected)


@pytest.mark.parametrize("agg", AGGREGATES)
@pytest.mark.parametrize("reg", DIVERGENCES)
def test_grad_ratio_is_of_the_two_losses_gradients_at_the_hidden_states_and_costs_no_number(
        reg, agg):
    cfg = config(reg, agg)
    model, prompts, completions, references = healing("llama")
    quiet, gradients = step(model, prompts, completions, references, cfg)
    stats, same = step(model, prompts, completions, references, cfg, diagnose=True)
    ratio = stats.pop("grad_ratio")
    assert stats == pytest.approx(quiet, rel=1e-6) and "grad_ratio" not in quiet
    for a, b in zip(gradients, same, strict=True):
        torch.testing.assert_close(a, b)

    with torch.no_grad():
        hidden = completion_states(model, prompts, completions)
    hidden.requires_grad_()
    lengths, ce, barriers = list(map(len, completions)), [], []
    for h, c, reference in zip(hidden.split(lengths), completions, references):
        logp, logq = (logits(model, states).log_softmax(-1) for states in (h, reference))
        ce.append(-logp[range(len(c)), c])
        p, q = (logp, logq) if reg == "kl_rev" else (logq, logp)
        kl = (p.exp() * (p - q)).sum(-1)
        barriers.append(torch.relu(aggregate(kl, agg) - cfg.tau))
    data, = torch.autograd.grad(torch.cat(ce).mean(), hidden, retain_graph=True)
    barrier, = torch.autograd.grad(cfg.lam * torch.stack(barriers).mean(), hidden)
    assert ratio == pytest.approx((barrier.norm() / data.norm()).item(), rel=1e-3) and ratio > 0.01


@of_every_architecture(max_examples=6, lengths=LENGTHS, cut=st.integers(1, 11))
def test_the_mask_is_exact_the_loss_sees_every_completion_token_and_no_prompt_token(
        name, lengths, cut):
    model, prompts, completions, references = healing(name, lengths=lengths)

    @torch.no_grad()
    def losses(completions, references):
        """-> per completion CE_t and KL_t, each [tokens]."""
        lengths, found = list(map(len, completions)), []
        hidden = completion_states(model, prompts, completions)
        assert len(hidden) == sum(lengths)
        for h, c, reference in zip(hidden.split(lengths), completions, references, strict=True):
            logp, logq = (logits(model, states).log_softmax(-1) for states in (h, reference))
            ce, D, _ = barrier_loss(logp, logq, torch.tensor(c), "kl_rev", "mean")
            kl = kl_per_token(logp, logq)
            assert len(ce) == len(kl) == len(c) and D == kl.mean()
            found.append((ce, kl))
        return found
    whole = losses(completions, references)
    truncated = losses([c[:cut] for c in completions], [r[:cut] for r in references])
    stats = heal_step(model, prompts, completions, references, config("kl_rev", "mean"))
    D = sum(kl.mean().item() for _, kl in whole) / len(whole)
    assert stats["D"] == pytest.approx(D, rel=1e-4)
    cases = zip(prompts, completions, whole, truncated, strict=True)
    for p, c, (ce, kl), (ce_cut, kl_cut) in cases:
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([p + c])).logits[0].float().log_softmax(-1)
            with lora.gates(model, history=0, live=0):
                logq = model(input_ids=torch.tensor([p + c])).logits[0].float().log_softmax(-1)
        at = range(len(p) - 1, len(p) + len(c) - 1)  # token k is predicted one place before it
        torch.testing.assert_close(ce, -logp[at, c], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kl, kl_per_token(logp, logq)[at], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((ce_cut, kl_cut), (ce[:cut], kl[:cut]), rtol=1e-4, atol=1e-5)
