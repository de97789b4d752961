"""LoRA whose finished rounds are frozen into a gated history. Torch, safetensors: copy this file.

For a frozen linear W x + b, rounds i and s = alpha / rank (Hu et al. 2021, arXiv 2106.09685):

    y = W x + b  +  c_history · s · Σ_i B_i A_i x  +  c_live · s · B A x

    import lora

    lora.attach(model, rank=16, alpha=32)          # B = 0: attaching changes nothing
    train(lora.live_parameters(model))
    lora.fold(model)                               # the live adapter joins the history
    with lora.gates(model, history=0, live=0):     # the original model, bit for bit
        reference = model(ids).logits
    lora.save(model, "round_0.safetensors")        # a round is a file

W is never written to: gates, detach and merged() give the base back exactly.
"""
import contextlib
import hashlib
import json
import math
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn


class BakedLoRA(nn.Module):
    """One `nn.Linear` with frozen history adapters and one live adapter.

    Factors are float32 masters and multiply in the dtype of x. The history's rounds lie side by
    side along the rank, history_A [N·rank, d_in], history_B [d_out, N·rank]: two products.
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
        self.c_history = 1.0  # or a [N·rank] tensor: each round's gate, rank times
        self.c_live = 1.0
        self.merged_weight = None  # W + s Σ B_i A_i while merged(), else None
        self.reset()

    def reset(self) -> None:
        """A fresh live adapter: B = 0."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., d_in] -> [..., d_out], in the dtype of x."""
        per_round = torch.is_tensor(self.c_history)
        if self.merged_weight is not None and not per_round and self.c_history == 1:
            y = F.linear(x, self.merged_weight, self.base.bias)
        else:
            y = self.base(x)
            if len(self.history_A) and (per_round or self.c_history):
                y = y + self.low_rank(x, self.history_A, self.history_B, self.c_history)
        if self.c_live:
            y = y + self.low_rank(x, self.A, self.B, self.c_live)
        return y

    def low_rank(self, x, A, B, gate) -> torch.Tensor:
        """gate · s · B A x"""
        inner = gate * self.scale * F.linear(x, A.to(x.dtype))  # [..., rank]
        return F.linear(inner.to(x.dtype), B.to(x.dtype))

    @property
    def weight(self) -> torch.Tensor:
        """W with the adapters in it: some blocks multiply by it themselves (Jamba's dt_proj)."""
        delta = self.c_live * self.B @ self.A if self.c_live else 0.0
        if torch.is_tensor(self.c_history) or self.c_history:
            delta = delta + (self.c_history * self.history_B) @ self.history_A
        return (self.base.weight.float() + self.scale * delta).to(self.base.weight.dtype)

    @torch.no_grad()
    def history_delta(self) -> torch.Tensor:
        """s Σ_i B_i A_i, [d_out, d_in], float32."""
        return self.scale * self.history_B @ self.history_A


def adapters(model) -> dict[str, BakedLoRA]:
    """{module name: BakedLoRA} in model order. Raises ValueError where nothing is attached."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, BakedLoRA)}
    if not found:
        raise ValueError("no LoRA on this model; fix: call attach(model) first")
    return found


def attach(model, rank: int = 16, alpha: float = 32.0, layers: tuple[float, float] = (0.2, 0.8),
           targets: tuple[str, ...] | None = None, blocks=None) -> None:
    """Freeze the model and wrap the linears of a depth range of its blocks in `BakedLoRA`.

    layers: fractions (from, to) of the depth. targets: last names such as ("q_proj", "v_proj");
    None is every `nn.Linear`. blocks: a list of modules, if not `get_decoder().layers`. Warns with
    the names of what multiplies there and cannot be wrapped: fused experts, 4-bit weights, GPT-2's
    Conv1D. Raises ValueError for bad values, an adapter already there, nothing to wrap.
    """
    if rank < 1 or alpha <= 0:
        raise ValueError(f"rank {rank} and alpha {alpha} must be positive; fix: such as 16 and 32")
    if not 0 <= layers[0] < layers[1] <= 1:
        raise ValueError(f"layers {layers[0]} {layers[1]} must be fractions of the depth, "
                         "0 <= from < to <= 1; fix: such as 0.2 0.8")
    if any(isinstance(m, BakedLoRA) for m in model.modules()):
        raise ValueError("this model has LoRA attached already; fix: detach(model) first")
    if blocks is None:
        try:
            blocks = model.get_decoder().layers  # of a multimodal checkpoint, its text model's
        except AttributeError:
            raise ValueError(f"{type(model).__name__} has no get_decoder().layers; "
                             "fix: attach(model, blocks=[its blocks, in order])") from None

    # 1. every linear in the chosen blocks, but no subclass: it may compute something else
    chosen = blocks[round(layers[0] * len(blocks)): round(layers[1] * len(blocks))]
    inside = {id(m) for block in chosen for m in block.modules()}
    linears = [(parent, name, child) for parent in model.modules()
               for name, child in parent.named_children()
               if id(child) in inside and type(child) is nn.Linear
               and (not targets or name in targets)]

    # 2. what else multiplies in there is named
    wrapped = {id(child.weight): child.weight.numel() for _, _, child in linears}
    others = {name: p.numel() for name, p in model.named_parameters()
              if p.ndim > 1 and id(p) not in wrapped
              and id(model.get_submodule(name.rpartition(".")[0])) in inside}
    if not linears:
        raise ValueError(f"no nn.Linear named {targets or 'anything'} in blocks {layers} of "
                         f"{len(blocks)}, only {', '.join(others) or 'nothing'}; "
                         "fix: other targets or layers")
    if others and not targets:
        share = sum(wrapped.values()) / (sum(wrapped.values()) + sum(others.values()))
        warnings.warn(f"LoRA reaches {share:.0%} of the weights in its blocks; not nn.Linear, "
                      f"and left as they are: {', '.join(others)}", stacklevel=2)

    # 3. wrap
    model.requires_grad_(False)
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


@torch.no_grad()
def fold(model) -> None:
    """Append the live adapter to the history and start a fresh one (B = 0): the function stays."""
    for m in adapters(model).values():
        if m.merged_weight is not None:
            raise ValueError("fold() inside merged() would leave a stale merged weight; "
                             "fix: leave the context first")
        m.history_A = torch.cat([m.history_A, m.A])
        m.history_B = torch.cat([m.history_B, m.B], dim=1)
        m.reset()


def n_rounds(model) -> int:
    """Folded rounds so far."""
    first = next(iter(adapters(model).values()))
    return len(first.history_A) // first.rank


@contextlib.contextmanager
def gates(model, history: float | list[float] = 1.0, live: float = 1.0):
    """Within the context: (0, 0) is the original, (1, 0) the previous student, (1, 1) the student.

    history may be a list, one gate per folded round. Raises ValueError where its length is another.
    """
    modules = list(adapters(model).values())
    if not isinstance(history, (int, float)):
        if len(history) != n_rounds(model):
            raise ValueError(f"{len(history)} history gates for {n_rounds(model)} folded rounds; "
                             "fix: one dose per round")
        all_gates = torch.tensor(history, dtype=torch.float32, device=modules[0].A.device)
        all_equal = len(set(history)) == 1  # one number: 0 skips the product, 1 may use merged()
        history = float(history[0]) if all_equal else all_gates.repeat_interleave(modules[0].rank)
    before = [(m.c_history, m.c_live) for m in modules]
    try:
        for m in modules:
            m.c_history = history.to(m.A.device) if torch.is_tensor(history) else history
            m.c_live = live
        yield
    finally:
        for m, (c_history, c_live) in zip(modules, before):
            m.c_history, m.c_live = c_history, c_live


@contextlib.contextmanager
def merged(model):
    """Within the context, history at gate 1 is one dense weight per layer: as fast as none.

    W + s Σ B A is summed in float32 and rounded once to the dtype of W. W itself stays, so other
    gate values, (0, 0) among them, keep their meaning inside the context. Where a second copy of
    the weights is too much, set `model.lora_merge = False`: then this does nothing.
    """
    modules = adapters(model).values() if getattr(model, "lora_merge", True) else ()
    before = [m.merged_weight for m in modules]
    try:
        for m in modules:
            W = m.base.weight
            m.merged_weight = (W.float() + m.history_delta()).to(W.dtype)
        yield
    finally:
        for m, weight in zip(modules, before):
            m.merged_weight = weight


# ---- files ---------------------------------------------------------------------------------------


def fingerprint(model) -> str:
    """sha256 over a sample of every wrapped base weight, in bfloat16 whatever the load dtype."""
    digest = hashlib.sha256()
    for name, m in adapters(model).items():
        w = m.base.weight.detach().flatten()
        sample = w[:: max(1, len(w) // 4096)].to(torch.bfloat16).contiguous().view(torch.int16)
        digest.update(f"{name}{tuple(m.base.weight.shape)}".encode())
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()


def save(model, path) -> None:
    """The newest folded round in one safetensors file. Raises ValueError before the first fold."""
    if not n_rounds(model):
        raise ValueError("nothing to save: no round is folded yet; fix: fold(model) after training")
    tensors = {}
    for name, m in adapters(model).items():
        tensors[f"{name}.A"] = m.history_A[-m.rank:].cpu().contiguous()
        tensors[f"{name}.B"] = m.history_B[:, -m.rank:].cpu().contiguous()
    about = {**model.lora_config, "round": n_rounds(model) - 1, "fingerprint": fingerprint(model)}
    save_file(tensors, path, metadata={"baked_lora": json.dumps(about)})


def load(model, paths) -> None:
    """Append the round in a file of `save`, or in several in order, attaching first where needed.

    Raises FileNotFoundError, or ValueError naming the file: damaged, not ours, of another base or
    other settings, out of order, not finite. Then the model is as it was.
    """
    attached_here, rounds = False, []
    try:
        for path in [paths] if isinstance(paths, (str, Path)) else paths:
            config, about, tensors = read(path)
            if not hasattr(model, "lora_config"):
                attach(model, **config)
                attached_here = True
            check_fit(model, path, config, about, tensors, n_rounds(model) + len(rounds))
            rounds.append(tensors)
    except (ValueError, OSError):
        if attached_here:
            detach(model)
        raise
    for tensors in rounds:
        for name, m in adapters(model).items():
            m.history_A = torch.cat([m.history_A, tensors[f"{name}.A"].to(m.A.device)])
            m.history_B = torch.cat([m.history_B, tensors[f"{name}.B"].to(m.A.device)], dim=1)


def read(path) -> tuple[dict, dict, dict[str, torch.Tensor]]:
    """-> what `attach` was told, round and fingerprint, and the tensors, of a file of `save`."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no adapter file {path}; fix: give a round's adapter.safetensors")
    try:
        with safe_open(str(path), framework="pt") as f:
            about = json.loads(f.metadata()["baked_lora"])
            tensors = {key: f.get_tensor(key) for key in f.keys()}
        config = {key: about.pop(key) for key in ("rank", "alpha", "layers", "targets")}
        return config, {key: about[key] for key in ("round", "fingerprint")}, tensors
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged, or was not written by lora.save ({e}); "
                         "fix: give a whole adapter.safetensors of a round") from None


def check_fit(model, path, config: dict, about: dict, tensors: dict, round: int) -> None:
    """Raises ValueError where a file does not belong on this model as this round."""
    if model.lora_config != config:
        raise ValueError(f"{path} has {config}, the model has {model.lora_config}; "
                         "fix: detach(model) first, or attach with the file's settings")
    if fingerprint(model) != about["fingerprint"]:
        raise ValueError(f"{path} was trained on another base; fix: load it onto that one")
    if about["round"] != round:
        raise ValueError(f"{path} is round {about['round']}, the model has {round} before it; "
                         "fix: give the files of all rounds, in order")
    wanted = {f"{name}.{part}": getattr(m, part).shape
              for name, m in adapters(model).items() for part in ("A", "B")}
    for key, shape in wanted.items():
        if key not in tensors or tensors[key].shape != shape:
            raise ValueError(f"{path}: {key} is missing or of another shape than {tuple(shape)}; "
                             "fix: use a whole copy")
        if not tensors[key].isfinite().all():
            raise ValueError(f"{path}: {key} is not finite; fix: one from before training broke")
