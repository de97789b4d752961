import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import heal_loop
import lora
from conftest import Ids, tiny
from evaluate import CLAUSES, FOUNDATIONS, cloze, load_vignettes
from steer import SteeringVector, completion_states, extract_vector, load_personas, sample


def rows(n=4):
    g = torch.Generator().manual_seed(3)
    def tokens(k):
        return torch.randint(3, 128, (k,), generator=g).tolist()
    return [tokens(5 + 3 * i) for i in range(n)], [tokens(9 - 2 * i) for i in range(n)]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generate_with_hooks_and_sample_draw_the_same_greedy_tokens(name):
    model, (prompts, _), doses = tiny(name), rows(), [0.0, 1.0, -2.0, 4.0]
    vector = SteeringVector({l: torch.randn(32, generator=torch.Generator().manual_seed(l)) for l in (1, 2)})
    with bench.endless(model):
        theirs = bench.generate(model, Ids, prompts, vector, doses, max_new_tokens=12, do_sample=False)
        ours = sample(model, Ids, prompts, vector, doses, max_new_tokens=12, temperature=0)
        unsteered = sample(model, Ids, prompts, max_new_tokens=12, temperature=0)
    assert theirs.tolist() == ours != unsteered
    assert not any(block._forward_hooks for block in model.get_decoder().layers)


@pytest.mark.parametrize("reg", ["kl_rev", "kl_fwd"])
@pytest.mark.parametrize("agg", ["mean", "rmse", "p95", "max"])
def test_full_logits_give_the_losses_and_gradients_of_a_heal_step(reg, agg):
    model, (prompts, completions) = tiny("llama"), rows()
    lora.attach(model, rank=4, alpha=8)
    torch.manual_seed(1)
    for m in lora.adapters(model).values():
        torch.nn.init.normal_(m.B, std=0.1)
    cfg = heal_loop.Config(reg=reg, agg=agg, tau=0.0)
    with torch.no_grad(), lora.gates(model, history=0, live=0):
        references = [completion_states(model, [p], [c]) for p, c in zip(prompts, completions)]
    log = heal_loop.heal_step(model, prompts, completions, references, cfg)
    ours = [p.grad.clone() for p in lora.live_parameters(model)]
    model.zero_grad()
    ce, barrier = bench.full_logits_loss(model, lambda: lora.gates(model, history=0, live=0), prompts, completions, cfg)
    (ce + barrier).backward()
    assert barrier > 1e-3
    assert log["data_loss"] == pytest.approx(ce.item(), rel=1e-5)
    assert log["barrier"] == pytest.approx(barrier.item(), rel=1e-4)
    for mine, p in zip(ours, lora.live_parameters(model)):
        torch.testing.assert_close(mine, p.grad, rtol=1e-3, atol=1e-5)


def test_one_forward_per_clause_gives_the_cloze_scores(embedded):
    model, tok = embedded
    vignettes = load_vignettes(heal_loop.Config().vignettes, 3)
    scores, mass = bench.clause_by_clause(model, tok, vignettes)
    zero = torch.zeros(len(FOUNDATIONS)).numpy()
    profile = cloze(model, tok, vignettes, constants=zero)  # unshifted: p is the softmax of the scores
    torch.testing.assert_close(scores.double().softmax(1), torch.as_tensor(profile.p), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(mass.double(), torch.as_tensor(profile.mass), rtol=1e-4, atol=1e-5)
    assert list(CLAUSES) == list(FOUNDATIONS)


def test_one_prompt_at_a_time_gives_the_same_vector(embedded):
    model, tok = embedded
    contexts, persona, layers = ["Hello there.", "What should I cook tonight, and for how many people?"], load_personas()["care"], [3, 5]
    ours, theirs = (f(model, tok, persona, contexts, layers) for f in (extract_vector, bench.prompt_by_prompt))
    for l in layers:
        torch.testing.assert_close(ours.layers[l], theirs[l], rtol=1e-3, atol=1e-4)


def test_a_twin_shares_weights_but_neither_adapters_nor_hooks(ids):
    model = tiny("llama")
    before = model(input_ids=ids).logits
    other = bench.twin(model)
    lora.attach(other, rank=4)
    for m in lora.adapters(other).values():
        torch.nn.init.normal_(m.B)
    assert other.get_decoder().layers[2].mlp.up_proj.weight is model.get_decoder().layers[2].mlp.up_proj.weight
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not torch.allclose(other(input_ids=ids).logits, before)


def test_runs_alternate_and_the_median_is_reported(monkeypatch):
    calls, now = [], [0.0]
    costs = {"a": iter([9.0, 1.0, 2.0, 3.0, 1.5]), "b": iter([4.0, 4.0, 100.0, 5.0, 6.0])}
    def run(name):
        calls.append(name)
        now[0] += next(costs[name])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    assert bench.medians("test", lambda: run("a"), lambda: run("b")) == [2.0, 5.0]
    assert calls == ["a", "b"] * 5


def test_common_beginnings_count_once():
    assert bench.distinct([[1, 2, 3], [1, 2, 4], [1, 2, 3], [2]]) == 5


def test_flops_are_those_of_the_matrix_products():
    model = tiny("llama")
    block = model.get_decoder().layers[0]
    with FlopCounterMode(display=False) as counted:
        for m in bench.linears(block):
            m(torch.zeros(7, m.in_features))
    assert 7 * bench.flops(bench.linears(block)) == counted.get_total_flops()


def test_peft_missing_is_one_line_that_says_the_fix(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="PEFT is missing; fix: pip install"):
        bench.peft_model(tiny("llama"), heal_loop.Config())
