"""Steering vectors: extract one from a persona pair, add it to the residual stream. Copy this file.

    v_l = mean over contexts of  h_l(persona.pos, context) − h_l(persona.neg, context)
    h_l ← h_l + dose · v_l                                 for l in a narrow middle band

h_l [d_model] is the residual stream after decoder block l at the assistant tag, the last position
of the generation prompt (difference of means: Marks & Tegmark 2023, arXiv 2310.06824; added from
the assistant tag on: CAA, Rimsky et al. 2023, arXiv 2312.06681). v is left unnormalised: dose 1 is
the distance between the two personas. With any chat model of transformers and its tokenizer:

    from steer import Persona, band, chat_ids, extract_vector

    persona = Persona(pos="You care about people.", neg="You obey authority.")
    vector = extract_vector(model, tok, persona, contexts, band(model, (0.45, 0.55)))
    prompt = torch.tensor([chat_ids(tok, "My boss told me to ignore a crying customer.")])
    with vector.at(model, dose=2, last_only=True):
        print(tok.decode(model.generate(prompt, max_new_tokens=64)[0]))

    python steer.py --trait care --dose 0 2 4 --prompt "My boss told me to ignore a customer."
"""
import contextlib
import functools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.optimize import brentq
from tqdm import tqdm

NEUTRAL = "You are a helpful assistant."


@dataclass
class Persona:
    """Two opposite system prompts; pos − neg is the direction of the trait."""
    pos: str
    neg: str


# ---- the vector ----------------------------------------------------------------------------------


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
    about: dict[str, str] = field(default_factory=dict)  # persona and model, kept in the file

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

        def steer_with(v):
            def hook(block, args, output):
                nonlocal v
                h = residual(output)  # [batch, seq, d_model]
                v = v.to(h.device)  # once: blocks may be on several devices
                doses = torch.as_tensor(dose, dtype=torch.float32, device=h.device)
                n = last_only or h.shape[1]  # positions to steer: True is 1, False is all
                step = self.step(h[:, -n:], v, doses.reshape(-1, 1, 1)).to(h.dtype)
                h = torch.cat([h[:, :-n], h[:, -n:] + step], 1)
                return h if torch.is_tensor(output) else (h, *output[1:])
            return hook

        with contextlib.ExitStack() as hooks:  # removes them on the way out
            for l, v in self.layers.items():
                hooks.enter_context(blocks[l].register_forward_hook(steer_with(v)))
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
        save_file(tensors, path, metadata={"steering_vector": json.dumps(self.about)})

    @classmethod
    def load(cls, path) -> "SteeringVector":
        """Raises FileNotFoundError, or ValueError for a damaged, foreign or not finite file."""
        if not Path(path).exists():
            raise FileNotFoundError(f"no vector file {path}; fix: give a vector.safetensors")
        try:
            with safe_open(str(path), framework="pt") as f:
                about = json.loads((f.metadata() or {}).get("steering_vector", "null"))
                tensors = {key: f.get_tensor(key) for key in f.keys()}
        except SafetensorError as e:
            raise ValueError(f"{path} is damaged or not safetensors ({e}); "
                             "fix: extract the vector again") from None
        if about is None or not tensors:
            raise ValueError(f"{path} was not written by SteeringVector.save; "
                             "fix: give a vector.safetensors of a run")
        if not all(v.isfinite().all() for v in tensors.values()):
            raise ValueError(f"{path} is not finite; fix: extract the vector again")
        layers = {int(key.removeprefix("layer.")): v for key, v in tensors.items()}
        return cls(dict(sorted(layers.items())), about)


# ---- extraction ----------------------------------------------------------------------------------


class _Stop(Exception):
    """Raised by a hook once the last wanted block has run."""


@torch.no_grad()
def mean_residual(model, tok, system: str, contexts: list[str], layers: list[int],
                  batch_size: int = 32) -> dict[int, torch.Tensor]:
    """{layer: mean over contexts of the residual stream at the assistant tag, [d_model]}."""
    total = {}

    def read(l):
        def hook(block, args, output):
            at_the_tag = residual(output)[:, -1]  # [batch, d_model]
            total[l] = total.get(l, 0) + at_the_tag.cpu().double().sum(0)
            if l == max(layers):
                raise _Stop  # blocks above the last wanted one need not run
        return hook

    rows = sorted((chat_ids(tok, c, system) for c in contexts), key=len)  # like lengths in a batch
    check_room(model, len(rows[-1]))
    decoder = model.get_decoder()
    with contextlib.ExitStack() as hooks:
        for l in layers:
            hooks.enter_context(decoder.layers[l].register_forward_hook(read(l)))
        for i in tqdm(range(0, len(rows), batch_size), "extract", leave=False, disable=None):
            ids, mask, positions = left_pad(rows[i:i + batch_size], model.device)
            with contextlib.suppress(_Stop):
                decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return {l: (t / len(contexts)).float() for l, t in total.items()}


def extract_vector(model, tok, persona: Persona, contexts: list[str], layers: list[int],
                   batch_size: int = 32) -> SteeringVector:
    """Mean difference of the residual stream between the personas over `contexts`, unnormalised.

    layers: block indices (see `band`). Raises ValueError for no contexts or half a persona.
    """
    if not contexts:
        raise ValueError("no contexts to extract from; fix: give at least one user message")
    if not persona.pos.strip() or not persona.neg.strip() or persona.pos == persona.neg:
        raise ValueError(f"persona needs two different texts, has '{persona.pos}' and "
                         f"'{persona.neg}'; fix: --pos and --neg")
    pos = mean_residual(model, tok, persona.pos, contexts, layers, batch_size)
    neg = mean_residual(model, tok, persona.neg, contexts, layers, batch_size)
    about = {"pos": persona.pos, "neg": persona.neg, "model_type": model.config.model_type}
    return SteeringVector({l: pos[l] - neg[l] for l in layers}, about)


# ---- the dose ------------------------------------------------------------------------------------


@torch.no_grad()
def calibrate(model, tok, vector: SteeringVector, prompts: list[str], nats: float,
              tokens: int = 16) -> float:
    """The dose at which the vector moves the model's next token by `nats`, on any trait and model.

    To 1 % of the dose, by Brent's method: the 95th percentile, over prompts and the first `tokens`
    tokens of their answers, of KL(steered ‖ unsteered) (iso-KL: wassname/steering-lite). The
    answers are the unsteered model's, greedy. Raises ValueError where no dose up to 1024 does it.
    """
    # 1. the unsteered answers, and what the model says at each of their positions
    ids, mask, _ = left_pad([chat_ids(tok, p) for p in prompts], model.device)
    check_room(model, ids.shape[1], tokens)
    ids = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0,
                         min_new_tokens=tokens, max_new_tokens=tokens,
                         repetition_penalty=1.0)
    mask = F.pad(mask, (0, tokens), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def next_logp(dose):  # [prompts, tokens, vocab], steered from the assistant tag on
        with vector.at(model, dose, last_only=tokens + 1):
            z = model(input_ids=ids, attention_mask=mask, position_ids=positions,
                      use_cache=False, logits_to_keep=tokens + 1).logits
        return z[:, -tokens - 1:-1].float().log_softmax(-1)  # position t predicts t + 1
    unsteered = next_logp(0.0)

    @functools.cache
    def log_moved(log_dose):  # of the 95th percentile of KL(steered ‖ unsteered)
        logp = next_logp(math.exp(log_dose))
        kl = (logp.exp() * (logp - unsteered)).sum(-1)  # [prompts, tokens]
        return math.log(max(kl.quantile(0.95).item(), 1e-9))

    # 2. a factor of two that holds the dose; in logarithms the curve between is almost straight
    wanted, double, log_dose = math.log(nats), math.log(2), 0.0
    while log_moved(log_dose) < wanted:
        log_dose += double
        if math.exp(log_dose) > 1024:
            raise ValueError(f"no dose up to 1024 moves the next token by {nats} nats; "
                             "fix: fewer nats, or a vector of another persona pair")
    while log_moved(log_dose - double) > wanted:
        log_dose -= double

    def excess(log_dose):
        return log_moved(log_dose) - wanted
    return math.exp(brentq(excess, log_dose - double, log_dose, xtol=0.01))


# ---- prompts -------------------------------------------------------------------------------------


def dated(template: str, date) -> str:
    """The chat template, with `date` as its today: a macro in the place of its `strftime_now`.

    transformers lets no function of ours into a template.
    """
    said = "form"
    for code in ("Y", "y", "B", "b", "m", "-m", "d", "-d", "A", "a", "j", "H", "M", "S"):
        said += f" | replace('%{code}', '{date.strftime('%' + code)}')"
    return "{%- macro strftime_now(form) -%}{{ " + said + " }}{%- endmacro -%}" + template


def chat_text(tok, user: str, system: str = NEUTRAL) -> str:
    """One user turn as the chat template renders it, up to where the assistant's words begin.

    Where the template refuses or drops a system turn, the system text goes in front of the user's.
    Thinking is switched off, or its block closed; a channel for the answer (GPT-OSS) is opened.
    Raises ValueError for an empty user text.
    """
    if not user.strip():
        raise ValueError("empty prompt; fix: give at least one word")
    system = system.strip()  # templates trim it, and it is looked for below

    how = dict(tokenize=False, enable_thinking=False)
    if getattr(tok, "chat_date", None):  # a datetime.date: what templates print as today's
        how["chat_template"] = dated(tok.get_chat_template(), tok.chat_date)

    def render(turns, **more):
        return tok.apply_chat_template(turns, **how, **more)
    turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    try:
        text = render(turns, add_generation_prompt=True)
    except Exception:  # templates refuse in their own words (jinja2.TemplateError and others)
        text = ""
    if system not in text:
        turns = [{"role": "user", "content": f"{system}\n\n{user}"}]
        text = render(turns, add_generation_prompt=True)

    # a marked answer shows what the template itself puts before an answer's words
    mark = "\u241f"
    with contextlib.suppress(Exception):  # some refuse a conversation that ends so
        answered = render([*turns, {"role": "assistant", "content": mark}]).rpartition(mark)[0]
        if answered.startswith(text) and answered[len(text):].strip():  # more: a channel
            return answered
        thinks = re.search(r"<(\w+)>\s*$", text.removeprefix(answered))  # less: an open <think>
        if answered and text.startswith(answered) and thinks:
            return f"{text.rstrip()}\n\n</{thinks[1]}>\n\n"
    return text


def chat_ids(tok, user: str, system: str = NEUTRAL) -> list[int]:
    """The token ids of `chat_text`, whose end, the assistant tag, is where steering begins."""
    return tok(chat_text(tok, user, system), add_special_tokens=False).input_ids


def left_pad(rows: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> input_ids, attention_mask, position_ids, each [batch, longest].

    Padding is id 0, whatever that means to the tokenizer: the mask hides it.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)  # the first real token is at position 0


def check_room(model, longest: int, new: int = 0) -> None:
    """Raises ValueError where `longest` prompt tokens and `new` ones exceed the model's context."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room and longest + new > room:
        raise ValueError(f"a prompt of {longest} tokens and {new} new ones exceed the model's "
                         f"context of {room}; fix: a shorter prompt or fewer new tokens")


# ---- the command ---------------------------------------------------------------------------------

if __name__ == "__main__":
    from typing import Literal

    from common import models
    from common import runs

    @dataclass
    class Config:
        prompt: str  # what to ask
        model: str = models.EMBEDDED  # smollm2, a local folder, or a hub id
        device: str = "auto"  # auto, cuda, mps or cpu
        dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"  # auto: bf16 where native
        seed: runs.Seed = 0  # of the sampling; every dose draws the same numbers
        trait: str = "care"  # name of a persona pair in data/personas.json
        pos: str | None = None  # system prompt of the trait, instead of --trait
        neg: str | None = None  # system prompt of its opposite
        n_contexts: runs.AtLeast1 = 128  # contexts the vector is averaged over
        steer_layers: runs.DepthRange = (0.45, 0.55)  # depth range that is steered, as fractions
        dose: runs.Doses = (0.0, 2.0, 4.0)  # doses to compare, one completion each
        max_new_tokens: runs.AtLeast1 = 64  # longest completion, in tokens
        temperature: runs.From0 = 1.0  # 0 is greedy

    def main(cfg: Config) -> None:
        data = Path(__file__).parent / "data"
        personas = json.loads((data / "personas.json").read_text())["personas"]
        contexts = json.loads((data / "contexts.json").read_text())["contexts"]
        if (cfg.pos is None) != (cfg.neg is None):
            raise ValueError("--pos and --neg go together; fix: give both")
        if cfg.pos is None and cfg.trait not in personas:
            raise ValueError(f"unknown trait '{cfg.trait}'; "
                             f"fix: one of {', '.join(personas)}, or --pos and --neg")
        pair = {"pos": cfg.pos, "neg": cfg.neg} if cfg.pos is not None else personas[cfg.trait]

        model, tok = models.load(cfg.model, cfg.device, cfg.dtype)
        prompt = torch.tensor([chat_ids(tok, cfg.prompt)], device=model.device)
        check_room(model, prompt.shape[1], cfg.max_new_tokens)
        vector = extract_vector(model, tok, Persona(pair["pos"], pair["neg"]),
                                contexts[:cfg.n_contexts], band(model, cfg.steer_layers))
        how = dict(max_new_tokens=cfg.max_new_tokens, do_sample=False)
        if cfg.temperature:
            how |= dict(do_sample=True, temperature=cfg.temperature, top_k=64, top_p=0.95)
        for dose in cfg.dose:
            torch.manual_seed(cfg.seed)
            with vector.at(model, dose, last_only=True):
                out = model.generate(prompt, pad_token_id=0, **how)
            text = tok.decode(out[0, prompt.shape[1]:], skip_special_tokens=True)
            print(f"\n--- dose {dose:g}\n{text}")

    runs.cli(Config, main)
