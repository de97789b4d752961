"""Steering vectors: steering as a forward hook, extraction, doses; the files that stand alone."""
import re
import shutil
import textwrap

import pytest
import torch

import lora
import steer
from common import models
from common.prompts import Chat
from common.sampling import sample
from conftest import ROOT, Ids, python, tiny
from steer import SteeringVector, band, batches, calibrate, extract_vector, mean_residual


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


def long_rope():
    """A Phi-3 whose rotary factors change for a whole batch where a row exceeds 16 tokens."""
    return tiny("phi3", original_max_position_embeddings=16, rope_parameters=dict(
        rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=16,
        short_factor=[1.0] * 4, long_factor=[4.0, 8.0, 16.0, 32.0]))


@pytest.mark.parametrize("last_only, first", [(False, 0), (True, 19), (3, 17), (99, 0)])
def test_steering_adds_dose_times_v_and_leaves_no_hook(tiny_model, ids, last_only, first):
    """first: the first of 20 positions that is steered."""
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
    expected = torch.zeros_like(plain)
    expected[:, first:] = 2 * v.layers[2]
    assert torch.equal(steered[:, :first], plain[:, :first])
    torch.testing.assert_close(steered - plain, expected, rtol=1e-4, atol=1e-4)
    assert not block._forward_hooks


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generate_steered_at_the_last_position_says_what_sample_says(name):
    model, changed = tiny(name), False
    v, chat = vector(model, size=4.0), Chat(Ids)
    for p, dose in zip(prompts(), [3.0, 1.0, -3.0]):
        with v.at(model, dose, last_only=True):
            out = model.generate(torch.tensor([p]), max_new_tokens=24, do_sample=False,
                                 pad_token_id=0)
        ours, = sample(model, chat, [p], v, [dose], max_new_tokens=24, temperature=0)
        assert ours == until_the_end(out[0, len(p):].tolist())
        changed |= [ours] != sample(model, chat, [p], max_new_tokens=24, temperature=0)
    assert changed, "the dose must show"


def test_a_vector_that_does_not_fit_is_refused():
    model = tiny("llama")
    for v in (SteeringVector({9: torch.ones(32)}), SteeringVector({1: torch.ones(31)})):
        with pytest.raises(ValueError, match="does not fit"):
            with v.at(model, 1.0):
                pass


@torch.no_grad()
def test_extraction_is_the_mean_difference_at_the_last_position(any_model):
    """Against one unpadded prompt at a time."""
    pos, neg, layers, means = prompts(5), prompts(9)[5:], [1, 3], []
    for rows in (pos, neg):
        states = [any_model(torch.tensor([p]), output_hidden_states=True).hidden_states
                  for p in rows]
        means.append({l: torch.stack([s[l + 1][0, -1] for s in states]).mean(0) for l in layers})
    blocks = any_model.get_decoder().layers
    hooks = [len(block._forward_hooks) for block in blocks]  # transformers' own, of the pass above
    for batch_size in (1, 4):
        v = extract_vector(any_model, pos, neg, layers, batch_size, {"pos": "You care."})
        assert list(v.layers) == layers and v.metadata["pos"] == "You care."
        for l in layers:
            torch.testing.assert_close(v.layers[l], means[0][l] - means[1][l], rtol=1e-3, atol=1e-4)
    assert hooks == [len(block._forward_hooks) for block in blocks]


def test_extraction_of_nothing_or_of_equal_prompts_is_refused():
    model, rows = tiny("llama"), prompts(2)
    for pos, neg in (([], rows), (rows, []), (rows, rows)):
        with pytest.raises(ValueError, match="no prompts to extract from, or the same.*; fix"):
            extract_vector(model, pos, neg, [2])
    with pytest.raises(ValueError, match="exceed the model's context of 256; fix"):
        mean_residual(model, [[5] * 257], [2])


def test_extraction_on_both_sides_of_a_long_rope_switch_equals_row_by_row():
    model, g = long_rope(), torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 128, (n,), generator=g).tolist() for n in (5, 16, 17, 30)]
    one, two, four = (mean_residual(model, rows, [4], batch_size)[4] for batch_size in (1, 2, 4))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(four, one, rtol=1e-4, atol=1e-5)


def test_batches_hold_few_rows_few_tokens_and_one_side_of_a_switch():
    lengths = [3, 20, 4, 18, 5, 6]
    assert batches(tiny("llama"), range(6), lengths, rows=4) == [[0, 1, 2, 3], [4, 5]]
    assert batches(tiny("llama"), [5, 4], lengths, rows=4) == [[5, 4]]
    # at most 32,768 tokens, padding included
    assert batches(tiny("llama"), range(3), [20000, 9000, 10000], rows=4) == [[0], [1, 2]]
    assert batches(long_rope(), range(6), lengths, rows=4) == [[0, 2, 4, 5], [1, 3]]


def test_vectors_survive_the_disk_and_bad_files_are_named(tmp_path):
    file = tmp_path / "v.safetensors"
    v = SteeringVector({3: torch.randn(8), 1: torch.randn(8)}, {"pos": "a", "neg": "b"})
    v.save(file)
    back = SteeringVector.load(file)
    assert all(torch.equal(v.layers[l], back.layers[l]) for l in (1, 3))
    assert back.metadata == {"pos": "a", "neg": "b"}
    assert v.cosine(back) == pytest.approx(1)
    opposite = SteeringVector({l: -x for l, x in v.layers.items()})
    assert v.cosine(opposite) == pytest.approx(-1)

    (tmp_path / "cut").write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="damaged"):
        SteeringVector.load(tmp_path / "cut")
    SteeringVector({1: torch.tensor([float("nan")])}).save(tmp_path / "nan")
    with pytest.raises(ValueError, match="not finite"):
        SteeringVector.load(tmp_path / "nan")
    with pytest.raises(FileNotFoundError, match="no vector file"):
        SteeringVector.load(tmp_path / "nope")


def test_a_band_is_a_range_of_blocks_with_at_least_one():
    model = tiny("llama")
    assert band(model, (0.4, 0.6)) == [2]
    assert band(model, (0, 1)) == [0, 1, 2, 3, 4]
    assert band(model, (0.99, 1.0)) == [4]
    for wrong in ((0.6, 0.4), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match="fractions"):
            band(model, wrong)


@pytest.mark.parametrize("nats, ends_at", [(0.1, 6), (1.0, 6), (1.0, 2)])
def test_the_calibrated_dose_moves_the_first_tokens_by_as_many_nats(nats, ends_at):
    model = tiny("llama", initializer_range=0.5)
    v, rows, n = vector(model, layers=(2,)), [prompts()[0], prompts()[3]], 6
    answers = []
    for row in rows:  # greedy and unsteered
        ids = torch.tensor([row])
        for _ in range(n):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        answers.append(ids)
    stop = [answers[0][0, len(rows[0]) + ends_at - 1].item()] if ends_at < n else []
    dose = calibrate(model, v, rows, nats, tokens=n, stop=stop)
    kl = []
    for row, ids in zip(rows, answers):  # one unpadded prompt at a time
        plain = model(ids).logits[0, -n - 1:-1].log_softmax(-1)
        with v.at(model, dose, last_only=n + 1):
            steered = model(ids).logits[0, -n - 1:-1].log_softmax(-1)
        answer = ids[0, len(row):].tolist()
        end = min([answer.index(t) + 1 for t in stop if t in answer], default=n)
        kl.append((steered.exp() * (steered - plain)).sum(-1)[:end])
    assert len(torch.cat(kl)) < 2 * n or not stop
    assert torch.cat(kl).quantile(0.95).item() == pytest.approx(nats, rel=0.05)
    assert not model.model.layers[2]._forward_hooks


def test_a_vector_that_moves_nothing_has_no_dose():
    with pytest.raises(ValueError, match="no dose up to 1024 moves .* by 1.0 nats; fix"):
        calibrate(tiny("llama"), SteeringVector({2: torch.zeros(32)}), prompts(1), 1.0, tokens=2)


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
    return sorted({"steer", "lora", "common", "distil", "tools"} & set(sys.modules))

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
names = dict(model=model, tok=tok, contexts=contexts, torch=torch)
exec(steer_shows, names)
assert ours() == ["steer"] and tok.pad_token is None
assert list(names["vector"].layers) == [2] and names["vector"].layers[2].abs().max() > 0
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
names = dict(model=model, ids=ids, train=train)
exec(lora_shows, names)
assert ours() == ["lora"]
student = logits()
assert torch.equal(names["reference"], original) and not torch.equal(student, original)
names["lora"].detach(model)
assert torch.equal(logits(), original)
names["lora"].load(model, "round_0.safetensors")
assert torch.equal(logits(), student)
"""


@pytest.mark.slow
def test_a_file_copied_alone_runs_what_its_docstring_shows(tmp_path):
    for name in ("steer", "lora"):
        (tmp_path / f"only_{name}").mkdir()
        shutil.copy(ROOT / f"{name}.py", tmp_path / f"only_{name}")
    assert "extract_vector(model" in shown(steer) and "lora.save(model" in shown(lora)
    done = python("-c", ALONE, tmp_path, models.embedded_folder(), shown(steer), shown(lora),
                  cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ignore a crying customer" in done.stdout
