import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as t

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
from common import models  # noqa: E402
from common import runs  # noqa: E402
from common import texts  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: whole runs and processes; leave out with -m 'not slow'")


SMALL = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=5,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)
SLIDING = dict(sliding_window=16, layer_types=[*["sliding_attention", "full_attention"] * 2,
                                               "sliding_attention"])
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
              image_size=28, patch_size=14)
MAKE = {"llama": (t.LlamaConfig, t.LlamaForCausalLM, {}),
        "qwen3": (t.Qwen3Config, t.Qwen3ForCausalLM, {}),
        "gemma3": (t.Gemma3TextConfig, t.Gemma3ForCausalLM, SLIDING),
        "phi3": (t.Phi3Config, t.Phi3ForCausalLM, {}),
        "gpt_neox": (t.GPTNeoXConfig, t.GPTNeoXForCausalLM, dict(num_key_value_heads=None, head_dim=None)),
        "olmo2": (t.Olmo2Config, t.Olmo2ForCausalLM, {}),
        "mixtral": (t.MixtralConfig, t.MixtralForCausalLM,
                    dict(num_local_experts=4, num_experts_per_tok=2))}
ARCHITECTURES = ["llama", "qwen3", "gemma3", "gemma3_multimodal", "phi3", "gpt_neox", "olmo2", "mixtral"]


def tiny(name: str, dtype=torch.float32, **changes):
    """A random model of a real architecture, seconds to make and never trained."""
    torch.manual_seed(0)
    if name == "gemma3_multimodal":
        config = t.Gemma3Config(text_config=SMALL | changes | SLIDING, vision_config=VISION)
        model = t.Gemma3ForConditionalGeneration(config)
    else:
        config_class, model_class, extra = MAKE[name]
        settings = SMALL | changes | extra
        model = model_class(config_class(**{k: v for k, v in settings.items() if v is not None}))
    model.generation_config.eos_token_id = 2
    for key, bias in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(bias, std=0.1)  # zeros by default: nobody would miss one
    return model.to(dtype).eval().requires_grad_(False)


class Ids:
    """Stands in for a tokenizer where a test gives token ids itself."""
    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    @staticmethod
    def apply_chat_template(*_, **__):
        return ""  # no mark of its own ends a turn


@pytest.fixture(params=ARCHITECTURES[:4])
def tiny_model(request):
    return tiny(request.param)


@pytest.fixture(params=ARCHITECTURES)
def any_model(request):
    return tiny(request.param)


@pytest.fixture(scope="session")
def embedded():
    """(model, tokenizer) in float32. Tests leave it as they found it."""
    return models.load("smollm2", dtype="float32")


@pytest.fixture
def ids():
    return torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(0))


# ---- whole runs on a tiny model -----------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def few_texts(tmp_path_factory):
    """Two held-out prompts and one plain text: speaking is most of a tiny run's time."""
    folder = shutil.copytree(texts.DATA, tmp_path_factory.mktemp("few") / "data")
    for name, key, n in (("prompts.json", "heldout", 2), ("prompts_love.json", "heldout", 2),
                         ("plain.json", "texts", 1)):
        content = json.loads((folder / name).read_text())
        content[key] = content[key][:n]
        (folder / name).write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "DATA", folder)
        yield


@pytest.fixture
def all_texts(monkeypatch):
    """The data as it is shipped."""
    monkeypatch.setattr(texts, "DATA", ROOT / "data")


def python(*args, **how):
    """`python args` in a process of its own, from the repository's root."""
    how = dict(cwd=ROOT, capture_output=True, text=True) | how
    return subprocess.run([sys.executable, *map(str, args)], **how)


def command(monkeypatch, module, *argv):
    """`python module.py argv`, or `python -m tools.module argv`, within this process."""
    [file] = [f for f in (ROOT / f"{module}.py", ROOT / f"tools/{module}.py") if f.exists()]
    monkeypatch.setattr(sys, "argv", [file.name, *map(str, argv)])
    runpy.run_path(str(file), run_name="__main__")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random Llama with the embedded model's tokenizer: the loop's every stage in about two seconds."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tiny("llama", vocab_size=49152, max_position_embeddings=512).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(models.embedded_folder() / name, folder)
    return folder


def flags(folder):
    """Flags under which a run on the tiny model takes about two seconds."""
    return ["--model", str(folder), *(
        "--rounds 1 --n-keep 6 --max-new-tokens 12 --n-vignettes 14 --epochs 2 --batch-size 2 "
        "--n-contexts 4 --max-perplexity 1e9 --min-diversity 0 --max-repetition 1 --dtype float32 "
        "--no-baselines").split()]


@pytest.fixture(scope="session")
def run(tiny_folder, tmp_path_factory):
    """A finished run of two rounds on the tiny model. Tests leave it as they found it."""
    import heal_loop
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "COHERENCE_FLOOR", 0.0)  # a random model has no coherence to lose
        patch.setattr(sys, "argv", ["heal_loop.py", *flags(tiny_folder), "--rounds", "2",
                                    "--out", str(folder)])
        runs.cli(heal_loop.Config, heal_loop.main)
    return folder
