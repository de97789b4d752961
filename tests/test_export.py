"""What leaves the project is read back with the real readers: PEFT, transformers, gguf."""
import json
import runpy
import shutil
import sys
from pathlib import Path

import gguf
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import heal_loop
import lora
import models
import plot
from conftest import ARCHITECTURES, ROOT, tiny
from steer import SteeringVector
from test_lora import logits, train_a_little
from test_run import flags, tiny_folder  # noqa: F401, a fixture


def command(monkeypatch, module, *argv):
    """`python module.py argv` within this process."""
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *map(str, argv)])
    runpy.run_path(str(ROOT / f"{module}.py"), run_name="__main__")


def student(model, rounds, **how):
    """`model` with `rounds` folded rounds that changed it."""
    lora.attach(model, rank=4, alpha=8, **how)
    for r in range(rounds):
        train_a_little(model, r)
        lora.fold(model)
    return model


def tensors(file):
    with safe_open(file, framework="pt") as f:
        return {key: f.get_tensor(key) for key in f.keys()}


@pytest.mark.parametrize("rounds", [1, 8])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_gives_the_students_logits_at_any_dose(name, rounds, ids, tmp_path):
    model = student(tiny(name), rounds)
    original = logits(tiny(name), ids)
    for dose in (1.0, 0.5, -1.5, 0.0):
        folder = tmp_path / str(dose)
        lora.export_peft(model, folder, dose)
        with lora.gates(model, history=dose):
            ours = logits(model, ids)
        theirs = logits(PeftModel.from_pretrained(tiny(name), folder).eval(), ids)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
        assert torch.equal(theirs, original) if dose == 0 else (theirs - original).abs().max() > 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_wraps_the_modules_we_wrapped_and_no_other(name, tmp_path):
    model = student(tiny(name), 2, layers=(0.0, 1.0))  # the vision tower of a multimodal checkpoint has a block 0 and a q_proj too
    lora.export_peft(model, tmp_path)
    theirs = PeftModel.from_pretrained(tiny(name), tmp_path)
    assert {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")} == set(lora.adapters(model))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_adapter_says_what_vllm_and_llama_cpp_read(name, tmp_path):
    model = student(tiny(name), 3)
    lora.export_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"], config["use_rslora"], config["use_dora"]) == (12, 24, "none", False, False)
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"]
    shapes = {k: v.shape for k, v in tiny(name).state_dict().items()}
    pairs = tensors(tmp_path / "adapter_model.safetensors")
    for key, A in pairs.items():  # both find a module by its tensor's name between this prefix and this suffix
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            B = pairs[key.replace("lora_A", "lora_B")]
            assert module in config["target_modules"] and (B @ A).shape == shapes[f"{module}.weight"] and len(A) == 12
    assert len(pairs) == 2 * len(config["target_modules"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, tied", [(name, tied) for name in ARCHITECTURES for tied in (False, True) if tied or name != "gemma3_multimodal"])
def test_a_merged_checkpoint_gives_the_merged_students_logits_bit_for_bit(name, tied, dtype, ids, tmp_path):
    tiny(name, dtype, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = student(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype), 3)
    lora.export_merged(model, tmp_path / "merged")
    lora.export_merged(model, tmp_path / "none", dose=0.0)
    with lora.merged(model):
        ours = logits(model, ids)
    with lora.gates(model, history=0, live=0):
        original = logits(model, ids)
    plain, none = (AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=dtype) for folder in ("merged", "none"))
    assert torch.equal(logits(plain, ids), ours) and torch.equal(logits(none, ids), original) and not torch.equal(ours, original)
    files = [tensors(tmp_path / folder / "model.safetensors") for folder in ("base", "merged")]
    assert files[0].keys() == files[1].keys() and all(t.dtype == dtype for t in files[1].values())
    if dtype == torch.float32:
        torch.testing.assert_close(ours, logits(model, ids), rtol=0, atol=1e-5)
        lora.export_merged(model, tmp_path / "half", dose=0.5)
        with lora.gates(model, history=0.5):
            torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "half"), ids), logits(model, ids), rtol=0, atol=1e-5)


def test_a_control_vector_reads_back_equal_and_steers_the_same_blocks(tmp_path, ids):
    model = tiny("llama")
    v = SteeringVector({l: torch.randn(32, generator=torch.Generator().manual_seed(l)) for l in (1, 3)}, {"model_type": "llama"})
    v.export_gguf(tmp_path / "v.gguf")
    read = gguf.GGUFReader(tmp_path / "v.gguf")
    field = {name: read.fields[name].contents() for name in ("general.architecture", "controlvector.model_hint", "controlvector.layer_count")}
    assert list(field.values()) == ["controlvector", "llama", 2]
    found = {t.name: torch.from_numpy(t.data.copy()) for t in read.tensors}
    assert found.keys() == {"direction.1", "direction.3"} and all(torch.equal(found[f"direction.{l}"], v.layers[l]) for l in (1, 3))
    with v.at(model, 1.5):
        ours = logits(model, ids)
    hooks = [model.model.layers[int(name.removeprefix("direction."))].register_forward_hook(lambda m, a, out, d=d: out + 1.5 * d)
             for name, d in found.items()]  # llama.cpp: cur = build_cvec(cur, il) on what leaves block il
    assert torch.equal(logits(model, ids), ours)
    for hook in hooks:
        hook.remove()
    assert not torch.equal(logits(model, ids), ours)
    with pytest.raises(ValueError, match="cannot steer block 0"):
        SteeringVector({0: torch.ones(32)}).export_gguf(tmp_path / "zero.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["v.gguf"]


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):  # noqa: F811
    """A finished run of two rounds on the tiny model."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heal_loop, "COHERENCE_FLOOR", 0.0)  # a random model has no coherence to lose
        patch.setattr(sys, "argv", ["heal_loop.py", *flags(tiny_folder), "--rounds", "2", "--no-baselines", "--out", str(folder)])
        models.cli(heal_loop.Config, heal_loop.main)
    return folder


def our_logits(base, adapter, ids, dose=1.0):
    model, _ = models.load(str(base), "cpu", "float32")
    lora.load(model, adapter)
    with lora.gates(model, history=dose, live=0):
        return logits(model, ids)


@pytest.mark.parametrize("to, dose", [("peft", 1.0), ("peft", 0.4), ("merged", 1.0), ("merged", 0.4), ("folder", 1.0)])
def test_a_runs_export_is_the_student_with_a_card_and_names_no_path(run, tiny_folder, to, dose, ids, tmp_path, monkeypatch, capsys):  # noqa: F811
    out = tmp_path / "deep" / "out"
    command(monkeypatch, "lora", "export", run, "--to", to, "--out", out, *(["--dose", dose] if dose != 1 else []))
    assert f"2 rounds on tiny-llama -> {out} ({to})" in capsys.readouterr().out
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    ours = our_logits(tiny_folder, run / "adapter.safetensors", ids, dose)
    if to == "peft":
        theirs = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), out).eval(), ids)
    elif to == "merged":
        theirs = logits(AutoModelForCausalLM.from_pretrained(out), ids)
        chat = [{"role": "system", "content": "You care."}, {"role": "user", "content": "Hi."}]
        before, after = (AutoTokenizer.from_pretrained(f).apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for f in (tiny_folder, out))
        assert before == after
        assert models.load(str(out), "cpu", "float32")
    else:
        theirs = our_logits(tiny_folder, out / "adapter.safetensors", ids)
        assert (out / "adapter.safetensors").read_bytes() == (run / "adapter.safetensors").read_bytes()
        for r in (0, 1):
            assert SteeringVector.load(out / f"vector_r{r}.safetensors").cosine(SteeringVector.load(run / f"vector_r{r}.safetensors")) == pytest.approx(1)
            assert (out / f"kept_r{r}.jsonl").read_bytes() == (run / f"kept_r{r}.jsonl").read_bytes()
        assert json.loads((out / "config.json").read_text())["model"] == "tiny-llama"
        plot.main(plot.Config(out))
        assert (out / "report.html").exists()
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    card = (out / "README.md").read_text()
    assert "base_model: tiny-llama" in card and "licence and terms of use" in card and '"lam": 2.0' in card
    assert plot.table(heal_loop.distil.read_jsonl(run / "events.jsonl"), "github") in card
    for file in out.rglob("*"):
        if file.is_file() and file.name != "report.html":
            assert not any(str(place).encode() in file.read_bytes() for place in (tmp_path.parent, run.parent, ROOT, Path.home())), file


def test_a_multimodal_students_merged_checkpoint_keeps_its_vision_tower_and_processor(run, tiny_folder, ids, tmp_path, monkeypatch):  # noqa: F811
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    (base / "model.safetensors").unlink()
    tiny("gemma3_multimodal", vocab_size=49152).save_pretrained(base)
    (base / "preprocessor_config.json").write_text("{}")
    model, _ = models.load(str(base), "cpu", "float32")
    mine = shutil.copytree(run, tmp_path / "run")
    lora.save(student(model, 2), mine / "adapter.safetensors")
    command(monkeypatch, "lora", "export", mine, "--to", "merged", "--out", tmp_path / "out", "--model", base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(merged) is type(model) and (tmp_path / "out" / "preprocessor_config.json").exists()
    torch.testing.assert_close(logits(merged, ids), logits(model, ids), rtol=0, atol=1e-5)
    towers = [{k: v for k, v in tensors(f / "model.safetensors").items() if "vision" in k} for f in (base, tmp_path / "out")]
    assert towers[0] and all(torch.equal(v, towers[1][k]) for k, v in towers[0].items())


def test_a_round_that_no_event_records_is_left_out(run, tiny_folder, ids, tmp_path, monkeypatch):  # noqa: F811
    killed = shutil.copytree(run, tmp_path / "run")  # after the second round's adapter was written, before its event was
    (killed / "events.jsonl").write_text("".join(line + "\n" for line in (run / "events.jsonl").read_text().splitlines()
                                                 if (json.loads(line)["stage"], json.loads(line)["round"]) not in (("heal", 1), ("healed", 1))))
    command(monkeypatch, "lora", "export", killed, "--to", "folder", "--out", tmp_path / "out")
    model, _ = models.load(str(tiny_folder), "cpu", "float32")
    lora.load(model, tmp_path / "out" / "adapter.safetensors")
    assert lora.n_rounds(model) == 1


def test_a_runs_vector_leaves_as_a_control_vector(run, tmp_path, monkeypatch, capsys):
    for r in (0, 1):
        command(monkeypatch, "steer", "export", run, "--to", "gguf", "--out", tmp_path / f"{r}.gguf", "--round", r)
        read = gguf.GGUFReader(tmp_path / f"{r}.gguf")
        v = SteeringVector.load(run / f"vector_r{r}.safetensors")
        assert {t.name: t.data.tolist() for t in read.tensors} == {f"direction.{l}": t.tolist() for l, t in v.layers.items()}
        assert read.fields["controlvector.model_hint"].contents() == "llama"


def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(json, "dumps", full)
    with pytest.raises(SystemExit):
        command(monkeypatch, "lora", "export", run, "--to", "peft", "--out", tmp_path / "out")
    assert "No space left on device" in capsys.readouterr().err and not list(tmp_path.iterdir())
