"""What leaves the project is read back with the real readers: PEFT, transformers, gguf."""
import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools import export
import lora
from common import models
from tools import plot
from common import runs
from chats import tokenizer
from conftest import ARCHITECTURES, ROOT, SMALL, command, tiny
from steer import SteeringVector
from test_lora import logits, train_a_little

pytestmark = pytest.mark.filterwarnings("ignore:LoRA reaches")  # of mixtral's experts


def student(model, rounds, folder=None, **how):
    """`model` with folded rounds that changed it, each saved in `folder` as a run would."""
    lora.attach(model, rank=4, alpha=8, **how)
    for r in range(rounds):
        train_a_little(model, r)
        lora.fold(model)
        if folder:
            lora.save(model, folder / f"round_{r}" / "adapter.safetensors")
    return model


def tensors(file):
    with safe_open(file, framework="pt") as f:
        return {key: f.get_tensor(key) for key in f.keys()}


def read_model(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


# ---- PEFT ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 8])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_gives_the_students_logits_at_any_dose(name, rounds, ids, tmp_path):
    model = student(tiny(name), rounds)
    original = logits(tiny(name), ids)
    for dose in (1.0, 0.5, -1.5, 0.0):
        folder = tmp_path / str(dose)
        export.export_peft(model, folder, dose)
        with lora.gates(model, history=dose):
            ours = logits(model, ids)
        theirs = logits(PeftModel.from_pretrained(tiny(name), folder).eval(), ids)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
        if dose == 0:
            assert torch.equal(theirs, original)
        else:
            assert (theirs - original).abs().max() > 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_wraps_the_modules_we_wrapped_and_no_other(name, tmp_path):
    # the vision tower of a multimodal checkpoint has a block 0 and a q_proj too
    model = student(tiny(name), 2, layers=(0.0, 1.0))
    export.export_peft(model, tmp_path)
    theirs = PeftModel.from_pretrained(tiny(name), tmp_path)
    wrapped = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules()
               if hasattr(m, "lora_A")}
    assert wrapped == set(lora.adapters(model))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_adapter_says_what_vllm_and_llama_cpp_read(name, tmp_path):
    export.export_peft(student(tiny(name), 3), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = {"r": 12, "lora_alpha": 24, "bias": "none", "use_rslora": False, "use_dora": False,
              "peft_type": "LORA"}
    assert {key: config[key] for key in wanted} == wanted and config["base_model_name_or_path"]

    # both find a module by its tensor's name between this prefix and this suffix
    shapes = {key: value.shape for key, value in tiny(name).state_dict().items()}
    pairs = tensors(tmp_path / "adapter_model.safetensors")
    for key, A in pairs.items():
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            B = pairs[key.replace("lora_A", "lora_B")]
            assert module in config["target_modules"] and len(A) == 12
            assert (B @ A).shape == shapes[f"{module}.weight"]
    assert len(pairs) == 2 * len(config["target_modules"])


@pytest.mark.parametrize("dose", [1.0, 0.01, 0.0])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_an_adapter_that_peft_reads_as_ours_passes_the_exports_own_check(name, dose, tmp_path):
    tok = tokenizer("chatml")
    model = student(tiny(name, vocab_size=len(tok)), 2)
    export.export_peft(model, tmp_path, dose)
    export.check_peft(model, tok, tmp_path, dose)


def test_an_adapter_that_peft_reads_otherwise_is_refused(tmp_path):
    tok = tokenizer("chatml")
    settings = SMALL | dict(vocab_size=len(tok), moe_intermediate_size=16, n_routed_experts=4,
                            num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1)
    model = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**settings)).eval()
    export.export_peft(student(model, 2), tmp_path)
    with pytest.raises(ValueError, match="PEFT loads .* as another one, .*; fix: --to merged"):
        export.check_peft(model, tok, tmp_path)


def test_a_student_without_a_round_is_not_exported(tmp_path):
    model = tiny("llama")
    lora.attach(model)
    with pytest.raises(ValueError, match="no round is folded yet; fix: fold"):
        export.export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- a plain checkpoint -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, tied", [
    (name, tied) for name in ARCHITECTURES for tied in (False, True)
    if tied or name != "gemma3_multimodal"])
def test_a_merged_checkpoint_gives_the_merged_students_logits_bit_for_bit(
        name, tied, dtype, ids, tmp_path):
    tiny(name, dtype, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = student(read_model(tmp_path / "base", dtype), 3)
    export.export_merged(model, tmp_path / "merged")
    export.export_merged(model, tmp_path / "none", dose=0.0)
    with lora.merged(model):
        ours = logits(model, ids)
    with lora.gates(model, history=0, live=0):
        original = logits(model, ids)
    assert not torch.equal(ours, original)
    assert torch.equal(logits(read_model(tmp_path / "merged", dtype), ids), ours)
    assert torch.equal(logits(read_model(tmp_path / "none", dtype), ids), original)

    before, after = (tensors(tmp_path / f / "model.safetensors") for f in ("base", "merged"))
    assert before.keys() == after.keys() and all(t.dtype == dtype for t in after.values())
    if dtype == torch.float32:
        torch.testing.assert_close(ours, logits(model, ids), rtol=0, atol=1e-5)
        export.export_merged(model, tmp_path / "half", dose=0.5)
        with lora.gates(model, history=0.5):
            half = logits(model, ids)
        torch.testing.assert_close(logits(read_model(tmp_path / "half"), ids), half,
                                   rtol=0, atol=1e-5)


# ---- a control vector ---------------------------------------------------------------------------


def test_a_control_vector_reads_back_equal_and_steers_the_same_blocks(tmp_path, ids):
    model = tiny("llama")
    layers = {l: torch.randn(32, generator=torch.Generator().manual_seed(l)) for l in (1, 3)}
    vector = SteeringVector(layers, {"model_type": "llama"})
    export.export_gguf(vector, tmp_path / "v.gguf")
    read = gguf.GGUFReader(tmp_path / "v.gguf")
    said = {"general.architecture": "controlvector", "controlvector.model_hint": "llama",
            "controlvector.layer_count": 2}
    assert {name: read.fields[name].contents() for name in said} == said
    found = {t.name: torch.from_numpy(t.data.copy()) for t in read.tensors}
    assert found.keys() == {"direction.1", "direction.3"}
    assert all(torch.equal(found[f"direction.{l}"], v) for l, v in layers.items())

    with vector.at(model, 1.5):
        ours = logits(model, ids)

    def build_cvec(direction):  # llama.cpp: cur = build_cvec(cur, il) on what leaves block il
        return lambda block, args, output: output + 1.5 * direction
    hooks = [model.model.layers[int(name.removeprefix("direction."))]
             .register_forward_hook(build_cvec(direction)) for name, direction in found.items()]
    assert torch.equal(logits(model, ids), ours)
    for hook in hooks:
        hook.remove()
    assert not torch.equal(logits(model, ids), ours)

    with pytest.raises(ValueError, match="cannot steer block 0"):
        export.export_gguf(SteeringVector({0: torch.ones(32)}), tmp_path / "zero.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["v.gguf"]


def test_a_runs_vector_leaves_as_a_control_vector(run, tmp_path, monkeypatch, capsys):
    for r in (0, 1):
        file = tmp_path / f"{r}.gguf"
        command(monkeypatch, "export", run, "--to", "gguf", "--out", file, "--round", r)
        assert str(file) in capsys.readouterr().out
        read = gguf.GGUFReader(file)
        vector = SteeringVector.load(run / f"round_{r}" / "vector.safetensors")
        wanted = {f"direction.{l}": v.tolist() for l, v in vector.layers.items()}
        assert {t.name: t.data.tolist() for t in read.tensors} == wanted
        assert read.fields["controlvector.model_hint"].contents() == "llama"


# ---- a run --------------------------------------------------------------------------------------


def student_of(run, base, ids, dose=1.0):
    """Logits of the run's student, from its rounds' own files."""
    model, _ = models.load(str(base), "cpu", "float32")
    lora.load(model, [run / f"round_{r}" / "adapter.safetensors" for r in (0, 1)])
    with lora.gates(model, history=dose, live=0):
        return logits(model, ids)


def ids_of_a_chat(folder):
    chat = [{"role": "system", "content": "You care."}, {"role": "user", "content": "Hi."}]
    tok = AutoTokenizer.from_pretrained(folder)
    return tok.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("to", ["peft", "merged"])
@pytest.mark.parametrize("dose", [1.0, 0.4])
def test_a_runs_export_is_the_student_with_a_card_and_names_no_path(
        run, tiny_folder, to, dose, ids, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "out"
    flags = ["--dose", dose] if dose != 1 else []
    command(monkeypatch, "export", run, "--to", to, "--out", out, *flags)
    assert f"2 rounds on tiny-llama -> {out} ({to})" in capsys.readouterr().out
    assert [p.name for p in out.parent.iterdir()] == ["out"]

    if to == "peft":
        theirs = PeftModel.from_pretrained(read_model(tiny_folder), out).eval()
    else:
        theirs = read_model(out)
        assert ids_of_a_chat(out) == ids_of_a_chat(tiny_folder)
        models.load(str(out), "cpu", "float32")  # it would refuse a checkpoint that is not whole
    ours = student_of(run, tiny_folder, ids, dose)
    torch.testing.assert_close(logits(theirs, ids), ours, rtol=0, atol=1e-5)

    card = (out / "README.md").read_text()
    for words in ("base_model: tiny-llama", "licence and terms of use", '"lam": 2.0',
                  f"at dose {dose:g} of 1", plot.table(runs.read_events(run), "github")):
        assert words in card
    places = [str(place).encode() for place in (tmp_path.parent, run.parent, ROOT, Path.home())]
    for file in out.rglob("*"):
        if file.is_file():
            assert not any(place in file.read_bytes() for place in places), file


def test_a_multimodal_students_merged_checkpoint_keeps_its_vision_tower_and_processor(
        run, tiny_folder, ids, tmp_path, monkeypatch):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    (base / "model.safetensors").unlink()
    tiny("gemma3_multimodal", vocab_size=49152).save_pretrained(base)
    (base / "preprocessor_config.json").write_text("{}")
    model, _ = models.load(str(base), "cpu", "float32")
    mine, out = shutil.copytree(run, tmp_path / "run"), tmp_path / "out"
    student(model, 2, folder=mine)
    command(monkeypatch, "export", mine, "--to", "merged", "--out", out, "--model", base)

    merged = read_model(out)
    assert type(merged) is type(model) and (out / "preprocessor_config.json").exists()
    torch.testing.assert_close(logits(merged, ids), logits(model, ids), rtol=0, atol=1e-5)
    towers = [{key: value for key, value in tensors(folder / "model.safetensors").items()
               if "vision" in key} for folder in (base, out)]
    assert towers[0] and towers[0].keys() == towers[1].keys()
    assert all(torch.equal(value, towers[1][key]) for key, value in towers[0].items())


def test_a_round_that_is_not_finished_is_left_out(run, tmp_path, monkeypatch, capsys):
    killed = shutil.copytree(run, tmp_path / "run")
    (killed / "round_1").rename(killed / "round_1.tmp")  # before the rename that finishes it
    command(monkeypatch, "export", killed, "--to", "peft", "--out", tmp_path / "out")
    assert "1 rounds on tiny-llama" in capsys.readouterr().out
    found = tensors(tmp_path / "out" / "adapter_model.safetensors")
    for key, value in tensors(run / "round_0" / "adapter.safetensors").items():
        module, _, part = key.rpartition(".")
        assert torch.equal(found[f"base_model.model.{module}.lora_{part}.weight"], value)
    assert "healed r1" not in (tmp_path / "out" / "README.md").read_text()


def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(json, "dumps", full)
    with pytest.raises(SystemExit):
        command(monkeypatch, "export", run, "--to", "peft", "--out", tmp_path / "out")
    assert "No space left on device" in capsys.readouterr().err and not list(tmp_path.iterdir())
