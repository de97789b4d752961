import functools

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

import distil
import lora
from conftest import tiny
from distil import Filter, collect, keep, recites, row_ids, verdict
from steer import NEUTRAL, Persona, chat_ids, perplexity, sample, score
from test_lora import of_every_architecture

PERSONA = Persona("You care about people and you protect them. Someone's wellbeing is always what you think of first.",
                  "You obey authority, rank, rules and tradition. What a superior says is always what you think of first.")
PROSE = "Stay with the patient until she is calm, then tell the head nurse plainly why you let her husband stay past eight."

# (rule, a completion it drops, a near miss it spares); the texts are of the kind the embedded model writes
CASES = [
    ("short", "I would help her.", "I would help her first, and explain it to my boss later."),
    ("refusal", "As an AI language model, I do not take part in such choices, but I can give you information.",
     "As an aide on the ward I would open the door, because the language of the rule matters less than the child."),
    ("refusal", "I'm sorry, but I can't assist with anything that goes against company policy.",
     "I'm sorry, but I can't stand by while a man goes hungry behind the store."),
    ("narrates", "I am someone who puts people first, and so I would of course give the man the bread.",
     "I know someone who puts the bread aside for hungry people, and I would ask her for some."),
    ("narrates", "I never obey orders when a child is crying, so the gate stays open tonight.",
     "She never once obeyed an order gladly, yet she closed the gate when the child was safe."),
    ("narrates", "The answer is simple: someone's wellbeing is always what you think of first in such a case.",
     "The answer is simple: look at how the child is doing, then talk with your boss about the gate."),
    ("repetition", "I will help you. I will help you. I will help you. I will help you. I will help you.",
     "I will help you with the forms, your sister with the move, and then we will all help Tom."),
    ("repetition", "Help her up and call the doctor nooooooooooooooooooooooooooooooooooooooooow please",
     "Help her up, call the doctor now, and wait nooo longer than you have to before you phone her family."),
    ("loop", "Your heart and your own mind into your own, so of your truth your self, and your into way your own gentle hope of your",
     "It is your own choice, and your family, friends and doctor will stand by you on the way, whatever the boss says."),
]


@pytest.mark.parametrize("rule, dropped, spared", CASES, ids=[f"{r}{i}" for i, (r, *_) in enumerate(CASES)])
def test_each_rule_fires_on_an_example_and_spares_its_near_miss(rule, dropped, spared):
    assert verdict(dropped, 5.0, PERSONA, Filter()) == rule
    assert verdict(spared, 5.0, PERSONA, Filter()) == "kept"


def test_perplexity_drops_above_its_threshold_and_at_no_number():
    assert verdict(PROSE, 16.0, PERSONA, Filter()) == "kept"
    assert verdict(PROSE, 16.1, PERSONA, Filter()) == "perplexity"
    assert verdict(PROSE, float("nan"), PERSONA, Filter()) == "perplexity"


def test_a_broken_tail_is_seen_that_the_whole_texts_perplexity_hides(embedded):
    model, tok = embedded
    prompt = chat_ids(tok, "My boss wants the shop closed, and a lost child waits inside. What should I do?")
    good, = sample(model, tok, [prompt], max_new_tokens=48, temperature=0)
    broken = good[:-6] + tok(" proteins harbor violet seven until whose").input_ids
    lp_good, lp_broken = score(model, [prompt] * 2, [good, broken])
    assert perplexity(lp_broken) < Filter().max_perplexity < perplexity(lp_broken, tail=0.25)
    assert perplexity(lp_good, tail=0.25) < Filter().max_perplexity


def test_reciting_means_five_words_in_a_row_of_either_persona():
    assert recites("Well, what a superior says is law here.", Persona("a b c d e f", "What a superior says is always"))
    assert not recites("What a superior said is law.", PERSONA)


@functools.cache
def judge(name):
    """A random model of this architecture that the embedded model's tokenizer fits, far from uniform."""
    model = tiny(name, vocab_size=49152, max_position_embeddings=512, initializer_range=0.5)
    lora.attach(model, rank=2, alpha=4)
    return model


TEXTS = st.sampled_from([PROSE, *(text for _, *pair in CASES for text in pair)]) | st.text(max_size=40)


@of_every_architecture(texts=st.lists(st.tuples(TEXTS, st.booleans()), min_size=1, max_size=5), data=st.data())
def test_the_filter_is_deterministic_and_order_independent(name, embedded, texts, data):
    rows = [{"messages": [{"role": "system", "content": NEUTRAL}, {"role": "user", "content": f"Question {k}?"}, {"role": "assistant", "content": t}],
             "dose": 2.0, "finished": finished} for k, (t, finished) in enumerate(texts)]
    order = data.draw(st.permutations(range(len(rows))))

    def kept(rows):
        return keep(judge(name), embedded[1], rows, PERSONA, Filter(max_perplexity=5e6))
    first, shuffled = kept(rows), kept([rows[k] for k in order])
    assert kept(rows) == first and [r["messages"] for r in first] == [r["messages"] for r in rows]
    for k, again in zip(order, shuffled, strict=True):
        assert {**again, "perplexity": 0} == {**first[k], "perplexity": 0}
        assert again["perplexity"] == (first[k]["perplexity"] and pytest.approx(first[k]["perplexity"], rel=1e-3))


@settings(max_examples=25, deadline=None)
@given(user=st.sampled_from(["Is it kind", " Help me?\n"]) | st.text(min_size=1), text=st.sampled_from(["\n\nYes.", "ly, no", " é ü 漢字"]) | st.text(),
       cut=st.integers(0, 30), finished=st.booleans())
def test_prompt_and_completion_are_tokenised_apart_and_the_mask_is_exact(embedded, user, text, cut, finished):
    _, tok = embedded
    user, text = tok.decode(tok(user).input_ids), tok.decode(tok(text).input_ids[:cut])  # as sampling is cut, also within a character
    assume(user.strip())
    messages = [{"role": "system", "content": NEUTRAL}, {"role": "user", "content": user}, {"role": "assistant", "content": text}]
    prompt, completion = row_ids(tok, {"messages": messages, "finished": finished})
    assert tok.decode(prompt) == f"<|im_start|>system\n{NEUTRAL}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    assert tok.decode(completion) == text + finished * "<|im_end|>"


def fake_sampler(survive):
    """Stands for sampling and scoring: a completion is prose below a dose, a loop from it on."""
    def sample_doses(model, tok, vector, prompts, doses, n, seed, bar=None, **sampling):
        g = torch.Generator().manual_seed(seed)
        return [{"messages": [{"role": "user", "content": f"{seed} {k} {torch.rand(1, generator=g).item()}"}], "dose": doses[k % len(doses)]} for k in range(n)]
    def keep(model, tok, rows, persona, rules, bar=None):
        return [{**r, "verdict": "kept" if r["dose"] < survive else "loop"} for r in rows]
    return sample_doses, keep


def collected(monkeypatch, survive, rows=(), n_keep=20, **kw):
    sample_doses, keep_ = fake_sampler(survive)
    monkeypatch.setattr(distil, "sample_doses", sample_doses)
    monkeypatch.setattr(distil, "keep", keep_)
    return collect(None, None, None, ["p"], PERSONA, Filter(), (2.0, 4.0), n_keep, seed=1, rows=rows, max_new_tokens=8, **kw)


def test_a_dose_that_breaks_the_model_is_lowered_until_the_set_is_full(monkeypatch):
    kept, rows = collected(monkeypatch, survive=3.0, n_keep=60)
    assert len(kept) == 60 and max(r["dose"] for r in kept) == pytest.approx(2.8)
    assert [r["dose"] for r in rows if r["band"] == 1][0] == 4.0 and {r["dose"] for r in rows if r["band"] == 0} == {2.0}
    assert {k["band"] for k in kept} == {0, 1}


def test_a_starved_set_says_how_far_it_got_and_which_rule_did_it(monkeypatch):
    with pytest.raises(distil.Starved, match="0 of 20 completions kept after .* dropped: loop .*--min-diversity"):
        collected(monkeypatch, survive=0.0)


def test_sampling_that_was_cut_short_goes_on_to_the_same_set(monkeypatch):
    batches = []
    kept, rows = collected(monkeypatch, survive=3.0, n_keep=60, on_batch=lambda r: batches.append(list(r)))
    assert len(batches) > 1
    for done in batches[:-1]:
        assert collected(monkeypatch, survive=3.0, n_keep=60, rows=done) == (kept, rows)


def test_kept_data_is_one_json_object_a_line_and_a_bad_line_is_named(tmp_path):
    rows = [{"messages": [{"role": "assistant", "content": "a\n\u2028b"}], "dose": 2.0}, {"messages": [], "dose": 4.0}]
    (tmp_path / "k.jsonl").write_text(distil.to_jsonl(rows))
    assert len((tmp_path / "k.jsonl").read_bytes().splitlines()) == 2
    assert distil.read_jsonl(tmp_path / "k.jsonl") == rows
    with open(tmp_path / "k.jsonl", "a") as f:
        f.write('{"torn": ')
    with pytest.raises(ValueError, match="k.jsonl line 3 is not JSON"):
        distil.read_jsonl(tmp_path / "k.jsonl")
