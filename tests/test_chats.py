"""Prompts, stops and answers under chat templates that behave as real ones do."""
import datetime

import pytest
import torch
from jinja2.exceptions import TemplateError

import distil
from common import readouts
from chats import CHATS, tokenizer
from conftest import tiny
from distil import row_ids
from common.readouts import CLAUSES, LETTERS, cloze, suffix_ids
from common.sampling import end_of_turn, sample, stop_tokens
from steer import NEUTRAL, SteeringVector, chat_ids, chat_text, dated
from common.texts import FOUNDATIONS

TURN = [{"role": "user", "content": "Hi."}]
VIGNETTES = [{"id": str(k), "foundation": "Care", "text": text} for k, text in enumerate([
    "You see a man.", "You see a man who hurts a dog, and he laughs at those who ask him to stop.",
    "You see a girl lie to her brother."])]
of_every_template = pytest.mark.parametrize("name", CHATS)


def model_for(tok, architecture="llama", **how):
    how = dict(max_position_embeddings=2048) | how
    return tiny(architecture, vocab_size=len(tok), **how)


# ---- prompts ------------------------------------------------------------------------------------


@of_every_template
@pytest.mark.parametrize("system", ["You care about people.", "You obey authority.\n"])
def test_the_persona_stands_once_in_its_place_and_the_prompt_ends_where_an_answer_begins(
        name, system):
    tok, chat = tokenizer(name), CHATS[name]
    text = chat_text(tok, "What should I do?", system)
    assert text.endswith(chat.begins)
    assert text.count(system.strip()) == text.count("What should I do?") == 1
    assert text.index(system.strip()) < text.index("What should I do?")
    before_user = text[text.index(system.strip()):text.index("What should I do?")]
    assert chat.in_user_turn == (not any(mark in before_user for mark in chat.marks + ("###",)))
    ids = chat_ids(tok, "What should I do?", system)
    assert ids.count(tok.bos_token_id) == text.count("<bos>") <= 1


def test_the_templates_behave_as_they_are_said_to():
    def render(name, *messages, **how):
        turns = [{"role": role, "content": content} for role, content in messages]
        return tokenizer(name).apply_chat_template(turns, tokenize=False, **how)
    with pytest.raises(TemplateError, match="not supported"):
        render("gemma2", ("system", "s"), ("user", "u"))
    assert "persona" not in render("drops", ("system", "persona"), ("user", "u"))
    assert " u " not in render("gemma3", ("user", " u "))
    for name in ("llama3", "gpt-oss"):
        assert f"{datetime.date.today():%Y}" in render(name, ("user", "u"))
    asked = dict(add_generation_prompt=True)
    assert render("qwen3", ("user", "u"), **asked) != render(
        "qwen3", ("user", "u"), **asked, enable_thinking=False)
    for name in ("r1", "qwen3-thinking"):
        assert render(name, ("user", "u"), **asked).endswith("<think>\n")
    assert render("gpt-oss", ("user", "u"), **asked).endswith("<|start|>assistant")
    # what named-special lists miss
    for name in ("gemma3", "phi4-mini", "glm"):
        tok = tokenizer(name)
        stop = tok.convert_tokens_to_ids(CHATS[name].ends)
        assert stop not in tok.all_special_ids and stop != tok.eos_token_id
    # a text of its own begins with a mark that it has not in context
    tok = tokenizer("llama2")
    assert tok.convert_ids_to_tokens(tok("A", add_special_tokens=False).input_ids) == ["▁A"]
    prompt = chat_text(tok, "Hi.")
    ids = tok(prompt, add_special_tokens=False).input_ids
    assert tok(tok.decode(ids), add_special_tokens=False).input_ids != ids


def test_a_date_that_is_set_is_what_templates_print(monkeypatch):
    for name, printed in (("llama3", "Today: 06 Jul 1999\n"), ("gpt-oss", ">1999-07-06<")):
        tok = tokenizer(name)
        undated = chat_text(tok, "Hi.")
        monkeypatch.setattr(tok, "chat_date", datetime.date(1999, 7, 6), raising=False)
        assert printed in chat_text(tok, "Hi.") and printed not in undated
        monkeypatch.undo()
        assert chat_text(tok, "Hi.") == undated
    form = "%A %a %B %b %d %-d %m %-m %Y %y %j %H:%M:%S"
    tok, date = tokenizer("chatml"), datetime.date(1999, 7, 6)
    says = dated("{{ strftime_now('" + form + "') }}", date)
    assert tok.apply_chat_template(TURN, chat_template=says, tokenize=False) == date.strftime(form)


# ---- the end of a turn --------------------------------------------------------------------------


@of_every_template
def test_the_stop_is_the_templates_own_whatever_the_generation_config_names(name):
    tok = tokenizer(name)
    stop = tok.convert_tokens_to_ids(CHATS[name].ends)
    assert end_of_turn(tok) == [stop]
    model = model_for(tok)
    for named in (None, 5, [5, 6]):
        model.generation_config.eos_token_id = named
        wanted = {stop, tok.eos_token_id, *([named] if named == 5 else named or [])}
        assert set(stop_tokens(model, tok)) == wanted


@of_every_template
def test_a_row_is_trained_on_the_tokens_that_were_sampled_with_the_stop_that_ended_it(name):
    tok = tokenizer(name)
    model = model_for(tok)
    model.generation_config.eos_token_id = list(range(300, 400))  # some rows end, some do not
    stops = stop_tokens(model, tok)
    vector = SteeringVector({2: torch.zeros(32)})
    how = dict(max_new_tokens=6, top_k=10**6, top_p=1.0)
    rows = distil.sample_doses(model, tok, vector, ["Hi.", "Who?"], [0.0, 1.0], 24, 3, **how)
    finished = [row["finished"] for row in rows]
    assert 0 < sum(finished) < 24
    for row in rows:
        prompt, completion = row_ids(tok, row)
        user, answer = (message["content"] for message in row["messages"][1:])
        assert prompt == chat_ids(tok, user)
        without = completion[:-1] if row["finished"] else completion
        assert (completion[-1] in stops) == row["finished"] and not set(without) & set(stops)
        assert len(completion) == 6 or row["finished"]
        assert answer == tok.decode(without, skip_special_tokens=True)
    # and they are what `sample` says, which drops the stop unless it is told to keep it
    prompts, sampled = zip(*(row_ids(tok, row) for row in rows))
    again = sample(model, tok, prompts, seed=3, **how)
    assert again == [c[:-1] if end else c for c, end in zip(sampled, finished)]


@of_every_template
def test_a_row_of_other_making_is_tokenised_where_it_stands(name):
    tok, answer = tokenizer(name), "I would help her first."
    messages = [{"role": "system", "content": NEUTRAL}, {"role": "user", "content": "Who?"},
                {"role": "assistant", "content": answer}]
    prompt, completion = row_ids(tok, {"messages": messages})
    whole = tok(chat_text(tok, "Who?") + answer, add_special_tokens=False).input_ids
    assert prompt + completion == whole + end_of_turn(tok)
    assert prompt == chat_ids(tok, "Who?")
    assert row_ids(tok, {"messages": messages, "finished": False})[1] == completion[:-1]


# ---- answers in context -------------------------------------------------------------------------


@of_every_template
def test_clauses_and_letters_are_the_tokens_they_are_in_context(name):
    tok = tokenizer(name)
    before = chat_text(tok, "Hi.") + "This is wrong because"
    for clause in CLAUSES.values():
        whole = tok(before + clause, add_special_tokens=False).input_ids
        suffix = suffix_ids(tok, before, clause)
        assert suffix and whole == tok(before, add_special_tokens=False).input_ids + suffix
    letters = [suffix_ids(tok, chat_text(tok, "Hi.") + "Answer: (", letter) for letter in LETTERS]
    assert [tok.convert_ids_to_tokens(ids) for ids in letters] == [[x] for x in LETTERS]


@pytest.mark.parametrize("name", ["chatml", "llama2"])
def test_no_token_straddles_the_boundary(name):
    tok = tokenizer(name)
    for before, text in (("auth", "ority"), ("wro", "ng"), ("a\n", "\n\nYes")):
        ids = suffix_ids(tok, before, text)
        assert tok.decode(tok("-", add_special_tokens=False).input_ids + ids) == "-" + text


class Swallows:
    """A tokenizer that makes one token of anything."""
    def __call__(self, text, **_):
        return type("Ids", (), {"input_ids": [len(text)]})


def test_a_tokenizer_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="cannot split 'ng' .* fix:"):
        suffix_ids(Swallows(), "wro", "ng")


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])  # Gemma's window of 16 is passed
@pytest.mark.parametrize("name", ["chatml", "gemma3", "llama2"])
def test_cloze_is_one_unpadded_pass_over_the_text_as_it_reads(name, architecture):
    tok = tokenizer(name)
    model = model_for(tok, architecture, initializer_range=0.3)
    got = cloze(model, tok, VIGNETTES, batch_size=3)

    def logp(text):
        ids = torch.tensor([tok(text, add_special_tokens=False).input_ids])
        return ids[0], model(input_ids=ids).logits[0].float().log_softmax(-1)
    raw = torch.zeros(len(VIGNETTES), 7)
    for k, v in enumerate(VIGNETTES):
        opened = chat_text(tok, v["text"] + " Why is this wrong?") + "This is wrong because"
        start = len(logp(opened)[0])
        for f, foundation in enumerate(FOUNDATIONS):
            ids, table = logp(opened + CLAUSES[foundation])
            for t in range(start, len(ids)):
                raw[k, f] += table[t - 1, ids[t]]
        asked = chat_text(tok, f"{readouts.OPTIONS}\n{v['text']} Why is this wrong?") + "Answer: ("
        letters = tok.convert_tokens_to_ids(list(LETTERS))
        mass = logp(asked)[1][-1].exp()[letters].sum().item()
        assert got.mass[k] == pytest.approx(mass, rel=1e-3)
    torch.testing.assert_close(torch.tensor(got.constants).float(), raw.mean(0),
                               rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(torch.tensor(got.p).float(), (raw - raw.mean(0)).softmax(1),
                               rtol=1e-3, atol=1e-4)
