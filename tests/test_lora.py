"""The adapter's algebra, on a random model of every architecture: base, gates, fold, files."""
import warnings

import pytest
import torch
import transformers
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


def train(model):
    """One AdamW step on whatever asks for a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(input_ids=IDS).logits.float().log_softmax(-1)[..., 5].mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


# ---- base and gates -----------------------------------------------------------------------------


@of_every_architecture(how=HOW, dtype=st.sampled_from([torch.float32, torch.bfloat16]),
                       steps=st.lists(st.sampled_from(["train", "fold"]), max_size=5))
def test_base_is_recovered_bit_for_bit_whatever_was_trained(name, how, dtype, steps):
    model = tiny(name, dtype).requires_grad_(True)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    before = logits(model)
    lora.attach(model, **how)
    assert torch.equal(before, logits(model)), "attaching changed something"
    for step in steps:
        lora.fold(model) if step == "fold" else train(model)
    if "train" in steps:
        assert not torch.equal(before, logits(model))
    with lora.gates(model, history=0, live=0):
        assert torch.equal(before, logits(model))
    lora.detach(model)
    after = model.state_dict()
    assert torch.equal(before, logits(model)) and after.keys() == tensors.keys()
    assert all(torch.equal(v, after[k]) for k, v in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_is_recovered_bit_for_bit_after_eight_folds(any_model, dtype):
    model = any_model.to(dtype)
    before = logits(model)
    lora.attach(model, rank=4, alpha=8)
    fold_rounds(model, 8)
    assert lora.n_rounds(model) == 8 and not torch.equal(before, logits(model))
    for history in (0, [0.0] * 8):
        with lora.gates(model, history, live=0):
            assert torch.equal(before, logits(model))
    lora.detach(model)
    assert torch.equal(before, logits(model)) and not lora.is_attached(model)


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


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_list_of_equal_gates_is_that_gate_bit_for_bit(any_model, dtype, merge):
    model = any_model.to(dtype)
    original = logits(model)
    lora.attach(model, rank=4, alpha=8, merge=merge)
    fold_rounds(model, 3)
    for gate in (0, 1, 0.5):
        with lora.gates(model, history=gate):
            one = logits(model)
        with lora.gates(model, history=[gate] * 3):
            assert torch.equal(logits(model), one)
        assert torch.equal(one, original) == (gate == 0)
    with lora.gates(model, history=[0, 1, 0]):
        some = logits(model)
    assert not torch.equal(some, original) and not torch.equal(some, one)


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


def test_only_the_live_factors_train(any_model):
    lora.attach(any_model, rank=4, alpha=8)
    fold_rounds(any_model, 1)
    train_a_little(any_model, 1)
    any_model(input_ids=IDS).logits.sum().backward()
    live = {id(p) for p in lora.live_parameters(any_model)}
    assert live and all((p.grad is not None) == (id(p) in live) for p in any_model.parameters())


def test_merged_and_unmerged_history_are_the_same_student(any_model):
    lora.attach(any_model, rank=4, alpha=8)
    fold_rounds(any_model, 3)
    train_a_little(any_model, 3)
    merged = logits(any_model)
    merged_loss = merged.log_softmax(-1)[..., 5].mean()
    modules = lora.adapters(any_model).values()
    for m in modules:
        torch.testing.assert_close(m.merged_weight, m.base.weight + m.history_delta())
        m.merged_weight = None
    unmerged = logits(any_model)
    torch.testing.assert_close(unmerged, merged, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(unmerged.log_softmax(-1)[..., 5].mean(), merged_loss)

    saving = tiny("llama")
    lora.attach(saving, merge=False)
    fold_rounds(saving, 2)
    assert all(m.merged_weight is None for m in lora.adapters(saving).values())


# ---- files: a round is one ----------------------------------------------------------------------


@of_every_architecture(max_examples=4, how=HOW, rounds=st.lists(
    st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=3))
def test_fold_keeps_the_student_also_through_files(name, how, rounds, tmp_path_factory):
    # float64: that no sum's order decides; experts are multiplied in at most float32
    dtype = torch.float32 if name == "mixtral" else torch.float64
    stays, travels, files = tiny(name, dtype), tiny(name, dtype), []
    folder = tmp_path_factory.getbasetemp()
    for model in (stays, travels):
        lora.attach(model, **how)
    for r, (trained, through_the_files) in enumerate(rounds):
        for model in (stays, travels):
            train_a_little(model, r, size=0.05 * trained)
        before = logits(stays)
        for model in (stays, travels):
            lora.fold(model)
        torch.testing.assert_close(logits(stays), before, rtol=1e-5, atol=1e-5)
        files.append(folder / f"round_{r}.safetensors")
        lora.save(travels, files[-1])
        if through_the_files:
            travels = tiny(name, dtype)
            lora.load(travels, files, merge=how["merge"])
    one_by_one = tiny(name, dtype)
    for file in files:
        lora.load(one_by_one, file, merge=how["merge"])
    for model in (travels, one_by_one):
        assert lora.n_rounds(model) == len(rounds)
        same = zip(lora.adapters(stays).values(), lora.adapters(model).values(), strict=True)
        for a, b in same:
            assert (a.rank, a.alpha) == (b.rank, b.alpha) and not b.B.any()
            assert torch.equal(a.history_A, b.history_A) and torch.equal(a.history_B, b.history_B)
        assert torch.equal(logits(stays), logits(model))


def test_a_file_holds_the_newest_round_alone(tmp_path):
    model, files = tiny("llama"), [tmp_path / "a", tmp_path / "b"]
    lora.attach(model, rank=4)
    with pytest.raises(ValueError, match="no round is folded yet; fix"):
        lora.save(model, files[0])
    for r, file in enumerate(files):
        train_a_little(model, r)
        lora.fold(model)
        train_a_little(model, 9)  # the live factors stay out of it
        lora.save(model, file)
    for r, file in enumerate(files):
        with safe_open(file, framework="pt") as f:
            assert len(f.keys()) == 2 * len(lora.adapters(model))
            for name, m in lora.adapters(model).items():
                rows = slice(4 * r, 4 * r + 4)
                assert torch.equal(f.get_tensor(f"{name}.A"), m.history_A[rows])
                assert torch.equal(f.get_tensor(f"{name}.B"), m.history_B[:, rows])
    for order, message in ((files[::-1], "b is round 1, the model has 0"),
                           (files[1], "b is round 1, the model has 0"),
                           ([files[0]] * 2, "a is round 0, the model has 1")):
        fresh = tiny("llama")
        with pytest.raises(ValueError, match=f"{message}.*in order"):
            lora.load(fresh, order)
        assert not lora.is_attached(fresh)


@pytest.mark.parametrize("spoil, message", [
    ("base", "another base"), ("rank", "another rank, alpha or other layers"),
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


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter file .*nope; fix"):
        lora.load(tiny("llama"), tmp_path / "nope")


# ---- what is wrapped ----------------------------------------------------------------------------


@pytest.mark.parametrize("how, message", [
    (dict(rank=0), "positive"), (dict(alpha=0), "positive"), (dict(layers=(0.8, 0.2)), "fractions"),
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
def test_every_matrix_of_the_blocks_is_wrapped_or_named(name):
    model = tiny(name)
    matrices = {key: p.numel() for key, p in model.named_parameters()
                if p.ndim > 1 and any(f"layers.{k}." in key for k in (1, 2, 3))
                and "vision" not in key}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        lora.attach(model, layers=(0.2, 0.8))
    wrapped = {f"{key}.weight" for key in lora.adapters(model)}
    assert wrapped <= matrices.keys()
    left = matrices.keys() - wrapped
    assert len(told) == bool(left) == (name == "mixtral")
    if left:
        share = sum(matrices[key] for key in wrapped) / sum(matrices.values())
        words, _, names = str(told[0].message).partition(" as they are: ")
        assert f" {share:.0%} of the weights" in words and set(names.split(", ")) == left
        assert any("experts.gate_up_proj" in key for key in left)
        lora.detach(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # somebody who names targets has chosen
            lora.attach(model, targets=("q_proj",))


def test_where_there_is_no_linear_its_weights_are_named():
    config = transformers.GPT2Config(vocab_size=128, n_positions=64, n_embd=32, n_layer=5, n_head=4,
                                     bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(ValueError, match="no nn.Linear.*fix:") as told:
        lora.attach(model, blocks=model.transformer.h)
    for key in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        assert f"transformer.h.2.{key}.weight" in str(told.value)
    assert not lora.is_attached(model)


class Unlike(nn.Linear):
    """A subclass may compute something else, as 4-bit weights do."""
    def forward(self, x):
        return super().forward(x).round(decimals=1)


class Net(nn.Module):
    """No model of transformers: its blocks are sequences of layers and, the last, a bare linear."""
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([
            nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
            nn.Sequential(nn.Linear(8, 16), nn.GELU(), Unlike(16, 8)), nn.Linear(8, 8, bias=False)])

    @torch.no_grad()
    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def test_blocks_of_any_module_can_be_named_and_a_subclass_is_left(tmp_path):
    net, x = Net(), torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    original = net(x)
    with pytest.warns(UserWarning, match="as they are: blocks.1.2.weight$"):
        lora.attach(net, rank=2, alpha=4.0, layers=(0.0, 1.0), blocks=net.blocks)
    assert set(lora.adapters(net)) == {"blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.2"}
    train_a_little(net)
    lora.fold(net)
    lora.save(net, tmp_path / "a")
    student, again = net(x), Net()
    assert not torch.equal(student, original)
    lora.load(again, tmp_path / "a")
    assert torch.equal(again(x), student)
    lora.detach(net)
    assert torch.equal(net(x), original)
