"""The adapter's algebra, on a random model of every architecture: base, gates, fold, files."""
import contextlib
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

HOW = st.fixed_dictionaries(dict(rank=st.integers(1, 4), alpha=st.sampled_from([1.0, 8.0]),
                                 layers=st.sampled_from([(0.0, 1.0), (0.2, 0.8), (0.4, 0.6)])))
DOSE = st.sampled_from([0.0, 1.0]) | st.floats(-3, 3)
IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


def of_every_architecture(max_examples=10, **drawn):
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


def train(model):
    """One AdamW step on whatever asks for a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(input_ids=IDS).logits.float().log_softmax(-1)[..., 5].mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


# ---- base and gates -----------------------------------------------------------------------------


@of_every_architecture(
    how=HOW, dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    steps=st.lists(st.sampled_from(["train", "train merged", "fold"]), max_size=6))
def test_base_is_recovered_bit_for_bit_whatever_was_trained_and_folded(name, how, dtype, steps):
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
    assert after.keys() == tensors.keys()
    assert all(torch.equal(v, after[k]) for k, v in tensors.items())


def test_base_is_recovered_bit_for_bit_on_the_embedded_model(embedded):
    model, tok = embedded
    ids = tok("A nurse hides the doctor's mistake.", return_tensors="pt").input_ids
    before = logits(model, ids)
    lora.attach(model, rank=4, alpha=8)
    try:
        for r in range(8):
            train_a_little(model, r)
            lora.fold(model)
        assert not torch.equal(before, logits(model, ids))
        with lora.gates(model, history=0, live=0):
            assert torch.equal(before, logits(model, ids))
    finally:
        lora.detach(model)
    assert torch.equal(before, logits(model, ids))


@of_every_architecture(how=HOW, rounds=st.integers(0, 3), trained=st.booleans(), live=DOSE,
                       history=DOSE | st.lists(DOSE, min_size=3, max_size=3), merged=st.booleans())
def test_gates_are_linear_in_the_dose_one_for_all_rounds_or_one_per_round(
        name, how, rounds, trained, live, history, merged):
    model = tiny(name)
    lora.attach(model, **how)
    modules, factors = lora.adapters(model).values(), []
    for r in range(rounds):
        train_a_little(model, r)
        factors.append([m.B.data @ m.A.data for m in modules])
        lora.fold(model)
    if trained:
        train_a_little(model, rounds)
    if isinstance(history, list):
        history = per_round = history[:rounds]
    else:
        per_round = [history] * rounds
    merging = lora.merged(model) if merged else contextlib.nullcontext()
    with merging, lora.gates(model, history, live):
        for k, m in enumerate(modules):
            W = m.base.weight
            x = torch.randn(3, W.shape[1], generator=torch.Generator().manual_seed(k))
            plain = x @ W.T + (0 if m.bias is None else m.bias)
            delta = sum(dose * f[k] for dose, f in zip(per_round, factors, strict=True))
            delta = how["alpha"] / how["rank"] * (delta + live * trained * m.B @ m.A)
            torch.testing.assert_close(m(x), plain + x @ delta.T, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(m.weight, W + delta, rtol=1e-4, atol=1e-5)
    assert all((m.c_history, m.c_live) == (1, 1) for m in modules)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_list_of_equal_gates_is_that_gate_bit_for_bit_also_inside_merged(any_model, ids, dtype):
    model = any_model.to(dtype)
    original = logits(model, ids)
    lora.attach(model, rank=4, alpha=8)
    for r in range(3):
        train_a_little(model, r)
        lora.fold(model)
    for merging in (contextlib.nullcontext(), lora.merged(model)):
        with merging:
            for gate in (0, 1, 0.5):
                with lora.gates(model, history=gate):
                    one = logits(model, ids)
                with lora.gates(model, history=[gate] * 3):
                    assert torch.equal(logits(model, ids), one)
                assert torch.equal(one, original) == (gate == 0)
            with lora.gates(model, history=[0, 1, 0]):
                some = logits(model, ids)
            assert not torch.equal(some, original) and not torch.equal(some, one)


def test_a_list_of_gates_of_another_length_is_refused_and_changes_none():
    model = tiny("llama")
    lora.attach(model)
    lora.fold(model)
    for wrong in ([], [1, 0]):
        with pytest.raises(ValueError, match=f"{len(wrong)} history gates for 1 folded round"):
            with lora.gates(model, history=wrong):
                pass
    assert all(m.c_history == 1 for m in lora.adapters(model).values())


def test_only_the_live_factors_train(any_model, ids):
    lora.attach(any_model, rank=4, alpha=8)
    train_a_little(any_model)
    lora.fold(any_model)
    train_a_little(any_model, 1)
    any_model(input_ids=ids).logits.sum().backward()
    live = {id(p) for p in lora.live_parameters(any_model)}
    assert all((p.grad is not None) == (id(p) in live) for p in any_model.parameters())


# ---- merged -------------------------------------------------------------------------------------


def test_merged_does_nothing_where_the_caller_has_no_room_for_it():
    model = tiny("llama")
    lora.attach(model, rank=4, alpha=8)
    train_a_little(model, 0)
    lora.fold(model)
    student = logits(model, IDS)
    model.lora_merge = False
    with lora.merged(model):
        assert all(m.merged_weight is None for m in lora.adapters(model).values())
        assert torch.equal(logits(model, IDS), student)


@of_every_architecture(rounds=st.integers(1, 3), nested=st.booleans(), where=st.integers(0, 99),
                       when=st.sampled_from(["entering", "within", "folding"]))
def test_merged_is_the_student_and_ends_with_its_context_wherever_an_exception_strikes(
        name, rounds, nested, where, when):
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
                gates = [float(where), *range(rounds - 1)] if where % 2 else where
                with struck.register_forward_hook(strike), lora.gates(model, gates, where):
                    logits(model, IDS)
        struck.history_B = whole
        assert all(m.merged_weight is weight for m, weight in zip(modules, outer))
        assert all((m.c_history, m.c_live) == (1, 1) for m in modules)
        assert torch.equal(logits(model, IDS), seen)
    assert all(m.merged_weight is None for m in modules)
    assert torch.equal(logits(model, IDS), student)
    assert all(torch.equal(v, tensors[k]) for k, v in model.state_dict().items())


# ---- files: a round is one ----------------------------------------------------------------------


@of_every_architecture(max_examples=5, how=HOW, rounds=st.lists(
    st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=3))
def test_fold_keeps_the_student_and_is_associative_with_save_and_load(
        name, how, rounds, tmp_path_factory):
    # float64: that no sum's order decides; experts are multiplied in at most float32
    dtype = torch.float32 if name == "mixtral" else torch.float64
    stays, travels, files = tiny(name, dtype), tiny(name, dtype), []
    folder = tmp_path_factory.getbasetemp()
    for model in (stays, travels):
        lora.attach(model, **how)
    for r, (trained, through_the_files) in enumerate(rounds):
        for model in (stays, travels):
            train_a_little(model, r, size=0.05 * trained)
        before = logits(stays, IDS)
        for model in (stays, travels):
            lora.fold(model)
        torch.testing.assert_close(logits(stays, IDS), before, rtol=1e-5, atol=1e-5)
        files.append(folder / f"round_{r}.safetensors")
        lora.save(travels, files[-1])
        if through_the_files:
            travels = tiny(name, dtype)
            lora.load(travels, files)
    one_by_one = tiny(name, dtype)
    for file in files:
        lora.load(one_by_one, file)
    for model in (travels, one_by_one):
        assert lora.n_rounds(model) == len(rounds) and model.lora_config == stays.lora_config
        same = zip(lora.adapters(stays).values(), lora.adapters(model).values(), strict=True)
        for a, b in same:
            assert torch.equal(a.history_A, b.history_A) and torch.equal(a.history_B, b.history_B)
            assert not b.B.any()
        assert torch.equal(logits(stays, IDS), logits(model, IDS))


def test_a_file_holds_the_newest_round_alone_and_files_are_loaded_in_their_order(tmp_path):
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
        assert not hasattr(fresh, "lora_config")


@pytest.mark.parametrize("spoil, message", [
    ("base", "another base"), ("rank", "'rank': 4.*'rank': 2"), ("nan", "not finite"),
    ("cut", "damaged"), ("foreign", "not written by lora.save"),
    ("lacks a tensor", "layers.2.*A"), ("another shape", "layers.2.*A")])
@pytest.mark.parametrize("place", ["alone", "after a good one"])
def test_a_refused_file_leaves_the_model_as_it_was(spoil, message, place, tmp_path):
    source, model = tiny("llama"), tiny("llama")
    good, file = tmp_path / "good.safetensors", tmp_path / "a.safetensors"
    lora.attach(source, rank=4, alpha=8)
    if place == "after a good one":
        train_a_little(source, 1)
        lora.fold(source)
        lora.save(source, good)
    train_a_little(source)
    name, first = next((name, m) for name, m in lora.adapters(source).items() if "layers.2" in name)
    if spoil == "base":
        model.get_submodule(name).weight.data += 1
    if spoil == "rank":
        lora.attach(model, rank=2, alpha=8)
    if spoil == "nan":
        first.B.data[0, 0] = float("nan")
    lora.fold(source)
    if spoil == "another shape":
        first.history_A = first.history_A[:, 1:]
    lora.save(source, file)
    if spoil == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    if spoil == "foreign":
        save_file({"weight": torch.zeros(2)}, file)
    if spoil == "lacks a tensor":
        with safe_open(file, framework="pt") as f:
            kept = {key: f.get_tensor(key) for key in f.keys() if key != f"{name}.A"}
            save_file(kept, file, f.metadata())
    before, modules = logits(model, IDS), list(model.modules())
    with pytest.raises(ValueError, match=message):
        lora.load(model, file if place == "alone" else [good, file])
    assert torch.equal(logits(model, IDS), before) and list(model.modules()) == modules
    assert hasattr(model, "lora_config") == (spoil == "rank")
    if spoil == "rank":
        assert lora.n_rounds(model) == 0


# ---- what is wrapped ----------------------------------------------------------------------------


@pytest.mark.parametrize("how, message", [
    (dict(rank=0), "positive"), (dict(layers=(0.8, 0.2)), "fractions"),
    (dict(targets=("nope",)), "no nn.Linear")])
def test_attach_names_what_is_wrong(how, message):
    with pytest.raises(ValueError, match=message):
        lora.attach(tiny("llama"), **how)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_matrix_of_the_chosen_blocks_is_wrapped_or_named_with_the_share_that_is_reached(name):
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


def test_where_there_is_no_linear_its_conv1d_weights_are_named():
    config = transformers.GPT2Config(vocab_size=128, n_positions=64, n_embd=32, n_layer=5, n_head=4,
                                     bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(ValueError) as told:
        lora.attach(model, blocks=model.transformer.h)
    assert "no nn.Linear" in str(told.value) and "fix:" in str(told.value)
    for key in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        assert f"transformer.h.2.{key}.weight" in str(told.value)
    assert not hasattr(model, "lora_config")


class Unlike(nn.Linear):
    """A subclass may compute something else, as 4-bit weights do."""
    def forward(self, x):
        return super().forward(x).round(decimals=1)


class Net(nn.Module):
    """No model of transformers: its blocks are sequences of layers and, the last, a bare linear."""
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.second = nn.Sequential(nn.Linear(8, 16), nn.GELU(), Unlike(16, 8))
        self.third = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        for block in (self.first, self.second, self.third):
            x = x + block(x)
        return self.head(x)


def a_net():
    net, x = Net(), torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    wrapped = {"first.0", "first.2", "second.0", "third"}
    return net, [net.first, net.second, net.third], wrapped, lambda: net(x).detach()


def a_gptj():
    torch.manual_seed(0)
    config = transformers.GPTJConfig(vocab_size=128, n_positions=64, n_embd=32, n_layer=3, n_head=4,
                                     rotary_dim=4, bos_token_id=1, eos_token_id=2)
    model = transformers.GPTJForCausalLM(config).eval()
    parts = [f"attn.{part}_proj" for part in ("q", "k", "v", "out")] + ["mlp.fc_in", "mlp.fc_out"]
    wrapped = {f"transformer.h.{k}.{part}" for k in range(3) for part in parts}
    return model, model.transformer.h, wrapped, lambda: logits(model, IDS)


@pytest.mark.parametrize("make", [a_net, a_gptj])
def test_a_model_without_decoder_layers_is_told_its_blocks_and_then_does_all_that_others_do(
        make, tmp_path):
    model, blocks, wrapped, student = make()
    original, everything = student(), dict(rank=2, alpha=4.0, layers=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"no get_decoder\(\).layers; fix: .*blocks="):
        lora.attach(model, **everything)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        lora.attach(model, **everything, blocks=blocks)
    assert set(lora.adapters(model)) == wrapped
    named = [str(w.message).partition(" as they are: ")[2] for w in told]
    assert named == (["second.2.weight"] if make is a_net else [])
    assert torch.equal(student(), original)
    train_a_little(model)
    lora.fold(model)
    lora.save(model, tmp_path / "a")
    trained = student()
    assert not torch.equal(trained, original)
    with lora.gates(model, history=0):
        assert torch.equal(student(), original)
    with lora.merged(model):
        torch.testing.assert_close(student(), trained)
    lora.detach(model)
    assert torch.equal(student(), original)

    again, its_blocks, _, its_student = make()
    lora.attach(again, **everything, blocks=its_blocks)
    lora.load(again, tmp_path / "a")
    assert torch.equal(its_student(), trained)
