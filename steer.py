"""Steering vectors: extract one from a persona pair, add it to the residual stream. Copy this file.

    v_l = mean over contexts of  h_l(context under pos) − h_l(context under neg)
    h_l ← h_l + dose · v_l                                 for l in a narrow middle band

h_l [d_model] is the residual stream after decoder block l at the assistant tag, the last position
of the prompt (difference of means: Marks & Tegmark 2023, arXiv 2310.06824; added from the assistant
tag on: CAA, Rimsky et al. 2023, arXiv 2312.06681). v is not normalised: dose 1 is the distance
between the two personas. Prompts are token ids. With any chat model of transformers:

    from steer import band, extract_vector

    def prompt(user, system):  # the model's own chat template, up to the assistant tag
        turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return tok.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]

    pos = [prompt(context, "You care about people.") for context in contexts]
    neg = [prompt(context, "You obey authority.") for context in contexts]
    vector = extract_vector(model, pos, neg, band(model, (0.45, 0.55)))
    ids = torch.tensor([prompt("My boss told me to ignore a crying customer.", "Be helpful.")])
    with vector.at(model, dose=2, last_only=True):
        out = model.generate(ids, max_new_tokens=64, use_cache=True)
    print(tok.decode(out[0]))

    python steer.py --trait care --dose 0 2 4 --prompt "My boss told me to ignore a customer."
"""
import contextlib
import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm


def band(model, layers: tuple[float, float]) -> list[int]:
    """Block indices of a depth range given as fractions; at least one.

    Raises ValueError for a range that is reversed or leaves 0 to 1.
    """
    if not 0 <= layers[0] < layers[1] <= 1:
        raise ValueError(f"layers {layers[0]} {layers[1]} must be fractions of the depth, "
                         "0 <= from < to <= 1; fix: such as 0.45 0.55")
    depth = len(model.get_decoder().layers)
    first = min(int(layers[0] * depth), depth - 1)
    return list(range(first, max(first + 1, int(layers[1] * depth + 0.5))))


def residual(output) -> torch.Tensor:
    """The residual stream [batch, seq, d_model] in what a decoder block returns."""
    return output if torch.is_tensor(output) else output[0]


@dataclass
class SteeringVector:
    """{layer: [d_model]} in float32; `with vector.at(model, dose): ...` steers what runs inside."""
    layers: dict[int, torch.Tensor]
    metadata: dict[str, str] = field(default_factory=dict)  # persona and model, kept in the file

    @contextlib.contextmanager
    def at(self, model, dose, last_only: bool | int = False):
        """Within the context, dose · v is added to the output of every block that has a v.

        dose: a float, or a [batch] tensor, one dose per row, read at each pass. last_only: steer
        the last position of each pass alone, or the last n.
        Raises ValueError where the vector does not fit the model.
        """
        blocks, d_model = model.get_decoder().layers, model.config.get_text_config().hidden_size
        width = len(next(iter(self.layers.values())))
        if max(self.layers) >= len(blocks) or width != d_model:
            raise ValueError(f"vector of layers {list(self.layers)} and width {width} does not fit "
                             f"a model of {len(blocks)} layers and width {d_model}; "
                             "fix: extract it from this model")

        def steer(v, block, args, output):
            h = residual(output)  # [batch, seq, d_model]
            doses = torch.as_tensor(dose, dtype=torch.float32, device=h.device)
            n = last_only or h.shape[1]  # positions to steer: True is 1, False is all
            step = self.step(h[:, -n:], v.to(h.device), doses.reshape(-1, 1, 1)).to(h.dtype)
            h = torch.cat([h[:, :-n], h[:, -n:] + step], 1)
            return h if torch.is_tensor(output) else (h, *output[1:])

        with contextlib.ExitStack() as hooks:  # removes them on the way out
            for l, v in self.layers.items():
                hook = functools.partial(steer, v)
                hooks.enter_context(blocks[l].register_forward_hook(hook))
            yield

    def step(self, h: torch.Tensor, v: torch.Tensor, doses: torch.Tensor) -> torch.Tensor:
        """What is added to h [batch, n, d_model] at doses [batch, 1, 1], float32."""
        return doses * v

    def cosine(self, other: "SteeringVector") -> float:
        """Cosine over the concatenated layers of both."""
        a, b = (torch.cat([v for _, v in sorted(s.layers.items())]) for s in (self, other))
        return torch.cosine_similarity(a, b, dim=0).item()

    def save(self, path) -> None:
        """safetensors, one `layer.N` tensor each."""
        tensors = {f"layer.{l}": v.cpu().contiguous() for l, v in self.layers.items()}
        save_file(tensors, path, metadata={"steering_vector": json.dumps(self.metadata)})

    @classmethod
    def load(cls, path) -> "SteeringVector":
        """Raises FileNotFoundError, or ValueError for a damaged, foreign or not finite file."""
        if not Path(path).exists():
            raise FileNotFoundError(f"no vector file {path}; fix: give a vector.safetensors")
        try:
            with safe_open(str(path), framework="pt") as f:
                metadata = json.loads(f.metadata()["steering_vector"])
                layers = {int(key.removeprefix("layer.")): f.get_tensor(key) for key in f.keys()}
        except (SafetensorError, KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{path} is damaged, or was not written by SteeringVector.save ({e}); "
                             "fix: give a vector.safetensors of a run") from None
        if not layers or not all(v.isfinite().all() for v in layers.values()):
            raise ValueError(f"{path} is empty or not finite; fix: extract the vector again")
        return cls(dict(sorted(layers.items())), metadata)


class _Stop(Exception):
    """Raised by a hook once the last wanted block has run."""


@torch.no_grad()
def mean_residual(model, prompts: list[list[int]], layers: list[int],
                  batch_size: int = 32) -> dict[int, torch.Tensor]:
    """{layer: mean over prompts of the residual stream at the last position, [d_model]}."""
    total = dict.fromkeys(layers, 0.0)

    def read(l, block, args, output):
        total[l] = total[l] + residual(output)[:, -1].cpu().double().sum(0)  # [batch, d_model]
        if l == max(layers):
            raise _Stop  # blocks above the last wanted one need not run

    rows = sorted(prompts, key=len)  # like lengths in a batch
    check_room(model, len(rows[-1]))
    decoder = model.get_decoder()
    with contextlib.ExitStack() as hooks:
        for l in layers:
            hook = functools.partial(read, l)
            hooks.enter_context(decoder.layers[l].register_forward_hook(hook))
        parts = batches(model, range(len(rows)), list(map(len, rows)), batch_size)
        for part in tqdm(parts, "extract", leave=False, disable=None):
            ids, mask, positions = left_pad([rows[i] for i in part], model.device)
            with contextlib.suppress(_Stop):
                decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return {l: (t / len(rows)).float() for l, t in total.items()}


def extract_vector(model, pos: list[list[int]], neg: list[list[int]], layers: list[int],
                   batch_size: int = 32, metadata: dict[str, str] | None = None) -> SteeringVector:
    """Mean difference of the residual stream between two lists of prompts, not normalised.

    pos, neg: the same contexts under the two personas, as token ids. layers: block indices (see
    `band`). metadata: kept in the vector's file. Raises ValueError for no prompts, or equal ones.
    """
    if not pos or not neg or pos == neg:
        raise ValueError("no prompts to extract from, or the same under both personas; "
                         "fix: at least one context, and two different personas")
    h_pos = mean_residual(model, pos, layers, batch_size)
    h_neg = mean_residual(model, neg, layers, batch_size)
    metadata = {"model_type": model.config.model_type, **(metadata or {})}
    return SteeringVector({l: h_pos[l] - h_neg[l] for l in layers}, metadata)


@torch.no_grad()
def calibrate(model, vector: SteeringVector, prompts: list[list[int]], nats: float,
              tokens: int = 16, stop: list[int] = ()) -> float:
    """The dose at which the vector moves the model's next token by `nats`; to 1 %, by bisection.

    How far it moves: the 95th percentile, over prompts and the first `tokens` tokens of their
    answers, of KL(steered ‖ unsteered) (iso-KL: wassname/steering-lite). The answers are the
    unsteered model's, greedy, up to a token of `stop` and with it.
    Raises ValueError where no dose up to 1024 does it.
    """
    check_room(model, max(map(len, prompts)), tokens)
    parts = batches(model, range(len(prompts)), [len(p) + tokens for p in prompts], len(prompts))
    # under long rope, the prompts on the larger side of its switch
    ids, mask, _ = left_pad([prompts[i] for i in max(parts, key=len)], model.device)

    def next_logits(n):  # of the last n positions, [prompts, n, vocab]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False,
                     logits_to_keep=n).logits[:, -n:]  # some models keep all

    def next_logp(dose):  # of the answers' tokens, steered from the assistant tag on
        with vector.at(model, dose, last_only=tokens + 1):
            return next_logits(tokens + 1)[:, :-1].float().log_softmax(-1)  # t predicts t + 1

    def moved(dose):
        logp = next_logp(dose)
        kl = (logp.exp() * (logp - unsteered)).sum(-1)  # [prompts, tokens]
        return kl[inside].quantile(0.95).item()

    # 1. the unsteered answers
    for _ in range(tokens):
        ids, mask = torch.cat([ids, next_logits(1).argmax(-1)], 1), F.pad(mask, (0, 1), value=1)
    ends = torch.isin(ids[:, -tokens:], torch.tensor(list(stop), device=ids.device)).long()
    inside = ends.cumsum(1) - ends == 0  # no end before this token
    unsteered = next_logp(0.0)

    # 2. bracket the dose within a factor of two, then bisect
    low, high = 0.5, 1.0
    while moved(high) < nats:
        low, high = high, 2 * high
        if high > 1024:
            raise ValueError(f"no dose up to 1024 moves the next token by {nats} nats; "
                             "fix: fewer nats, or a vector of another persona pair")
    while moved(low) > nats:
        low, high = low / 2, low
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if moved(middle) < nats else (low, middle)
    return math.sqrt(low * high)


def left_pad(rows: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> input_ids, attention_mask, position_ids, each [batch, longest].

    Padding is id 0, whatever that means to the tokenizer: the mask hides it.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)  # the first real token is at position 0


def rope_switch(model) -> int:
    """The length beyond which long rope (Phi-3) takes other factors for a whole batch, or 0."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else 0


def batches(model, order, lengths: list[int], rows: int) -> list[list[int]]:
    """`order`, indices into lengths, cut into batches of at most `rows` rows and `tokens` tokens.

    Under long rope no batch has rows on both sides of the switch.
    """
    tokens = 32768 if model.device.type == "cpu" else 131072  # with padding
    cut, switch = [], rope_switch(model)
    for i in sorted(order, key=lambda i: switch and lengths[i] > switch):  # else the order stays
        longest = max(lengths[k] for k in [i, *cut[-1]]) if cut else 0
        is_full = not cut or len(cut[-1]) == rows or (len(cut[-1]) + 1) * longest > tokens
        if is_full or switch and (lengths[i] > switch) != (lengths[cut[-1][0]] > switch):
            cut.append([])
        cut[-1].append(i)
    return cut


def check_room(model, longest: int, new: int = 0) -> None:
    """Raises ValueError where `longest` prompt tokens and `new` ones exceed the model's context."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room and longest + new > room:
        raise ValueError(f"a prompt of {longest} tokens and {new} new ones exceed the model's "
                         f"context of {room}; fix: a shorter prompt or fewer new tokens")


if __name__ == "__main__":
    from tools.commands import SteerConfig, cli, compare_doses
    cli(SteerConfig, compare_doses)
