"""Talking to a run: three models side by side, driven through a pipe."""
import io
import os

import pytest
import torch
import transformers
from rich.console import Console

import lora
from common import checks
from common.sampling import sample
from conftest import SMALL, command, python
from tools import chat

SIX = ("--max-new-tokens", "6")


def talk(monkeypatch, capsys, run, text, *flags):
    """What chat answers to some lines of input -> (stdout, stderr)."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), "ascii"))
    command(monkeypatch, "chat", run, *SIX, *flags)
    return capsys.readouterr()


def answers(output):
    """{arm: answer} of each message in turn."""
    turns = []
    for turn in output.split("\n> ")[1:]:
        arms = [part.partition("\n") for part in ("\n" + turn).split("\n--- ")[1:]]
        turns.append({name.split(",")[0]: text.strip() for name, _, text in arms})
    return turns


@pytest.mark.slow
def test_a_pipe_in_any_encoding_gets_every_arms_answer(run):
    lines = "Grüße?\n/dose much\nGrüße?\n".encode() + "Grüße?\n".encode("latin-1")
    latin = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = python("-m", "tools.chat", run, *SIX, input=lines, text=False, encoding=None, env=latin)
    first, nothing, again, garbled = answers(done.stdout.decode())
    assert done.returncode == 0 and list(first) == ["base", "steered r1", "healed r1"]
    assert first == again != garbled and all(garbled.values()) and nothing == {}
    assert done.stderr.count(b"\n") == 1 and b"'/dose much' sets nothing; fix:" in done.stderr


def test_at_dose_0_all_three_are_the_base(run, tiny_folder, monkeypatch, capsys):
    text = "/round 0\nHello.\n/dose 0\nHello.\n/dose 500\nHello.\n/quit\nnever read\n"
    out, err = talk(monkeypatch, capsys, run, text, "--model", tiny_folder)
    _, usual, _, none, _, strong, _ = answers(out)
    assert err == "" and "never read" not in out
    assert set(none.values()) == {usual["base"]} == {strong["base"]}
    assert usual["base"] not in (strong["steered r0"], strong["healed r0"])


def test_seed_and_system_change_the_answer_and_can_be_reset(run, monkeypatch, capsys):
    lines = "Hi.\n/seed 5\nHi.\n/seed 0\n/system Pirates only.\nHi.\n/system\nHi.\n"
    out, _ = talk(monkeypatch, capsys, run, lines)
    first, seeded, told, last = [turn["base"] for turn in answers(out) if turn]
    assert len({first, seeded, told}) == 3 and last == first


@pytest.mark.parametrize("line, why", [
    ("/dose", "sets nothing"), ("/dose inf", "--dose inf"), ("/round 2", "no round 2; fix: 0"),
    ("/round -1", "--round -1"), ("word " * 600, "context")])
def test_a_bad_line_is_told_with_its_fix_and_changes_nothing(run, monkeypatch, capsys, line, why):
    out, err = talk(monkeypatch, capsys, run, f"Hello.\n{line}\nHello.\n")
    assert err.startswith("error: ") and why in err and "fix:" in err and err.count("\n") == 1
    first, _, last = answers(out)
    assert first == last != {}


def test_arms_that_take_turns_answer_as_the_sampler_does(run, tiny_folder):
    model, its_chat = checks.load(str(tiny_folder), "cpu", "float32")
    lora.load(model, [run / f"round_{r}/adapter.safetensors" for r in (0, 1)])
    cfg = chat.Config(run, seed=3, dose=300.0, max_new_tokens=8)
    arms = chat.choose_arms(cfg)
    assert [arm.history for arm in arms] == [[0, 0], [1, 0], [300, 300]]
    in_turn = zip(*(chat.answer(model, its_chat, "Hello.", arm, cfg) for arm in arms))
    for arm, grown in zip(arms, zip(*in_turn)):
        with lora.gates(model, arm.history, live=0):
            tokens, = sample(model, its_chat, [its_chat.ids("Hello.")], arm.vector, [arm.dose],
                             max_new_tokens=8, seed=3)
        assert list(grown) == [its_chat.decode(tokens[:n + 1]).rstrip("\ufffd")
                               for n in range(len(grown))] and len(grown) > 1


def test_a_model_that_counts_positions_itself_answers_as_uncached(run, embedded):
    torch.manual_seed(0)
    model, its_chat = transformers.BambaForCausalLM(transformers.BambaConfig(
        **SMALL | dict(vocab_size=49152), mamba_n_heads=8, mamba_d_state=8, mamba_d_head=8,
        mamba_n_groups=1, mamba_chunk_size=16, attn_layer_indices=[1, 3])).eval(), embedded[1]
    for p in model.parameters():
        p.data *= 4  # so that a position shows
    lora.attach(model, rank=2, targets=("q_proj",))
    cfg = chat.Config(run, temperature=0, max_new_tokens=8)
    *_, text = chat.answer(model, its_chat, "Hello.", chat.Arm("base", []), cfg)
    row = its_chat.ids("Hello.")
    for _ in range(8):
        z = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1]
        row.append(z.argmax().item())
    assert text == its_chat.decode(row[-8:]).rstrip("\ufffd")


def test_a_terminal_shows_the_arms_in_columns(run):
    screen, arms = io.StringIO(), chat.choose_arms(chat.Config(run))
    console = Console(file=screen, force_terminal=True, width=100)
    chat.show(console, arms, [iter(["a", "a [b]"]), iter(["c"]), iter([])])
    lines = screen.getvalue().splitlines()
    assert any("base" in line and "steered r1" in line and "healed r1" in line for line in lines)
    assert any("a [b]" in line and " c " in line for line in lines), "the last state stays"
