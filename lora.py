"""LoRA whose finished rounds are frozen into a gated history. One file, torch and safetensors only: copy it.

For a frozen linear layer W x + b, rounds i = 0..N-1 and scale s = alpha / rank (Hu et al. 2021, arXiv 2106.09685, §4.1):

    y = W x + b  +  c_history · s · Σ_i B_i A_i x  +  c_live · s · B A x

    attach(model, rank=16, alpha=32)        # B = 0: attaching changes nothing
    train(live_parameters(model))
    fold(model)                             # the live adapter joins the history, a fresh one takes its place
    with gates(model, history=0, live=0):   # the original model, bit for bit
        reference = model(ids).logits

W is never written to, so gates, detach and merged() give the base back exactly, whatever happened in between.

    python lora.py export runs/X --to peft --out adapter     # PEFT, vLLM, llama.cpp; or merged: a plain checkpoint; or folder
"""
import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn


class BakedLoRA(nn.Module):
    """One `nn.Linear` with frozen history adapters and one live adapter.

    Factors are float32 masters and multiply in the dtype of x. History rounds lie side by side along the rank:
    history_A [N·rank, d_in], history_B [d_out, N·rank], so N rounds cost two matrix products, not 2N.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        d_out, d_in = base.weight.shape
        self.base, self.rank, self.scale = base, rank, alpha / rank
        new = dict(device=base.weight.device, dtype=torch.float32)
        self.A = nn.Parameter(torch.empty(rank, d_in, **new))
        self.B = nn.Parameter(torch.empty(d_out, rank, **new))
        self.register_buffer("history_A", torch.empty(0, d_in, **new))
        self.register_buffer("history_B", torch.empty(d_out, 0, **new))
        self.c_history = self.c_live = 1.0
        self.merged_weight = None  # W + s Σ B_i A_i while merged(), else None
        self.reset()

    def reset(self) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    @property
    def weight(self):  # some blocks look at their linear's weight for its dtype
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., d_in] -> [..., d_out], in the dtype of x."""
        if self.merged_weight is not None and self.c_history == 1:
            y = F.linear(x, self.merged_weight, self.base.bias)
        else:
            y = self.base(x)
            if self.c_history and len(self.history_A):
                y = y + self._low_rank(x, self.history_A, self.history_B, self.c_history)
        if self.c_live:
            y = y + self._low_rank(x, self.A, self.B, self.c_live)
        return y

    def _low_rank(self, x, A, B, dose):
        return F.linear(dose * self.scale * F.linear(x, A.to(x.dtype)), B.to(x.dtype))

    @torch.no_grad()
    def history_delta(self) -> torch.Tensor:
        """s Σ_i B_i A_i, [d_out, d_in], float32."""
        return self.scale * self.history_B @ self.history_A


def blocks(model) -> nn.ModuleList:
    """The decoder blocks; for a multimodal checkpoint, those of its text model."""
    return model.get_decoder().layers


def adapters(model) -> dict[str, BakedLoRA]:
    """{module name: BakedLoRA} in model order. Raises ValueError where nothing is attached."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, BakedLoRA)}
    if not found:
        raise ValueError("no LoRA on this model; fix: call attach(model) first")
    return found


def attach(model, rank: int = 16, alpha: float = 32.0, layers: tuple[float, float] = (0.2, 0.8),
           targets: tuple[str, ...] | None = None) -> None:
    """Freeze the model and wrap the linears of a depth range of decoder blocks in `BakedLoRA`.

    layers: fractions (from, to) of the depth. targets: last names such as ("q_proj", "v_proj"); None wraps every
    `nn.Linear` in the blocks. Raises ValueError for bad values, an adapter already there, or nothing to wrap.
    """
    if rank < 1 or alpha <= 0:
        raise ValueError(f"rank {rank} and alpha {alpha} must be positive; fix: such as 16 and 32")
    if not 0 <= layers[0] < layers[1] <= 1:
        raise ValueError(f"layers {layers[0]} {layers[1]} must be fractions of the depth, 0 <= from < to <= 1; fix: such as 0.2 0.8")
    if any(isinstance(m, BakedLoRA) for m in model.modules()):
        raise ValueError("this model has LoRA attached already; fix: detach(model) first")
    model.requires_grad_(False)
    depth = len(blocks(model))
    chosen = blocks(model)[round(layers[0] * depth): round(layers[1] * depth)]
    linears = [(parent, name, child) for block in chosen for parent in block.modules()
               for name, child in parent.named_children()
               if isinstance(child, nn.Linear) and (targets is None or name in targets)]
    if not linears:
        raise ValueError(f"no nn.Linear named {targets or 'anything'} in blocks {layers} of {depth}")
    for parent, name, child in linears:
        setattr(parent, name, BakedLoRA(child, rank, alpha))
    model.lora_config = {"rank": rank, "alpha": alpha, "layers": list(layers),
                         "targets": list(targets) if targets else None}


def detach(model) -> None:
    """Put the plain linears back; every base tensor is the one that was there before `attach`."""
    for name, module in adapters(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.base)
    del model.lora_config


def live_parameters(model) -> list[nn.Parameter]:
    """The trainable factors A and B of every live adapter."""
    return [p for m in adapters(model).values() for p in (m.A, m.B)]


@contextlib.contextmanager
def gates(model, history: float = 1.0, live: float = 1.0):
    """Within the context the doses c_history and c_live hold: (0, 0) original, (1, 0) previous student, (1, 1) student."""
    modules = adapters(model).values()
    before = [(m.c_history, m.c_live) for m in modules]
    try:
        for m in modules:
            m.c_history, m.c_live = history, live
        yield
    finally:
        for m, (c_history, c_live) in zip(modules, before):
            m.c_history, m.c_live = c_history, c_live


@contextlib.contextmanager
def merged(model):
    """Within the context, history at gate 1 is read from one dense weight per layer: as fast as no history.

    W + s Σ B A is summed in float32 and rounded once to the dtype of W. W itself stays, so other gate values,
    (0, 0) among them, keep their meaning inside the context.
    """
    modules = adapters(model).values()
    before = [m.merged_weight for m in modules]
    try:
        for m in modules:
            m.merged_weight = (m.weight.float() + m.history_delta()).to(m.weight.dtype)
        yield
    finally:
        for m, weight in zip(modules, before):
            m.merged_weight = weight


@torch.no_grad()
def fold(model) -> None:
    """Append the live adapter to the history and start a fresh one (B = 0). The student's function does not change."""
    for m in adapters(model).values():
        if m.merged_weight is not None:
            raise ValueError("fold() inside merged() would leave a stale merged weight; fix: leave the context first")
        m.history_A = torch.cat([m.history_A, m.A])
        m.history_B = torch.cat([m.history_B, m.B], dim=1)
        m.reset()


def truncate(model, rounds: int) -> None:
    """Forget all but the first `rounds` rounds of the history."""
    for m in adapters(model).values():
        m.history_A, m.history_B = m.history_A[:rounds * m.rank], m.history_B[:, :rounds * m.rank]


def n_rounds(model) -> int:
    """Folded rounds so far."""
    first = next(iter(adapters(model).values()))
    return len(first.history_A) // first.rank


def fingerprint(model) -> str:
    """sha256 over a sample of every wrapped base weight, rounded to bfloat16 so that it does not depend on the load dtype."""
    digest = hashlib.sha256()
    for name, m in adapters(model).items():
        w = m.weight.detach().flatten()
        sample = w[:: max(1, len(w) // 4096)].to(torch.bfloat16).contiguous().view(torch.int16)
        digest.update(f"{name}{tuple(m.weight.shape)}".encode() + sample.cpu().numpy().tobytes())
    return digest.hexdigest()


def base_name(model) -> str:
    """The base model's hub id, or its folder's name: never a path of this machine."""
    name = getattr(model.config, "_name_or_path", "") or "unknown"
    return Path(name).name if Path(name).exists() or name.count("/") != 1 else name


def save_tensors(tensors: dict[str, torch.Tensor], path, metadata: dict[str, str]) -> None:
    """safetensors, written aside and renamed: a reader never meets half a file. Raises OSError where it cannot be written."""
    aside = Path(f"{path}.tmp")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, aside, metadata=metadata)
    except SafetensorError as e:
        raise OSError(f"cannot write {path} ({e}); fix: a folder that can be written, on a disk with room") from None
    os.replace(aside, path)


def save(model, path) -> None:
    """Every round and the live adapter in one safetensors file; metadata: rank, alpha, layers, targets, base, fingerprint."""
    tensors = {f"{name}.{part}": getattr(m, part) for name, m in adapters(model).items()
               for part in ("history_A", "history_B", "A", "B")}
    about = {**model.lora_config, "base": base_name(model), "fingerprint": fingerprint(model), "rounds": n_rounds(model)}
    save_tensors(tensors, path, {"baked_lora": json.dumps(about)})  # one key: safetensors writes several in random order


def load(model, path) -> None:
    """Read a file of `save` onto the same base, attaching first where needed.

    Raises FileNotFoundError, or ValueError naming the file: damaged, not ours, another base, other settings, not finite.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no adapter file {path}; fix: give the adapter.safetensors of a run")
    try:
        with safe_open(str(path), framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}
    except SafetensorError as e:
        raise ValueError(f"{path} is damaged or not safetensors ({e}); fix: use a whole copy") from None
    if "baked_lora" not in metadata:
        raise ValueError(f"{path} was not written by lora.save; fix: give an adapter.safetensors of a run")
    try:
        about = json.loads(metadata["baked_lora"])
        config = {key: about[key] for key in ("rank", "alpha", "layers", "targets")}
        rounds, base, whose = (about[key] for key in ("rounds", "base", "fingerprint"))
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"{path} was not written by lora.save ({e}); fix: give an adapter.safetensors of a run") from None
    attached_here = not hasattr(model, "lora_config")
    if attached_here:
        attach(model, config["rank"], config["alpha"], config["layers"], config["targets"])
    try:
        if model.lora_config != config:
            raise ValueError(f"{path} has {config}, the model has {model.lora_config}; fix: detach(model) first, or attach with the file's settings")
        if fingerprint(model) != whose:
            raise ValueError(f"{path} was trained on another base ({base}); fix: load it onto that one")
        for name, m in adapters(model).items():
            (d_out, d_in), n = m.weight.shape, rounds * m.rank
            for part, shape in (("history_A", (n, d_in)), ("history_B", (d_out, n)), ("A", (m.rank, d_in)), ("B", (d_out, m.rank))):
                if f"{name}.{part}" not in tensors or tensors[f"{name}.{part}"].shape != shape:
                    raise ValueError(f"{path}: {name}.{part} is missing or of another shape than {shape}; fix: use a whole copy")
        for key, value in tensors.items():
            if not value.isfinite().all():
                raise ValueError(f"{path}: {key} is not finite; fix: use an adapter from before the training broke")
    except ValueError:
        if attached_here:
            detach(model)
        raise
    for name, m in adapters(model).items():
        for part in ("history_A", "history_B", "A", "B"):
            getattr(m, part).data = tensors[f"{name}.{part}"].to(m.A.device)


def export_peft(model, folder, dose: float = 1.0) -> None:
    """The whole history as ONE adapter of rank N·r in PEFT's file format, scaled by `dose` (the history gate).

    PEFT multiplies by lora_alpha / r, so lora_alpha = alpha · N keeps the scale s. Modules go by their full names: a last name
    such as "q_proj" would also wrap the vision tower of a multimodal checkpoint. vLLM reads r, lora_alpha, target_modules, bias,
    use_rslora and use_dora, llama.cpp's convert_lora_to_gguf.py lora_alpha and base_model_name_or_path.
    Raises ValueError before the first fold.
    """
    modules, config = adapters(model), model.lora_config
    rounds = n_rounds(model)
    if not rounds:
        raise ValueError("nothing to export: no round is folded yet; fix: fold(model) after training")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, m in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = m.history_A
        tensors[f"base_model.model.{name}.lora_B.weight"] = dose * m.history_B
    save_tensors(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name(model),
              "r": rounds * config["rank"], "lora_alpha": rounds * config["alpha"], "lora_dropout": 0.0, "bias": "none",
              "target_modules": sorted(modules), "fan_in_fan_out": False, "inference_mode": True,
              "use_rslora": False, "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def export_merged(model, folder, dose: float = 1.0) -> None:
    """A plain Hugging Face checkpoint, W + dose · s Σ B_i A_i summed in float32 and rounded once to the model's dtype."""
    state = {}
    for key, value in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        if isinstance(parent := model.get_submodule(owner), BakedLoRA):
            continue  # A, B and the history
        if owner.endswith(".base") and isinstance(outer := model.get_submodule(owner[:-5]), BakedLoRA):
            key = f"{owner[:-5]}.{leaf}"
            if leaf == "weight":
                value = (value.float() + dose * outer.history_delta()).to(value.dtype)
        state[key] = value
    model.save_pretrained(folder, state_dict=state, safe_serialization=True)


@contextlib.contextmanager
def new_folder(path):
    """A folder to fill, which appears at `path` as a whole when the context ends well.

    Raises ValueError where path is taken, OSError where it cannot be written.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--out {path} is not empty; fix: another folder, or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:
        fresh = Path(aside) / "export"
        fresh.mkdir()
        try:
            yield fresh
        except SafetensorError as e:
            raise OSError(f"cannot write {path} ({e}); fix: a folder that can be written, on a disk with room") from None
        os.replace(fresh, path)


CARD = """---
base_model: {base}
library_name: {library}
---
# {base} after {rounds} rounds of steer, distil, heal: {trait}

{what}

{use}

Base, steered and healed by round; Δ against the base with 95 % bootstrap intervals over vignettes, log mean blame in nats:

{table}

## Settings

```json
{settings}
```

## Licence

These weights are made from {base}: its licence and terms of use hold for them too.
"""
WHAT = {
    "peft": ("peft", "The rounds as one LoRA adapter of rank {rank} for PEFT, vLLM and llama.cpp, at dose {dose:g} of 1.", """```python
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "this folder")
```

vLLM: `--enable-lora --max-lora-rank N --lora-modules healed=FOLDER`, N the next size it offers from {rank} on.
llama.cpp: `python convert_lora_to_gguf.py --base BASE_FOLDER FOLDER`."""),
    "merged": ("transformers", "A plain checkpoint with the rounds merged into its weights, at dose {dose:g} of 1.", """```python
model = AutoModelForCausalLM.from_pretrained("this folder")
```"""),
    "folder": ("steer-heal-loop", "Every round's adapter, the steering vectors, the kept data and the record of the run, for the code that made them.", """```python
model, tok = models.load("{model}")
lora.load(model, "adapter.safetensors")
with lora.gates(model, history=0.5): ...  # any dose; 0 is the original
```"""),
}


@dataclass
class Config:
    command: Literal["export"]
    """Write the healed student of a run in a format that other tools read."""
    run: Path
    """Run folder of heal_loop.py."""
    to: Literal["peft", "merged", "folder"] = "peft"
    """peft: one adapter. merged: a plain checkpoint. folder: what this code needs on another machine."""
    out: Path = Path("export")
    """New or empty folder."""
    dose: float = 1.0
    """History gate of peft and merged: 0 is the original, 1 the student."""
    model: str | None = None
    """The base model, where it is not where the run found it."""

    def __post_init__(self):
        if not math.isfinite(self.dose):
            raise ValueError(f"--dose {self.dose} is not a number; fix: 1 for the student, 0 for the original")
        if self.to == "folder" and self.dose != 1:
            raise ValueError(f"--dose {self.dose} cannot be written by --to folder; fix: leave it out, and set lora.gates(model, history={self.dose}) in use")


def main(cfg: Config) -> None:
    import distil  # only the command needs the rest of the project
    import models
    import plot
    from transformers.utils import cached_file
    for name in ("config.json", "events.jsonl", "adapter.safetensors"):
        if not (cfg.run / name).exists():
            raise FileNotFoundError(f"{cfg.run} has no {name}; fix: give a run folder of heal_loop.py with a healed round")
    events = distil.read_jsonl(cfg.run / "events.jsonl")
    try:
        settings = json.loads((cfg.run / "config.json").read_text())
        base, dtype, trait = settings["model"], settings["dtype"], settings["trait"]
        for key in ("model", "vignettes"):  # no path of this machine leaves it
            if Path(settings[key]).is_absolute() or ".." in Path(settings[key]).parts:
                settings[key] = Path(settings[key]).name
        table, healed = plot.table(events, "github"), sum(e["stage"] == "heal" for e in events)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, IndexError, KeyError, TypeError) as e:
        raise ValueError(f"{cfg.run}: config.json or events.jsonl is malformed ({type(e).__name__}: {e}); fix: take them from the run again") from None
    if not healed:
        raise ValueError(f"{cfg.run} has no healed round; fix: python heal_loop.py --resume {cfg.run}")
    with new_folder(cfg.out) as out:
        recorded = models.DATA.parent / base  # a run records a model folder relative to the code
        model, tok = models.load(cfg.model or (str(recorded) if recorded.is_dir() else base), "cpu", dtype)
        load(model, cfg.run / "adapter.safetensors")
        truncate(model, healed)  # a kill between the file and its event leaves one round too many
        if cfg.to == "peft":
            export_peft(model, out, cfg.dose)
        elif cfg.to == "merged":
            export_merged(model, out, cfg.dose)
            tok.save_pretrained(out)
            for name in ("preprocessor_config.json", "processor_config.json"):  # a multimodal checkpoint has one beside its tokenizer
                if file := cached_file(model.config._name_or_path, name, _raise_exceptions_for_missing_entries=False):
                    shutil.copy(file, out)
        else:
            save(model, out / "adapter.safetensors")
            (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
            for file in sorted([cfg.run / "events.jsonl", *cfg.run.glob("vector_r*.safetensors"), *cfg.run.glob("kept_r*.jsonl")]):
                shutil.copy(file, out)
        library, what, use = WHAT[cfg.to]
        about = {"base": base_name(model), "rank": healed * model.lora_config["rank"], "dose": cfg.dose, "model": settings["model"]}
        (out / "README.md").write_text(CARD.format(library=library, rounds=healed, trait=trait, what=what.format(**about), use=use.format(**about),
                                                   table=table, settings=json.dumps(settings, indent=2), **about))
    print(f"{cfg.run}, {healed} rounds on {about['base']} -> {cfg.out} ({cfg.to})")


if __name__ == "__main__":
    from models import cli
    cli(Config, main, positional=True)
