"""The rules that keep or drop a completion, the rows they judge, and how a set gets full."""
import functools
import math

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

import distil
import lora
from common import runs
from conftest import tiny
from distil import Rules, collect, judge, recites, row_ids, summary, verdict
from common.sampling import perplexity, worst_perplexity, sample, score
from steer import NEUTRAL, Persona, chat_ids
from test_lora import of_every_architecture

pytestmark = pytest.mark.filterwarnings("ignore:LoRA reaches")  # of mixtral's experts

PERSONA = Persona(
    pos="You care about people and you protect them. "
        "Someone's wellbeing is always what you think of first.",
    neg="You obey authority, rank, rules and tradition. "
        "What a superior says is always what you think of first.")
PROSE = ("Stay with the patient until she is calm, then tell the head nurse plainly why you let "
         "her husband stay past eight.")


# ---- the rules ----------------------------------------------------------------------------------

# (rule, a completion it drops, a near miss it spares), of the kind the embedded model writes
CASES = [
    ("short",
     "I would help her.",
     "I would help her first, and explain it to my boss later."),
    ("refusal",
     "As an AI language model, I do not take part in such choices, but I can give you information.",
     "As an aide on the ward I would open the door, because the language of the rule matters less "
     "than the child."),
    ("refusal",
     "I'm sorry, but I can't assist with anything that goes against company policy.",
     "I'm sorry, but I can't stand by while a man goes hungry behind the store."),
    ("narrates",
     "I am someone who puts people first, and so I would of course give the man the bread.",
     "I know someone who puts the bread aside for hungry people, and I would ask her for some."),
    ("narrates",
     "I never obey orders when a child is crying, so the gate stays open tonight.",
     "She never once obeyed an order gladly, yet she closed the gate when the child was safe."),
    ("narrates",
     "The answer is simple: someone's wellbeing is always what you think of first in such a case.",
     "The answer is simple: look at how the child is doing, then talk with your boss about the "
     "gate."),
    ("repetition",
     "I will help you. I will help you. I will help you. I will help you. I will help you.",
     "I will help you with the forms, your sister with the move, and then we will all help Tom."),
    ("repetition",
     "Help her up and call the doctor nooooooooooooooooooooooooooooooooooooooooow please",
     "Help her up, call the doctor now, and wait nooo longer than you have to before you phone her "
     "family."),
    ("loop",
     "Your heart and your own mind into your own, so of your truth your self, and your into way "
     "your own gentle hope of your",
     "It is your own choice, and your family, friends and doctor will stand by you on the way, "
     "whatever the boss says."),
]


@pytest.mark.parametrize("rule, dropped, spared", CASES,
                         ids=[f"{rule}{k}" for k, (rule, *_) in enumerate(CASES)])
def test_each_rule_fires_on_an_example_and_spares_its_near_miss(rule, dropped, spared):
    assert verdict(dropped, 5.0, PERSONA, Rules()) == rule
    assert verdict(spared, 5.0, PERSONA, Rules()) == "kept"


def test_perplexity_drops_above_its_threshold_and_at_no_number():
    assert verdict(PROSE, 15.0, PERSONA, Rules()) == "kept"
    for ppl in (15.1, math.inf, math.nan):
        assert verdict(PROSE, ppl, PERSONA, Rules()) == "perplexity"


@pytest.mark.slow
def test_a_broken_tail_is_seen_that_the_whole_texts_perplexity_hides(embedded):
    model, tok = embedded
    prompt = chat_ids(tok, "My boss wants the shop closed, and a lost child waits inside. "
                           "What should I do?")
    good, = sample(model, tok, [prompt], max_new_tokens=48, temperature=0)
    broken = good[:-6] + tok(" proteins harbor violet seven until whose").input_ids
    lp_good, lp_broken = score(model, [prompt] * 2, [good, broken])
    most = Rules().max_perplexity
    assert perplexity(lp_broken) < most < worst_perplexity(lp_broken)
    assert worst_perplexity(lp_good) < most


def test_reciting_means_five_words_in_a_row_of_either_persona():
    either = Persona("a b c d e f", "What a superior says is always")
    assert recites("Well, what a superior says is law here.", either)
    assert not recites("What a superior said is law.", PERSONA)


# ---- rows ---------------------------------------------------------------------------------------


@functools.cache
def a_judge(name):
    """A random model of this architecture for the embedded model's tokenizer, far from uniform."""
    model = tiny(name, vocab_size=49152, max_position_embeddings=512, initializer_range=0.5)
    lora.attach(model, rank=2, alpha=4)
    return model


def chat(user, assistant):
    return [{"role": "system", "content": NEUTRAL}, {"role": "user", "content": user},
            {"role": "assistant", "content": assistant}]


TEXTS = st.sampled_from([PROSE, *(text for _, *pair in CASES for text in pair)])


@of_every_architecture(texts=st.lists(st.tuples(TEXTS | st.text(max_size=40), st.booleans()),
                                      min_size=1, max_size=5), data=st.data())
def test_verdicts_are_deterministic_and_do_not_depend_on_the_order(name, embedded, texts, data):
    rows = [{"messages": chat(f"Question {k}?", text), "dose": 2.0, "finished": finished}
            for k, (text, finished) in enumerate(texts)]
    order = data.draw(st.permutations(range(len(rows))))

    def judged(rows):
        return judge(a_judge(name), embedded[1], rows, PERSONA, Rules(max_perplexity=5e6))
    first, shuffled = judged(rows), judged([rows[k] for k in order])
    assert judged(rows) == first
    assert [r["messages"] for r in first] == [r["messages"] for r in rows]
    for k, again in zip(order, shuffled, strict=True):
        ppl = first[k]["perplexity"]
        assert {**again, "perplexity": 0} == {**first[k], "perplexity": 0}
        assert again["perplexity"] == (ppl and pytest.approx(ppl, rel=1e-3))


def test_perplexity_is_of_the_worst_window_under_the_original_whatever_the_student_became(embedded):
    tok = embedded[1]
    model = tiny("llama", vocab_size=49152, max_position_embeddings=512, initializer_range=0.5)
    rows = [{"messages": chat("Is it kind?", PROSE), "finished": True}]
    prompt, completion = row_ids(tok, rows[0])
    logp = score(model, [prompt], [completion])[0]
    lora.attach(model, rank=2, alpha=4)
    for m in lora.adapters(model).values():
        m.B.data.normal_()
    lora.fold(model)
    assert not torch.allclose(score(model, [prompt], [completion])[0], logp)
    with lora.merged(model):
        judged, = judge(model, tok, rows, PERSONA, Rules())
    windows = [logp[k:k + 24].mean().item() for k in range(len(completion) - 23)]
    expected = math.exp(-min(windows))
    assert len(windows) > 1 and judged["perplexity"] == pytest.approx(expected, rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(user=st.sampled_from(["Is it kind", " Help me?\n"]) | st.text(min_size=1),
       text=st.sampled_from(["\n\nYes.", "ly, no", " é ü 漢字"]) | st.text(),
       cut=st.integers(0, 30), finished=st.booleans())
def test_prompt_and_completion_are_tokenised_apart_and_the_mask_is_exact(
        embedded, user, text, cut, finished):
    _, tok = embedded
    user = tok.decode(tok(user).input_ids)
    text = tok.decode(tok(text).input_ids[:cut])  # as sampling is cut, also within a character
    assume(user.strip())
    prompt, completion = row_ids(tok, {"messages": chat(user, text), "finished": finished})
    assert tok.decode(prompt) == (f"<|im_start|>system\n{NEUTRAL}<|im_end|>\n"
                                  f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")
    assert tok.decode(completion) == text + finished * "<|im_end|>"


def test_kept_data_is_one_json_object_a_line_and_a_bad_line_is_named(tmp_path):
    rows = [{"messages": [{"role": "assistant", "content": "a\n\u2028b"}], "dose": 2.0},
            {"messages": [], "dose": 4.0}]
    file = tmp_path / "k.jsonl"
    file.write_text(runs.to_jsonl(rows))
    assert len(file.read_bytes().splitlines()) == 2
    assert runs.read_jsonl(file) == rows
    with open(file, "a") as f:
        f.write('{"torn": ')
    with pytest.raises(ValueError, match="k.jsonl line 3 is not JSON"):
        runs.read_jsonl(file)
    assert runs.read_jsonl(file, torn=True) == rows


# ---- a full set ---------------------------------------------------------------------------------


def fake_sampler(survive):
    """Stands for sampling and scoring: a completion is prose below a dose, a loop from it on."""
    def sample_doses(model, tok, vector, prompts, doses, n, seed, **sampling):
        g = torch.Generator().manual_seed(seed)
        rows = []
        for k in range(n):
            content = f"{seed} {k} {torch.rand(1, generator=g).item()}"
            rows.append({"messages": [{"role": "user", "content": content}],
                         "dose": doses[k % len(doses)]})
        return rows

    def judge(model, tok, rows, persona, rules):
        return [{**r, "verdict": "kept" if r["dose"] < survive else "loop"} for r in rows]
    return sample_doses, judge


def collected(monkeypatch, folder, survive, n_keep=20, **how):
    sample_doses, judge = fake_sampler(survive)
    monkeypatch.setattr(distil, "sample_doses", sample_doses)
    monkeypatch.setattr(distil, "judge", judge)
    return collect(None, None, None, ["p"], PERSONA, Rules(), (2.0, 4.0), n_keep, 1, folder,
                   max_new_tokens=8, **how)


def test_a_dose_that_breaks_the_model_is_lowered_until_the_set_is_full(monkeypatch, tmp_path):
    kept, rows = collected(monkeypatch, tmp_path, survive=3.0, n_keep=60)
    assert len(kept) == 60 and max(r["dose"] for r in kept) == pytest.approx(2.8)
    doses = [[r["dose"] for r in rows if r["band"] == band] for band in (0, 1)]
    assert set(doses[0]) == {2.0} and doses[1][0] == 4.0
    assert {r["band"] for r in kept} == {0, 1}
    assert all(r["verdict"] == "kept" and r in rows for r in kept)
    told = summary(kept, rows)
    assert told["sampled"] == len(rows) and told["kept"] == 60
    assert told["verdicts"]["loop"] == sum(r["verdict"] == "loop" for r in rows)
    assert told["dose"] == pytest.approx(sum(r["dose"] for r in kept) / 60)


def test_bands_take_turns_so_that_no_dose_crowds_out_another(monkeypatch, tmp_path):
    kept, _ = collected(monkeypatch, tmp_path, survive=9.0)
    assert [r["band"] for r in kept] == [0, 1] * 10


def test_the_kept_and_all_sampled_rows_lie_in_the_folder_the_same_for_the_same_seed(
        monkeypatch, tmp_path):
    files = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        kept, rows = collected(monkeypatch, folder, survive=3.0, n_keep=60)
        assert runs.read_jsonl(folder / "kept.jsonl") == kept
        assert runs.read_jsonl(folder / "sampled.jsonl") == rows
        files.append([(folder / name).read_bytes() for name in ("kept.jsonl", "sampled.jsonl")])
    assert files[0] == files[1]


def test_a_starved_set_says_how_far_it_got_and_which_rule_did_it_and_leaves_what_it_sampled(
        monkeypatch, tmp_path):
    why = "0 of 20 completions kept after 160 samples .* dropped: loop 160; .*--min-diversity"
    with pytest.raises(distil.Starved, match=why):
        collected(monkeypatch, tmp_path, survive=0.0, max_batches=4)
    rows = runs.read_jsonl(tmp_path / "sampled.jsonl")
    assert len(rows) == 160 and {r["verdict"] for r in rows} == {"loop"}
    assert not (tmp_path / "kept.jsonl").exists()
    assert issubclass(distil.Starved, runs.Ended)
