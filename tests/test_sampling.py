"""Batched decoding and scoring against transformers and against plain passes, row by row."""
import functools
import itertools
import math
from contextlib import nullcontext

import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st
from torch.profiler import ProfilerActivity, profile
from transformers import (LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper,
                          TopPLogitsWarper)

import lora
from common import sampling
from common.prompts import Chat
from common.sampling import (completion_states, next_token, perplexity, repetition, sample, score,
                             stream, worst_perplexity)
from conftest import ARCHITECTURES, SMALL, Ids, tiny
from heal_loop import Config, heal_step
from steer import SteeringVector
from test_steer import long_rope, prompts, vector

CHAT = Chat(Ids)  # its end token is 2


@functools.cache
def hybrid():
    """A Qwen3-Next whose first two of four blocks keep a state instead of keys."""
    torch.manual_seed(0)
    kinds = ["linear_attention"] * 2 + ["full_attention", "linear_attention"]
    config = transformers.Qwen3NextConfig(**SMALL | dict(
        num_hidden_layers=4, layer_types=kinds, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16))
    model = transformers.Qwen3NextForCausalLM(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = 2
    return model


def make(name):
    return hybrid() if name == "qwen3_next" else tiny(name)


@torch.no_grad()
def plain_loop(model, prompt, draws, ends, v=None, dose=0.0):
    """One row, no cache, no padding: steered from the prompt's last token on."""
    ids = list(prompt)
    for u in draws:
        with sampling.steering(model, v, dose, len(ids) - len(prompt) + 1):
            z = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
        ids.append(next_token(z, u[None], 1.0, 64, 0.95).item())
        if ids[-1] in ends:
            break
    return ids[len(prompt):]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "mixtral", "qwen3_next"])
def test_decoding_equals_a_plain_uncached_loop_token_for_token(name):
    """Steered, with rows of several lengths that end early and leave the batch."""
    model, ends = make(name), set(range(2, 12))
    model.generation_config.eos_token_id = sorted(ends)
    v, ps, steps = vector(model, size=0.5), prompts(8), 20
    doses = [0.0, 1.0, -2.0, 3.0] * 2
    ours = sample(model, CHAT, ps, v, doses, max_new_tokens=steps, seed=5, keep_stop=True)
    draws = torch.rand(len(ps), steps, generator=torch.Generator().manual_seed(5))
    assert ours == [plain_loop(model, p, u, ends, v, dose) for p, u, dose in zip(ps, draws, doses)]
    lengths = list(map(len, ours))
    assert min(lengths) <= 8 < max(lengths), "some must leave early, some must go on"
    model.generation_config.eos_token_id = 2


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next"])
def test_stream_yields_what_sample_gives(name):
    model, p = make(name), prompts(3)[2]
    model.generation_config.eos_token_id = list(range(2, 12))
    v, ended = vector(model), 0
    for seed in range(4):
        how = dict(max_new_tokens=12, seed=seed, top_k=20)
        expected, = sample(model, CHAT, [p], v, [2.0], **how)
        assert list(stream(model, CHAT, p, v, 2.0, **how)) == expected
        ended += len(expected) < 12
    assert ended, "one must come to a stop token, which is not yielded"
    model.generation_config.eos_token_id = 2


def watch_passes(model):
    """-> a list that collects the shape of the ids of every pass through the blocks."""
    shapes = []
    model.get_decoder().layers[0].register_forward_pre_hook(
        lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    return shapes


def test_rows_that_finish_leave_the_batch_and_change_no_other_row():
    model = tiny("llama")
    model.generation_config.eos_token_id = list(range(3, 20))  # an eighth of the draws end a row
    shapes, ps = watch_passes(model), prompts(32)
    out = sample(model, CHAT, ps, max_new_tokens=30, seed=1)
    assert shapes[1][0] == 32 and shapes[-1][0] < 12 and len(set(map(len, out))) > 3
    assert out == sample(model, CHAT, ps, max_new_tokens=30, seed=1, batch_size=8)
    assert out[:4] == sample(model, CHAT, ps[:4], max_new_tokens=30, seed=1)
    assert out != sample(model, CHAT, ps, max_new_tokens=30, seed=2)


def test_equal_prompts_are_run_once_for_all_doses():
    model, p = tiny("llama"), prompts(1)[0]
    shapes = watch_passes(model)
    sample(model, CHAT, [p] * 4, vector(model), [0.0, 1.0, 2.0, 4.0], max_new_tokens=3)
    assert shapes[0] == (1, len(p) - 1) and shapes[1] == (4, 1)


def frequencies(z, n, *pick):
    """Inverse CDF on a grid of n draws gives every token its probability to within 1/n."""
    u = (torch.arange(n) + 0.5) / n
    return torch.bincount(next_token(z.expand(n, -1), u, *pick), minlength=z.shape[-1]) / n


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), temperature=st.sampled_from([0.7, 1.0, 1.5]),
       top_k=st.integers(1, 40), top_p=st.sampled_from([0.3, 0.8, 0.95, 1.0]))
def test_next_token_draws_from_the_distribution_of_transformers(seed, temperature, top_k, top_p):
    z = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(seed))
    warp = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k),
                                TopPLogitsWarper(top_p)])
    theirs = warp(None, z.clone()).softmax(-1)[0]
    ours = frequencies(z, 4000, temperature, top_k, top_p)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1.5 / 4000)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampling_whole_follows_the_softmax(temperature):
    z = 2 * torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    ours = frequencies(z, 20000, temperature, 0, 1.0)
    torch.testing.assert_close(ours, (z / temperature).softmax(-1)[0], rtol=0, atol=1.5 / 20000)
    nucleus = frequencies(z, 4000, temperature, 0, 0.5)  # of the whole vocabulary
    p = (z / temperature).softmax(-1)[0].sort(descending=True)
    inside = p.values.cumsum(0) - p.values < 0.5
    assert set(nucleus.nonzero()[:, 0].tolist()) == set(p.indices[inside].tolist())


def test_a_prompt_that_leaves_no_room_is_refused():
    for ask in (lambda: sample(tiny("llama"), CHAT, [[5] * 250], max_new_tokens=10),
                lambda: next(stream(tiny("llama"), CHAT, [5] * 250, max_new_tokens=10)),
                lambda: score(tiny("llama"), [[5] * 250], [[5] * 10])):
        with pytest.raises(ValueError, match="exceed the model's context of 256"):
            ask()


@torch.no_grad()
def plain_score(model, prompt, completion, v=None, dose=0.0):
    """One row, no cache, no padding: steered from the prompt's last token on."""
    with sampling.steering(model, v, dose, len(completion) + 1):
        z = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
    logp = z[len(prompt) - 1:-1].float().log_softmax(-1)
    return logp.gather(1, torch.tensor(completion, dtype=torch.long)[:, None])[:, 0]


ANSWERS = [[5], [6, 7, 8, 9, 10, 11], [], [12, 13, 14], [15, 16]]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "qwen3_next"])
def test_score_is_the_log_probability_of_each_completion_token(name, share, monkeypatch):
    """Steered or not, after `begun` or not, equal prompts run once or not."""
    model = make(name)
    if name != "qwen3_next":
        monkeypatch.setattr(sampling, "shares_prompts", lambda model, prompts: share)
    v, ps = vector(model), [prompts(1)[0], *prompts(4)]
    for dose in (0.0, 2.0):
        for begun in ([], [20, 21, 22]):
            ours = score(model, ps, ANSWERS, v, dose, batch_size=3, begun=begun)
            for p, c, logp in zip(ps, ANSWERS, ours, strict=True):
                whole = plain_score(model, p, begun + c, v, dose)[len(begun):]
                torch.testing.assert_close(logp, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_neither_sharing_prompts_nor_healings_attention_changes_gradients(name, monkeypatch):
    model = tiny(name)
    lora.attach(model, rank=2, layers=(0, 1), targets=("q_proj", "v_proj", "o_proj"))
    for m in lora.adapters(model).values():
        m.B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    ps, cs = [prompts(1)[0]] * 2 + prompts(3), [c or [9] for c in ANSWERS]
    results = []
    for share, context in itertools.product((True, False), (nullcontext, sampling.training)):
        monkeypatch.setattr(sampling, "shares_prompts", lambda model, prompts: share)
        with context(model):
            states = completion_states(model, ps, cs)
            gradients = torch.autograd.grad(states.sin().sum(), lora.live_parameters(model))
        results.append((states, *gradients))
    assert model.config._attn_implementation == "sdpa"
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_a_row_on_one_side_of_a_long_rope_switch_is_scored_alone():
    model, g = long_rope(), torch.Generator().manual_seed(0)
    ps = [torch.randint(3, 128, (n,), generator=g).tolist() for n in (4, 20, 5, 30)]
    cs = [[5, 6, 7, 8]] * 4
    two, one = (score(model, ps, cs, batch_size=n) for n in (2, 1))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one, [plain_score(model, p, c) for p, c in zip(ps, cs)],
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("holds", [3, 1])
def test_where_memory_is_short_the_halves_give_the_same(monkeypatch, holds):
    """A device that holds `holds` rows, made of the CPU: halving helps from 5 to 3, not to 0."""
    model, rows = tiny("llama"), prompts(5)
    answers = [[5, 6, 7]] * len(rows)
    whole = sample(model, CHAT, rows, max_new_tokens=6), score(model, rows, answers)

    def full(block, args):
        if len(args[0]) > holds or holds == 1:
            raise torch.OutOfMemoryError
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    model.get_decoder().layers[0].register_forward_pre_hook(full)
    if holds == 1:
        with pytest.raises(torch.OutOfMemoryError):
            sample(model, CHAT, rows, max_new_tokens=6)
        return
    assert sample(model, CHAT, rows, max_new_tokens=6) == whole[0]
    torch.testing.assert_close(score(model, rows, answers), whole[1])


def operations(step):
    """How many operations of torch one call of `step` starts, the second time."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as log:
        step()
    return sum(e.count for e in log.key_averages() if e.key.startswith("aten::"))


@torch.no_grad()
def test_one_decode_step_starts_few_operations():
    model = tiny("llama")
    doses = torch.zeros(4)
    decoder = sampling.Decoder(model, prompts(4), vector(model), doses, torch.rand(4, 8), {2},
                               dict(temperature=1.0, top_k=64, top_p=0.95))
    assert 1000 < operations(decoder.step) <= 1445  # 1,314 and a tenth more


def test_one_heal_step_starts_few_operations():
    model, ps, cs = tiny("llama"), prompts(4), [[5, 6, 7, 8]] * 4
    lora.attach(model, rank=4)
    states = completion_states(model, ps, cs).detach().split([4] * 4)
    batch = {"prompts": ps, "completions": cs, "reference": states, "teacher": None}
    n = operations(lambda: heal_step(model, batch, Config()))
    assert 7000 < n <= 10310  # 9,373 and a tenth more


def test_perplexity_is_of_all_tokens_or_of_the_worst_window():
    logp = torch.tensor([-1.0, -2.0, -3.0, -6.0, -1.0])
    assert perplexity(logp) == pytest.approx(math.exp(2.6))
    assert worst_perplexity(logp, window=2) == pytest.approx(math.exp(4.5))
    assert worst_perplexity(logp) == pytest.approx(math.exp(2.6))  # a short text is one window
    assert perplexity(torch.empty(0)) == worst_perplexity(torch.empty(0)) == math.inf


def test_repetition_is_low_for_prose_and_high_for_loops():
    prose = "Ask the nurse on duty before you move her, and stay close to the door."
    assert repetition(prose) < 0.1 and repetition("") == 0
    assert repetition("I will help you. " * 4) > 0.5
    assert repetition("T" * 24) > 0.8


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "mixtral"])
def test_answers_side_by_side_score_as_a_row_each(name):
    model = tiny(name, initializer_range=0.5)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (20, 9, 12)]
    answers = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (1, 3, 2, 5)]
    vector = SteeringVector({2: torch.randn(32, generator=generator)})
    for v in (None, vector):
        ours = sampling.score_answers(model, prompts, answers, v, 1.5, begun=[5, 6])
        repeated = [prompt for prompt in prompts for _ in answers]
        rows = sampling.score(model, repeated, answers * 3, v, 1.5, begun=[5, 6])
        one_by_one = torch.stack([logp.double().sum() for logp in rows]).view(3, -1)
        assert ours.std() > 1  # nats: the answers differ
        torch.testing.assert_close(ours, one_by_one, atol=1e-3, rtol=0)
