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
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import lora
from common import checks, models, runs
from conftest import ARCHITECTURES, ROOT, SMALL, command, tiny
from steer import SteeringVector
from tools import export, plot


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
def logits(model, ids, dose=None):
    with contextlib.nullcontext() if dose is None else lora.gates(model, history=dose, live=0):
        return model(input_ids=ids).logits


def read_model(folder, dtype=torch.float32):
    return t.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_gives_the_students_logits_at_any_dose(name, ids, tmp_path):
    model = student(tiny(name), 3, layers=(0.0, 1.0))
    for dose in (1.0, -1.5, 0.0):
        export.export_peft(model, tmp_path, dose)
        theirs = PeftModel.from_pretrained(tiny(name), tmp_path).eval()
        torch.testing.assert_close(logits(theirs, ids), logits(model, ids, dose), rtol=0, atol=1e-5)
        # the vision tower of a multimodal checkpoint has a block 0 and a q_proj too
        assert set(lora.adapters(model)) == {
            name.removeprefix("base_model.model.") for name, m in theirs.named_modules()
            if hasattr(m, "lora_A")}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = {"r": 12, "lora_alpha": 24, "bias": "none", "use_rslora": False, "use_dora": False}
    assert {key: config[key] for key in wanted} == wanted and config["base_model_name_or_path"]


@pytest.mark.parametrize("name, settings, refused", [
    ("llama", {}, False), ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2), False),
    ("glm4_moe", dict(moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
                      n_shared_experts=1, first_k_dense_replace=1), True),
    ("jamba", dict(num_experts=2, num_experts_per_tok=1, mamba_d_state=8, mamba_dt_rank=4,
                   attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False), True)])
@pytest.mark.parametrize("dose", [1.0, 0.3])
def test_an_adapter_that_peft_reads_otherwise_is_refused(
        name, settings, refused, dose, embedded, tmp_path):
    torch.manual_seed(0)
    config = t.AutoConfig.for_model(name, **SMALL | settings | dict(vocab_size=49152))
    model = t.AutoModelForCausalLM.from_config(config).eval()
    export.export_peft(student(model, 2, size=0.3, layers=(0.0, 1.0)), tmp_path, dose)
    error = pytest.raises(ValueError, match="PEFT reads this adapter otherwise.*; fix: --to merged")
    with error if refused else contextlib.nullcontext():
        export.check_peft(model, embedded[1], tmp_path, dose)


@pytest.mark.parametrize("rank, words", [(16, "-rank 16 "), (36, "-rank 64 "), (300, "-rank 320 "),
                                         (600, "takes no adapter of rank 600: export with `--to")])
def test_the_card_names_a_rank_that_vllm_offers(rank, words):
    card = plot.PAGES.get_template("card.md.j2")
    assert words in card.render(cfg=export.Config(Path("run")), rank=rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_merged_checkpoint_gives_the_students_logits(name, tied, dtype, ids, tmp_path):
    base = tiny(name, dtype, tie_word_embeddings=tied or name == "gemma3_multimodal")
    base.save_pretrained(tmp_path / "base")
    model = student(read_model(tmp_path / "base", dtype), 3)
    for dose in (1.0, 0.0, 0.5):
        export.export_merged(copy.deepcopy(model), tmp_path / str(dose), dose)
        theirs = logits(read_model(tmp_path / str(dose), dtype), ids)
        ours = logits(model, ids, dose)
        if dose != 0.5:
            assert torch.equal(theirs, ours), "bit for bit"
        elif dtype == torch.float32:
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "1.0"))
    assert before.keys() == after.keys() and {x.dtype for x in after.values()} == {dtype}


def test_a_base_with_an_adapter_in_its_folder_is_refused(tmp_path):
    base = str(tmp_path / "base")
    tiny("llama").save_pretrained(base)
    inside = LoraConfig(target_modules=["up_proj"], base_model_name_or_path=base)
    get_peft_model(read_model(base), inside).save_pretrained(base)
    model = student(read_model(base), 1, targets=("q_proj",))
    with pytest.raises(ValueError, match="adapter_config.json.*not a whole checkpoint; fix"):
        export.export_merged(model, tmp_path / "out")


def test_a_control_vector_steers_the_same_blocks(run, ids, tmp_path, monkeypatch):
    command(monkeypatch, "export", run, "--to", "gguf", "--out", tmp_path / "v.gguf", "--round", 1)
    read = gguf.GGUFReader(tmp_path / "v.gguf")
    vector, model = SteeringVector.load(run / "round_1/vector.safetensors"), tiny("llama")
    assert read.fields["general.architecture"].contents() == "controlvector"
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in read.tensors}
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


@pytest.mark.parametrize("to, dose", [("peft", 1.0), ("peft", 0.4), ("merged", 1.0)])
def test_a_runs_export_is_its_student_with_a_card_and_no_path(
        run, tiny_folder, to, dose, ids, tmp_path, monkeypatch):
    out = tmp_path / "deep" / "out"
    command(monkeypatch, "export", run, "--to", to, "--out", out, "--dose", dose)
    model, chat = checks.load(str(tiny_folder), "cpu", "float32")
    lora.load(model, [run / f"round_{r}" / "adapter.safetensors" for r in (0, 1)])
    theirs = read_model(out if to == "merged" else tiny_folder)
    if to == "peft":
        theirs = PeftModel.from_pretrained(theirs, out).eval()
    torch.testing.assert_close(logits(theirs, ids), logits(model, ids, dose), rtol=0, atol=1e-5)

    card = (out / "README.md").read_text("utf-8")
    for words in ("base_model: tiny-llama", "licence and terms of use", '"lam": 2.0',
                  f"at dose {dose:g} of 1", plot.table(runs.read_events(run), "github")):
        assert words in card
    places = [str(place).encode() for place in (tmp_path.parent, run.parent, ROOT, Path.home())]
    for file in out.iterdir():
        assert not any(place in file.read_bytes() for place in places), file


def test_a_merged_multimodal_checkpoint_is_whole(run, tiny_folder, ids, tmp_path, monkeypatch):
    base, out = shutil.copytree(tiny_folder, tmp_path / "base"), tmp_path / "out"
    tiny("gemma3_multimodal", vocab_size=49152).save_pretrained(base)
    beside = {"preprocessor_config.json": b"{}", "tokenizer.model": b"SentencePiece"}
    for name, content in beside.items():
        (base / name).write_bytes(content)
    model, _ = models.load(str(base), "cpu", "float32")
    mine = shutil.copytree(run, tmp_path / "run")
    student(model, 2, folder=mine)
    command(monkeypatch, "export", mine, "--to", "merged", "--out", out, "--model", base)
    merged = read_model(out)
    torch.testing.assert_close(logits(merged, ids), logits(model, ids), rtol=0, atol=1e-5)
    found = {name: (out / name).read_bytes() for name in beside}
    assert found == beside and type(merged) is type(model)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    tower = [key for key in before if "vision" in key]
    assert tower and all(torch.equal(before[key], after[key]) for key in tower)


@pytest.mark.parametrize("out, why", [*((out, f"--out {out} exists; fix: another name")
                                        for out in ("link", "/dev/shm", ".", "empty")),
                                      ("new", "nowhere"), ("no_peft", "-r requirements-dev.txt")])
def test_a_mistake_is_told_in_one_line_and_leaves_nothing(
        out, why, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.symlink("elsewhere", "link")
    Path("empty").mkdir()
    if out == "no_peft":
        monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit):
        command(monkeypatch, "export", run, "--out", out, "--model", "nowhere/at/all")
    assert why in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert sorted(os.listdir()) == ["empty", "link"]
