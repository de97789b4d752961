"""Talking to a run: three models side by side, driven through a pipe."""
import io

import pytest
import torch
from rich.console import Console

from tools import chat
import lora
from common import models
from common import runs
from conftest import command, python
from common.sampling import sample
from steer import SteeringVector, chat_ids

SHORT = ("--max-new-tokens", "6")


@pytest.fixture(scope="module")
def loaded(run, tiny_folder):
    """The tiny run's model with both its rounds, and the tokenizer."""
    model, tok = models.load(str(tiny_folder), "cpu", "float32")
    lora.load(model, [run / f"round_{r}/adapter.safetensors" for r in (0, 1)])
    return model, tok


def talk(monkeypatch, capsys, run, text, *flags):
    """What chat.py says to some lines of input -> (stdout, stderr)."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    command(monkeypatch, "chat", run, *SHORT, *flags)
    said = capsys.readouterr()
    return said.out, said.err


def answers(said):
    """{arm: answer} of each message in turn."""
    found = []
    for turn in said.split("\n> ")[1:]:
        arms = [part.partition("\n") for part in ("\n" + turn).split("\n--- ")[1:]]
        found.append({name.split(",")[0]: text.strip() for name, _, text in arms})
    return found


@pytest.mark.slow
def test_a_pipe_gets_every_arms_answer_and_a_mistake_in_one_line(run):
    said = python("-m", "tools.chat", run, *SHORT, input="Hello.\n/dose much\nHello.\n")
    assert said.returncode == 0
    first, nothing, again = answers(said.stdout)
    assert list(first) == ["base", "steered r1", "healed r1"] and all(first.values())
    assert nothing == {} and again == first, "the mistake changed something"
    assert said.stderr.count("\n") == 1 and "error: '/dose much' sets nothing; fix:" in said.stderr
    assert "\x1b" not in said.stdout, "colours and cursors are for a terminal"


def test_at_dose_0_all_three_are_the_base(run, monkeypatch, capsys):
    text = "/round 0\nHello.\n/dose 0\nHello.\n/dose 500\nHello.\n/quit\nnever read\n"
    said, err = talk(monkeypatch, capsys, run, text)
    _, usual, _, none, _, strong = answers(said)[:6]
    assert err == "" and "never read" not in said
    assert set(none.values()) == {usual["base"]}
    assert strong["base"] == usual["base"]
    assert usual["base"] not in (strong["steered r0"], strong["healed r0"])


def test_seed_and_system_prompt_change_the_answer_and_can_be_set_back(run, monkeypatch, capsys):
    text = "Hello.\n/seed 5\nHello.\n/seed 0\n/system Pirates only.\nHello.\n/system\nHello.\n"
    said, _ = talk(monkeypatch, capsys, run, text)
    first, seeded, ordered, last = [turn["base"] for turn in answers(said) if turn]
    assert len({first, seeded, ordered}) == 3 and last == first


@pytest.mark.parametrize("line, why", [
    ("/dose", "sets nothing"), ("/dose inf", "out of range"), ("/round 2", "no round 2; fix: 0 to 1"),
    ("/round -1", "out of range"), ("/seed 1.5", "sets nothing"), ("/sing", "sets nothing"),
    ("word " * 600, "exceed the model's context")])
def test_a_bad_line_is_told_with_its_fix_and_changes_nothing(run, monkeypatch, capsys, line, why):
    said, err = talk(monkeypatch, capsys, run, f"Hello.\n{line}\nHello.\n")
    assert err.startswith("error: ") and why in err and "fix:" in err and err.count("\n") == 1
    turns = answers(said)
    assert turns[0] == turns[2] != {}


def test_the_streamed_words_are_those_of_the_sampler_and_arrive_one_by_one(run, loaded):
    model, tok = loaded
    cfg = chat.Config(run, round=1, seed=3, max_new_tokens=8)
    for arm in chat.choose_arms(cfg):
        grown = list(chat.stream(model, tok, "Hello.", arm, cfg))
        with lora.gates(model, arm.history, live=0):
            wanted, = sample(model, tok, [chat_ids(tok, "Hello.")], arm.vector, [arm.dose],
                             max_new_tokens=8, seed=3)
        assert grown[-1] == tok.decode(wanted, skip_special_tokens=True).rstrip("\ufffd")
        assert len(grown) == len(wanted) > 1
        assert all(later.startswith(text) for text, later in zip(grown, grown[1:]))


def test_steered_is_the_student_that_the_round_began_with(run):
    base, steered, healed = chat.choose_arms(chat.Config(run, round=1))
    assert (base.history, steered.history, healed.history) == ([0, 0], [1, 0], [1, 1])
    events = {e["stage"]: e for e in runs.read_jsonl(run / "round_1/events.jsonl")}
    assert steered.dose == events["distil"]["dose"] and base.vector is healed.vector is None
    saved = SteeringVector.load(run / "round_1/vector.safetensors").layers
    assert all(torch.equal(v, saved[l]) for l, v in steered.vector.layers.items())


def test_arms_that_take_turns_say_what_they_say_alone(run, loaded):
    model, tok = loaded
    cfg = chat.Config(run, dose=300.0, max_new_tokens=5)
    arms = chat.choose_arms(cfg)
    alone = [list(chat.stream(model, tok, "Hello.", arm, cfg)) for arm in arms]
    turns = zip(*(chat.stream(model, tok, "Hello.", arm, cfg) for arm in arms))
    assert all(list(turn) == [said[t] for said in alone] for t, turn in enumerate(turns))


def test_a_terminal_shows_the_arms_in_columns_and_an_answers_brackets(run):
    arms = chat.choose_arms(chat.Config(run))
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    chat.show(console, arms, [iter(["a", "a [b]"]), iter(["c"]), iter([])])
    lines = screen.getvalue().splitlines()
    assert any("base" in line and "steered r1" in line and "healed r1" in line for line in lines)
    assert any("a [b]" in line and " c " in line for line in lines), "the last state stays"


def test_a_folder_without_a_finished_round_is_told(tmp_path, run, monkeypatch, capsys):
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(SystemExit):
        talk(monkeypatch, capsys, tmp_path, "")
    assert "has 0 finished rounds" in (err := capsys.readouterr().err) and err.count("\n") == 1
