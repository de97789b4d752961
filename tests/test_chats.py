"""Prompts, stops and answers under chat templates that behave as real ones do."""
import datetime
import json

import pytest
import torch

from chats import CHATS, tokenizer
from common import checks, readouts
from common.prompts import NEUTRAL, Chat, dated, stop_tokens
from common.readouts import BECAUSE, LETTERS, cloze
from common.sampling import sample
from common.texts import FOUNDATIONS, load_clauses
from conftest import tiny
from distil import row_ids, sample_teacher
from steer import SteeringVector

USER = "What should I do?"
VIGNETTES = [{"id": str(k), "foundation": "Care", "text": text} for k, text in enumerate([
    "You see a man.", "You see a man who hurts a dog, and he laughs at those who ask him to stop.",
    "You see a girl lie to her brother."])]
of_every_template = pytest.mark.parametrize("name", CHATS)


def model_for(chat, architecture="llama", **kwargs):
    kwargs = dict(max_position_embeddings=2048) | kwargs
    return tiny(architecture, vocab_size=len(chat.tok), **kwargs)


def ends(name):
    return tokenizer(name).convert_tokens_to_ids(CHATS[name].ends.split())


@of_every_template
@pytest.mark.parametrize("system", ["You care about people.", "You obey authority.\n",
                                    'You say "yes".\nAlways.', 'You say "« é »".'])
def test_the_persona_stands_once_in_its_place(name, system):
    chat, habits = Chat(tokenizer(name)), CHATS[name]
    shown = system.strip()
    if habits.escapes:
        shown = json.dumps(shown, ensure_ascii=False)[1:-1]
    text = chat.text(USER, system)
    assert text.endswith(habits.begins)
    assert text.count(shown) == text.count(USER) == 1 and text.index(shown) < text.index(USER)
    before_user = text[text.index(shown):text.index(USER)]
    assert habits.in_user_turn == (not any(m in before_user for m in [*habits.marks, "###"]))
    assert chat.ids(USER, system).count(chat.tok.bos_token_id) == text.count("<bos>") <= 1


@of_every_template
def test_quotes_and_line_breaks_move_no_persona(name):
    chat = Chat(tokenizer(name))
    plain = chat.text(USER, "PERSONA")
    for system in ('"', "\n\n", "\\", "é", "</s>", "{{ 1 }}", "<&>'"):
        system = f"a{system}b"
        shown = json.dumps(system, ensure_ascii=False)[1:-1] if CHATS[name].escapes else system
        assert chat.text(USER, system) == plain.replace("PERSONA", shown)


@pytest.mark.parametrize("template", [
    "{%- for m in messages -%}<|user|>{%- endfor -%}",
    "{%- for m in messages -%}{{ m.content[:3] }}{%- endfor -%}",
    "{%- for m in messages -%}{{ m.content if m.role == 'system' }}{%- endfor -%}",
    "{{ raise_exception('never') }}"])
def test_a_template_that_shows_nothing_is_refused(template, monkeypatch):
    tok = tokenizer("chatml")
    monkeypatch.setattr(tok, "chat_template", template)
    with pytest.raises(ValueError, match="chat template .*; fix: "):
        Chat(tok)


@pytest.mark.parametrize("shown", ["m.content | replace('\\n', ' ')",
                                   "m.content | replace('\"', '')"])
def test_a_template_that_changes_words_is_refused_at_load(shown, monkeypatch):
    tok = tokenizer("chatml")
    monkeypatch.setattr(tok, "chat_template", tok.chat_template.replace("m.content", shown))
    with pytest.raises(ValueError, match="does not show .*; fix: "):
        checks.template(model_for(Chat(tok)), Chat(tok), "x")


def test_the_templates_and_tokenizers_have_the_habits_they_stand_for():
    def render(name, content, **kwargs):
        turns = [{"role": "user", "content": content}]
        return tokenizer(name).apply_chat_template(turns, tokenize=False, **kwargs)
    assert "words" not in render("idefics3", "words") and " u " not in render("gemma3", " u ")
    assert f"{datetime.date.today():%Y}" in render("llama3", "u") + render("gpt-oss", "u")
    assert render("r1", "u", add_generation_prompt=True).endswith("<think>\n")
    for name in ("gemma3", "phi4-mini", "glm"):  # what named-special lists miss
        assert not set(ends(name)) & set(tokenizer(name).all_special_ids)
    assert tokenizer("llama2").tokenize("A") == ["▁A"]  # a mark that it has not in context


def test_the_date_that_is_set_is_what_templates_print():
    for name, printed in (("llama3", "Today: 06 Jul 1999\n"), ("gpt-oss", ">1999-07-06<")):
        assert printed in Chat(tokenizer(name), "1999-07-06").text("Hi.")
        assert printed not in Chat(tokenizer(name)).text("Hi.")
    form = "%A %a %B %b %d %-d %m %-m %Y %y %j %H:%M:%S"
    tok, date = tokenizer("chatml"), datetime.date(1999, 7, 6)
    template = dated("{{ strftime_now('" + form + "') }}", date)
    turns = [{"role": "user", "content": "Hi."}]
    rendered = tok.apply_chat_template(turns, chat_template=template, tokenize=False)
    assert rendered == date.strftime(form)


@of_every_template
def test_the_stop_is_the_templates_own_and_the_configs(name):
    chat, wanted = Chat(tokenizer(name)), ends(name)
    assert chat.end_of_turn() == wanted
    model = model_for(chat)
    for named in (None, 5, [5, 6]):
        model.generation_config.eos_token_id = named
        configs = [named] if named == 5 else named or []
        assert set(stop_tokens(model, chat)) == {wanted[-1], chat.tok.eos_token_id, *configs}


@of_every_template
def test_a_row_is_trained_on_the_tokens_that_were_sampled(name):
    chat = Chat(tokenizer(name))
    model = model_for(chat)
    model.generation_config.eos_token_id = list(range(300, 400))  # some rows end, some do not
    stops = stop_tokens(model, chat)
    vector = SteeringVector({2: torch.zeros(32)})
    kwargs = dict(max_new_tokens=6, top_k=10**6, top_p=1.0)
    rows = sample_teacher(model, chat, ["Hi.", "Who?"], [0.0, 1.0], 24, 3, vector, **kwargs)
    assert 0 < sum(row["finished"] for row in rows) < 24
    prompts, sampled = zip(*(row_ids(chat, row) for row in rows))
    again = sample(model, chat, prompts, seed=3, **kwargs)  # drops the stops
    for row, prompt, completion, words in zip(rows, prompts, sampled, again):
        user, answer = (message["content"] for message in row["messages"][1:])
        assert prompt == chat.ids(user) and not set(words) & set(stops)
        assert completion[:len(words)] == words and len(completion) - len(words) == row["finished"]
        assert (completion[-1] in stops) if row["finished"] else len(completion) == 6
        assert answer == chat.tok.decode(words, skip_special_tokens=True)


@of_every_template
def test_a_row_of_other_making_is_tokenised_where_it_stands(name):
    chat, answer = Chat(tokenizer(name)), "I would help her first."
    messages = [{"role": "system", "content": NEUTRAL}, {"role": "user", "content": "Who?"},
                {"role": "assistant", "content": answer}]
    prompt, completion = row_ids(chat, {"messages": messages})
    assert prompt + completion == chat.encode(chat.text("Who?") + answer) + ends(name)
    assert prompt == chat.ids("Who?")
    cut = completion[:-len(ends(name))]
    assert row_ids(chat, {"messages": messages, "finished": False})[1] == cut


@of_every_template
def test_wordings_and_letters_are_the_tokens_of_their_context(name):
    chat = Chat(tokenizer(name))
    before = chat.text("Hi.") + BECAUSE
    for wording in sum(load_clauses().values(), []):
        suffix = chat.suffix_ids(before, wording)
        assert suffix and chat.encode(before + wording) == chat.encode(before) + suffix
    letters = [chat.suffix_ids(chat.text("Hi.") + "Answer: (", letter) for letter in LETTERS]
    assert [chat.tok.convert_ids_to_tokens(ids) for ids in letters] == [[x] for x in LETTERS]


@pytest.mark.parametrize("name", ["chatml", "llama2"])
def test_no_token_straddles_the_boundary(name):
    chat = Chat(tokenizer(name))
    for before, text in (("auth", "ority"), ("wro", "ng"), ("a\n", "\n\nYes")):
        ids = chat.suffix_ids(before, text)
        assert chat.tok.decode(chat.encode("-") + ids) == "-" + text


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])  # Gemma's window of 16 is passed
@pytest.mark.parametrize("name", ["chatml", "gemma3", "llama2", "idefics3"])
def test_cloze_is_one_unpadded_pass_over_the_text(name, architecture):
    chat = Chat(tokenizer(name))
    model = model_for(chat, architecture, initializer_range=0.3)
    got, clauses = cloze(model, chat, VIGNETTES), load_clauses()

    def logp(text):
        ids = torch.tensor([chat.encode(text)])
        return ids[0], model(input_ids=ids).logits[0].float().log_softmax(-1)
    raw = torch.zeros(len(VIGNETTES), 7, len(clauses["Care"]))
    for k, v in enumerate(VIGNETTES):
        opened = chat.text(v["text"] + " Why is this wrong?") + BECAUSE
        start = len(chat.encode(opened))
        for f, foundation in enumerate(FOUNDATIONS):
            for w, wording in enumerate(clauses[foundation]):
                ids, table = logp(opened + wording)
                raw[k, f, w] = sum(table[t - 1, ids[t]] for t in range(start, len(ids)))
        asked = chat.text(f"{readouts.OPTIONS}\n{v['text']} Why is this wrong?") + "Answer: ("
        letters = chat.tok.convert_tokens_to_ids(list(LETTERS))
        valid_p = logp(asked)[1][-1].exp()[letters].sum().item()
        assert got.valid_p[k] == pytest.approx(valid_p, rel=1e-3)
    torch.testing.assert_close(torch.tensor(got.constants).float(), raw.mean(0),
                               rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(torch.tensor(got.p).float(), (raw - raw.mean(0)).mean(2).softmax(1),
                               rtol=1e-3, atol=1e-4)
