"""check.py on tiny random models of real architectures: right, or refused and why."""
import math
import shutil

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tools import check
from common import models
from common import sampling
from conftest import Ids, tiny
from steer import SteeringVector
from test_steer import prompts, vector

TABLE = check.architectures()
QUICKLY = ["cohere", "granite", "recurrent_gemma", "qwen3_next", "lfm2", "jamba", "mamba",
           "gemma3n", "gptj", "gpt2", "afmoe", "mistral3"]  # wrong, or a traceback, before


def made(name):
    model = check.tiny(TABLE[name])
    models.prepare(model, name)
    return model


CASES = [n if n in QUICKLY else pytest.param(n, marks=pytest.mark.slow) for n in TABLE]


@pytest.mark.parametrize("name", CASES)
def test_an_architecture_is_right_or_refused_as_the_table_says(name):
    said, errors = check.verdict(name, TABLE[name])
    assert said.startswith(TABLE[name].get("expect", "right")), (said, errors)
    assert errors or "expect" in TABLE[name]


# ---- each check can fail ------------------------------------------------------------------------


def test_a_head_read_by_name_is_seen_by_its_check(monkeypatch):
    model = made("cohere")
    monkeypatch.setattr(check, "logits", lambda model, h: model.get_output_embeddings()(h))
    assert "head" in check.failed(check.run_checks(model, ["head"]), model.dtype)


def test_a_state_without_its_own_cache_is_seen(monkeypatch):
    model = made("qwen3_next")
    monkeypatch.setattr(sampling, "special_layers", lambda model: [])
    with pytest.raises(ValueError, match=r"'x' fails the check 'sampled': .*; fix: "):
        check.quick(model, "x")


def test_padding_that_is_seen_is_found(monkeypatch):
    model = made("llama")

    def unmasked(rows, device):
        ids, mask, positions = left_pad(rows, device)
        return ids, torch.ones_like(mask), positions
    left_pad = sampling.left_pad
    monkeypatch.setattr(sampling, "left_pad", unmasked)
    wrong = check.failed(check.run_checks(model), model.dtype)
    assert {"sampled", "scored", "gradient"} <= set(wrong)


def test_an_attention_that_drops_a_mask_is_not_kept(monkeypatch):
    from transformers import AttentionInterface

    def blind(module, query, key, value, attention_mask, **how):
        return models.grouped_attention(module, query, key, value, None, **how)
    monkeypatch.setitem(AttentionInterface._global_mapping, "grouped", blind)
    model = tiny("llama")
    models.prepare(model, "x")
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("grouped")
    assert "attention" in check.failed(check.run_checks(model, ["attention"]), model.dtype)


def test_a_weight_written_to_is_seen_by_the_gates(monkeypatch):
    model, attach = made("llama"), check.lora.attach

    def and_spoil(model, **how):
        attach(model, **how)
        next(iter(check.lora.adapters(model).values())).base.weight.data += 1e-3
    monkeypatch.setattr(check.lora, "attach", and_spoil)
    assert check.failed(check.run_checks(model, ["gates"]), model.dtype) == ["gates"]


def test_nan_counts_as_wrong():
    nan = torch.tensor([0.0, math.nan])
    for dtype in (torch.float32, torch.bfloat16):
        assert check.off(tiny("llama", dtype), nan, torch.zeros(2)) == math.inf


# ---- what sampling asks of the machine ----------------------------------------------------------


class Transfers(TorchFunctionMode):
    """Counts what would wait for a device: values read into Python, tensors moved to the CPU."""
    WAITS = {"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__",
             "nonzero", "__contains__"}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.WAITS:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def counted(model, v, new, **how):
    with Transfers() as transfers:
        sampling.sample(model, Ids, prompts(4), v, [1.0] * 4, max_new_tokens=new, **how)
    return transfers.seen


def test_sampling_waits_once_per_token_and_hooks_blocks_once_per_batch(monkeypatch):
    model, entered, at = tiny("llama"), [], SteeringVector.at
    models.prepare(model, "llama")  # with sdpa transformers' masks ask one question more
    model.generation_config.eos_token_id = 127  # which greedy sampling here never draws

    def counting(self, *args, **how):
        entered.append(1)
        return at(self, *args, **how)
    monkeypatch.setattr(SteeringVector, "at", counting)
    v = vector(model)
    short, long = (counted(model, v, new, temperature=0) for new in (4, 14))
    assert len(long) - len(short) == 10, set(long)  # `tolist`, once for each of ten more tokens
    assert len(entered) == 2


def test_layers_that_accelerate_moves_give_the_same_tokens_and_scores(tmp_path):
    """Blocks kept on disk and brought in for each pass: what device_map does, without a GPU."""
    from accelerate import dispatch_model
    model, ps = tiny("llama"), prompts(4)
    v = vector(model, size=2.0)

    def read():
        tokens = sampling.sample(model, Ids, ps, v, [0, 1, 2, 3], max_new_tokens=8, seed=1)
        return tokens, torch.cat(sampling.score(model, ps, [[5, 6], [7], [8, 9], [3]]))
    before = read()
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
             "lm_head": "cpu"}
    where |= {f"model.layers.{l}": ("disk", "cpu")[l % 2] for l in range(5)}
    dispatch_model(model, where, main_device="cpu", offload_dir=tmp_path)
    assert model.get_decoder().layers[0].mlp.up_proj.weight.is_meta
    after = read()
    assert before[0] == after[0]
    torch.testing.assert_close(before[1], after[1], rtol=0, atol=0)


def test_a_multimodal_checkpoint_is_loaded_for_its_text_side(tiny_folder, tmp_path):
    """AutoModelForCausalLM does not know Mistral 3."""
    for file in tiny_folder.iterdir():
        if file.name.startswith(("tokenizer", "chat")):
            shutil.copy(file, tmp_path)
    entry = TABLE["mistral3"]
    wide = entry | {"config": entry["config"] | {"vocab_size": 49152}}  # the tokenizer's
    check.tiny(wide).save_pretrained(tmp_path)
    model, tok = models.load(str(tmp_path), "cpu", "float32")
    check.quick(model, "mistral3")
    assert type(model).__name__ == "Mistral3ForConditionalGeneration"


@pytest.mark.parametrize("name, blocks", [("gptj", "h"), ("bloom", "h"), ("mpt", "blocks")])
def test_blocks_of_another_name_are_found_and_saved_under_their_own(name, blocks):
    model = made(name)
    assert model.get_decoder().layers is getattr(model.transformer, blocks)
    assert not any("layers" in key for key in model.state_dict())
