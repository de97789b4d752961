"""LoRA that remembers: frozen history adapters and one live adapter, each behind a gate. Copy it.

For a linear W x + b, rounds i and s = alpha / rank (Hu et al. 2021, arXiv 2106.09685):

    y = W x + b  +  c_history · s · Σ_i B_i A_i x  +  c_live · s · B A x

    import lora

    lora.attach(model, rank=16, alpha=32)          # B = 0: attaching changes nothing
    train(lora.live_parameters(model))
    lora.fold(model)                               # the live adapter joins the history
    with lora.gates(model, history=0, live=0):     # the original model, bit for bit
        reference = model(ids).logits
    lora.save(model, "round_0.safetensors")        # a round is a file

W is never written to: gates and detach give the base back exactly. The history at gate 1 is one
dense weight W + s Σ B_i A_i of its own: as fast as the original (merge=False saves that memory).
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

    Factors are stored in float32 and cast to the dtype of x. The history's rounds lie side by
    side along the rank, history_A [N·rank, d_in], history_B [d_out, N·rank]: two products.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, merge: bool = True):
        super().__init__()
        d_out, d_in = base.weight.shape
        self.base, self.rank, self.alpha, self.scale = base, rank, alpha, alpha / rank
        new = dict(device=base.weight.device, dtype=torch.float32)
        self.A = nn.Parameter(torch.empty(rank, d_in, **new))
        self.B = nn.Parameter(torch.empty(d_out, rank, **new))
        self.register_buffer("history_A", torch.empty(0, d_in, **new))
        self.register_buffer("history_B", torch.empty(d_out, 0, **new))
        self.c_history = 1.0  # or a [N·rank] tensor: each round's gate, rank times
        self.c_live = 1.0
        self.merge, self.merged_weight = merge, None  # W + s Σ B_i A_i, once there is a history
        self.reset()

    def reset(self) -> None:
        """A fresh live adapter: B = 0."""
        A = nn.init.kaiming_uniform_(torch.empty(self.A.shape), a=math.sqrt(5))
        self.A.data.copy_(A)  # drawn on the CPU: the same on every device
        nn.init.zeros_(self.B)

    @torch.no_grad()
    def append(self, A: torch.Tensor, B: torch.Tensor) -> None:
        """One more round in the history, A [rank, d_in], B [d_out, rank]."""
        self.history_A = torch.cat([self.history_A, A.to(self.A.device)])
        self.history_B = torch.cat([self.history_B, B.to(self.B.device)], dim=1)
        if self.merge:  # summed in float32, rounded once to the dtype of W
            W = self.base.weight
            self.merged_weight = (W.float() + self.history_delta()).to(W.dtype)

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
        """gate · s · B A x, the gate and s in B, where they cost least."""
        B = (gate * self.scale * B).to(x.dtype)
        return F.linear(F.linear(x, A.to(x.dtype)), B)

    @property
    def bias(self):
        return self.base.bias

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


def is_attached(model) -> bool:
    return any(isinstance(m, BakedLoRA) for m in model.modules())


def adapters(model) -> dict[str, BakedLoRA]:
    """{module name: BakedLoRA} in model order. Raises ValueError where nothing is attached."""
    if not is_attached(model):
        raise ValueError("no LoRA on this model; fix: call attach(model) first")
    return {name: m for name, m in model.named_modules() if isinstance(m, BakedLoRA)}


def attach(model, rank: int = 16, alpha: float = 32.0, layers: tuple[float, float] = (0.2, 0.8),
           targets: tuple[str, ...] | None = None, blocks=None, merge: bool = True) -> None:
    """Freeze the model and wrap the linears of a depth range of its blocks in `BakedLoRA`.

    layers: fractions (from, to) of the depth. targets: last names such as ("q_proj", "v_proj");
    None is every `nn.Linear`. blocks: a list of modules, if not `get_decoder().layers`. Warns with
    the names of what multiplies there and cannot be wrapped: fused experts, 4-bit weights, GPT-2's
    Conv1D. Raises ValueError for bad values, an adapter already there, nothing to wrap.
    """
    if blocks is None:
        blocks = model.get_decoder().layers  # of a multimodal checkpoint, its text model's

    # 1. every linear in the chosen blocks, but no subclass: it may compute something else
    chosen = blocks[int(layers[0] * len(blocks)): int(layers[1] * len(blocks) + 0.5)]
    inside = {id(m) for block in chosen for m in block.modules()}
    names = [name for name, m in model.named_modules() if id(m) in inside
             and type(m) is nn.Linear and (not targets or name.rpartition(".")[2] in targets)]
    # 2. what else multiplies in there is named
    sizes = {key: p.numel() for key, p in model.named_parameters()
             if p.ndim > 1 and id(model.get_submodule(key.rpartition(".")[0])) in inside}
    others = [key for key in sizes if key.removesuffix(".weight") not in names]
    if not names:
        raise ValueError(f"no nn.Linear named {targets or 'anything'} in blocks {layers}, only "
                         f"{', '.join(others) or 'nothing'}; fix: 0 <= from < to <= 1, or targets")
    if others and not targets:
        share = 1 - sum(sizes[key] for key in others) / sum(sizes.values())
        warnings.warn(f"LoRA reaches {share:.0%} of the weights in its blocks; not nn.Linear, "
                      f"and left as they are: {', '.join(others)}", stacklevel=2)
    wrap(model, names, rank, alpha, merge)


def wrap(model, names: list[str], rank: int, alpha: float, merge: bool = True) -> None:
    """Freeze the model and put a `BakedLoRA` around the linears of these full names."""
    if rank < 1 or alpha <= 0:
        raise ValueError(f"rank {rank} and alpha {alpha} must be positive; fix: such as 16 and 32")
    if is_attached(model):
        raise ValueError("this model has LoRA attached already; fix: detach(model) first")
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, BakedLoRA(model.get_submodule(name), rank, alpha, merge))


def detach(model) -> None:
    """Put the plain linears back; every base tensor is the one that was there before `attach`."""
    for name, module in adapters(model).items():
        model.set_submodule(name, module.base)


def live_parameters(model) -> list[nn.Parameter]:
    """The trainable factors A and B of every live adapter."""
    return [p for m in adapters(model).values() for p in (m.A, m.B)]


def fold(model) -> None:
    """Append the live adapter to the history and start a fresh one (B = 0): the function stays."""
    for m in adapters(model).values():
        m.append(m.A.detach(), m.B.detach())
        m.reset()


def n_rounds(model) -> int:
    """Folded rounds so far."""
    first = next(iter(adapters(model).values()))
    return len(first.history_A) // first.rank


@contextlib.contextmanager
def gates(model, history: float | list[float] = 1.0, live: float = 1.0):
    """Within the context: (0, 0) is the original, (1, 0) the student, (1, 1) with its live adapter.

    history may be a list, one gate per folded round. Raises ValueError where its length is another.
    """
    modules = list(adapters(model).values()) if is_attached(model) or history or live else []
    if not isinstance(history, (int, float)):
        if len(history) != n_rounds(model):
            raise ValueError(f"{len(history)} history gates for {n_rounds(model)} folded rounds; "
                             "fix: one gate per round")
        all_gates = torch.tensor(history, dtype=torch.float32, device=modules[0].A.device)
        all_equal = len(set(history)) == 1  # one number: 0 skips the product, 1 takes the merged
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


def fingerprint(model, names) -> str:
    """sha256 over a sample of each named linear's base weight, in bfloat16 in whatever dtype."""
    digest = hashlib.sha256()
    for name in names:
        linear = model.get_submodule(name)
        w = getattr(linear, "base", linear).weight.detach()
        sample = w.flatten()[:: max(1, w.numel() // 4096)].to(torch.bfloat16).contiguous()
        digest.update(f"{name}{tuple(w.shape)}".encode())
        digest.update(sample.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def factor_shapes(model, names: list[str], rank: int) -> dict[str, tuple[int, int]]:
    """{tensor name in a file: its shape} of the named linears."""
    shapes = {}
    for name in names:
        linear = model.get_submodule(name)
        d_out, d_in = getattr(linear, "base", linear).weight.shape
        shapes |= {f"{name}.A": (rank, d_in), f"{name}.B": (d_out, rank)}
    return shapes


def save(model, path) -> None:
    """The newest folded round in one safetensors file. Raises ValueError before the first fold."""
    if not n_rounds(model):
        raise ValueError("nothing to save: no round is folded yet; fix: fold(model) after training")
    tensors = {}
    for name, m in adapters(model).items():
        tensors[f"{name}.A"] = m.history_A[-m.rank:].cpu().contiguous()
        tensors[f"{name}.B"] = m.history_B[:, -m.rank:].cpu().contiguous()
    metadata = {"rank": m.rank, "alpha": m.alpha, "round": n_rounds(model) - 1,
                "fingerprint": fingerprint(model, adapters(model))}
    save_file(tensors, path, metadata={"baked_lora": json.dumps(metadata)})


def load(model, paths, merge: bool = True) -> None:
    """Append the round in a file of `save`, or in several, wrapping first where needed.

    Raises FileNotFoundError, or ValueError naming the file: damaged, not ours, of another base or
    other settings, a round missing, not finite. Then the model is as it was.
    """
    # 1. what is on the model; on a plain one the first file decides
    modules = adapters(model) if is_attached(model) else {}
    names, done = list(modules), n_rounds(model) if modules else 0
    settings = next(((m.rank, m.alpha) for m in modules.values()), None)

    # 2. every file is read and checked before anything changes
    rounds = []
    files = [(path, *read(path)) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    for path, metadata, tensors in sorted(files, key=lambda file: file[1]["round"]):
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        names = names or [name for name, _ in model.named_modules() if f"{name}.A" in shapes]
        settings = settings or metadata["settings"]
        wanted = (settings, factor_shapes(model, names, settings[0]))
        faults = {"was trained on another base; fix: load it onto that one":
                  not names or metadata["fingerprint"] != fingerprint(model, names),
                  "has another rank, alpha, layers or shapes; fix: detach(model), or a whole copy":
                  (metadata["settings"], shapes) != wanted,
                  f"is round {metadata['round']}, the model has {done + len(rounds)} before it; "
                  "fix: give all rounds": metadata["round"] != done + len(rounds),
                  "is not finite; fix: a round from before training broke":
                  not all(tensor.isfinite().all() for tensor in tensors.values())}
        for fault, found in faults.items():
            if found:
                raise ValueError(f"{path} {fault}")
        rounds.append(tensors)

    # 3. wrapped, and appended
    if rounds and not modules:
        wrap(model, names, *settings, merge)
    for tensors in rounds:
        for name, m in adapters(model).items():
            m.append(tensors[f"{name}.A"], tensors[f"{name}.B"])


def read(path) -> tuple[dict, dict[str, torch.Tensor]]:
    """-> {settings (rank, alpha), round, fingerprint}, and the tensors, of a file of `save`."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no adapter file {path}; fix: give a round's adapter.safetensors")
    try:
        with safe_open(str(path), framework="pt") as f:
            metadata = json.loads(f.metadata()["baked_lora"])
            tensors = {key: f.get_tensor(key) for key in f.keys()}
        return {"settings": (metadata["rank"], metadata["alpha"]), "round": int(metadata["round"]),
                "fingerprint": metadata["fingerprint"]}, tensors
    except (SafetensorError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged, or was not written by lora.save ({e}); "
                         "fix: give a whole adapter.safetensors of a round") from None
