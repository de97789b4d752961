"""Batched decoding and scoring against transformers and against plain passes, row by row."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import (AttentionMaskInterface, LogitsProcessorList, TemperatureLogitsWarper,
                          TopKLogitsWarper, TopPLogitsWarper)

from conftest import ARCHITECTURES, Ids, tiny
from common.sampling import next_token, perplexity, repetition, sample, score
from steer import left_pad
from test_steer import prompts, until_the_end, vector

# ---- attention on a CPU -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attention_on_a_cpu_equals_the_models_own_with_padding_and_gradients(name, monkeypatch):
    """In float64, where rounding hides nothing; the softmax of both is float32."""
    model = tiny(name, dtype=torch.float64)
    model.set_experts_implementation("eager")  # the fused one has no float64
    rows = [list(range(3, 24)), list(range(40, 52)), [7]]  # longer than Gemma's window of 16
    tokens, mask, positions = left_pad(rows, "cpu")
    embedding = model.get_input_embeddings().weight.requires_grad_()

    def finite_in_float32(masks):  # float64's −1e308 is −inf there, and a row of those is nan
        return lambda *args, dtype, **how: masks(*args, dtype=torch.float32, **how).double()
    results = []
    for implementation in ("eager", "grouped"):
        masks = AttentionMaskInterface._global_mapping
        monkeypatch.setitem(masks, implementation, finite_in_float32(masks[implementation]))
        model.set_attn_implementation(implementation)
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
        logits = logits[mask.bool()]
        gradient, = torch.autograd.grad(logits.sin().sum(), embedding)
        results.append((logits, gradient))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert results[0][1].abs().max() > 0.1


def test_a_model_loaded_on_a_cpu_uses_it(embedded):
    assert embedded[0].config._attn_implementation == "grouped"
    assert "grouped" not in embedded[0].config.to_json_string()


# ---- sampling -----------------------------------------------------------------------------------


def test_greedy_sampling_equals_transformers_generate_also_with_padding(tiny_model):
    ps = prompts()
    ours = sample(tiny_model, Ids, ps, max_new_tokens=24, temperature=0)
    for p, o in zip(ps, ours, strict=True):
        theirs = tiny_model.generate(torch.tensor([p]), max_new_tokens=24, do_sample=False,
                                     pad_token_id=0)[0, len(p):].tolist()
        assert o == until_the_end(theirs)


def test_sampled_tokens_depend_on_seed_and_row_not_on_the_batch(tiny_model):
    ps, v, doses = prompts() + prompts(), vector(tiny_model), [0.0] * 6 + [2.0] * 6
    how = dict(max_new_tokens=20, seed=3)
    together = sample(tiny_model, Ids, ps, v, doses, **how)
    assert together == sample(tiny_model, Ids, ps, v, doses, **how, batch_size=5)
    assert together[:4] == sample(tiny_model, Ids, ps[:4], v, doses[:4], **how)
    assert together != sample(tiny_model, Ids, ps, v, doses, max_new_tokens=20, seed=4)
    assert together[:6] != together[6:]


def watch_passes(model):
    """-> a list that collects the shape of the ids of every pass through the blocks."""
    shapes = []
    model.get_decoder().layers[0].register_forward_pre_hook(
        lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    return shapes


def test_rows_that_finish_leave_the_batch_and_change_no_other_row():
    model = tiny("llama")
    model.generation_config.eos_token_id = list(range(3, 40))  # a third of the draws end a row
    shapes = watch_passes(model)
    ps = prompts(32)
    out = sample(model, Ids, ps, max_new_tokens=30, seed=1)
    assert shapes[1][0] == 32 and shapes[-1][0] < 8 and len(set(map(len, out))) > 3
    assert out == sample(model, Ids, ps, max_new_tokens=30, seed=1, batch_size=1)


def test_steering_acts_from_the_assistant_tag_on_and_equal_prompts_are_run_once():
    model, p = tiny("llama"), prompts(1)[0]
    v, shapes = vector(model, size=4.0), watch_passes(model)
    doses = [0.0, 1.0, 2.0, 4.0]
    ours = sample(model, Ids, [p] * 4, v, doses, max_new_tokens=6, temperature=0)
    assert shapes[0] == (1, len(p) - 1) and shapes[1] == (4, 1)

    def steer(l, dose):  # by hand, no cache: positions len(p) − 1 and later
        def hook(module, args, output):
            output = output.clone()
            output[:, len(p) - 1:] += dose * v.layers[l]
            return output
        return model.get_decoder().layers[l].register_forward_hook(hook)
    for dose, answer in zip(doses, ours, strict=True):
        hooks, ids = [steer(l, dose) for l in v.layers], list(p)
        for _ in range(6):
            with torch.no_grad():
                ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        for hook in hooks:
            hook.remove()
        assert answer == until_the_end(ids[len(p):])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), temperature=st.sampled_from([0.7, 1.0, 1.5]),
       top_k=st.integers(1, 40), top_p=st.sampled_from([0.3, 0.8, 0.95, 1.0]))
def test_next_token_draws_from_the_distribution_that_transformers_composes(
        seed, temperature, top_k, top_p):
    z = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(seed))
    warp = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k),
                                TopPLogitsWarper(top_p)])
    theirs = warp(None, z.clone()).softmax(-1)[0]
    n = 4000  # inverse CDF on a grid gives every token its probability to within 1/n
    u = (torch.arange(n) + 0.5) / n
    ours = torch.bincount(next_token(z.expand(n, -1), u, temperature, top_k, top_p), minlength=40)
    torch.testing.assert_close(ours / n, theirs, rtol=0, atol=1.5 / n)


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(ValueError, match="exceed the model's context of 256"):
        sample(tiny("llama"), Ids, [[5] * 250], max_new_tokens=10)


# ---- scoring ------------------------------------------------------------------------------------


def test_score_is_the_log_probability_of_each_completion_token(tiny_model):
    ps, cs = prompts(5), [c[:k + 1] for k, c in enumerate(prompts(10)[5:])]
    cs[2] = []
    for p, c, lp in zip(ps, cs, score(tiny_model, ps, cs, batch_size=2), strict=True):
        if not c:
            assert len(lp) == 0
            continue
        with torch.no_grad():
            full = tiny_model(input_ids=torch.tensor([p + c])).logits[0].float().log_softmax(-1)
        by_hand = torch.stack([full[len(p) + k - 1, t] for k, t in enumerate(c)])
        torch.testing.assert_close(lp, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("holds", [3, 1])
def test_where_memory_does_not_hold_a_batch_its_halves_give_the_same(tiny_model, monkeypatch, holds):
    """A device that holds `holds` rows, made of the CPU: halving helps from 5 rows to 3, not to 1."""
    rows = prompts(5)
    answers = [[5, 6, 7]] * len(rows)
    whole = sample(tiny_model, Ids, rows, max_new_tokens=6), score(tiny_model, rows, answers)

    def full(block, args):
        if len(args[0]) > holds:
            raise torch.OutOfMemoryError
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    hook = tiny_model.get_decoder().layers[0].register_forward_pre_hook(full)
    try:
        if holds == 1:
            with pytest.raises(torch.OutOfMemoryError):
                sample(tiny_model, Ids, rows, max_new_tokens=6)
            return
        halves = sample(tiny_model, Ids, rows, max_new_tokens=6), score(tiny_model, rows, answers)
    finally:
        hook.remove()
    assert whole[0] == halves[0]
    torch.testing.assert_close(whole[1], halves[1])


def test_perplexity_is_of_the_tail_that_is_asked_for_and_infinite_for_no_tokens():
    logp = torch.tensor([-1.0, -2.0, -3.0, -6.0])
    assert perplexity(logp) == pytest.approx(math.exp(3))
    assert perplexity(logp, tail=0.5) == pytest.approx(math.exp(4.5))
    assert perplexity(logp, tail=0.1) == pytest.approx(math.exp(6))  # at least one token
    assert perplexity(torch.empty(0)) == math.inf


def test_repetition_is_zero_for_prose_and_high_for_loops_of_words_and_of_characters():
    prose = "Ask the nurse on duty before you move her, and stay close to the door."
    assert repetition(prose) < 0.1
    assert repetition("I will help you. " * 4) > 0.5
    assert repetition("T" * 24) > 0.8
