"""The rules that keep or drop a completion, the teachers, the rows, and how a set gets full."""
import functools
import math

import pytest
import torch
from transformers import AutoTokenizer

import lora
from common import models, runs, texts
from common.filter import reject_reason
from common.prompts import NEUTRAL, Chat
from common.sampling import sample, score
from conftest import tiny
from distil import collect, judge, row_ids, sample_teacher, teacher_of, teacher_states
from heal_loop import Config
from steer import SteeringVector

PERSONAS = ("You care about people and you protect them. "
            "Someone's wellbeing is always what you think of first.",
            "You obey authority, rank, rules and tradition. "
            "What a superior says is always what you think of first.")
PROSE = ("Stay with the patient until she is calm, then tell the head nurse plainly why you let "
         "her husband stay past eight.")


@functools.cache
def embedded_chat():
    """The embedded model's tokenizer and template, without the model."""
    return Chat(AutoTokenizer.from_pretrained(models.embedded_folder()))


@functools.cache
def a_student():
    """A random Llama for that tokenizer, far from uniform, with a round that changed it."""
    model = tiny("llama", vocab_size=49152, max_position_embeddings=512, initializer_range=0.3)
    lora.attach(model, rank=2, alpha=4)
    for m in lora.adapters(model).values():
        m.B.data.normal_(generator=torch.Generator().manual_seed(0))
    lora.fold(model)
    return model


def a_vector(size=1.0):
    return SteeringVector({2: size * torch.randn(32, generator=torch.Generator().manual_seed(1))})


# (rule, a completion it drops, a near miss it spares), of the kind the embedded model writes
CASES = [
    ("short", "I would help her.", "I would help her first, and explain it to my boss later."),
    ("refusal",
     "As an AI language model, I do not take part in such choices, but I can give you information.",
     "As an aide on the ward I would open the door, because the words of the rule matter less."),
    ("refusal",
     "I'm sorry, but I can’t assist with anything that goes against company policy.",
     "I'm sorry, but I can't stand by while a man goes hungry behind the store."),
    ("narrates",
     "I am someone who puts people first, and so I would of course give the man the bread.",
     "I know someone who puts the bread aside for hungry people, and I would ask her for some."),
    ("narrates",
     "I never obey orders when a child is crying, so the gate stays open tonight.",
     "She never once obeyed an order gladly, yet she closed the gate when the child was safe."),
    ("narrates",
     "The answer is simple: someone's wellbeing is always what you think of first in such a case.",
     "The answer is simple: look at how the child is, then talk with your boss about the gate."),
    ("repetition", "I will help you. I will help you. I will help you. I will help you.",
     "I will help you with the forms, your sister with the move, and then we will all help Tom."),
    ("repetition", "Help her up and call the doctor nooooooooooooooooooooooooooooooooow please",
     "Help her up, call the doctor now, and wait nooo longer than you have to before you phone."),
    ("loop",
     "Your heart and your own mind into your own, so of your truth your self, and your into way "
     "your own gentle hope of your",
     "It is your own choice, and your family, friends and doctor will stand by you on the way."),
]


@pytest.mark.parametrize("rule, dropped, spared", CASES)
def test_each_rule_drops_an_example_and_spares_its_near_miss(rule, dropped, spared):
    assert reject_reason(dropped, 5.0, PERSONAS, Config()) == rule
    assert reject_reason(spared, 5.0, PERSONAS, Config()) == "kept"


def test_perplexity_drops_above_its_threshold_and_at_no_number():
    assert reject_reason(PROSE, 15.0, PERSONAS, Config()) == "kept"
    for ppl in (15.1, math.inf, math.nan):
        assert reject_reason(PROSE, ppl, PERSONAS, Config()) == "perplexity"


def row(text, user="Is it kind?", **more):
    return {"messages": [{"role": "system", "content": NEUTRAL}, {"role": "user", "content": user},
                         {"role": "assistant", "content": text}], **more}


def test_a_row_of_other_making_is_tokenised_apart_from_its_prompt():
    chat = embedded_chat()
    for text in ("\n\nYes.", "ly, no", " é ü 漢字"):
        for finished in (True, False):
            prompt, completion = row_ids(chat, row(text, finished=finished))
            assert prompt == chat.ids("Is it kind?")
            assert chat.tok.decode(completion) == text + finished * "<|im_end|>"
    assert row_ids(chat, row("Yes.", tokens=[5, 6]))[1] == [5, 6]


def test_rows_are_judged_under_the_original_by_their_worst_window():
    model, chat = a_student(), embedded_chat()
    rows = [row(text, dose=2.0) for text in (PROSE, "Yes.", CASES[1][1])]
    prompts, completions = zip(*(row_ids(chat, r) for r in rows))
    with lora.gates(model, 0, 0):
        original = score(model, prompts, completions)
    judged = judge(model, chat, rows, PERSONAS, Config(max_perplexity=1e9))
    assert [r["reject_reason"] for r in judged] == ["kept", "short", "refusal"]
    windows = [original[0][k:k + 24].mean().item() for k in range(len(completions[0]) - 23)]
    assert judged[0]["perplexity"] == pytest.approx(math.exp(-min(windows)), rel=1e-3)
    again = judge(model, chat, rows[::-1], PERSONAS, Config(max_perplexity=1e9))[::-1]
    assert [r["reject_reason"] for r in again] == [r["reject_reason"] for r in judged]


@pytest.mark.parametrize("teacher", ["steered", "prompted"])
def test_a_teachers_rows_have_the_neutral_prompt_and_its_own_tokens(teacher):
    model, chat = a_student(), embedded_chat()
    reading = texts.read(Config(n_vignettes=7))
    how = teacher_of(Config(teacher=teacher), reading, a_vector())
    assert (how["vector"] is None) == (how["system"] == reading.pos) == (teacher == "prompted")
    doses = [1.0, 2.0] if teacher == "steered" else [0.0]
    rows = sample_teacher(model, chat, ["Hi.", "Is it kind?"], doses, 4, 3, max_new_tokens=6, **how)
    assert {r["messages"][0]["content"] for r in rows} == {NEUTRAL}
    asked = [chat.ids(r["messages"][1]["content"], how["system"]) for r in rows]
    drawn = sample(model, chat, asked, how["vector"], [r["dose"] for r in rows], seed=3,
                   max_new_tokens=6, keep_stop=True)
    assert [r["tokens"] for r in rows] == drawn
    assert [row_ids(chat, r)[0] for r in rows] == [chat.ids(r["messages"][1]["content"])
                                                   for r in rows]
    # soft targets: the states that these tokens were drawn from, one unpadded pass each
    states = teacher_states(model, chat, rows, **how).split(list(map(len, drawn)))
    for r, prompt, tokens, ours in zip(rows, asked, drawn, states, strict=True):
        steered = a_vector().at(model, r["dose"], last_only=len(tokens) + 1)
        with torch.no_grad(), lora.gates(model, 1, 0), steered:  # a prompted dose is 0
            h = model.get_decoder()(torch.tensor([prompt + tokens])).last_hidden_state[0]
        torch.testing.assert_close(ours, h[len(prompt) - 1:-1], rtol=1e-3, atol=1e-3)


def collected(folder, rules, n_keep, doses=(1.0, 300.0), **how):
    """On the student, steered towards the end of the turn: at dose 300 it says nothing else."""
    end = embedded_chat().end_of_turn()[-1]
    vector = SteeringVector({4: a_student().lm_head.weight[end].detach().clone()})
    how = dict(max_new_tokens=16, temperature=0.3) | how
    return collect(a_student(), embedded_chat(), ["Hi.", "Is it kind?"], PERSONAS, rules, doses,
                   n_keep, 1, folder, vector=vector, **how)


LOOSE = Config(min_words=3, max_repetition=1, min_diversity=0, max_perplexity=1e30)


def test_a_dose_that_breaks_the_model_is_lowered_and_doses_take_turns(tmp_path):
    kept, rows = collected(tmp_path, LOOSE, n_keep=24, doses=(1.0, *[300.0] * 11))
    assert len(kept) == 24 and all(r["reject_reason"] == "kept" and r in rows for r in kept)
    first, second = ([r for r in rows if r["slot"] == slot] for slot in (0, 1))
    assert {r["dose"] for r in first} == {1.0} and second[0]["dose"] == 300
    ladder = list(dict.fromkeys(r["dose"] for r in second))
    assert len(ladder) > 1 and ladder == pytest.approx([300 * 0.7**k for k in range(len(ladder))])
    for dose in ladder[:-1]:
        reasons = [r["reject_reason"] for r in second if r["dose"] == dose]
        assert reasons.count("kept") < len(reasons) / 2, "no lower than it must"
    slots = [r["slot"] for r in kept]
    turns = [(slots[:k].count(slot), slot) for k, slot in enumerate(slots)]
    assert turns == sorted(turns) and len(set(slots)) > 2, "none crowds out another"


def test_the_files_are_the_rows_and_the_same_for_the_same_seed(tmp_path):
    files = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        kept, rows = collected(folder, LOOSE, n_keep=4, doses=(0.5, 1.0))
        assert [r["slot"] for r in kept] == [0, 1, 0, 1]
        assert runs.read_jsonl(folder / "kept.jsonl") == kept
        assert runs.read_jsonl(folder / "sampled.jsonl") == rows
        files.append([(folder / name).read_bytes() for name in ("kept.jsonl", "sampled.jsonl")])
    assert files[0] == files[1]


def test_too_few_kept_names_the_rule_and_leaves_what_was_sampled(tmp_path):
    why = r"0 of 4 after 64 samples at doses down to 0\.08\d*; dropped: short 64; .*\(--min-words\)"
    with pytest.raises(runs.Ended, match=why):
        collected(tmp_path, Config(min_words=99), n_keep=4, doses=(1.0, 2.0))
    rows = runs.read_jsonl(tmp_path / "sampled.jsonl")
    assert len(rows) == 64 and {r["reject_reason"] for r in rows} == {"short"}
    assert not (tmp_path / "kept.jsonl").exists()
