"""The barrier and the heal step against definitions, float64, finite differences and autograd."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import lora
from common.sampling import completion_states
from conftest import tiny
from heal_loop import Config, aggregate, barrier_loss, heal_step, kl_per_token
from test_lora import of_every_architecture, train_a_little

pytestmark = pytest.mark.filterwarnings("ignore:LoRA reaches")  # of mixtral's experts

AGGREGATES = ["mean", "rmse", "p95", "max"]
DIVERGENCES = ["kl_rev", "kl_fwd"]


def float64_kl(logits_p, logits_q):
    """KL(p‖q) per position by the definition, in float64, without log_softmax."""
    p, q = (torch.exp(z.double()) / torch.exp(z.double()).sum(-1, keepdim=True)
            for z in (logits_p, logits_q))
    return (p * (p / q).log()).sum(-1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), scale=st.sampled_from([0.01, 1, 10]),
       apart=st.sampled_from([0, 1e-6, 1e-3, 1, 10]))
def test_kl_is_its_definition_never_negative_and_zero_at_equality(seed, scale, apart):
    a, step = torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(seed))
    a, b = scale * a, scale * a + apart * step
    logp, logq = a.log_softmax(-1), b.log_softmax(-1)
    for kl, expected in ((kl_per_token(logp, logq), float64_kl(a, b)),
                         (kl_per_token(logq, logp), float64_kl(b, a))):
        assert (kl >= 0).all()
        torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-5)
    assert (kl_per_token(logp, logp) == 0).all()


@settings(max_examples=25, deadline=None)
@given(kl=st.lists(st.floats(0, 50), min_size=1, max_size=40))
def test_aggregates_are_their_formulas(kl):
    mean, rmse, p95, most = (aggregate(torch.tensor(kl, dtype=torch.float64), agg).item()
                             for agg in AGGREGATES)
    assert mean == pytest.approx(sum(kl) / len(kl), rel=1e-9)
    assert rmse == pytest.approx(math.sqrt(sum(x * x for x in kl) / len(kl) + 1e-8), rel=1e-9)
    s, place = sorted(kl), 0.95 * (len(kl) - 1)  # linear interpolation between order statistics
    below, above = s[int(place)], s[math.ceil(place)]
    assert p95 == pytest.approx(below + place % 1 * (above - below), rel=1e-9)
    assert most == max(kl)


def log_probabilities(soft):
    """-> of student and original, random, [9 tokens, 11 words], and their targets; float64."""
    g = torch.Generator().manual_seed(3)
    both = torch.randn(3, 9, 11, generator=g, dtype=torch.float64).log_softmax(-1)
    return *both[:2], both[2] if soft else torch.randint(0, 11, (9,), generator=g)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("agg", AGGREGATES)
@pytest.mark.parametrize("reg", DIVERGENCES)
def test_the_barrier_is_its_equation_and_acts_above_tau_alone(reg, agg, soft):
    student, original, targets = log_probabilities(soft)
    student.requires_grad_()
    kl = float64_kl(*((student, original) if reg == "kl_rev" else (original, student)))
    loss, D, _ = barrier_loss(student, original, targets, reg, agg)
    expected = float64_kl(targets, student) if soft else F.nll_loss(student, targets,
                                                                    reduction="none")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(D, aggregate(kl, agg), rtol=1e-9, atol=0)
    for tau in (0.5 * D.item(), 2 * D.item()):
        over = barrier_loss(student, original, targets, reg, agg, tau)[2]
        gradient, = torch.autograd.grad(over, student)
        assert over.item() == pytest.approx(max(0.0, D.item() - tau))
        assert gradient.any() == (tau < D)

    def of_logits(z):
        loss, D, over = barrier_loss(z.log_softmax(-1), original, targets, reg, agg, tau=0.1)
        return loss, D, over
    assert torch.autograd.gradcheck(of_logits, (student,), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("reg", ["nll", "wd"])
def test_without_a_divergence_d_is_kl_revs_and_has_no_gradient(reg):
    student, original, targets = log_probabilities(soft=False)
    student.requires_grad_()
    loss, D, over = barrier_loss(student, original, targets, reg, tau=0.1)
    assert loss.requires_grad and not D.requires_grad and not over.requires_grad
    assert D == barrier_loss(student, original, targets, "kl_rev")[1]


def healing(name, lengths=((6, 5), (9, 8), (6, 11)), trained=True, soft=False):
    """-> a student, and a batch to heal it with; the soft targets are of a third model."""
    g = torch.Generator().manual_seed(5)
    text = torch.randint(3, 128, (9,), generator=g).tolist()
    prompts = [text[:n] for n, _ in lengths]
    completions = [torch.randint(3, 128, (n,), generator=g).tolist() for _, n in lengths]
    model, states = tiny(name), []
    lora.attach(model, rank=4, alpha=8, layers=(0, 1))
    for size in (0.0, 0.1):
        train_a_little(model, 1, size)
        with torch.no_grad():
            states.append([completion_states(model, [p], [c])
                           for p, c in zip(prompts, completions)])
    train_a_little(model, size=0.2 * trained)
    return model, dict(prompts=prompts, completions=completions, reference=states[0],
                       teacher=states[1] if soft else None)


def plain_loss(model, batch, cfg):
    """The docstring's loss, row by row over full logits, by autograd alone; -> (data, barrier)."""
    def full(p, c):
        ids = torch.tensor([p + c])
        return model(input_ids=ids).logits[0, len(p) - 1:-1].float().log_softmax(-1)
    losses, over = [], []
    for k, (p, c) in enumerate(zip(batch["prompts"], batch["completions"])):
        logp = full(p, c)
        with torch.no_grad(), lora.gates(model, history=0, live=0):
            logq = full(p, c)
            head = model.get_output_embeddings()
            soft = head(batch["teacher"][k]).log_softmax(-1) if batch["teacher"] else None
        losses.append(-logp[range(len(c)), c] if soft is None else
                      (soft.exp() * (soft - logp)).sum(-1))
        a, b = (logq, logp) if cfg.reg == "kl_fwd" else (logp, logq)
        over.append(torch.relu(aggregate((a.exp() * (a - b)).sum(-1), cfg.agg) - cfg.tau))
    lam = cfg.lam if cfg.reg.startswith("kl") else 0.0
    return torch.cat(losses).mean(), lam * torch.stack(over).mean()


@of_every_architecture(
    max_examples=4, reg=st.sampled_from([*DIVERGENCES, "nll", "wd"]), soft=st.booleans(),
    agg=st.sampled_from(AGGREGATES), tau=st.sampled_from([0.0, 0.02]), lengths=st.lists(
        st.tuples(st.sampled_from([1, 6, 9]), st.integers(1, 11)), min_size=1, max_size=4))
def test_heal_step_equals_plain_autograd_over_full_logits(name, reg, agg, tau, soft, lengths):
    cfg = Config(reg=reg, agg=agg, lam=3.0, tau=tau)
    model, batch = healing(name, lengths, soft=soft)
    stats = heal_step(model, batch, cfg)
    ours = [p.grad.clone() for p in lora.live_parameters(model)]
    model.zero_grad()
    data, barrier = plain_loss(model, batch, cfg)
    (data + barrier).backward()
    assert stats["data_loss"] == pytest.approx(data.item(), rel=1e-4, abs=1e-6)
    assert stats["barrier"] == pytest.approx(barrier.item(), rel=1e-4, abs=1e-6)
    assert stats["D"] <= stats["D_max"] and 0 <= stats["active"] <= 1
    for a, b in zip(ours, [p.grad for p in lora.live_parameters(model)], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-5 + 1e-3 * b.abs().max().item())


@pytest.mark.parametrize("agg", AGGREGATES)
def test_gradients_are_finite_at_a_fresh_adapter(agg):
    model, batch = healing("llama", trained=False)
    stats = heal_step(model, batch, Config(agg=agg, tau=0.0))
    assert stats["D"] < 1e-3 and all(map(math.isfinite, stats.values()))
    gradients = [p.grad for p in lora.live_parameters(model)]
    assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
