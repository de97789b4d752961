import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st

import lora
from conftest import ROOT, tiny


def train_a_little(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    for m in lora.adapters(model).values():
        m.B.data = 0.05 * torch.randn(m.B.shape, generator=g)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_attaching_changes_nothing(any_model, ids):
    before = logits(any_model, ids)
    lora.attach(any_model, rank=4, alpha=8)
    assert torch.equal(before, logits(any_model, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_is_recovered_bit_for_bit_after_eight_folds(any_model, ids, dtype):
    model = any_model.to(dtype)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    before = logits(model, ids)
    lora.attach(model, rank=4, alpha=8)
    for r in range(8):
        train_a_little(model, r)
        lora.fold(model)
    assert lora.n_rounds(model) == 8
    assert not torch.equal(before, logits(model, ids))
    with lora.gates(model, history=0, live=0):
        assert torch.equal(before, logits(model, ids))
    with lora.merged(model), lora.gates(model, history=0, live=0):
        assert torch.equal(before, logits(model, ids))
    lora.detach(model)
    assert torch.equal(before, logits(model, ids))
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


def test_fold_does_not_change_the_student(tiny_model, ids):
    lora.attach(tiny_model, rank=4, alpha=8)
    for r in range(3):
        train_a_little(tiny_model, r)
        student = logits(tiny_model, ids)
        lora.fold(tiny_model)
        torch.testing.assert_close(logits(tiny_model, ids), student, rtol=1e-5, atol=1e-5)


def test_gate_1_0_is_the_previous_student(tiny_model, ids):
    lora.attach(tiny_model, rank=4, alpha=8)
    train_a_little(tiny_model, 0)
    previous = logits(tiny_model, ids)
    lora.fold(tiny_model)
    train_a_little(tiny_model, 1)
    with lora.gates(tiny_model, history=1, live=0):
        torch.testing.assert_close(logits(tiny_model, ids), previous, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(history=st.floats(-3, 3), live=st.floats(-3, 3), seed=st.integers(0, 99))
def test_gates_are_linear_in_the_dose(history, live, seed):
    g = torch.Generator().manual_seed(seed)
    layer = lora.BakedLoRA(torch.nn.Linear(12, 7).requires_grad_(False), rank=3, alpha=6)
    layer.history_A, layer.history_B = torch.randn(6, 12, generator=g), torch.randn(7, 6, generator=g)
    layer.B.data = torch.randn(7, 3, generator=g)
    x = torch.randn(5, 12, generator=g)
    layer.c_history, layer.c_live = history, live
    expected = layer.base(x) + history * 2 * x @ layer.history_A.T @ layer.history_B.T + live * 2 * x @ layer.A.T @ layer.B.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_merged_is_the_student_and_ends_with_its_context_also_after_an_exception(tiny_model, ids):
    lora.attach(tiny_model, rank=4, alpha=8)
    train_a_little(tiny_model)
    lora.fold(tiny_model)
    train_a_little(tiny_model, 1)
    student = logits(tiny_model, ids)
    with pytest.raises(KeyboardInterrupt):
        with lora.merged(tiny_model):
            torch.testing.assert_close(logits(tiny_model, ids), student, rtol=1e-4, atol=1e-4)
            with pytest.raises(ValueError, match="inside merged"):
                lora.fold(tiny_model)
            raise KeyboardInterrupt
    assert all(m.merged_weight is None for m in lora.adapters(tiny_model).values())
    assert torch.equal(logits(tiny_model, ids), student)


def test_only_the_live_factors_train(tiny_model, ids):
    lora.attach(tiny_model, rank=4, alpha=8)
    train_a_little(tiny_model)
    lora.fold(tiny_model)
    train_a_little(tiny_model, 1)
    tiny_model(input_ids=ids).logits.sum().backward()
    live = {id(p) for p in lora.live_parameters(tiny_model)}
    assert all((p.grad is not None) == (id(p) in live) for p in tiny_model.parameters())


def test_save_and_load_give_the_same_student_and_go_on_folding(any_model, ids, tmp_path):
    name = type(any_model).__name__
    lora.attach(any_model, rank=4, alpha=8)
    for r in range(2):
        train_a_little(any_model, r)
        lora.fold(any_model)
    train_a_little(any_model, 2)
    lora.save(any_model, tmp_path / "a.safetensors")
    lora.fold(any_model)
    student = logits(any_model, ids)
    lora.detach(any_model)
    lora.load(any_model, tmp_path / "a.safetensors")
    lora.fold(any_model)
    assert torch.equal(logits(any_model, ids), student), name


def test_loading_refuses_what_does_not_fit(ids, tmp_path):
    model, path = tiny("llama"), tmp_path / "a.safetensors"
    lora.attach(model, rank=4, alpha=8)
    lora.save(model, path)
    other = tiny("llama")
    other.get_decoder().layers[2].mlp.up_proj.weight.data += 1
    with pytest.raises(ValueError, match="another base"):
        lora.load(other, path)
    assert not hasattr(other, "lora_config")
    ranked = tiny("llama")
    lora.attach(ranked, rank=2, alpha=8)
    with pytest.raises(ValueError, match="rank"):
        lora.load(ranked, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        lora.load(tiny("llama"), path)
    next(iter(lora.adapters(model).values())).B.data[0, 0] = float("nan")
    lora.save(model, path)
    with pytest.raises(ValueError, match="not finite"):
        lora.load(tiny("llama"), path)
    with pytest.raises(FileNotFoundError, match="no adapter file"):
        lora.load(tiny("llama"), tmp_path / "missing")


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
