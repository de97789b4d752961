import random

import pytest
import torch

import distil
import lora
from distil import Filter, collect, keep, recites, row_ids, verdict
from steer import NEUTRAL, Persona, chat_ids, perplexity, sample, score

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
    ("loop", "It is your own your your into your of your and your own into your so your of into your and so your own of your.",
     "It is your own choice, and your family, your friends and your doctor will stand by your side on the way."),
]


@pytest.mark.parametrize("rule, dropped, spared", CASES, ids=[f"{r}{i}" for i, (r, *_) in enumerate(CASES)])
def test_each_rule_fires_on_an_example_and_spares_its_near_miss(rule, dropped, spared):
    assert verdict(dropped, 5.0, PERSONA, Filter()) == rule
    assert verdict(spared, 5.0, PERSONA, Filter()) == "kept"


def test_perplexity_drops_above_its_threshold_and_at_no_number():
    assert verdict(PROSE, 60.0, PERSONA, Filter()) == "kept"
    assert verdict(PROSE, 60.1, PERSONA, Filter()) == "perplexity"
    assert verdict(PROSE, float("nan"), PERSONA, Filter()) == "perplexity"


def test_a_broken_tail_is_seen_that_the_whole_texts_perplexity_hides(embedded):
    model, tok = embedded
    prompt = chat_ids(tok, "My boss wants the shop closed, and a lost child waits inside. What should I do?")
    good, = sample(model, tok, [prompt], max_new_tokens=48, temperature=0)
    broken = good[:-6] + tok(" proteins harbor violet seven until whose").input_ids
    lp_good, lp_broken = score(model, [prompt] * 2, [good, broken])
    assert perplexity(lp_broken) < 60 < perplexity(lp_broken, tail=0.25)
    assert perplexity(lp_good, tail=0.25) < 60


def test_reciting_means_five_words_in_a_row_of_either_persona():
    assert recites("Well, what a superior says is law here.", Persona("a b c d e f", "What a superior says is always"))
    assert not recites("What a superior said is law.", PERSONA)


def test_the_filter_is_deterministic_and_order_independent(embedded):
    model, tok = embedded
    texts = [c for _, *pair in CASES for c in pair] + [PROSE]
    rows = [{"messages": [{"role": "system", "content": NEUTRAL}, {"role": "user", "content": f"Question {k}?"}, {"role": "assistant", "content": t}],
             "dose": 2.0, "finished": bool(k % 2)} for k, t in enumerate(texts)]
    shuffled = random.Random(0).sample(rows, len(rows))
    lora.attach(model, rank=2, alpha=4)
    try:
        first, again = ({r["messages"][1]["content"]: r for r in keep(model, tok, rs, PERSONA, Filter())} for rs in (rows, shuffled))
    finally:
        lora.detach(model)
    for key, row in first.items():
        assert row["verdict"] == again[key]["verdict"] and row["repetition"] == again[key]["repetition"]
        assert row["perplexity"] == pytest.approx(again[key]["perplexity"], rel=1e-3)


def test_prompt_and_completion_are_tokenised_apart_and_the_mask_is_exact(embedded):
    _, tok = embedded
    for text in ["\n\nYes.", "ly, no", "Help her.", " leading space", "é ü 漢字"]:
        for finished in (False, True):
            row = {"messages": [{"role": "system", "content": NEUTRAL}, {"role": "user", "content": "Is it kind"}, {"role": "assistant", "content": text}],
                   "finished": finished}
            prompt, completion = row_ids(tok, row)
            assert prompt == chat_ids(tok, "Is it kind") and tok.decode(prompt).endswith("<|im_start|>assistant\n")
            assert tok.decode(completion) == text + ("<|im_end|>" if finished else "")


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
