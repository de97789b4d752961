"""Steering vectors: extraction, steering as a forward hook, prompts; the files that stand alone."""
import re
import shutil
import textwrap

import pytest
import torch

import lora
from common import models
import steer
from conftest import ROOT, Ids, python, tiny
from common.sampling import sample
from steer import (NEUTRAL, Persona, SteeringVector, band, calibrate, chat_ids, extract_vector,
                   left_pad)


def vector(model, layers=(1, 2), size=1.0):
    d = model.config.get_text_config().hidden_size
    return SteeringVector({l: size * torch.randn(d, generator=torch.Generator().manual_seed(l))
                           for l in layers})


def prompts(n=6):
    """Random prompts of four different lengths."""
    g = torch.Generator().manual_seed(7)
    return [torch.randint(3, 128, (4 + 3 * (i % 4),), generator=g).tolist() for i in range(n)]


def until_the_end(tokens):
    """What stands before the end token."""
    return tokens[:tokens.index(2)] if 2 in tokens else tokens


# ---- steering -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("last_only", [False, True])
def test_steering_adds_dose_times_v_to_the_residual_stream_and_leaves_no_hook(
        tiny_model, ids, last_only):
    v = vector(tiny_model, layers=(2,))
    block, seen = tiny_model.get_decoder().layers[2], []

    def reader(module, args, output):
        seen.append(output if torch.is_tensor(output) else output[0])
    with torch.no_grad():
        with block.register_forward_hook(reader):
            tiny_model(input_ids=ids)
        with v.at(tiny_model, 2.0, last_only), block.register_forward_hook(reader):
            tiny_model(input_ids=ids)
    plain, steered = seen
    expected = (2 * v.layers[2]).expand_as(plain).clone()
    if last_only:
        expected[:, :-1] = 0
        assert torch.equal(steered[:, :-1], plain[:, :-1])
    torch.testing.assert_close(steered - plain, expected, rtol=1e-4, atol=1e-4)
    assert not block._forward_hooks


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generate_steered_at_the_last_position_of_each_pass_says_what_sample_says(name):
    model, changed = tiny(name), False
    v = vector(model, size=4.0)
    for p, dose in zip(prompts(), [3.0, 1.0, -3.0]):
        with v.at(model, dose, last_only=True):
            out = model.generate(torch.tensor([p]), max_new_tokens=24, do_sample=False,
                                 pad_token_id=0)
        ours, = sample(model, Ids, [p], v, [dose], max_new_tokens=24, temperature=0)
        assert ours == until_the_end(out[0, len(p):].tolist())
        changed |= [ours] != sample(model, Ids, [p], max_new_tokens=24, temperature=0)
    assert changed, "the dose must show"


def test_a_vector_that_does_not_fit_is_refused():
    model = tiny("llama")
    for v in (SteeringVector({9: torch.ones(32)}), SteeringVector({1: torch.ones(31)})):
        with pytest.raises(ValueError, match="does not fit"):
            with v.at(model, 1.0):
                pass


# ---- the vector ---------------------------------------------------------------------------------


def test_extraction_is_the_mean_difference_at_the_assistant_tag(embedded):
    model, tok = embedded
    persona = Persona("You care.", "You obey authority in everything you do.")
    contexts = ["Hi.", "What is the best bread?", "My boss is late again today."]
    v = extract_vector(model, tok, persona, contexts, [13, 15], batch_size=2)

    @torch.no_grad()
    def states(system, context):
        ids = torch.tensor([chat_ids(tok, context, system)])
        return model(ids, output_hidden_states=True).hidden_states
    moved = {13: [], 15: []}
    for context in contexts:
        pos, neg = states(persona.pos, context), states(persona.neg, context)
        for l in moved:
            moved[l].append(pos[l + 1][0, -1] - neg[l + 1][0, -1])
    assert list(v.layers) == [13, 15]
    for l in moved:
        torch.testing.assert_close(v.layers[l], torch.stack(moved[l]).mean(0), rtol=1e-3, atol=1e-3)


def test_vectors_survive_the_disk_and_bad_files_are_named(tmp_path):
    file = tmp_path / "v.safetensors"
    v = SteeringVector({3: torch.randn(8), 1: torch.randn(8)}, {"pos": "a", "neg": "b"})
    v.save(file)
    back = SteeringVector.load(file)
    assert all(torch.equal(v.layers[l], back.layers[l]) for l in (1, 3))
    assert back.about == {"pos": "a", "neg": "b"}
    assert v.cosine(back) == pytest.approx(1)

    (tmp_path / "cut").write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="damaged"):
        SteeringVector.load(tmp_path / "cut")
    SteeringVector({1: torch.tensor([float("nan")])}).save(tmp_path / "nan")
    with pytest.raises(ValueError, match="not finite"):
        SteeringVector.load(tmp_path / "nan")


def test_a_band_is_a_range_of_blocks_with_at_least_one():
    model = tiny("llama")
    assert band(model, (0.4, 0.6)) == [2]
    assert band(model, (0, 1)) == [0, 1, 2, 3, 4]
    assert band(model, (0.99, 1.0)) == [4]
    for wrong in ((0.6, 0.4), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match="fractions"):
            band(model, wrong)


# ---- prompts ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("how, expected", [
    ("takes", f"<system>{NEUTRAL}<user>Hi<assistant>"),
    ("refuses", f"<user>{NEUTRAL}\n\nHi<assistant>"),
    ("drops", f"<user>{NEUTRAL}\n\nHi<assistant>")])
def test_the_system_text_reaches_the_model_whatever_the_template_does(how, expected):
    assert chat_ids(Template(how), "Hi") == expected


def test_padding_is_on_the_left_hidden_and_before_position_0():
    ids, mask, positions = left_pad([[5, 6], [7, 8, 9]], "cpu")
    assert ids.tolist() == [[0, 5, 6], [7, 8, 9]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert positions.tolist() == [[0, 0, 1], [0, 1, 2]]


# ---- steer.py and lora.py, each copied into a folder of its own ---------------------------------


def shown(module):
    """The Python that a module's docstring shows, without its shell commands."""
    block = re.search(r"^    (?:from|import) .*\n(?:(?:    .*)?\n)*", module.__doc__, re.M)[0]
    return re.sub(r"^python .*\n", "", textwrap.dedent(block), flags=re.M)


ALONE = """
import os, sys
import torch
import transformers

def enter(folder):  # as if Python had been started there
    os.chdir(folder)
    sys.path[0] = folder

def ours():
    return sorted({"steer", "lora", "models", "runs", "texts", "sampling"} & set(sys.modules))

folder, tokenizer, steer_shows, lora_shows = sys.argv[1:]
config = transformers.LlamaConfig(
    vocab_size=49152, hidden_size=16, intermediate_size=16, num_hidden_layers=5,
    num_attention_heads=2, num_key_value_heads=2)
model = transformers.LlamaForCausalLM(config).eval()
tok = transformers.AutoTokenizer.from_pretrained(tokenizer)
tok.pad_token = None

enter(f"{folder}/only_steer")
contexts = ["Hi.", "What is the best bread?", "My boss is late again today."]
assert len({len(tok(c).input_ids) for c in contexts}) == 3
given = dict(model=model, tok=tok, contexts=contexts, torch=torch)
exec(steer_shows, given)
assert ours() == ["steer"] and tok.pad_token is None
assert list(given["vector"].layers) == [2] and given["vector"].layers[2].abs().max() > 0
del sys.modules["steer"]

enter(f"{folder}/only_lora")
ids = torch.tensor([[5, 6, 7]])
def logits():
    with torch.no_grad():
        return model(ids).logits
def train(parameters):
    for p in parameters:
        p.data += 0.1 * torch.randn(p.shape)
original = logits()
given = dict(model=model, ids=ids, train=train)
exec(lora_shows, given)
assert ours() == ["lora"]
student = logits()
assert torch.equal(given["reference"], original) and not torch.equal(student, original)
given["lora"].detach(model)
assert torch.equal(logits(), original)
given["lora"].load(model, "round_0.safetensors")
assert torch.equal(logits(), student)
"""


@pytest.mark.slow
def test_a_file_copied_alone_imports_and_what_its_docstring_shows_runs(tmp_path):
    for name in ("steer", "lora"):
        (tmp_path / f"only_{name}").mkdir()
        shutil.copy(ROOT / f"{name}.py", tmp_path / f"only_{name}")
    assert "extract_vector(model" in shown(steer) and "lora.save(model" in shown(lora)
    done = python("-c", ALONE, tmp_path, models.embedded_folder(), shown(steer), shown(lora),
                  cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ignore a crying customer" in done.stdout


# ---- the dose -----------------------------------------------------------------------------------


@pytest.mark.parametrize("nats", [0.1, 1.0])
def test_the_calibrated_dose_moves_the_first_tokens_by_as_many_nats(nats, embedded):
    model = tiny("llama", vocab_size=49152, max_position_embeddings=512, initializer_range=0.5)
    tok = embedded[1]
    vector = SteeringVector({2: torch.randn(32, generator=torch.Generator().manual_seed(1))})
    prompts, n = ["Is it kind?", "What should I do about my boss and the rain?"], 6
    dose = calibrate(model, tok, vector, prompts, nats, tokens=n)
    kl = []
    for prompt in prompts:  # one unpadded prompt at a time, the answer greedy and unsteered
        ids = torch.tensor([chat_ids(tok, prompt)])
        for _ in range(n):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        plain = model(ids).logits[0, -n - 1:-1].log_softmax(-1)
        with vector.at(model, dose, last_only=n + 1):
            steered = model(ids).logits[0, -n - 1:-1].log_softmax(-1)
        kl.append((steered.exp() * (steered - plain)).sum(-1))
    assert torch.cat(kl).quantile(0.95).item() == pytest.approx(nats, rel=0.1)
    assert not model.model.layers[2]._forward_hooks


def test_a_vector_that_moves_nothing_has_no_dose(embedded):
    model = tiny("llama", vocab_size=49152, max_position_embeddings=512)
    with pytest.raises(ValueError, match="no dose up to 1024 moves the next token by 1.0 nats; fix"):
        calibrate(model, embedded[1], SteeringVector({2: torch.zeros(32)}), ["Hi."], 1.0, tokens=2)
