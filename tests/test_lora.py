"""The adapter's algebra, on a random model of every architecture: base, gates, fold, files."""
import re
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lora
from conftest import ARCHITECTURES, tiny

pytestmark = pytest.mark.filterwarnings("ignore:LoRA reaches")  # of mixtral's experts, tested below

HOW = st.fixed_dictionaries(dict(
    rank=st.integers(1, 4), alpha=st.sampled_from([1.0, 8.0]), merge=st.booleans(),
    layers=st.sampled_from([(0.0, 1.0), (0.2, 0.8), (0.4, 0.6)])))
GATE = st.sampled_from([0.0, 1.0]) | st.floats(-3, 3)
IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


def of_every_architecture(max_examples=8, **drawn):
    """A property of random draws, on a random model of each architecture."""
    def decorate(test):
        test = settings(max_examples=max_examples, deadline=None)(given(**drawn)(test))
        return pytest.mark.parametrize("name", ARCHITECTURES)(test)
    return decorate


def train_a_little(model, seed=0, size=0.05):
    """Random live factors; size 0 is a B that never moved."""
    g = torch.Generator().manual_seed(seed)
    for m in lora.adapters(model).values():
        m.A.data = 0.1 * torch.randn(m.A.shape, generator=g)
        m.B.data = size * torch.randn(m.B.shape, generator=g)


def fold_rounds(model, n):
    for r in range(n):
        train_a_little(model, r)
        lora.fold(model)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_is_recovered_bit_for_bit_after_eight_folds(any_model, dtype, merge):
    model = any_model.to(dtype)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    before = logits(model)
    lora.attach(model, rank=4, alpha=8, merge=merge)
    assert torch.equal(before, logits(model)), "attaching changed something"
    fold_rounds(model, 8)
    assert lora.n_rounds(model) == 8 and not torch.equal(before, logits(model))
    for gate in (0.0, 0.5, 1.0):  # a list of equal gates is that gate
        with lora.gates(model, gate, live=0):
            one = logits(model)
        with lora.gates(model, [gate] * 8, live=0):
            assert torch.equal(one, logits(model))
        assert torch.equal(before, one) == (gate == 0)
    lora.detach(model)
    after = model.state_dict()
    assert torch.equal(before, logits(model)) and after.keys() == tensors.keys()
    assert all(torch.equal(v, after[k]) for k, v in tensors.items())


def test_merged_and_unmerged_history_are_the_same_student(any_model):
    lora.attach(any_model, rank=4, alpha=8)
    fold_rounds(any_model, 3)
    train_a_little(any_model, 3)
    merged = logits(any_model)
    for m in lora.adapters(any_model).values():
        torch.testing.assert_close(m.merged_weight, m.base.weight + m.history_delta())
        m.merged_weight = None
    torch.testing.assert_close(logits(any_model), merged, rtol=1e-4, atol=1e-4)


@of_every_architecture(how=HOW, rounds=st.integers(0, 3), trained=st.booleans(), live=GATE,
                       history=GATE | st.lists(GATE, min_size=3, max_size=3))
def test_a_layer_is_its_equation_at_any_gates(name, how, rounds, trained, live, history):
    """One gate for all rounds or one for each, merged or not."""
    model = tiny(name)
    lora.attach(model, **how)
    modules, products = lora.adapters(model).values(), []
    for r in range(rounds):
        train_a_little(model, r)
        products.append([m.B.data @ m.A.data for m in modules])
        lora.fold(model)
    if trained:
        train_a_little(model, rounds)
    if isinstance(history, list):
        history = per_round = history[:rounds]
    else:
        per_round = [history] * rounds
    with lora.gates(model, history, live):
        for k, m in enumerate(modules):
            W = m.base.weight
            x = torch.randn(3, W.shape[1], generator=torch.Generator().manual_seed(k))
            plain = x @ W.T + (0 if m.bias is None else m.bias)
            delta = sum(gate * p[k] for gate, p in zip(per_round, products, strict=True))
            delta = how["alpha"] / how["rank"] * (delta + live * trained * m.B @ m.A)
            torch.testing.assert_close(m(x), plain + x @ delta.T, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(m.weight, W + delta, rtol=1e-4, atol=1e-5)
    assert all((m.c_history, m.c_live) == (1, 1) for m in modules)


def test_gates_are_restored_after_an_error_and_nested():
    model = tiny("llama")
    lora.attach(model)
    fold_rounds(model, 1)
    student = logits(model)
    with pytest.raises(KeyboardInterrupt):
        with lora.gates(model, 0, 0):
            with lora.gates(model, [0.5], 2):
                assert all(m.c_live == 2 for m in lora.adapters(model).values())
            assert all((m.c_history, m.c_live) == (0, 0) for m in lora.adapters(model).values())
            raise KeyboardInterrupt
    for wrong in ([], [1, 0]):
        with pytest.raises(ValueError, match=f"{len(wrong)} history gates for 1 folded round"):
            with lora.gates(model, history=wrong):
                pass
    assert torch.equal(logits(model), student)


@of_every_architecture(max_examples=3, how=HOW, trained=st.lists(st.booleans(), min_size=1,
                                                                 max_size=3))
def test_fold_keeps_the_student_also_through_files(name, how, trained, tmp_path_factory):
    # float64: that no sum's order decides; experts are multiplied in at most float32
    dtype = torch.float32 if name == "mixtral" else torch.float64
    model, at_once, one_by_one = (tiny(name, dtype) for _ in range(3))
    lora.attach(model, **how)
    files, folder = [], tmp_path_factory.getbasetemp()
    for r, moved in enumerate(trained):
        train_a_little(model, r, size=0.05 * moved)
        before = logits(model)
        lora.fold(model)
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
        files.append(folder / f"round_{r}.safetensors")
        lora.save(model, files[-1])
        lora.load(one_by_one, files[-1], merge=how["merge"])
    lora.load(at_once, files, merge=how["merge"])
    for other in (at_once, one_by_one):
        assert lora.n_rounds(other) == len(trained)
        assert torch.equal(logits(other), logits(model))


def test_a_file_holds_the_newest_round_alone_and_none_may_lack(tmp_path):
    model, a, b = tiny("llama"), tmp_path / "a", tmp_path / "b"
    lora.attach(model, rank=4)
    with pytest.raises(ValueError, match="no round is folded yet; fix"):
        lora.save(model, a)
    for r, file in enumerate((a, b)):
        fold_rounds(model, 1)
        train_a_little(model, 9)  # the live factors stay out of it
        lora.save(model, file)
        with safe_open(file, framework="pt") as f:
            assert len(f.keys()) == 2 * len(lora.adapters(model))
            for name, m in lora.adapters(model).items():
                assert torch.equal(f.get_tensor(f"{name}.A"), m.history_A[4 * r:])
                assert torch.equal(f.get_tensor(f"{name}.B"), m.history_B[:, 4 * r:])
    for files, message in ((b, "b is round 1, the model has 0"),
                           ([a, a], "a is round 0, the model has 1")):
        fresh = tiny("llama")
        with pytest.raises(ValueError, match=f"{message}.*all rounds"):
            lora.load(fresh, files)
        assert not lora.is_attached(fresh)
    lora.load(fresh, [b, a])  # in any order, as a shell lists them
    with lora.gates(model, history=1, live=0):
        assert torch.equal(logits(fresh), logits(model))
    with pytest.raises(FileNotFoundError, match="no adapter file .*nope; fix"):
        lora.load(model, tmp_path / "nope")


@pytest.mark.parametrize("spoil, message", [
    ("base", "another base"), ("rank", "another rank, alpha, layers"),
    ("layers", "another base|other layers"), ("nan", "not finite"),
    ("cut", "damaged"), ("foreign", "not written by lora.save")])
@pytest.mark.parametrize("place", ["alone", "after a good one"])
def test_a_refused_file_leaves_the_model_as_it_was(spoil, message, place, tmp_path):
    source, model = tiny("llama"), tiny("llama")
    good, file = tmp_path / "good.safetensors", tmp_path / "a.safetensors"
    lora.attach(source, rank=4, alpha=8)
    if place == "after a good one":
        fold_rounds(source, 1)
        lora.save(source, good)
    train_a_little(source)
    name, first = next((name, m) for name, m in lora.adapters(source).items() if "layers.2" in name)
    if spoil == "base":
        model.get_submodule(name).weight.data += 1
    if spoil == "rank":
        lora.attach(model, rank=2, alpha=8)
    if spoil == "layers":
        lora.attach(model, rank=4, alpha=8, layers=(0.2, 0.6))
    if spoil == "nan":
        first.B.data[0, 0] = float("nan")
    lora.fold(source)
    lora.save(source, file)
    if spoil == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    if spoil == "foreign":
        save_file({"weight": torch.zeros(2)}, file)
    before, modules = logits(model), list(model.modules())
    with pytest.raises(ValueError, match=message):
        lora.load(model, file if place == "alone" else [good, file])
    assert torch.equal(logits(model), before) and list(model.modules()) == modules
    if spoil in ("rank", "layers"):
        assert lora.n_rounds(model) == 0


@pytest.mark.parametrize("how, message", [
    (dict(rank=0), "positive"), (dict(alpha=0), "positive"),
    (dict(layers=(0.8, 0.2)), "0 <= from < to <= 1"),
    (dict(targets=("nope",)), "no nn.Linear")])
def test_attach_names_what_is_wrong_and_changes_nothing(how, message):
    model = tiny("llama")
    with pytest.raises(ValueError, match=message):
        lora.attach(model, **how)
    with pytest.raises(ValueError, match="no LoRA on this model; fix"):
        lora.adapters(model)
    lora.attach(model)
    with pytest.raises(ValueError, match="attached already; fix"):
        lora.attach(model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_matrix_is_wrapped_or_named_and_the_live_factors_train(name):
    model = tiny(name)
    matrices = {key: p.numel() for key, p in model.named_parameters()
                if p.ndim > 1 and re.search(r"layers\.[123]\.", key) and "vision" not in key}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        lora.attach(model, layers=(0.2, 0.8))
    wrapped = {f"{key}.weight" for key in lora.adapters(model)}
    assert wrapped <= matrices.keys()
    left = matrices.keys() - wrapped
    assert len(told) == bool(left) == (name == "mixtral")  # its experts are one fused tensor
    if left:
        share = sum(matrices[key] for key in wrapped) / sum(matrices.values())
        words, _, names = str(told[0].message).partition(" as they are: ")
        assert f" {share:.0%} of the weights" in words and set(names.split(", ")) == left
    fold_rounds(model, 1)
    train_a_little(model, 1)
    model(input_ids=IDS).logits.sum().backward()
    live = {id(p) for p in lora.live_parameters(model)}
    assert live and all((p.grad is not None) == (id(p) in live) for p in model.parameters())


class Unlike(nn.Linear):
    """A subclass may compute something else, as 4-bit weights do."""


def test_blocks_of_any_module_can_be_named_and_a_subclass_is_left():
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 16), Unlike(16, 8)))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    original = net(x)
    with pytest.warns(UserWarning, match="as they are: 1.1.weight$"):
        lora.attach(net, rank=2, alpha=4.0, layers=(0.0, 1.0), blocks=list(net))
    assert set(lora.adapters(net)) == {"0", "1.0"}
    fold_rounds(net, 1)
    assert not torch.equal(net(x), original)
    lora.detach(net)
    assert torch.equal(net(x), original)
