import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import models  # noqa: E402

SMALL = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def tiny(name: str, dtype=torch.float32, **changes):
    """A random model of a real architecture, seconds to make and never trained."""
    torch.manual_seed(0)
    t, c = transformers, SMALL | changes
    if name == "gemma3_multimodal":
        config = t.Gemma3Config(text_config=dict(c, sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]),
                                vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14))
        model = t.Gemma3ForConditionalGeneration(config)
    else:
        make = {"llama": (t.LlamaConfig, t.LlamaForCausalLM, {}), "qwen3": (t.Qwen3Config, t.Qwen3ForCausalLM, {}),
                "gemma3": (t.Gemma3TextConfig, t.Gemma3ForCausalLM, dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"])),
                "phi3": (t.Phi3Config, t.Phi3ForCausalLM, {}), "gpt_neox": (t.GPTNeoXConfig, t.GPTNeoXForCausalLM, dict(num_key_value_heads=None, head_dim=None)),
                "olmo2": (t.Olmo2Config, t.Olmo2ForCausalLM, {}),
                "mixtral": (t.MixtralConfig, t.MixtralForCausalLM, dict(num_local_experts=4, num_experts_per_tok=2))}
        config_class, model_class, extra = make[name]
        config = config_class(**{k: v for k, v in (c | extra).items() if v is not None})
        model = model_class(config)
    model.generation_config.eos_token_id = 2
    for key, bias in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(bias, std=0.1)  # zeros by default: nobody would miss one
    return model.to(dtype).eval().requires_grad_(False)


ARCHITECTURES = ["llama", "qwen3", "gemma3", "gemma3_multimodal", "phi3", "gpt_neox", "olmo2", "mixtral"]


class Ids:
    """Stands in for a tokenizer where a test gives token ids itself."""
    pad_token_id, eos_token_id, all_special_ids = 0, 2, [0, 1, 2]


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
