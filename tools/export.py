"""Write the healed student of a run, or its steering vector, in a format that other tools read.

    python -m tools.export runs/X --to peft --out adapter               # one LoRA: PEFT, vLLM, llama.cpp
    python -m tools.export runs/X --to merged --out model --dose 0.5    # a plain Hugging Face checkpoint
    python -m tools.export runs/X --to gguf --out care.gguf --round 0   # a control vector for llama.cpp

    exported weight = W + dose · s Σ_i B_i A_i over the rounds i

A run folder itself is portable as it is: lora.load and SteeringVector.load read the files of its
rounds.
"""
import contextlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.utils import cached_file

import lora
from common import models
from tools import plot
from common import runs
from heal_loop import Config as RunConfig
from steer import SteeringVector, chat_ids


@dataclass
class Config:
    run: tyro.conf.Positional[Path]  # run folder of heal_loop.py
    to: Literal["peft", "merged", "gguf"] = "peft"  # an adapter, a checkpoint, or a control vector
    out: Path = Path("export")  # new or empty folder; for gguf a new file
    dose: runs.Finite = 1.0  # history gate of peft and merged: 0 is the original, 1 the student
    round: runs.WholeFrom0 = 0  # whose vector gguf takes: 0 the original's, N round N's student's
    model: str | None = None  # the base model, where it is not where the run found it


# ---- the formats --------------------------------------------------------------------------------


def export_peft(model, folder, dose: float = 1.0) -> None:
    """The whole history as ONE adapter of rank N·r in PEFT's file format, scaled by `dose`.

    PEFT multiplies by lora_alpha / r, so lora_alpha = alpha · N keeps the scale s. Modules go by
    their full names: a last name such as "q_proj" would also wrap the vision tower of a multimodal
    checkpoint. vLLM reads r, lora_alpha, target_modules, bias, use_rslora and use_dora, llama.cpp's
    convert_lora_to_gguf.py lora_alpha and base_model_name_or_path.
    Raises ValueError before the first fold.
    """
    modules = lora.adapters(model)
    config = model.lora_config
    rounds = lora.n_rounds(model)
    if not rounds:
        raise ValueError("nothing to export: no round is folded yet; "
                         "fix: fold(model) after training")

    # 1. the factors, the dose in B
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, m in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = m.history_A.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (dose * m.history_B).cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    # 2. how PEFT is to read them
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": models.base_name(model),
        "r": rounds * config["rank"], "lora_alpha": rounds * config["alpha"], "lora_dropout": 0.0,
        "bias": "none", "target_modules": sorted(modules), "fan_in_fan_out": False,
        "inference_mode": True, "use_rslora": False, "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))


@torch.no_grad()
def check_peft(model, tok, folder, dose: float = 1.0) -> None:
    """Load the adapter of `export_peft` back with PEFT; afterwards the model is PEFT's.

    PEFT may take a module for another kind than we did: 0.21 reads a shared expert's gate_proj as
    one of fused experts and drops it with a warning. Raises ValueError where log-probabilities come
    out another tenth of what the rounds changed, rounding aside.
    """
    from peft import PeftModel
    ids = torch.tensor([chat_ids(tok, "My boss told me to ignore a crying customer. Should I?")])

    def logp():
        return model(input_ids=ids).logits.float().log_softmax(-1)
    with lora.gates(model, history=dose, live=0):
        ours = logp()
    lora.detach(model)
    effect = (ours - logp()).abs().mean()
    try:
        PeftModel.from_pretrained(model, folder)  # in place
        error = (ours - logp()).abs().mean()
    except (ValueError, RuntimeError, KeyError) as e:
        raise ValueError(f"PEFT does not load this model's adapter ({e}); "
                         "fix: --to merged") from None
    rounding = 1e-4 if model.dtype == torch.float32 else 0.05
    if not error <= 0.1 * effect + rounding:
        raise ValueError(f"PEFT loads this model's adapter as another one, {error:.2g} nats off "
                         f"where the rounds changed {effect:.2g}; fix: --to merged")


def export_merged(model, folder, dose: float = 1.0) -> None:
    """A plain Hugging Face checkpoint, W + dose · s Σ B_i A_i, summed in float32, rounded once."""
    state = {}
    modules = dict(model.named_modules())
    for key, value in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        if isinstance(modules[owner], lora.BakedLoRA):
            continue  # A, B and the history
        # a wrapped layer gives its tensors under the name it had before it was wrapped
        outer = modules.get(owner.removesuffix(".base"))
        if owner.endswith(".base") and isinstance(outer, lora.BakedLoRA):
            key = f"{owner.removesuffix('.base')}.{leaf}"
            if leaf == "weight":
                value = (value.float() + dose * outer.history_delta()).to(value.dtype)
        state[key] = value
    model.save_pretrained(folder, state_dict=state, safe_serialization=True)


def export_gguf(vector: SteeringVector, path) -> None:
    """A llama.cpp control vector: `llama-cli -m BASE.gguf --control-vector-scaled PATH:DOSE`.

    `direction.N` is added after block N, counted from 0 as here, with no shift: llama.cpp's graphs
    call build_cvec(cur, il) on the sum that leaves block il, and repeng's export numbers it so too.
    Its loader has no place for N = 0. llama.cpp steers every position, the prompt included; ours
    act from the assistant tag on. Raises ValueError for a vector of block 0.
    """
    import gguf
    if 0 in vector.layers:
        raise ValueError(f"a control vector cannot steer block 0, this vector has blocks "
                         f"{list(vector.layers)}; fix: steer from a later block")
    writer = gguf.GGUFWriter(f"{path}.tmp", "controlvector")  # general.architecture
    writer.add_string("controlvector.model_hint", vector.about.get("model_type", "unknown"))
    writer.add_uint32("controlvector.layer_count", len(vector.layers))
    for l, v in vector.layers.items():
        writer.add_tensor(f"direction.{l}", v.float().cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(f"{path}.tmp", path)


# ---- the card -----------------------------------------------------------------------------------

CARD = """---
base_model: {base}
library_name: {library}
---
# {base} after {rounds} rounds of steer, distil, heal: {trait}

{what}, at dose {dose:g} of 1.

{use}

Base, steered and healed by round; Δ against the base with 95 % bootstrap intervals over vignettes,
log mean blame in nats:

{table}

## Settings

```json
{settings}
```

## Licence

These weights are made from {base}: its licence and terms of use hold for them too.
"""
PEFT_USE = """```python
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "this folder")
```

vLLM: `--enable-lora --max-lora-rank N --lora-modules healed=FOLDER`,
N the next size it offers from {rank} on.
llama.cpp: `python convert_lora_to_gguf.py --base BASE_FOLDER FOLDER`."""
MERGED_USE = """```python
model = AutoModelForCausalLM.from_pretrained("this folder")
```"""


def card(run: Path, cfg: Config, base: str, rounds: int, rank: int) -> str:
    """README.md of an exported model.

    Raises ValueError where config.json or events.jsonl is malformed.
    """
    # 1. the run's settings and table
    try:
        settings = json.loads((run / "config.json").read_text())
        for key in ("model", "vignettes", "prompts", "probes"):  # no path of this machine
            parts = Path(settings[key] or "").parts
            if Path(*parts).is_absolute() or ".." in parts:
                settings[key] = Path(settings[key]).name
        table = plot.table(runs.read_events(run), "github")
        trait = settings["trait"]
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, IndexError, KeyError,
            TypeError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise ValueError(f"{run}: config.json or events.jsonl is malformed ({reason}); "
                         "fix: take them from the run again") from None

    # 2. what this format is, and how it is used
    if cfg.to == "peft":
        library, use = "peft", PEFT_USE
        what = f"The rounds as one LoRA adapter of rank {rank}"
    else:
        library, use = "transformers", MERGED_USE
        what = "A plain checkpoint with the rounds merged in"
    return CARD.format(base=base, library=library, rounds=rounds, trait=trait, what=what,
                       dose=cfg.dose, use=use.format(base=base, rank=rank), table=table,
                       settings=json.dumps(settings, indent=2))


# ---- the command --------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(path: Path):
    """A folder to fill, which appears at `path` as a whole when the context ends well.

    Raises ValueError where path is taken, OSError where it cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--out {path} is not empty; fix: another folder, or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:
        fresh = Path(aside) / "export"
        fresh.mkdir()
        try:
            yield fresh
        except SafetensorError as e:
            raise OSError(f"cannot write {path} ({e}); "
                          "fix: a folder that can be written, on a disk with room") from None
        os.replace(fresh, path)


def export_vector(cfg: Config) -> None:
    """--to gguf. Raises ValueError or FileNotFoundError before anything is written."""
    file = cfg.run / f"round_{cfg.round}" / "vector.safetensors"
    if cfg.out.exists():
        raise ValueError(f"--out {cfg.out} exists; fix: another name, or delete it")
    if not file.exists():
        done = runs.rounds_done(cfg.run)
        fix = f"--round 0 to {done - 1}" if done else "a run folder of heal_loop.py"
        raise FileNotFoundError(f"no vector file {file}; fix: {fix}")
    vector = SteeringVector.load(file)
    export_gguf(vector, cfg.out)
    print(f"{file}, blocks {', '.join(map(str, vector.layers))} -> {cfg.out}")


def export_student(cfg: Config) -> None:
    """--to peft or merged: all rounds of the run. Raises ValueError for a run without one."""
    rounds = runs.rounds_done(cfg.run)
    settings = runs.read_config(RunConfig, cfg.run)
    if not rounds:
        raise ValueError(f"{cfg.run} has no healed round; "
                         f"fix: python heal_loop.py --resume {cfg.run}")
    with new_folder(cfg.out) as out:
        # 1. the base model, and the run's rounds on it
        model, tok = models.load(cfg.model or str(settings.model), "cpu", settings.dtype)
        lora.load(model, [cfg.run / f"round_{r}" / "adapter.safetensors" for r in range(rounds)])
        base = models.base_name(model)
        rank = rounds * model.lora_config["rank"]
        # 2. its weights; a plain checkpoint with what else one needs to run it
        if cfg.to == "peft":
            export_peft(model, out, cfg.dose)
            check_peft(model, tok, out, cfg.dose)
        else:
            export_merged(model, out, cfg.dose)
            tok.save_pretrained(out)
            # a multimodal checkpoint's
            for name in ("preprocessor_config.json", "processor_config.json"):
                file = cached_file(model.config._name_or_path, name,
                                   _raise_exceptions_for_missing_entries=False)
                if file:
                    shutil.copy(file, out)
        # 3. its card
        (out / "README.md").write_text(card(cfg.run, cfg, base, rounds, rank))
    print(f"{cfg.run}, {rounds} rounds on {base} -> {cfg.out} ({cfg.to})")


def main(cfg: Config) -> None:
    if not (cfg.run / "config.json").exists():
        raise FileNotFoundError(f"{cfg.run} has no config.json; "
                                "fix: give a run folder of heal_loop.py")
    runs.read_events(cfg.run)  # raises for a folder of an earlier version
    if cfg.to == "gguf" and cfg.dose != 1:
        raise ValueError(f"--dose {cfg.dose}: a control vector is stored at dose 1; "
                         "fix: give llama.cpp the dose, --control-vector-scaled PATH:DOSE")
    if cfg.to != "gguf" and cfg.round:
        raise ValueError(f"--round {cfg.round} is of --to gguf, {cfg.to} takes all rounds; "
                         "fix: leave it out")
    if cfg.to == "gguf":
        export_vector(cfg)
    else:
        export_student(cfg)


if __name__ == "__main__":
    runs.cli(Config, main)
