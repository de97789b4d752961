import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

import lora
from conftest import tiny
from heal_loop import aggregate, heal_step, kl_per_token, token_losses
from steer import completion_states
from test_lora import of_every_architecture

AGGREGATES = ["mean", "rmse", "p95", "max"]


def config(reg, agg, lam=3.0, tau=0.01):
    return SimpleNamespace(reg=reg, agg=agg, lam=lam, tau=tau)


def float64_reference(logits_p, logits_q):
    """KL(p‖q) per position by the definition, in float64, without log_softmax."""
    p, q = (torch.exp(z.double()) / torch.exp(z.double()).sum(-1, keepdim=True) for z in (logits_p, logits_q))
    return (p * (p / q).log()).sum(-1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), scale=st.sampled_from([0.01, 1, 10]), apart=st.sampled_from([0, 1e-6, 1e-3, 1, 10]))
def test_kl_is_never_negative_zero_exactly_at_equality_and_agrees_with_float64_in_both_directions(seed, scale, apart):
    a, step = torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(seed))
    a, b = scale * a, scale * a + apart * step
    logp, logq = a.log_softmax(-1), b.log_softmax(-1)
    for kl, expected in ((kl_per_token(logp, logq), float64_reference(a, b)), (kl_per_token(logq, logp), float64_reference(b, a))):
        assert (kl >= 0).all()
        torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-5)
    assert (kl_per_token(logp, logp) == 0).all() and (kl_per_token(logq, logq) == 0).all()


@settings(max_examples=25, deadline=None)
@given(kl=st.lists(st.floats(0, 50), min_size=1, max_size=40))
def test_aggregates_are_their_formulas_and_are_ordered(kl):
    mean, rmse, p95, most = (aggregate(torch.tensor(kl, dtype=torch.float64), agg).item() for agg in AGGREGATES)
    assert mean == pytest.approx(sum(kl) / len(kl), rel=1e-9)
    assert rmse == pytest.approx(math.sqrt(sum(x * x for x in kl) / len(kl) + 1e-8), rel=1e-9)
    s, place = sorted(kl), 0.95 * (len(kl) - 1)  # linear interpolation between order statistics
    assert p95 == pytest.approx(s[int(place)] + place % 1 * (s[math.ceil(place)] - s[int(place)]), rel=1e-9)
    assert most == max(kl)
    assert mean <= rmse <= math.hypot(most, 1e-4) * (1 + 1e-12) and p95 <= most  # ε = 1e-8 lies under the root


def test_rmse_sees_the_four_broken_tokens_that_a_mean_hides():
    kl = torch.full((60,), 0.03)
    kl[-4:] = 5.0
    assert aggregate(kl, "mean") < 0.5 < aggregate(kl, "rmse")


@pytest.mark.parametrize("agg", AGGREGATES)
@pytest.mark.parametrize("reg", ["kl_rev", "kl_fwd"])
def test_the_barriers_gradient_agrees_with_finite_differences(reg, agg):
    g = torch.Generator().manual_seed(3)
    student, original = torch.randn(2, 9, 11, generator=g, dtype=torch.float64)
    def loss(z):
        logp, logq = z.log_softmax(-1), original.log_softmax(-1)
        kl = kl_per_token(logp, logq) if reg == "kl_rev" else kl_per_token(logq, logp)
        return 3.0 * torch.relu(aggregate(kl, agg) - 0.1)
    assert loss(student) > 0
    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),), eps=1e-6, atol=1e-7)


LENGTHS = st.lists(st.tuples(st.sampled_from([1, 6, 9]), st.integers(1, 11)), min_size=1, max_size=4)


def batch(lengths=((6, 5), (9, 8), (4, 11))):
    """-> prompts, the same one for the same length, and completions, all random."""
    g = torch.Generator().manual_seed(5)
    text = torch.randint(3, 128, (9,), generator=g).tolist()
    return [text[:n] for n, _ in lengths], [torch.randint(3, 128, (n,), generator=g).tolist() for _, n in lengths]


def healing(name, reg, trained=True, **how):
    model = tiny(name)
    lora.attach(model, rank=4, alpha=8, layers=(0, 1))
    prompts, completions = batch(**how)
    with torch.no_grad():
        references = [completion_states(model, [p], [c]) for p, c in zip(prompts, completions)]
    if trained:
        for k, m in enumerate(lora.adapters(model).values()):
            m.B.data = 0.2 * torch.randn(m.B.shape, generator=torch.Generator().manual_seed(k))
    return model, prompts, completions, references if reg.startswith("kl") else [None] * len(prompts)


def plain_loss(model, prompts, completions, cfg):
    """The module docstring's loss, row by row over full logits, by autograd alone."""
    ce, barriers = [], []
    for p, c in zip(prompts, completions):
        ids, at = torch.tensor([p + c]), slice(len(p) - 1, len(p) + len(c) - 1)
        logp = model(input_ids=ids).logits[0, at].float().log_softmax(-1)
        with torch.no_grad(), lora.gates(model, history=0, live=0):
            logq = model(input_ids=ids).logits[0, at].float().log_softmax(-1)
        ce.append(-logp[range(len(c)), c])
        kl = (logp.exp() * (logp - logq)).sum(-1) if cfg.reg == "kl_rev" else (logq.exp() * (logq - logp)).sum(-1)
        barriers.append(torch.relu(aggregate(kl, cfg.agg) - cfg.tau))
    return torch.cat(ce).mean(), cfg.lam * torch.stack(barriers).mean()


@of_every_architecture(reg=st.sampled_from(["kl_rev", "kl_fwd"]), agg=st.sampled_from(AGGREGATES), tau=st.sampled_from([0.0, 0.02]), lengths=LENGTHS)
def test_heal_step_equals_plain_autograd_over_full_logits(name, reg, agg, tau, lengths):
    cfg = config(reg, agg, tau=tau)
    model, prompts, completions, references = healing(name, reg, lengths=lengths)
    stats = heal_step(model, prompts, completions, references, cfg)
    ours = [p.grad.clone() for p in lora.live_parameters(model)]
    model.zero_grad()
    data, barrier = plain_loss(model, prompts, completions, cfg)
    assert stats["data_loss"] == pytest.approx(data.item(), rel=1e-5)
    assert stats["barrier"] == pytest.approx(barrier.item(), rel=1e-4, abs=1e-6) and (barrier > 0 or tau)
    (data + barrier).backward()
    for a, p in zip(ours, lora.live_parameters(model)):
        torch.testing.assert_close(a, p.grad, rtol=2e-3, atol=1e-5 + 1e-3 * p.grad.abs().max().item())


@pytest.mark.parametrize("reg", ["nll", "wd"])
def test_without_a_divergence_the_loss_is_the_data_loss(reg):
    cfg = config(reg, "rmse", tau=0.0)
    model, prompts, completions, references = healing("llama", reg)
    stats = heal_step(model, prompts, completions, references, cfg)
    assert stats["barrier"] == 0 and stats["grad_ratio"] == 0
    assert stats["data_loss"] == pytest.approx(plain_loss(model, prompts, completions, cfg)[0].item(), rel=1e-5)


@pytest.mark.parametrize("agg", AGGREGATES)
def test_gradients_are_finite_at_a_fresh_adapter(agg):
    model, prompts, completions, references = healing("llama", "kl_rev", trained=False)
    stats = heal_step(model, prompts, completions, references, config("kl_rev", agg, tau=0.0))
    assert stats["D"] < 1e-3
    assert all(p.grad.isfinite().all() for p in lora.live_parameters(model))
    assert any(p.grad.abs().max() > 0 for p in lora.live_parameters(model))


def test_chunks_of_positions_change_no_number():
    model, prompts, completions, references = healing("llama", "kl_rev")
    with torch.no_grad():
        hidden = completion_states(model, prompts, completions)
    targets = torch.tensor(sum(completions, []))
    whole = token_losses(model, hidden, targets, torch.cat(references), "kl_rev")
    chunked = token_losses(model, hidden, targets, torch.cat(references), "kl_rev", budget=128 * 3)
    for a, b in zip(whole, chunked):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@of_every_architecture(lengths=LENGTHS, cut=st.integers(1, 11))
def test_the_mask_is_exact_the_loss_sees_every_completion_token_and_no_prompt_token(name, lengths, cut):
    model, prompts, completions, references = healing(name, "kl_rev", lengths=lengths)

    def losses(completions, references):
        with torch.no_grad():
            hidden = completion_states(model, prompts, completions)
        ce, kl, *_ = token_losses(model, hidden, torch.tensor(sum(completions, [])), torch.cat(references), "kl_rev")
        assert len(hidden) == len(ce) == len(kl) == sum(map(len, completions))
        return zip(*(t.split(list(map(len, completions))) for t in (ce, kl)))
    truncated = losses([c[:cut] for c in completions], [r[:cut] for r in references])
    for p, c, (ce, kl), (ce_cut, kl_cut) in zip(prompts, completions, losses(completions, references), truncated, strict=True):
        logp = model(input_ids=torch.tensor([p + c])).logits[0].float().log_softmax(-1)
        by_hand = torch.stack([-logp[len(p) + k - 1, t] for k, t in enumerate(c)])  # token k is predicted one place before it
        torch.testing.assert_close(ce, by_hand, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((ce_cut, kl_cut), (ce[:cut], kl[:cut]), rtol=1e-4, atol=1e-5)
