import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import steer
from conftest import Ids, tiny
from steer import NEUTRAL, Persona, SteeringVector, band, chat_ids, extract_vector, left_pad, next_token, sample, score


def vector(model, layers=(1, 2), size=1.0):
    d = model.config.get_text_config().hidden_size
    return SteeringVector({l: size * torch.randn(d, generator=torch.Generator().manual_seed(l)) for l in layers})


def prompts(n=6):
    g = torch.Generator().manual_seed(7)
    return [torch.randint(3, 128, (4 + 3 * (i % 4),), generator=g).tolist() for i in range(n)]


def test_attention_on_a_cpu_equals_the_models_own_with_padding_and_gradients(any_model):
    rows = [list(range(3, 24)), list(range(40, 52)), [7]]  # longer than Gemma's window of 16
    tokens, mask, positions = left_pad(rows, 0, "cpu")
    any_model.get_input_embeddings().weight.requires_grad_()
    results = []
    for implementation in ("eager", "grouped"):
        any_model.set_attn_implementation(implementation)
        logits = any_model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
        gradient, = torch.autograd.grad(logits[mask.bool()].sin().sum(), any_model.get_input_embeddings().weight)
        results.append((logits[mask.bool()], gradient))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_model_loaded_on_a_cpu_uses_it(embedded):
    assert embedded[0].config._attn_implementation == "grouped"
    assert "grouped" not in embedded[0].config.to_json_string()


def test_mixed_doses_in_a_batch_equal_row_by_row(any_model, ids):
    v, doses = vector(any_model), [0.0, 1.5, -3.0]
    with torch.no_grad():
        with v.at(any_model, torch.tensor(doses)):
            together = any_model(input_ids=ids).logits
        for row, dose in enumerate(doses):
            with v.at(any_model, dose):
                alone = any_model(input_ids=ids[row:row + 1]).logits[0]
            torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)
        plain = any_model(input_ids=ids).logits
    torch.testing.assert_close(together[0], plain[0], rtol=1e-4, atol=1e-4)
    assert (together[1] - plain[1]).abs().max() > 1e-3


def test_steering_adds_dose_times_v_to_the_residual_stream_and_leaves_no_hook(tiny_model, ids):
    v = vector(tiny_model, layers=(2,))
    seen = []
    block = tiny_model.get_decoder().layers[2]
    reader = lambda m, a, out: seen.append(out if torch.is_tensor(out) else out[0])
    with torch.no_grad():
        with block.register_forward_hook(reader):
            tiny_model(input_ids=ids)
        with v.at(tiny_model, 2.0), block.register_forward_hook(reader):
            tiny_model(input_ids=ids)
    torch.testing.assert_close(seen[1] - seen[0], (2 * v.layers[2]).expand_as(seen[0]), rtol=1e-4, atol=1e-4)
    assert not block._forward_hooks


def test_a_vector_that_does_not_fit_is_refused(ids):
    model = tiny("llama")
    for v in (SteeringVector({9: torch.ones(32)}), SteeringVector({1: torch.ones(31)})):
        with pytest.raises(ValueError, match="does not fit"):
            with v.at(model, 1.0):
                pass


def test_greedy_sampling_equals_transformers_generate_also_with_padding(tiny_model):
    ps = prompts()
    ours = sample(tiny_model, Ids, ps, max_new_tokens=24, temperature=0)
    for p, o in zip(ps, ours):
        theirs = tiny_model.generate(torch.tensor([p]), max_new_tokens=24, do_sample=False, pad_token_id=0)[0, len(p):].tolist()
        theirs = theirs[:theirs.index(2)] if 2 in theirs else theirs
        assert o == theirs


def test_sampled_tokens_depend_on_seed_and_row_not_on_the_batch(tiny_model):
    ps, v, doses = prompts() + prompts(), vector(tiny_model), [0.0] * 6 + [2.0] * 6
    together = sample(tiny_model, Ids, ps, v, doses, max_new_tokens=20, seed=3)
    assert together == sample(tiny_model, Ids, ps, v, doses, max_new_tokens=20, seed=3, batch_size=5)
    assert together != sample(tiny_model, Ids, ps, v, doses, max_new_tokens=20, seed=4)
    assert together[:6] != together[6:]


def test_rows_that_finish_leave_the_batch_and_change_no_other_row(monkeypatch):
    model = tiny("llama")
    model.generation_config.eos_token_id = list(range(3, 40))  # about a third of the draws end a row
    widths = []
    model.get_decoder().register_forward_pre_hook(lambda m, a, k: widths.append(len(k["input_ids"])), with_kwargs=True)
    ps = prompts(32)
    out = sample(model, Ids, ps, max_new_tokens=30, seed=1)
    assert widths[1] == 32 and widths[-1] < 8 and len(set(map(len, out))) > 3
    alone = sample(model, Ids, ps, max_new_tokens=30, seed=1, batch_size=1)
    assert out == alone


def test_steering_acts_from_the_assistant_tag_on_and_equal_prompts_are_run_once():
    model, widths = tiny("llama"), []
    model.get_decoder().register_forward_pre_hook(lambda m, a, k: widths.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    p = prompts(1)[0]
    v = vector(model, size=4.0)
    ours = sample(model, Ids, [p] * 4, v, [0.0, 1.0, 2.0, 4.0], max_new_tokens=6, temperature=0)
    assert widths[0] == (1, len(p) - 1) and widths[1] == (4, 1)
    ids = list(p)
    for _ in range(6):  # by hand, no cache: steer positions len(p) − 1 and later
        def add(m, a, out, l):
            out = out.clone()
            out[:, len(p) - 1:] += 4.0 * v.layers[l]
            return out
        hooks = [model.get_decoder().layers[l].register_forward_hook(lambda m, a, out, l=l: add(m, a, out, l)) for l in v.layers]
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        for h in hooks:
            h.remove()
    hand = ids[len(p):]
    assert ours[3] == (hand[:hand.index(2)] if 2 in hand else hand)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), temperature=st.sampled_from([0.7, 1.0, 1.5]), top_k=st.integers(1, 40), top_p=st.sampled_from([0.3, 0.8, 0.95, 1.0]))
def test_next_token_draws_from_the_distribution_that_transformers_composes(seed, temperature, top_k, top_p):
    z = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(seed))
    warp = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)])
    theirs = warp(None, z.clone()).softmax(-1)[0]
    n = 4000
    u = (torch.arange(n) + 0.5) / n  # inverse CDF on a grid gives every token its probability to within 1/n
    ours = torch.bincount(next_token(z.expand(n, -1), u, temperature, top_k, top_p), minlength=40) / n
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1.5 / n)


def test_score_is_the_log_probability_of_each_completion_token(tiny_model):
    ps, cs = prompts(5), [c[:k + 1] for k, c in enumerate(prompts(10)[5:])]
    cs[2] = []
    for p, c, lp in zip(ps, cs, score(tiny_model, ps, cs, batch_size=2)):
        if not c:
            assert len(lp) == 0
            continue
        full = tiny_model(input_ids=torch.tensor([p + c])).logits[0].float().log_softmax(-1)
        torch.testing.assert_close(lp, torch.stack([full[len(p) + k - 1, t] for k, t in enumerate(c)]), rtol=1e-4, atol=1e-4)


def test_extraction_is_the_mean_difference_at_the_assistant_tag(embedded):
    model, tok = embedded
    persona, contexts = Persona("You care.", "You obey authority in everything you do."), ["Hi.", "What is the best bread?", "My boss is late again today."]
    v = extract_vector(model, tok, persona, contexts, [13, 15], batch_size=2)
    for l in (13, 15):
        def state(system, c):
            with torch.no_grad():
                return model(torch.tensor([chat_ids(tok, c, system)]), output_hidden_states=True).hidden_states[l + 1][0, -1]
        expected = torch.stack([state(persona.pos, c) - state(persona.neg, c) for c in contexts]).mean(0)
        torch.testing.assert_close(v.layers[l], expected, rtol=1e-3, atol=1e-3)


def test_vectors_survive_the_disk_and_bad_files_are_named(tmp_path):
    v = SteeringVector({3: torch.randn(8), 1: torch.randn(8)}, {"pos": "a", "neg": "b"})
    v.save(tmp_path / "v.safetensors")
    back = SteeringVector.load(tmp_path / "v.safetensors")
    assert all(torch.equal(v.layers[l], back.layers[l]) for l in (1, 3)) and back.about["pos"] == "a"
    assert v.cosine(back) == pytest.approx(1)
    (tmp_path / "cut").write_bytes((tmp_path / "v.safetensors").read_bytes()[:40])
    with pytest.raises(ValueError, match="damaged"):
        SteeringVector.load(tmp_path / "cut")
    SteeringVector({1: torch.tensor([float("nan")])}).save(tmp_path / "nan")
    with pytest.raises(ValueError, match="not finite"):
        SteeringVector.load(tmp_path / "nan")


class Template:
    """A chat template that treats the system turn in its own way."""
    def __init__(self, how):
        self.how = how

    def apply_chat_template(self, messages, **_):
        if messages[0]["role"] == "system":
            if self.how == "refuses":
                raise RuntimeError("System role not supported")
            if self.how == "drops":
                messages = messages[1:]
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    def __call__(self, text, **_):
        class Out:
            input_ids = text
        return Out


@pytest.mark.parametrize("how, expected", [("takes", f"<system>{NEUTRAL}<user>Hi<assistant>"), ("refuses", f"<user>{NEUTRAL}\n\nHi<assistant>"),
                                           ("drops", f"<user>{NEUTRAL}\n\nHi<assistant>")])
def test_the_system_text_reaches_the_model_whatever_the_template_does(how, expected):
    assert chat_ids(Template(how), "Hi") == expected


def test_band_and_padding():
    model = tiny("llama")
    assert band(model, (0.4, 0.6)) == [2] and band(model, (0, 1)) == [0, 1, 2, 3, 4] and band(model, (0.99, 1.0)) == [4]
    for wrong in ((0.6, 0.4), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match="fractions"):
            band(model, wrong)
    ids, mask, positions = left_pad([[5, 6], [7, 8, 9]], 0, "cpu")
    assert ids.tolist() == [[0, 5, 6], [7, 8, 9]] and mask.tolist() == [[0, 1, 1], [1, 1, 1]] and positions.tolist() == [[0, 0, 1], [0, 1, 2]]


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(ValueError, match="exceed the model's context of 256"):
        sample(tiny("llama"), Ids, [[5] * 250], max_new_tokens=10)


def test_repetition_is_zero_for_prose_and_high_for_loops_of_words_and_of_characters():
    assert steer.repetition("Ask the nurse on duty before you move her, and stay close to the door.") < 0.1
    assert steer.repetition("I will help you. I will help you. I will help you. I will help you.") > 0.5
    assert steer.repetition("TTTTTTTTTTTTTTTTTTTTTTTT") > 0.8
