"""tools/check.py on tiny random models of real architectures: right, or refused and why."""
import math

import pytest
import torch
from transformers import AttentionInterface

import steer
from common import checks, models, sampling
from conftest import tiny
from tools import check

TABLE = check.architectures()
QUICKLY = ["cohere", "granite", "recurrent_gemma", "qwen3_next", "lfm2", "jamba", "mamba",
           "gemma3n", "gptj", "gpt2", "afmoe", "mistral3", "gemma4", "phi3_longrope",
           "diffusion_gemma", "paligemma", "qwen2_5_omni"]  # wrong, or a traceback, before
CASES = [n if n in QUICKLY else pytest.param(n, marks=pytest.mark.slow) for n in TABLE]
IDS = list(range(3, 128))


def vector(model, size):
    d = model.config.get_text_config().hidden_size
    g = torch.Generator().manual_seed(0)
    return steer.SteeringVector({l: size * torch.randn(d, generator=g) for l in (1, 2)})


def made(name):
    model = check.tiny(TABLE[name])
    models.find_blocks(model, name)
    return model


def fails(model, rows=None):
    """Which checks fail, of all there are."""
    rows = rows or checks.token_rows(IDS, 32)
    return checks.failed(checks.run(model, rows, check.CHECKS), model.dtype)


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
