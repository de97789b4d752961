import contextlib
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open

import lora
from conftest import ARCHITECTURES, ROOT, tiny

HOW = st.fixed_dictionaries(dict(rank=st.integers(1, 4), alpha=st.sampled_from([1.0, 8.0]), layers=st.sampled_from([(0.0, 1.0), (0.2, 0.8), (0.4, 0.6)])))
DOSE = st.sampled_from([0.0, 1.0]) | st.floats(-3, 3)
IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


def of_every_architecture(**drawn):
    """A property of random draws, on a random model of each architecture."""
    return lambda test: pytest.mark.parametrize("name", ARCHITECTURES)(settings(max_examples=10, deadline=None)(given(**drawn)(test)))


def train_a_little(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    for m in lora.adapters(model).values():
        m.B.data = 0.05 * torch.randn(m.B.shape, generator=g)


def train(model):
    """One AdamW step on whatever asks for a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(input_ids=IDS).logits.float().log_softmax(-1)[..., 5].mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@of_every_architecture(how=HOW, steps=st.lists(st.sampled_from(["train", "train merged", "fold"]), max_size=6), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_base_is_recovered_bit_for_bit_whatever_was_trained_and_folded(name, how, steps, dtype):
    model = tiny(name, dtype).requires_grad_(True)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    before = logits(model, IDS)
    lora.attach(model, **how)
    assert torch.equal(before, logits(model, IDS)), "attaching changed something"
    for step in steps:
        with lora.merged(model) if "merged" in step else contextlib.nullcontext():
            lora.fold(model) if step == "fold" else train(model)
    assert torch.equal(before, logits(model, IDS)) == all(step == "fold" for step in steps)
    with lora.gates(model, history=0, live=0):
        assert torch.equal(before, logits(model, IDS))
        with lora.merged(model):
            assert torch.equal(before, logits(model, IDS))
    lora.detach(model)
    assert torch.equal(before, logits(model, IDS))
    after = model.state_dict()
    assert after.keys() == tensors.keys() and all(torch.equal(v, after[k]) for k, v in tensors.items())


def test_base_is_recovered_bit_for_bit_on_the_embedded_model(embedded):
    model, tok = embedded
    ids = tok("A nurse hides the doctor's mistake.", return_tensors="pt").input_ids
    before = logits(model, ids)
    lora.attach(model, rank=4, alpha=8)
    try:
        for r in range(8):
            train_a_little(model, r)
            lora.fold(model)
        with lora.gates(model, history=0, live=0):
            assert torch.equal(before, logits(model, ids))
    finally:
        lora.detach(model)
    assert torch.equal(before, logits(model, ids))


@of_every_architecture(how=HOW, rounds=st.integers(0, 3), trained=st.booleans(), history=DOSE, live=DOSE, merged=st.booleans())
def test_gates_are_linear_in_the_dose(name, how, rounds, trained, history, live, merged):
    model = tiny(name)
    lora.attach(model, **how)
    modules, factors = lora.adapters(model).values(), []
    for r in range(rounds):
        train_a_little(model, r)
        factors.append([m.B.data @ m.A.data for m in modules])
        lora.fold(model)
    if trained:
        train_a_little(model, rounds)
    with lora.merged(model) if merged else contextlib.nullcontext(), lora.gates(model, history, live):
        for k, m in enumerate(modules):
            x = torch.randn(3, m.weight.shape[1], generator=torch.Generator().manual_seed(k))
            plain = x @ m.weight.T + (0 if m.bias is None else m.bias)
            delta = history * sum(f[k] for f in factors) + live * trained * m.B @ m.A
            torch.testing.assert_close(m(x), plain + how["alpha"] / how["rank"] * x @ delta.T, rtol=1e-4, atol=1e-5)
    assert all((m.c_history, m.c_live) == (1, 1) for m in modules)


@of_every_architecture(how=HOW, steps=st.lists(st.tuples(st.sampled_from(["train", "fold"]), st.booleans()), min_size=1, max_size=6))
def test_fold_keeps_the_student_and_is_associative_with_save_and_load(name, how, steps, tmp_path_factory):
    stays, travels, file = tiny(name), tiny(name), tmp_path_factory.getbasetemp() / "a.safetensors"
    for model in (stays, travels):
        torch.manual_seed(0)
        lora.attach(model, **how)
    for k, (step, through_the_file) in enumerate(steps):
        before = logits(stays, IDS)
        for model in (stays, travels):
            torch.manual_seed(k)
            lora.fold(model) if step == "fold" else train_a_little(model, k)
        if step == "fold":
            torch.testing.assert_close(logits(stays, IDS), before, rtol=1e-5, atol=1e-5)
        if through_the_file:
            lora.save(travels, file)
            travels = tiny(name)
            lora.load(travels, file)
    assert lora.n_rounds(travels) == [step for step, _ in steps].count("fold") and stays.lora_config == travels.lora_config
    for a, b in zip(lora.adapters(stays).values(), lora.adapters(travels).values(), strict=True):
        assert all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("history_A", "history_B", "A", "B"))
    assert torch.equal(logits(stays, IDS), logits(travels, IDS))


@of_every_architecture(rounds=st.integers(1, 3), nested=st.booleans(), where=st.integers(0, 99), when=st.sampled_from(["entering", "within", "folding"]))
def test_merged_is_the_student_and_ends_with_its_context_wherever_an_exception_strikes(name, rounds, nested, where, when):
    model = tiny(name)
    lora.attach(model, rank=4, alpha=8)
    for r in range(rounds):
        train_a_little(model, r)
        lora.fold(model)
    train_a_little(model, rounds)
    modules = list(lora.adapters(model).values())
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    student = logits(model, IDS)
    struck = modules[where % len(modules)]
    whole = struck.history_B

    def strike(*_):
        raise KeyboardInterrupt
    with lora.merged(model) if nested else contextlib.nullcontext():
        outer, seen = [m.merged_weight for m in modules], logits(model, IDS)
        if when == "entering":
            struck.history_B = whole[:, 1:]
        with pytest.raises((KeyboardInterrupt, ValueError, RuntimeError)):
            with lora.merged(model):
                torch.testing.assert_close(logits(model, IDS), student, rtol=1e-4, atol=1e-4)
                if when == "folding":
                    lora.fold(model)
                with struck.register_forward_hook(strike), lora.gates(model, where, where):
                    logits(model, IDS)
        struck.history_B = whole
        assert all(m.merged_weight is weight and (m.c_history, m.c_live) == (1, 1) for m, weight in zip(modules, outer))
        assert torch.equal(logits(model, IDS), seen)
    assert all(m.merged_weight is None for m in modules) and torch.equal(logits(model, IDS), student)
    assert all(torch.equal(v, tensors[k]) for k, v in model.state_dict().items())


def test_only_the_live_factors_train(any_model, ids):
    lora.attach(any_model, rank=4, alpha=8)
    train_a_little(any_model)
    lora.fold(any_model)
    train_a_little(any_model, 1)
    any_model(input_ids=ids).logits.sum().backward()
    live = {id(p) for p in lora.live_parameters(any_model)}
    assert all((p.grad is not None) == (id(p) in live) for p in any_model.parameters())


@pytest.mark.parametrize("spoil, message", [("base", "another base"), ("rank", "'rank': 4.*'rank': 2"), ("nan", "not finite"), ("cut", "damaged"),
                                            ("lacks a tensor", "layers.2.*A"), ("another shape", "layers.2.*A")])
def test_a_refused_file_leaves_the_model_as_it_was(spoil, message, tmp_path):
    source, model, file = tiny("llama"), tiny("llama"), tmp_path / "a.safetensors"
    lora.attach(source, rank=4, alpha=8)
    name, first = next((name, m) for name, m in lora.adapters(source).items() if "layers.2" in name)
    if spoil == "base":
        model.get_submodule(name).weight.data += 1
    if spoil == "rank":
        lora.attach(model, rank=2, alpha=8)
    if spoil == "nan":
        first.B.data[0, 0] = float("nan")
    if spoil == "another shape":
        first.A.data = first.A.data[:, 1:]
    lora.save(source, file)
    if spoil == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    if spoil == "lacks a tensor":
        with safe_open(file, framework="pt") as f:
            lora.save_tensors({key: f.get_tensor(key) for key in f.keys() if key != f"{name}.A"}, file, f.metadata())
    before, modules = logits(model, IDS), list(model.modules())
    with pytest.raises(ValueError, match=message):
        lora.load(model, file)
    assert torch.equal(logits(model, IDS), before) and list(model.modules()) == modules and hasattr(model, "lora_config") == (spoil == "rank")

@pytest.mark.parametrize("how, message", [(dict(rank=0), "positive"), (dict(layers=(0.8, 0.2)), "fractions"), (dict(targets=("nope",)), "no nn.Linear")])
def test_attach_names_what_is_wrong(how, message):
    with pytest.raises(ValueError, match=message):
        lora.attach(tiny("llama"), **how)


@pytest.mark.parametrize("name", ["lora", "steer"])
def test_the_file_copied_alone_imports_and_works(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    use = {"lora": """
import torch, transformers, lora
c = transformers.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=5, num_attention_heads=2, num_key_value_heads=2)
m = transformers.LlamaForCausalLM(c); lora.attach(m, rank=2, alpha=4); lora.fold(m); lora.save(m, 'a.safetensors'); lora.detach(m); lora.load(m, 'a.safetensors')
""", "steer": """
import torch, transformers, steer
c = transformers.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=5, num_attention_heads=2, num_key_value_heads=2)
m = transformers.LlamaForCausalLM(c)
class tok: pad_token_id = 0; eos_token_id = 2
v = steer.SteeringVector({2: torch.ones(16)})
assert len(steer.sample(m, tok, [[5, 6, 7]], v, [2.0], max_new_tokens=4)) == 1
"""}[name]
    done = subprocess.run([sys.executable, "-c", use], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
