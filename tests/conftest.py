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
from common import checks, models, texts  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: whole runs, processes; leave out with -m 'not slow'")


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
        "gpt_neox": (t.GPTNeoXConfig, t.GPTNeoXForCausalLM, dict(num_key_value_heads=4)),
        "olmo2": (t.Olmo2Config, t.Olmo2ForCausalLM, {}),
        "mixtral": (t.MixtralConfig, t.MixtralForCausalLM,
                    dict(num_local_experts=4, num_experts_per_tok=2))}
ARCHITECTURES = [*list(MAKE)[:3], "gemma3_multimodal", *list(MAKE)[3:]]


def tiny(name: str, dtype=torch.float32, **changes):
    """A random model of a real architecture, seconds to make and never trained."""
    torch.manual_seed(0)
    if name == "gemma3_multimodal":
        config = t.Gemma3Config(text_config=SMALL | changes | SLIDING, vision_config=VISION)
        model = t.Gemma3ForConditionalGeneration(config)
    else:
        config_class, model_class, extra = MAKE[name]
        model = model_class(config_class(**SMALL | changes | extra))
    model.generation_config.eos_token_id = 2
    for key, bias in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(bias, std=0.1)  # zeros by default: nobody would miss one
    return model.to(dtype).eval().requires_grad_(False)


class Ids:
    """Stands in for a tokenizer where a test gives token ids itself: no text has any."""
    pad_token_id, bos_token_id, eos_token_id, added_tokens_decoder = 0, 1, 2, {}

    def __init__(self, *_, **__):
        self.input_ids = []

    @staticmethod
    def get_chat_template():
        return ""

    @staticmethod
    def apply_chat_template(turns, **_):
        return " ".join(turn["content"] for turn in turns)


@pytest.fixture(params=ARCHITECTURES[:4])
def tiny_model(request):
    return tiny(request.param)


@pytest.fixture(params=ARCHITECTURES)
def any_model(request):
    return tiny(request.param)


@pytest.fixture(scope="session")
def embedded():
    """(model, chat) in float32. Tests leave it as they found it."""
    return checks.load("smollm2", dtype="float32")


@pytest.fixture
def ids():
    return torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session", autouse=True)
def few_texts(tmp_path_factory):
    """Two held-out prompts, one plain text, four controls: measuring is most of a run's time."""
    folder = shutil.copytree(texts.DATA, tmp_path_factory.mktemp("few") / "data")
    for file in [*folder.glob("traits/*.json"), folder / "plain.json", folder / "controls.json"]:
        content = json.loads(file.read_text("utf-8"))
        for key, n in (("heldout", 2), ("texts", 1), ("controls", 4)):
            if key in content:
                content[key] = content[key][:n]
        file.write_text(json.dumps(content), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "DATA", folder)
        yield


@pytest.fixture
def all_texts(monkeypatch):
    """The data as it is shipped."""
    monkeypatch.setattr(texts, "DATA", ROOT / "data")


def python(*args, **kwargs):
    """`python args` in a process of its own, from the repository's root."""
    kwargs = dict(cwd=ROOT, capture_output=True, text=True, encoding="utf-8") | kwargs
    return subprocess.run([sys.executable, *map(str, args)], **kwargs)


def command(monkeypatch, name, *argv):
    """`python NAME.py argv`, or of tools/ or studies/, within this process."""
    [file] = [f for at in (".", "tools", "studies") if (f := ROOT / at / f"{name}.py").exists()]
    monkeypatch.setattr(sys, "argv", [file.name, *map(str, argv)])
    runpy.run_path(str(file), run_name="__main__")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random Llama with the embedded model's tokenizer: each stage of the loop in an instant."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    shutil.copytree(models.embedded_folder(), folder, ignore=lambda *_: ["model.safetensors"])
    tiny("llama", vocab_size=49152, max_position_embeddings=512).save_pretrained(folder)
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
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "COHERENCE_FLOOR", 0.0)  # a random model has no coherence to lose
        command(patch, "heal_loop", *flags(tiny_folder), "--rounds", 2, "--out", folder)
    return folder
