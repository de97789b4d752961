import math
from types import SimpleNamespace

import pytest
import torch

import heal_loop
import lora
from conftest import tiny
from heal_loop import aggregate, heal_step, kl_per_token, token_losses
from steer import completion_states

AGGREGATES = ["mean", "rmse", "p95", "max"]


def settings(reg, agg, lam=3.0, tau=0.01):
    return SimpleNamespace(reg=reg, agg=agg, lam=lam, tau=tau)


def float64_reference(logits_p, logits_q):
    """KL(p‖q) per position by the definition, in float64, without log_softmax."""
    p, q = (torch.exp(z.double()) / torch.exp(z.double()).sum(-1, keepdim=True) for z in (logits_p, logits_q))
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("seed", range(5))
def test_kl_agrees_with_float64_in_both_directions_and_is_zero_only_at_equality(seed):
    a, b = torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(seed))
    logp, logq = a.log_softmax(-1), b.log_softmax(-1)
    torch.testing.assert_close(kl_per_token(logp, logq).double(), float64_reference(a, b), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kl_per_token(logq, logp).double(), float64_reference(b, a), rtol=1e-5, atol=1e-6)
    assert (kl_per_token(logp, logq) > 0).all()
    assert (kl_per_token(logp, logp) == 0).all()


def test_aggregates_are_their_formulas_and_are_ordered():
    kl = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 4
    assert aggregate(kl, "mean").item() == pytest.approx(sum(kl.tolist()) / 40, rel=1e-12)
    assert aggregate(kl, "rmse").item() == pytest.approx(math.sqrt(sum(x * x for x in kl.tolist()) / 40 + 1e-8), rel=1e-12)
    s = sorted(kl.tolist())  # linear interpolation between order statistics, position 0.95 · 39 = 37.05
    assert aggregate(kl, "p95").item() == pytest.approx(s[37] + 0.05 * (s[38] - s[37]), rel=1e-9)
    assert aggregate(kl, "max").item() == s[-1]
    assert aggregate(kl, "mean") <= aggregate(kl, "rmse") <= aggregate(kl, "max")


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


def batch():
    g = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 128, (n,), generator=g).tolist() for n in (6, 9, 4)]
    completions = [torch.randint(3, 128, (n,), generator=g).tolist() for n in (5, 8, 11)]
    return prompts, completions


def healing(name, reg, trained=True):
    model = tiny(name)
    lora.attach(model, rank=4, alpha=8, layers=(0, 1))
    prompts, completions = batch()
    with torch.no_grad():
        references = [completion_states(model, [p], [c]) for p, c in zip(prompts, completions)]
    if trained:
        for k, m in enumerate(lora.adapters(model).values()):
            m.B.data = 0.2 * torch.randn(m.B.shape, generator=torch.Generator().manual_seed(k))
    return model, prompts, completions, references if reg.startswith("kl") else [None] * 3


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


@pytest.mark.parametrize("agg", AGGREGATES)
@pytest.mark.parametrize("reg", ["kl_rev", "kl_fwd"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_heal_step_equals_plain_autograd_over_full_logits(name, reg, agg):
    cfg = settings(reg, agg)
    model, prompts, completions, references = healing(name, reg)
    stats = heal_step(model, prompts, completions, references, cfg)
    ours = [p.grad.clone() for p in lora.live_parameters(model)]
    model.zero_grad()
    data, barrier = plain_loss(model, prompts, completions, cfg)
    assert stats["data_loss"] == pytest.approx(data.item(), rel=1e-5)
    assert stats["barrier"] == pytest.approx(barrier.item(), rel=1e-4) and barrier > 0
    (data + barrier).backward()
    for a, p in zip(ours, lora.live_parameters(model)):
        torch.testing.assert_close(a, p.grad, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("reg", ["nll", "wd"])
def test_without_a_divergence_the_loss_is_the_data_loss(reg):
    cfg = settings(reg, "rmse", tau=0.0)
    model, prompts, completions, references = healing("llama", reg)
    stats = heal_step(model, prompts, completions, references, cfg)
    assert stats["barrier"] == 0 and stats["grad_ratio"] == 0
    assert stats["data_loss"] == pytest.approx(plain_loss(model, prompts, completions, cfg)[0].item(), rel=1e-5)


@pytest.mark.parametrize("agg", AGGREGATES)
def test_gradients_are_finite_at_a_fresh_adapter(agg):
    model, prompts, completions, references = healing("llama", "kl_rev", trained=False)
    stats = heal_step(model, prompts, completions, references, settings("kl_rev", agg, tau=0.0))
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


def test_the_mask_is_exact_the_loss_sees_every_completion_token_and_no_prompt_token():
    model, prompts, completions, _ = healing("llama", "nll")
    hidden = completion_states(model, prompts, completions)
    assert len(hidden) == sum(map(len, completions))
    ce = token_losses(model, hidden, torch.tensor(sum(completions, [])), None, "nll")[0]
    start = 0
    for p, c in zip(prompts, completions):
        logp = model(input_ids=torch.tensor([p + c])).logits[0].log_softmax(-1)
        by_hand = torch.stack([-logp[len(p) + k - 1, t] for k, t in enumerate(c)])  # token k is predicted one place before it
        torch.testing.assert_close(ce[start:start + len(c)], by_hand, rtol=1e-4, atol=1e-5)
        start += len(c)
