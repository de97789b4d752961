"""What leaves the project is read back with the real readers: PEFT, transformers, gguf."""
import contextlib
import copy
import json
import os
import shutil
import sys
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora
from common import checks, models, runs
from conftest import ARCHITECTURES, ROOT, SMALL, command, tiny
from steer import SteeringVector
from tools import export, plot

pytestmark = pytest.mark.filterwarnings("ignore:LoRA reaches")  # of mixtral's experts


def student(model, rounds, size=0.1, folder=None, **kwargs):
    """`model` with folded rounds that changed it, each saved in `folder` as a run would."""
    lora.attach(model, rank=4, alpha=8, **kwargs)
    generator = torch.Generator().manual_seed(0)
    for r in range(rounds):
        for m in lora.adapters(model).values():
            m.A.data = 0.1 * torch.randn(m.A.shape, generator=generator)
            m.B.data = size * torch.randn(m.B.shape, generator=generator)
        lora.fold(model)
        if folder:
            lora.save(model, folder / f"round_{r}" / "adapter.safetensors")
    return model


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def tensors(file):
    with safe_open(file, framework="pt") as f:
        return {key: f.get_tensor(key) for key in f.keys()}


def read_model(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


# ---- PEFT ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_gives_the_students_logits_at_any_dose(name, ids, tmp_path):
    model = student(tiny(name), 3, layers=(0.0, 1.0))
    for dose in (1.0, -1.5, 0.0):
        export.export_peft(model, tmp_path, dose)
        theirs = PeftModel.from_pretrained(tiny(name), tmp_path).eval()
        with lora.gates(model, history=dose, live=0):
            ours = logits(model, ids)
        torch.testing.assert_close(logits(theirs, ids), ours, rtol=0, atol=1e-5)
        # the vision tower of a multimodal checkpoint has a block 0 and a q_proj too
        assert set(lora.adapters(model)) == {
            name.removeprefix("base_model.model.") for name, m in theirs.named_modules()
            if hasattr(m, "lora_A")}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = {"r": 12, "lora_alpha": 24, "bias": "none", "use_rslora": False, "use_dora": False}
    assert {key: config[key] for key in wanted} == wanted and config["base_model_name_or_path"]


def glm4_moe(settings):
    settings |= dict(moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
                     n_shared_experts=1, first_k_dense_replace=1)
    return transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**settings))


def jamba(settings):
    settings |= dict(num_experts=2, num_experts_per_tok=1, mamba_d_state=8, mamba_dt_rank=4,
                     use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1,
                     expert_layer_period=2, expert_layer_offset=1)
    return transformers.JambaForCausalLM(transformers.JambaConfig(**settings))


@pytest.mark.parametrize("make, refused", [(lambda s: tiny("llama", **s), False),
                                           (lambda s: tiny("mixtral", **s), False),
                                           (glm4_moe, True), (jamba, True)])
@pytest.mark.parametrize("dose", [1.0, 0.3])
def test_an_adapter_that_peft_reads_otherwise_is_refused(make, refused, dose, embedded, tmp_path):
    torch.manual_seed(0)
    model = make(SMALL | dict(vocab_size=49152)).eval()
    export.export_peft(student(model, 2, size=0.3, layers=(0.0, 1.0)), tmp_path, dose)
    what = pytest.raises(ValueError, match="PEFT reads this adapter otherwise.*; fix: --to merged")
    with what if refused else contextlib.nullcontext():
        export.check_peft(model, embedded[1], tmp_path, dose)


@pytest.mark.parametrize("rank, words", [
    (16, "--max-lora-rank 16 "), (36, "--max-lora-rank 64 "), (300, "--max-lora-rank 320 "),
    (600, "vLLM takes no adapter of rank 600: export with `--to merged`")])
def test_the_card_names_a_rank_that_vllm_offers(rank, words):
    card = plot.PAGES.get_template("card.md.j2").render(cfg=export.Config(Path("run")), rank=rank)
    assert words in card


# ---- a plain checkpoint -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, tied", [(name, tied) for name in ARCHITECTURES
                                        for tied in (False, True)
                                        if tied or name != "gemma3_multimodal"])
def test_a_merged_checkpoint_gives_the_students_logits_bit_for_bit(
        name, tied, dtype, ids, tmp_path):
    tiny(name, dtype, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = student(read_model(tmp_path / "base", dtype), 3)
    wanted = {}
    for dose in (1.0, 0.0, 0.5):
        export.export_merged(copy.deepcopy(model), tmp_path / str(dose), dose)
        with lora.gates(model, history=dose, live=0):
            wanted[dose] = logits(model, ids)
    assert not torch.equal(wanted[0.0], wanted[1.0])
    for dose in (1.0, 0.0):
        assert torch.equal(logits(read_model(tmp_path / str(dose), dtype), ids), wanted[dose])
    if dtype == torch.float32:
        half = logits(read_model(tmp_path / "0.5"), ids)
        torch.testing.assert_close(half, wanted[0.5], rtol=0, atol=1e-5)
    before, after = (tensors(tmp_path / f / "model.safetensors") for f in ("base", "1.0"))
    assert before.keys() == after.keys() and all(t.dtype == dtype for t in after.values())


def test_a_base_with_an_adapter_in_its_folder_is_refused(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    inside = LoraConfig(target_modules=["up_proj"], base_model_name_or_path=str(tmp_path / "base"))
    get_peft_model(read_model(tmp_path / "base"), inside).save_pretrained(tmp_path / "base")
    model = student(read_model(tmp_path / "base"), 1, targets=("q_proj",))
    with pytest.raises(ValueError, match="adapter_config.json.*not a whole checkpoint; fix: a base"):
        export.export_merged(model, tmp_path / "out")


# ---- a control vector ---------------------------------------------------------------------------


def test_a_control_vector_steers_the_same_blocks(run, ids, tmp_path, monkeypatch):
    command(monkeypatch, "export", run, "--to", "gguf", "--out", tmp_path / "v.gguf", "--round", 1)
    read = gguf.GGUFReader(tmp_path / "v.gguf")
    vector, model = SteeringVector.load(run / "round_1/vector.safetensors"), tiny("llama")
    fields = {"general.architecture": "controlvector", "controlvector.layer_count": 1}
    assert {name: read.fields[name].contents() for name in fields} == fields
    found = {t.name: torch.from_numpy(t.data.copy()) for t in read.tensors}
    assert found.keys() == {f"direction.{l}" for l in vector.layers}

    with vector.at(model, 1.5):
        ours = logits(model, ids)

    def build_cvec(direction):  # llama.cpp: cur = build_cvec(cur, il) on what leaves block il
        return lambda block, args, output: output + 1.5 * direction
    for name, direction in found.items():
        block = model.model.layers[int(name.removeprefix("direction."))]
        block.register_forward_hook(build_cvec(direction))
    assert torch.equal(logits(model, ids), ours)
    with pytest.raises(ValueError, match="cannot steer block 0"):
        export.export_gguf(SteeringVector({0: direction}), tmp_path / "zero.gguf")


# ---- a run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("to, dose", [("peft", 1.0), ("peft", 0.4), ("merged", 1.0)])
def test_a_runs_export_is_its_student_with_a_card_and_no_path(
        run, tiny_folder, to, dose, ids, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "out"
    command(monkeypatch, "export", run, "--to", to, "--out", out, "--dose", dose)
    assert f"{run} -> {out} ({to})" in capsys.readouterr().out
    assert [p.name for p in out.parent.iterdir()] == ["out"]

    model, chat = checks.load(str(tiny_folder), "cpu", "float32")
    lora.load(model, [run / f"round_{r}" / "adapter.safetensors" for r in (0, 1)])
    if to == "peft":
        theirs = PeftModel.from_pretrained(read_model(tiny_folder), out).eval()
    else:
        theirs = read_model(out)
        tok = AutoTokenizer.from_pretrained(out)
        assert tok.chat_template == chat.tok.chat_template and tok("Hi") == chat.tok("Hi")
    with lora.gates(model, history=dose, live=0):
        torch.testing.assert_close(logits(theirs, ids), logits(model, ids), rtol=0, atol=1e-5)

    card = (out / "README.md").read_text("utf-8")
    for words in ("base_model: tiny-llama", "licence and terms of use", '"lam": 2.0',
                  f"at dose {dose:g} of 1", plot.table(runs.read_events(run), "github")):
        assert words in card
    places = [str(place).encode() for place in (tmp_path.parent, run.parent, ROOT, Path.home())]
    for file in out.iterdir():
        assert not any(place in file.read_bytes() for place in places), file


def test_a_merged_multimodal_checkpoint_is_whole(run, tiny_folder, ids, tmp_path, monkeypatch):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    (base / "model.safetensors").unlink()
    tiny("gemma3_multimodal", vocab_size=49152).save_pretrained(base)
    beside = {"preprocessor_config.json": b"{}", "tokenizer.model": b"SentencePiece"}
    for name, content in beside.items():
        (base / name).write_bytes(content)
    model, _ = models.load(str(base), "cpu", "float32")
    mine, out = shutil.copytree(run, tmp_path / "run"), tmp_path / "out"
    student(model, 2, folder=mine)
    command(monkeypatch, "export", mine, "--to", "merged", "--out", out, "--model", base)

    merged = read_model(out)
    assert type(merged) is type(model)
    assert {name: (out / name).read_bytes() for name in beside} == beside
    torch.testing.assert_close(logits(merged, ids), logits(model, ids), rtol=0, atol=1e-5)
    towers = [{key: value for key, value in tensors(folder / "model.safetensors").items()
               if "vision" in key} for folder in (base, out)]
    assert towers[0] and towers[0].keys() == towers[1].keys()
    assert all(torch.equal(value, towers[1][key]) for key, value in towers[0].items())


@pytest.mark.parametrize("out", ["link", "/dev/shm", ".", "file", "empty"])
def test_a_taken_place_is_refused_before_the_work(out, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.symlink("elsewhere", "link")
    Path("file").touch()
    Path("empty").mkdir()
    with pytest.raises(SystemExit):  # the model would be looked for next
        command(monkeypatch, "export", run, "--out", out, "--model", "nowhere")
    assert capsys.readouterr().err == (
        f"error: --out {out} exists; fix: another name, or delete it\n")


def test_without_peft_one_line_says_where_it_is(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit):
        command(monkeypatch, "export", run, "--out", tmp_path / "out", "--model", "nowhere")
    assert "pip install -r requirements-dev.txt" in (err := capsys.readouterr().err)
    assert err.count("\n") == 1


def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(json, "dumps", full)
    with pytest.raises(SystemExit):
        command(monkeypatch, "export", run, "--to", "peft", "--out", tmp_path / "out")
    assert "No space left on device" in capsys.readouterr().err and not list(tmp_path.iterdir())
