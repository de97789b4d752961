"""The benchmark compares like with like: every alternative does the same work as ours."""
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import distil
import evaluate
import heal_loop
import lora
from common import models
from conftest import Ids, tiny
from common.readouts import CLAUSES, cloze
from common.sampling import completion_states, sample
from steer import SteeringVector, chat_ids, extract_vector
from studies import bench
from common.texts import FOUNDATIONS, load_traits, load_vignettes


def rows(n=4):
    """-> prompts and completions of different lengths, random token ids."""
    g = torch.Generator().manual_seed(3)

    def tokens(k):
        return torch.randint(3, 128, (k,), generator=g).tolist()
    return [tokens(5 + 3 * i) for i in range(n)], [tokens(9 - 2 * i) for i in range(n)]


# ---- sampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generate_with_hooks_and_sample_draw_the_same_greedy_tokens(name):
    model, (prompts, _), doses = tiny(name), rows(), [0.0, 1.0, -2.0, 4.0]
    vector = SteeringVector({l: torch.randn(32, generator=torch.Generator().manual_seed(l))
                             for l in (1, 2)})
    with bench.endless(model):
        theirs = bench.generate(model, Ids, prompts, vector, doses, max_new_tokens=12,
                                do_sample=False)
        ours = sample(model, Ids, prompts, vector, doses, max_new_tokens=12, temperature=0)
        unsteered = sample(model, Ids, prompts, max_new_tokens=12, temperature=0)
    assert theirs.tolist() == ours != unsteered
    assert not any(block._forward_hooks for block in model.get_decoder().layers)


def test_endless_rows_all_run_to_the_last_token_and_the_stop_token_comes_back():
    model, (prompts, _) = tiny("llama"), rows()
    before = model.generation_config.eos_token_id
    with bench.endless(model):
        new = sample(model, Ids, prompts * 8, max_new_tokens=40, temperature=5.0, top_k=128,
                     top_p=1.0)
    assert {len(row) for row in new} == {40}
    assert model.generation_config.eos_token_id == before


# ---- healing ------------------------------------------------------------------------------------


def healing():
    """-> a tiny model with a trained adapter, prompts, completions and the original's states."""
    model, (prompts, completions) = tiny("llama"), rows()
    lora.attach(model, rank=4, alpha=8)
    torch.manual_seed(1)
    for m in lora.adapters(model).values():
        torch.nn.init.normal_(m.B, std=0.1)
    with torch.no_grad(), lora.gates(model, history=0, live=0):
        references = [completion_states(model, [p], [c]) for p, c in zip(prompts, completions)]
    return model, prompts, completions, references


def gradients(model):
    """The live factors' gradients, taken away from the model."""
    found = [p.grad.clone() for p in lora.live_parameters(model)]
    model.zero_grad()
    return found


@pytest.mark.parametrize("reg", ["kl_rev", "kl_fwd"])
@pytest.mark.parametrize("agg", ["mean", "rmse", "p95", "max"])
def test_full_logits_give_the_losses_and_gradients_of_a_heal_step(reg, agg):
    model, prompts, completions, references = healing()
    cfg = heal_loop.Config(reg=reg, agg=agg, tau=0.0)
    log = heal_loop.heal_step(model, prompts, completions, references, cfg)
    ours = gradients(model)
    ce, barrier = bench.full_logits_loss(model, lambda: lora.gates(model, history=0, live=0),
                                         prompts, completions, cfg)
    (ce + barrier).backward()
    assert barrier > 1e-3
    assert log["data_loss"] == pytest.approx(ce.item(), rel=1e-5)
    assert log["barrier"] == pytest.approx(barrier.item(), rel=1e-4)
    for mine, theirs in zip(ours, gradients(model)):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("positions", [1, 3, 10_000])
@pytest.mark.parametrize("reg", ["kl_rev", "kl_fwd", "nll"])
@pytest.mark.parametrize("agg", ["mean", "rmse", "p95", "max"])
def test_closed_form_gradients_in_chunks_are_those_of_a_heal_step_whatever_the_chunk(
        reg, agg, positions):
    model, prompts, completions, references = healing()
    cfg = heal_loop.Config(reg=reg, agg=agg, tau=0.0105, lam=100.0)  # between the completions' D
    log = heal_loop.heal_step(model, prompts, completions, references, cfg)
    ours = gradients(model)
    chunked = bench.chunked_heal_step(model, prompts, completions, references, cfg,
                                      budget=128 * positions)
    assert 0 < log["active"] < 1
    assert (chunked["barrier"] == 0) == (reg == "nll")
    for key, value in chunked.items():
        assert log[key] == pytest.approx(value, rel=1e-4)
    for mine, theirs in zip(ours, gradients(model)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * mine.abs().max().item())


def test_original_states_of_a_batch_are_those_of_each_row_before_training():
    model, prompts, completions, references = healing()
    found = bench.original_states(model, prompts, completions)
    lora.detach(model)
    for one, states, p, c in zip(found, references, prompts, completions):
        with torch.no_grad():
            torch.testing.assert_close(one, completion_states(model, [p], [c]))
        torch.testing.assert_close(one, states)


@pytest.mark.slow
@pytest.mark.parametrize("version", bench.VERSIONS)
def test_the_memory_of_every_version_is_measured_in_a_fresh_process(version):
    shape = bench.Shape(vocab=20_000, rows=2, tokens=64)
    peak = bench.in_fresh_process(version, shape, "cpu", prompt=8)
    assert 2 * 64 * 20_000 < peak < 2**30  # one completion's logits, in bfloat16 or more


def test_a_failure_that_is_not_for_want_of_memory_is_told():
    with pytest.raises(ValueError, match="was not measured"):
        bench.in_fresh_process("ours", bench.Shape(64, 1, 4), "cpu", no_such_argument=1)


def test_peft_missing_is_one_line_that_says_the_fix(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="PEFT is missing; fix: pip install"):
        bench.peft_model(tiny("llama"), heal_loop.Config())


# ---- evaluation and extraction ------------------------------------------------------------------


def test_one_forward_per_clause_gives_the_cloze_scores(embedded):
    model, tok = embedded
    vignettes = load_vignettes(heal_loop.Config().vignettes, 3)
    scores, mass = bench.clause_by_clause(model, tok, vignettes)
    zero = torch.zeros(len(FOUNDATIONS)).numpy()
    answers = cloze(model, tok, vignettes, constants=zero)  # unshifted: p is softmax of the scores
    torch.testing.assert_close(scores.double().softmax(1), torch.as_tensor(answers.p),
                               rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(mass.double(), torch.as_tensor(answers.mass), rtol=1e-4, atol=1e-5)
    assert list(CLAUSES) == list(FOUNDATIONS)


def test_one_forward_per_completion_gives_the_same_verdicts(embedded):
    model, tok = embedded
    lora.attach(model)
    try:
        v = extract_vector(model, tok, load_traits()["care"].persona, ["Hello there."], [15])
        rows = distil.sample_doses(model, tok, v, ["How are you?", "What is a map?"], [0.0, 40.0], 4,
                                   seed=0, max_new_tokens=16)
        rules = distil.Rules(min_words=3)
        given = rows, load_traits()["care"].persona, rules
        ours = [row["verdict"] for row in distil.judge(model, tok, *given)]
        assert ours == bench.completion_by_completion(model, tok, *given)
        assert len(set(ours)) > 1
    finally:
        lora.detach(model)


def test_one_forward_per_text_reads_the_same(embedded):
    model, tok = embedded
    lora.attach(model)
    try:
        for m in lora.adapters(model).values():
            torch.nn.init.normal_(m.B, std=0.03)
        prompts, plain = ["How are you?", "What is a map?"], ["A map shows where things are."]
        asked = [chat_ids(tok, p) for p in prompts]
        answers = sample(model, tok, asked, max_new_tokens=8)
        speech = evaluate.speak(model, tok, prompts, plain, max_new_tokens=8)
        plainly = bench.twin(model)
        lora.detach(plainly)
        theirs = bench.text_by_text(model, plainly, tok, asked, answers, plain)
        assert theirs == pytest.approx((speech.perplexity, speech.drift, speech.text_nats), rel=1e-3)
        assert speech.drift > 0.01
    finally:
        lora.detach(model)


def test_one_prompt_at_a_time_gives_the_same_vector(embedded):
    model, tok = embedded
    contexts = ["Hello there.", "What should I cook tonight, and for how many people?"]
    given = model, tok, load_traits()["care"].persona, contexts, [3, 5]
    ours, theirs = extract_vector(*given), bench.prompt_by_prompt(*given)
    for l in (3, 5):
        torch.testing.assert_close(ours.layers[l], theirs[l], rtol=1e-3, atol=1e-4)


# ---- clocks and floors --------------------------------------------------------------------------


def test_a_twin_shares_weights_but_neither_adapters_nor_hooks(ids):
    model = tiny("llama")
    before = model(input_ids=ids).logits
    other = bench.twin(model)
    lora.attach(other, rank=4)
    for m in lora.adapters(other).values():
        torch.nn.init.normal_(m.B)
    mine, theirs = (m.get_decoder().layers[2].mlp.up_proj for m in (model, other))
    assert theirs.base.weight is mine.weight
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not torch.allclose(other(input_ids=ids).logits, before)


def test_steps_alternate_and_the_median_is_reported(monkeypatch):
    calls, now = [], [0.0]
    costs = {"a": iter([9.0, 1.0, 2.0, 3.0, 1.5]), "b": iter([4.0, 4.0, 100.0, 5.0, 6.0])}

    def step(name):
        calls.append(name)
        now[0] += next(costs[name])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    assert bench.medians("test", lambda: step("a"), lambda: step("b")) == [2.0, 5.0]
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


def test_a_profile_shares_the_whole_step_out_and_names_operations_that_ran(tiny_folder):
    b = bench.Bench(*models.load(str(tiny_folder), dtype="float32"))
    text = bench.profile(b, rows=2)
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")][2:]
    *shares, (everything, total, _) = rows
    assert [kind.strip() for kind, *_ in shares[:-1]] == list(bench.KINDS)
    assert sum(int(ms) for _, ms, _ in shares) == pytest.approx(int(total), abs=len(shares))
    percent = sum(int(share.strip(" %")) for *_, share in shares)
    assert percent == pytest.approx(100, abs=len(shares))
    over_vocabulary = dict((kind.strip(), int(ms)) for kind, ms, _ in shares)["over the vocabulary"]
    assert over_vocabulary > 0  # 49,152 words, a model 32 wide: most of the step
    assert not any(p.grad is not None for p in lora.live_parameters(b.student))


def test_every_key_has_a_line_that_says_what_it_is_compared_with():
    assert list(bench.AGAINST) == list(bench.get_args(bench.Key))
