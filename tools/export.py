"""Write the healed student of a run, or its steering vector, in a format that other tools read.

    python -m tools.export runs/X --to peft --out adapter               # PEFT, vLLM, llama.cpp
    python -m tools.export runs/X --to merged --out model --dose 0.5    # a plain checkpoint
    python -m tools.export runs/X --to gguf --out care.gguf --round 0   # llama.cpp's control vector

    exported weight = W + dose · s Σ_i B_i A_i over the rounds i
"""
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors.torch import save_file
from transformers.utils import cached_file

import heal_loop
import lora
from common import checks, models, runs
from common.checks import plain_logp
from steer import SteeringVector
from tools import plot


@dataclass
class Config:
    run: tyro.conf.Positional[Path]  # run folder of heal_loop.py
    to: Literal["peft", "merged", "gguf"] = "peft"  # an adapter, a checkpoint, or a control vector
    out: Path = Path("export")  # a new folder; for gguf a new file
    dose: runs.Finite = 1.0  # history gate of peft and merged: 0 is the original, 1 the student
    round: runs.WholeFrom0 = 0  # whose vector gguf takes; of 0: extracted from the original
    model: str | None = None  # the base model, if it has moved since the run


def export_peft(model, folder, dose: float = 1.0) -> None:
    """The history of N ≥ 1 rounds as ONE adapter of rank N·r in PEFT's file format, times `dose`.

    PEFT multiplies by lora_alpha / r, so lora_alpha = alpha · N keeps the scale s. Modules go by
    their full names: a last name such as "q_proj" would also wrap the vision tower of a multimodal
    checkpoint. vLLM and llama.cpp read these settings too.
    """
    rounds, tensors = lora.n_rounds(model), {}
    for name, m in lora.adapters(model).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = m.history_A.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (dose * m.history_B).cpu().contiguous()
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rounds * m.rank,
        "lora_alpha": rounds * m.alpha, "target_modules": sorted(lora.adapters(model)),
        "base_model_name_or_path": models.base_name(model), "lora_dropout": 0.0, "bias": "none",
        "use_rslora": False, "use_dora": False, "inference_mode": True}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    runs.write_text(Path(folder) / "adapter_config.json", json.dumps(settings, indent=2))


@torch.no_grad()
def check_peft(model, chat, folder, dose: float = 1.0) -> None:
    """Load the adapter of `export_peft` back with PEFT, in float32; the model is PEFT's then.

    PEFT may take a module for another kind (0.21 drops a shared expert's gate_proj with a warning),
    and never calls its layer where the block multiplies by the weight itself (Jamba's dt_proj).
    Raises ValueError where the error of a log-probability is more than rounding.
    """
    from peft import PeftModel
    rows = [chat.ids("My boss told me to ignore a crying customer. " * n) for n in (1, 3, 9)]
    with lora.gates(model, history=dose, live=0):
        ours = torch.cat([plain_logp(model, row, len(row)) for row in rows])  # [Σ tokens, vocab]
    lora.detach(model)
    effect = (ours - torch.cat([plain_logp(model, row, len(row)) for row in rows])).abs()
    try:
        PeftModel.from_pretrained(model, folder, trust_remote_code=False)  # in place
        error = (ours - torch.cat([plain_logp(model, row, len(row)) for row in rows])).abs()
    except (ValueError, RuntimeError, KeyError) as e:
        raise ValueError(f"PEFT does not load this adapter ({e}); fix: --to merged") from None
    off, changed = (f"mean {x.mean():.2g}, largest {x.max():.2g}" for x in (error, effect))
    if not (error.mean() <= 2e-5 + 0.002 * effect.mean()
            and error.max() <= 5e-4 + 0.002 * effect.max()):
        raise ValueError(f"PEFT reads this adapter otherwise: log-probabilities are off by {off} "
                         f"nats, where the rounds changed {changed}; fix: --to merged")


@torch.no_grad()
def export_merged(model, folder, dose: float = 1.0) -> None:
    """A plain Hugging Face checkpoint, W + dose · s Σ B_i A_i, summed in float32, rounded once.

    Afterwards the model is that one. Raises ValueError where transformers wrote an adapter, or no
    weights: of a model with PEFT's layers in it, save_pretrained writes those alone.
    """
    for m in lora.adapters(model).values():
        W = m.base.weight
        merged = (W.float() + dose * m.history_delta()).to(W.dtype)
        m.base.weight = torch.nn.Parameter(merged, requires_grad=False)
    lora.detach(model)
    model.save_pretrained(folder)
    names = sorted(file.name for file in Path(folder).iterdir())
    if ".safetensors" not in str(names) or "adapter_" in str(names):
        raise ValueError(f"transformers wrote {', '.join(names)}, not a whole checkpoint; "
                         "fix: a base model without an adapter in its folder")


def export_gguf(vector: SteeringVector, path) -> None:
    """A llama.cpp control vector: `llama-cli -m BASE.gguf --control-vector-scaled PATH:DOSE`.

    `direction.N` is added after block N, counted from 0 as here, at every position, the prompt
    included. Raises ValueError for a vector of block 0, for which llama.cpp's loader has no place.
    """
    import gguf
    if 0 in vector.layers:
        raise ValueError("a control vector cannot steer block 0; fix: steer from a later block")
    writer = gguf.GGUFWriter(path, "controlvector")  # general.architecture
    writer.add_string("controlvector.model_hint", vector.metadata.get("model_type", "unknown"))
    writer.add_uint32("controlvector.layer_count", len(vector.layers))
    for l, v in vector.layers.items():
        writer.add_tensor(f"direction.{l}", v.float().cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def export_student(cfg: Config, settings: heal_loop.Config, folder: Path) -> None:
    """--to peft or merged: all rounds of the run on its base model, with a card."""
    rounds, table = runs.rounds_done(cfg.run), plot.table(runs.read_events(cfg.run), "github")
    dtype = "float32" if cfg.to == "peft" else settings.dtype
    model, chat = checks.load(cfg.model or settings.model, "cpu", dtype, settings.date)
    lora.load(model, [cfg.run / f"round_{r}" / "adapter.safetensors" for r in range(rounds)],
              merge=False)
    base = models.base_name(model)
    # its weights; a plain checkpoint with what else one needs to run or convert it
    if cfg.to == "peft":
        export_peft(model, folder, cfg.dose)
        check_peft(model, chat, folder, cfg.dose)
    else:
        export_merged(model, folder, cfg.dose)
        chat.tok.save_pretrained(folder)
        for name in ("tokenizer.model", "preprocessor_config.json", "processor_config.json"):
            file = cached_file(model.config._name_or_path, name,
                               _raise_exceptions_for_missing_entries=False)
            if file:
                shutil.copy(file, folder)
    # its card, which names no path of this machine
    shown = {**runs.settings(settings), "model": base, "trait": Path(settings.trait).name,
             "vignettes": Path(settings.vignettes).name}
    page = plot.PAGES.get_template("card.md.j2").render(
        cfg=cfg, base=base, rounds=rounds, rank=rounds * settings.rank, table=table,
        settings=json.dumps(shown, indent=2, ensure_ascii=False))
    runs.write_text(folder / "README.md", page)


def main(cfg: Config) -> None:
    settings = runs.read_config(heal_loop.Config, cfg.run)
    if cfg.dose != 1 if cfg.to == "gguf" else cfg.round:
        raise ValueError(f"--dose {cfg.dose:g} --round {cfg.round}: peft and merged take a dose, "
                         "gguf a round; fix: leave the other flag out")
    if cfg.to != "gguf" and not runs.rounds_done(cfg.run):
        raise ValueError(f"{cfg.run} has no healed round; fix: heal_loop.py --resume {cfg.run}")
    if os.path.lexists(cfg.out):  # a link, a mount point and "." too
        raise ValueError(f"--out {cfg.out} exists; fix: another name, or delete it")
    if cfg.to == "peft" and not importlib.util.find_spec("peft"):
        raise ValueError("--to peft needs PEFT; fix: pip install -r requirements-dev.txt")
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cfg.out.parent) as aside:  # it appears as a whole, or not
        fresh = Path(aside) / "export"
        if cfg.to == "gguf":
            file = cfg.run / f"round_{cfg.round}/vector.safetensors"
            export_gguf(SteeringVector.load(file), fresh)
        else:
            export_student(cfg, settings, fresh)
        os.replace(fresh, cfg.out)
    print(f"{cfg.run} -> {cfg.out} ({cfg.to})")


if __name__ == "__main__":
    runs.cli(Config, main)
