"""tools/check.py on tiny random models of real architectures: right, or refused and why."""
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface

import steer
from common import checks, models, sampling
from conftest import ROOT, tiny
from tools import check

TABLE = check.architectures()
QUICKLY = ["cohere", "granite", "recurrent_gemma", "qwen3_next", "lfm2", "jamba", "mamba", "gemma3n",
           "gptj", "gpt2", "afmoe", "mistral3", "gemma4", "phi3_longrope", "diffusion_gemma",
           "paligemma", "qwen2_5_omni"]  # wrong, or a traceback, before
CASES = [n if n in QUICKLY else pytest.param(n, marks=pytest.mark.slow) for n in TABLE]
IDS = list(range(3, 128))


def vector(model, size):
    d = model.config.get_text_config().hidden_size
    return steer.SteeringVector({l: size * torch.randn(d, generator=torch.Generator().manual_seed(l))
                                 for l in (1, 2)})


def made(name):
    model = check.tiny(TABLE[name])
    models.find_blocks(model, name)
    return model


def fails(model, rows=None):
    """Which checks fail, of all there are."""
    rows = rows or checks.token_rows(IDS, 32)
    return checks.failed(checks.run(model, rows, {**checks.QUICK, **check.SLOW}), model.dtype)


@pytest.mark.parametrize("name", CASES)
def test_an_architecture_is_right_or_refused_as_the_table_says(name):
    found, errors = check.result(name, TABLE[name])
    assert found.startswith(TABLE[name].get("expect", "right")), (found, errors)
    assert errors or "expect" in TABLE[name]


def test_the_table_has_ninety_and_gemma_4_as_it_is_shaped():
    assert len(TABLE) >= 90
    config = TABLE["gemma4"]["config"]
    assert config["global_head_dim"] != config["head_dim"]
    assert check.switch_length(made("phi3_longrope")) == 40


# ---- each check can fail -------------------------------------------------------------------------


def test_a_head_read_by_name_fails(monkeypatch):
    monkeypatch.setattr(checks, "logits", lambda model, h: model.get_output_embeddings()(h))
    assert "head" in fails(made("cohere"))


def test_a_state_without_its_own_cache_fails(monkeypatch):
    monkeypatch.setattr(sampling, "special_layers", lambda model: [])
    assert {"sampled", "stream"} <= set(fails(made("qwen3_next")))


def unmasked(rows, device):
    ids, mask, positions = steer.left_pad(rows, device)
    return ids, torch.ones_like(mask), positions


def test_padding_that_is_attended_to_fails(monkeypatch):
    monkeypatch.setattr(sampling, "left_pad", unmasked)
    assert {"sampled", "scored", "gradient"} <= set(fails(made("llama")))


def test_an_attention_that_drops_its_mask_fails(monkeypatch):
    def blind(module, query, key, value, attention_mask, **kwargs):
        return sdpa(module, query, key, value, None, **kwargs | {"is_causal": False})
    sdpa = AttentionInterface._global_mapping["sdpa"]
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", blind)
    assert {"attention", "sampled"} <= set(fails(made("llama")))


def test_a_weight_written_to_fails_the_gates(monkeypatch):
    def and_spoil(model, **kwargs):
        attach(model, **kwargs)
        next(iter(check.lora.adapters(model).values())).base.weight.data += 1e-3
    attach = check.lora.attach
    monkeypatch.setattr(check.lora, "attach", and_spoil)
    assert "gates" in fails(made("llama"))


def test_an_export_without_its_scale_fails(monkeypatch):
    def unscaled(model, folder, **kwargs):
        export(model, folder, dose=0.5)
    export = check.export.export_peft
    monkeypatch.setattr(check.export, "export_peft", unscaled)
    assert fails(made("llama")) == ["peft"]


def test_nan_counts_as_wrong():
    nan = torch.tensor([0.0, math.nan])
    for dtype in (torch.float32, torch.bfloat16):
        assert checks.off(tiny("llama", dtype), nan, torch.zeros(2)) == math.inf


# ---- long rope: other factors beyond a length ----------------------------------------------------


def long_rope_rows():
    long, short = checks.token_rows(IDS, 60, apart=9), checks.token_rows(IDS, 30)
    return [long[0], short[0], long[1], short[1]]


def test_short_rows_beside_long_ones_are_scored_as_alone():
    model, rows = made("phi3_longrope"), long_rope_rows()
    prompts, completions = [row[:-4] for row in rows], [row[-4:] for row in rows]
    together = sampling.score(model, prompts, completions)
    for p, c, logp in zip(prompts, completions, together):
        torch.testing.assert_close(logp, sampling.score(model, [p], [c])[0], rtol=0, atol=1e-4)


def test_short_rows_beside_long_ones_are_extracted_as_alone():
    model, rows = made("phi3_longrope"), long_rope_rows()
    together = steer.mean_residual(model, rows, [2])[2]
    alone = torch.stack([steer.mean_residual(model, [row], [2])[2] for row in rows]).mean(0)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_short_rows_beside_long_ones_are_calibrated_as_alone():
    model, rows = made("phi3_longrope"), long_rope_rows()
    v, doses = vector(model, size=2.0), []
    for prompts in (rows[1:2] * 40, rows[1:2] * 40 + rows[:1]):  # the long one is in the upper 5 %
        doses.append(steer.calibrate(model, v, prompts, nats=0.2, tokens=4))
    assert doses[0] == pytest.approx(doses[1], rel=0.05)


# ---- the gate ------------------------------------------------------------------------------------


def test_no_command_loads_a_model_past_the_gate():
    files = [f for f in ROOT.rglob("*.py") if f.relative_to(ROOT).parts[0] not in ("tests", ".venv")]
    past = [f for f in files if "= models.load(" in f.read_text("utf-8").split('"""', 2)[2]]
    assert [f.name for f in past] == ["checks.py"]


def spoilt(folder, to, spoil, rows=49152):
    """A copy of a model folder whose tensors went through `spoil`, its vocabulary padded to `rows`."""
    shutil.copytree(folder, to)
    model = tiny("llama", vocab_size=rows, max_position_embeddings=512)
    model.save_pretrained(to)
    tensors = load_file(to / "model.safetensors")
    spoil(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return str(to)


HEAD, TABLE_OF_WORDS = "lm_head.weight", "model.embed_tokens.weight"
DOWN = "model.layers.3.mlp.down_proj.weight"


@pytest.mark.parametrize("key, where, value, dtype", [
    (DOWN, (0, 0), math.nan, "float32"), (DOWN, (0, 0), math.inf, "bfloat16"),
    (DOWN, (0, 0), 1e6, "float16"), (HEAD, slice(49100, None), math.nan, "float32"),
    (HEAD, slice(49155, None), -math.inf, "float32"), (TABLE_OF_WORDS, 20, math.nan, "float32")])
def test_a_weight_that_is_not_finite_is_refused_by_name(
        tiny_folder, tmp_path, key, where, value, dtype):
    def spoil(tensors):
        tensors[key][where] = value
    folder = spoilt(tiny_folder, tmp_path / "model", spoil, rows=49160)
    with pytest.raises(ValueError, match=rf"not finite in torch.{dtype}: {key}; fix: "):
        checks.load(folder, "cpu", dtype)


def test_a_padded_row_that_no_text_has_is_named_only(tiny_folder, tmp_path, capfd):
    def spoil(tensors):
        tensors[TABLE_OF_WORDS][49155] = math.nan
    checks.load(spoilt(tiny_folder, tmp_path / "model", spoil, rows=49160), "cpu", "float32")
    assert f"{TABLE_OF_WORDS} is not finite at ids [49155]" in capfd.readouterr().err


def test_an_overflow_in_float16_is_refused_and_float32_is_not(tiny_folder, tmp_path):
    def spoil(tensors):
        tensors[TABLE_OF_WORDS] *= 3e3
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1e5
        tensors["model.layers.1.mlp.down_proj.weight"] *= 1e4
    folder = spoilt(tiny_folder, tmp_path / "model", spoil)
    with pytest.raises(ValueError, match="not finite in torch.float16; fix: --dtype float32"):
        checks.load(folder, "cpu", "float16")
    checks.load(folder, "cpu", "float32")


def test_a_model_that_fails_a_quick_check_is_refused_by_every_command(tiny_folder, monkeypatch):
    monkeypatch.setattr(sampling, "left_pad", unmasked)
    with pytest.raises(ValueError, match=r"fails the check 'sampled': .* fix: another model"):
        checks.load(str(tiny_folder), "cpu", "float32")
