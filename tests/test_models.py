"""Loading: whose code runs, what a folder may hold, and machines without a home."""
import copy
import errno
import json
import math
import os
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoTokenizer

from common import checks, models, sampling
from common.prompts import Chat
from conftest import ROOT, Ids, python, tiny
from test_check import IDS, TABLE, made, unmasked, vector
from tools import check


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def edit(folder, name, **fields):
    content = json.loads((folder / name).read_text("utf-8"))
    (folder / name).write_text(json.dumps(content | fields), "utf-8")


EVIL = "open({!r}, 'w').close()\n"
TRIES = """
import sys
from transformers import AutoConfig
from common import checks
for folder in sys.argv[1:-1]:
    try:
        checks.load(folder, "cpu", "float32")
        print("loaded")
    except ValueError as e:
        print(e)
AutoConfig.from_pretrained(sys.argv[-1])  # asks: so the folder is as hostile as it should be
"""


def test_a_model_folders_own_code_never_runs(folder, tmp_path):
    """Its config, model, tokenizer and generation, under a type of its own and under llama's."""
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M",
            "AutoTokenizer": ["evil.T", None]}
    folders = []
    for model_type in ("llama", "evil"):
        hostile = shutil.copytree(folder, tmp_path / model_type)
        ran = tmp_path / f"{model_type}.ran"
        for file in (hostile / "evil.py", hostile / "custom_generate" / "generate.py"):
            file.parent.mkdir(exist_ok=True)
            file.write_text(EVIL.format(str(ran)))
        edit(hostile, "config.json", auto_map=code, model_type=model_type)
        edit(hostile, "tokenizer_config.json", auto_map=code, tokenizer_class="T")
        folders.append(hostile)
    yes = subprocess.Popen(["yes"], stdout=subprocess.PIPE)
    try:
        done = python("-c", TRIES, *folders, folders[1], stdin=yes.stdout)
    finally:
        yes.kill()
    native, own = done.stdout.splitlines()[:2]
    assert "its own" in own and "fix: " in own and "none but transformers'" in own
    assert not (tmp_path / "llama.ran").exists(), native
    assert (tmp_path / "evil.ran").exists(), "the control: transformers alone runs it"
    assert done.stdout.count("Do you wish to run") == 1


def test_a_kernel_that_a_config_names_is_not_fetched(folder):
    edit(folder, "config.json", attn_implementation="someone/kernel",
         _attn_implementation="someone/kernel", experts_implementation="someone/kernel")
    assert checks.load(str(folder), "cpu", "float32")[0].config._attn_implementation == "sdpa"


def test_an_adapter_beside_the_weights_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"adapter \(adapter_config.json\) beside .* fix: merge"):
        models.load(str(folder), "cpu", "float32")


def with_token(folder, token, **special):
    tok = AutoTokenizer.from_pretrained(folder)
    tok.add_tokens([AddedToken(token, special=True)])
    if special:
        tok.add_special_tokens({name: token for name in special})
    tok.save_pretrained(folder)
    return tok


def test_an_added_token_beyond_the_embedding_loads_where_no_prompt_has_it(folder):
    with_token(folder, "<pad>", pad_token=True)
    model, chat = checks.load(str(folder), "cpu", "float32")
    assert max(chat.tok.get_vocab().values()) == 49152 == len(model.get_input_embeddings().weight)
    assert chat.tok.pad_token_id < 49152


def test_an_added_token_of_the_template_beyond_the_embedding_is_refused_by_name(folder):
    tok = with_token(folder, "<|new|>")
    (folder / "chat_template.jinja").write_text("<|new|>" + tok.chat_template)
    with pytest.raises(ValueError, match=r"uses '<\|new\|>', id 49152, .* 49152 tokens; fix: "):
        checks.load(str(folder), "cpu", "float32")


def test_a_tokenizer_of_a_larger_model_is_refused(folder):
    tiny("llama", vocab_size=40000, max_position_embeddings=512).save_pretrained(folder)
    with pytest.raises(ValueError, match="has 49152 tokens, the model 40000; fix: "):
        models.load(str(folder), "cpu", "float32")


def test_without_a_home_the_cache_is_in_the_temporary_folder(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987654)  # an id without a name
    assert models.cache_dir().parent.name == "cache-987654"


@pytest.mark.parametrize("error", [NotImplementedError(), OSError(errno.ENOLCK, "no locks"),
                                   OSError(524, "no locks")])
def test_a_cache_whose_locks_fail_is_used(monkeypatch, tmp_path, error):
    def no_lock(path):
        raise error
    monkeypatch.setattr(models, "FileLock", no_lock)
    monkeypatch.setattr(models, "convert_gguf", lambda gguf, folder, template: folder.mkdir())
    models.convert_once(tmp_path / "x.gguf", tmp_path / "cache" / "model", "it")
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["model"]


@pytest.mark.slow
def test_the_first_minute_prints_one_line(tmp_path):
    done = python("-c", "from common import models; models.find_source('smollm2')",
                  env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)})
    assert (done.stdout, len(done.stderr.splitlines())) == ("", 1), done.stderr
    [made] = tmp_path.glob("*/checkpoint/*/model.safetensors")
    ours = models.embedded_folder() / "model.safetensors"
    assert made.read_bytes() == ours.read_bytes()


def test_a_multimodal_checkpoint_is_loaded_for_its_text_side(folder):
    """AutoModelForCausalLM does not know Mistral 3."""
    entry = TABLE["mistral3"]
    wide = entry | {"config": entry["config"] | {"vocab_size": 49152}}  # the tokenizer's
    check.tiny(wide).save_pretrained(folder)
    model, _ = checks.load(str(folder), "cpu", "float32")
    assert type(model).__name__ == "Mistral3ForConditionalGeneration"


@pytest.mark.parametrize("name, blocks", [("gptj", "h"), ("bloom", "h"), ("mpt", "blocks")])
def test_blocks_of_another_name_are_found_and_saved_under_their_own(name, blocks):
    for model in (made(name), copy.deepcopy(made(name))):
        assert model.get_decoder().layers is getattr(model.transformer, blocks)
        assert not any("layers" in key for key in model.state_dict())


def test_layers_that_accelerate_moves_give_the_same_tokens_and_scores(tmp_path):
    """Blocks kept on disk and brought in for each pass: what device_map does, without a GPU."""
    from accelerate import dispatch_model
    model, ps = tiny("llama"), [*checks.token_rows(IDS, 30), IDS[:9]]
    v = vector(model, size=2.0)

    def read():
        tokens = sampling.sample(model, Chat(Ids), ps, v, [0, 1, 2, 3], max_new_tokens=8, seed=1)
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


def test_no_command_loads_a_model_past_the_gate():
    folders = [ROOT, *(ROOT / name for name in ("common", "tools", "studies", "docs"))]
    files = [file for folder in folders for file in folder.glob("*.py")]
    past = [f for f in files if "= models.load(" in f.read_text("utf-8").split('"""', 2)[2]]
    assert [f.name for f in past] == ["checks.py"]


def spoilt(folder, to, spoil, rows=49152):
    """A copy of a model folder, its vocabulary padded to `rows`, its tensors then spoilt."""
    shutil.copytree(folder, to)
    model = tiny("llama", vocab_size=rows, max_position_embeddings=512)
    model.save_pretrained(to)
    tensors = load_file(to / "model.safetensors")
    spoil(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return str(to)


HEAD, WORDS = "lm_head.weight", "model.embed_tokens.weight"
DOWN = "model.layers.3.mlp.down_proj.weight"


@pytest.mark.parametrize("key, where, value, dtype", [
    (DOWN, (0, 0), math.nan, "float32"), (DOWN, (0, 0), math.inf, "bfloat16"),
    (DOWN, (0, 0), 1e6, "float16"), (HEAD, slice(49100, None), math.nan, "float32"),
    (HEAD, slice(49155, None), -math.inf, "float32"), (WORDS, 20, math.nan, "float32")])
def test_a_weight_that_is_not_finite_is_refused_by_name(
        tiny_folder, tmp_path, key, where, value, dtype):
    def spoil(tensors):
        tensors[key][where] = value
    folder = spoilt(tiny_folder, tmp_path / "model", spoil, rows=49160)
    with pytest.raises(ValueError, match=rf"not finite in torch.{dtype}: {key}; fix: "):
        checks.load(folder, "cpu", dtype)


def test_a_padded_row_that_no_text_has_is_named_only(tiny_folder, tmp_path, capfd):
    def spoil(tensors):
        tensors[WORDS][49155] = math.nan
    checks.load(spoilt(tiny_folder, tmp_path / "model", spoil, rows=49160), "cpu", "float32")
    assert f"{WORDS} is not finite at ids [49155]" in capfd.readouterr().err


def test_an_overflow_in_float16_is_refused_and_float32_is_not(tiny_folder, tmp_path):
    def spoil(tensors):
        tensors[WORDS] *= 3e3
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
