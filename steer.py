"""Steering vectors: extract one from a persona pair, add it to the residual stream, sample with it. One file: copy it.

    v_l = mean over contexts of  h_l(persona.pos, context) − h_l(persona.neg, context)        h_l: [d_model]
    h_l ← h_l + dose · v_l                                                                    for l in a narrow middle band

h_l is the residual stream after decoder block l at the assistant tag, the last position of the generation prompt
(difference of means: Marks & Tegmark 2023, arXiv 2310.06824; added from the assistant tag on: CAA, Rimsky et al. 2023,
arXiv 2312.06681). v is left unnormalised, so dose 1 is the distance between the two personas.

    python steer.py --trait care --dose 0 2 4 --prompt "My boss told me to ignore a crying customer. What now?"
    python steer.py export runs/X --to gguf --out care.gguf          # a control vector for llama.cpp
"""
import contextlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicLayer

NEUTRAL = "You are a helpful assistant."


@dataclass
class Persona:
    """Two opposite system prompts; pos − neg is the direction of the trait."""
    pos: str
    neg: str


def chat_ids(tok, user: str, system: str = NEUTRAL) -> list[int]:
    """Token ids of one user turn up to and including the assistant tag.

    Where the chat template refuses or drops a system turn, the system text goes in front of the user's.
    Raises ValueError for an empty user text.
    """
    if not user.strip():
        raise ValueError("empty prompt; fix: give at least one word")
    def render(messages):
        return tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    try:
        text = render([{"role": "system", "content": system}, {"role": "user", "content": user}])
    except Exception:  # templates refuse in their own words (jinja2.TemplateError and others)
        text = ""
    if system not in text:
        text = render([{"role": "user", "content": f"{system}\n\n{user}"}])
    return tok(text, add_special_tokens=False).input_ids


def left_pad(rows: list[list[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> input_ids, attention_mask, position_ids, each [batch, longest]."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def band(model, layers: tuple[float, float]) -> list[int]:
    """Block indices of a depth range given as fractions; at least one. Raises ValueError for a reversed or foreign range."""
    if not 0 <= layers[0] < layers[1] <= 1:
        raise ValueError(f"layers {layers[0]} {layers[1]} must be fractions of the depth, 0 <= from < to <= 1; fix: such as 0.45 0.55")
    depth = len(model.get_decoder().layers)
    first = min(int(layers[0] * depth), depth - 1)
    return list(range(first, max(first + 1, int(layers[1] * depth + 0.5))))


@dataclass
class SteeringVector:
    """{layer: [d_model]} in float32; `with vector.at(model, dose): ...` adds dose · v at every position that is run."""
    layers: dict[int, torch.Tensor]
    about: dict[str, str] = field(default_factory=dict)  # persona and model, kept in the file

    @contextlib.contextmanager
    def at(self, model, dose):
        """dose: a float, or a [batch] tensor with one dose per row. Raises ValueError where the vector does not fit the model."""
        decoder_layers = model.get_decoder().layers
        d_model = model.config.get_text_config().hidden_size
        if max(self.layers) >= len(decoder_layers) or any(len(v) != d_model for v in self.layers.values()):
            raise ValueError(f"vector of layers {list(self.layers)} and width {len(next(iter(self.layers.values())))} does not "
                             f"fit a model of {len(decoder_layers)} layers and width {d_model}; fix: extract it from this model")

        def add(v):
            def hook(block, args, output):
                h = output if torch.is_tensor(output) else output[0]  # [batch, seq, d_model]
                step = torch.as_tensor(dose, dtype=torch.float32, device=h.device).reshape(-1, 1, 1) * v.to(h.device)
                h = h + step.to(h.dtype)
                return h if torch.is_tensor(output) else (h, *output[1:])
            return hook
        hooks = [decoder_layers[l].register_forward_hook(add(v)) for l, v in self.layers.items()]
        try:
            yield
        finally:
            for h in hooks:
                h.remove()

    def cosine(self, other: "SteeringVector") -> float:
        """Cosine over the concatenated layers of both."""
        a, b = (torch.cat([s.layers[l].flatten() for l in sorted(s.layers)]) for s in (self, other))
        return torch.cosine_similarity(a, b, dim=0).item()

    def save(self, path) -> None:
        """safetensors, one `layer.N` tensor each; written aside and renamed. Raises OSError where it cannot be written."""
        tensors = {f"layer.{l}": v.cpu().contiguous() for l, v in self.layers.items()}
        try:
            save_file(tensors, f"{path}.tmp", metadata={"steering_vector": json.dumps(self.about)})
        except SafetensorError as e:
            raise OSError(f"cannot write {path} ({e}); fix: a folder that can be written, on a disk with room") from None
        os.replace(f"{path}.tmp", path)

    @classmethod
    def load(cls, path) -> "SteeringVector":
        """Raises FileNotFoundError, or ValueError for a damaged, foreign or not finite file."""
        if not Path(path).exists():
            raise FileNotFoundError(f"no vector file {path}; fix: give a vector_rN.safetensors of a run")
        try:
            with safe_open(str(path), framework="pt") as f:
                about = json.loads((f.metadata() or {}).get("steering_vector", "null"))
                layers = {} if about is None else {int(k.removeprefix("layer.")): f.get_tensor(k) for k in f.keys()}
        except SafetensorError as e:
            raise ValueError(f"{path} is damaged or not safetensors ({e}); fix: extract the vector again") from None
        if not layers:
            raise ValueError(f"{path} was not written by SteeringVector.save; fix: give a vector_rN.safetensors of a run")
        if not all(v.isfinite().all() for v in layers.values()):
            raise ValueError(f"{path} holds values that are not finite; fix: extract the vector again")
        return cls(dict(sorted(layers.items())), about)

    def export_gguf(self, path) -> None:
        """A llama.cpp control vector: `llama-cli -m BASE.gguf --control-vector-scaled PATH:DOSE`. Written aside and renamed.

        `direction.N` is added after block N, counted from 0 as here, with no shift: llama.cpp's graphs call build_cvec(cur, il) on
        the sum that leaves block il, and repeng's export_gguf numbers it so too. Its loader has no place for N = 0.
        llama.cpp steers every position, the prompt included; `at` in `sample` acts from the assistant tag on.
        Raises ValueError for a vector of block 0.
        """
        import gguf
        if 0 in self.layers:
            raise ValueError(f"a control vector cannot steer block 0, this vector has blocks {list(self.layers)}; fix: steer from a later block")
        writer = gguf.GGUFWriter(f"{path}.tmp", "controlvector")  # general.architecture
        writer.add_string("controlvector.model_hint", self.about.get("model_type", "unknown"))
        writer.add_uint32("controlvector.layer_count", len(self.layers))
        for l, v in self.layers.items():
            writer.add_tensor(f"direction.{l}", v.float().cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(f"{path}.tmp", path)


def check_room(model, longest: int, new: int = 0) -> None:
    """Raises ValueError where a prompt of `longest` tokens and `new` ones do not fit the model's context."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room and longest + new > room:
        raise ValueError(f"a prompt of {longest} tokens and {new} new ones exceed the model's context of {room}; "
                         "fix: a shorter prompt or fewer new tokens")


class _Stop(Exception):
    """Raised by a hook once the last wanted block has run."""


@torch.no_grad()
def mean_residual(model, tok, system: str, contexts: list[str], layers: list[int], batch_size: int = 32,
                  bar=None) -> dict[int, torch.Tensor]:
    """{layer: mean over contexts of the residual stream at the assistant tag, [d_model] float32}.

    Blocks above the last wanted one do not run. Contexts of like length share a batch.
    """
    blocks, total = model.get_decoder().layers, {}
    def read(l):
        def hook(block, args, output):
            h = output if torch.is_tensor(output) else output[0]
            total[l] = total.get(l, 0) + h[:, -1].double().sum(0)
            if l == max(layers):
                raise _Stop
        return hook
    rows = sorted((chat_ids(tok, c, system) for c in contexts), key=len)
    check_room(model, len(rows[-1]))
    hooks = [blocks[l].register_forward_hook(read(l)) for l in layers]
    try:
        for i in range(0, len(rows), batch_size):
            ids, mask, positions = left_pad(rows[i:i + batch_size], tok.pad_token_id, model.device)
            with contextlib.suppress(_Stop):
                model.get_decoder()(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
            if bar is not None:
                bar.update(len(ids))
    finally:
        for h in hooks:
            h.remove()
    return {l: (t / len(contexts)).float() for l, t in total.items()}


def extract_vector(model, tok, persona: Persona, contexts: list[str], layers: list[int], batch_size: int = 32,
                   bar=None) -> SteeringVector:
    """Mean difference of the residual stream between the two personas over `contexts`, unnormalised.

    layers: block indices (see `band`). bar: anything with `.update(n)`, told of 2·len(contexts) prompts.
    Raises ValueError for no contexts, an empty or a doubled persona.
    """
    if not contexts:
        raise ValueError("no contexts to extract from; fix: give at least one user message")
    if not persona.pos.strip() or not persona.neg.strip() or persona.pos == persona.neg:
        raise ValueError(f"persona needs two different texts, has '{persona.pos}' and '{persona.neg}'; fix: --pos and --neg")
    pos, neg = (mean_residual(model, tok, system, contexts, layers, batch_size, bar)
                for system in (persona.pos, persona.neg))
    return SteeringVector({l: pos[l] - neg[l] for l in layers}, {"pos": persona.pos, "neg": persona.neg, "model_type": model.config.model_type})


class RoomyLayer(DynamicLayer):
    """A key-value cache layer with spare room, so that a new token is written in place instead of copying all before it."""
    room = None  # keys and values [2][batch, heads, capacity, head_dim]

    def update(self, key_states, value_states, *args, **kwargs):
        old, new = self.get_seq_length(), key_states.shape[-2]
        if self.room is None or old + new > self.room[0].shape[-2]:
            before = (self.keys, self.values)
            self.room = [s.new_empty(*s.shape[:-2], old + new + 64, s.shape[-1]) for s in (key_states, value_states)]
            for room, kept in zip(self.room, before):
                if old:
                    room[..., :old, :] = kept
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        for room, s in zip(self.room, (key_states, value_states)):
            room[..., old:old + new, :] = s
        self.keys, self.values = (room[..., :old + new, :] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        length = self.get_seq_length()
        self.room = [r[indices] for r in self.room]
        self.keys, self.values = (r[..., :length, :] for r in self.room)


def logits(model, hidden: torch.Tensor) -> torch.Tensor:
    """The vocabulary projection of final hidden states [n, d_model] -> [n, vocab], in the model's dtype.

    Called on the positions somebody reads, and on two dimensions: a strided [batch, 1, d_model] slice makes
    torch copy the projection once per row.
    """
    z = model.get_output_embeddings()(hidden)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2
    return z if cap is None else cap * torch.tanh(z / cap)


def token_logp(model, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token at its final hidden state: [n, d_model], [n] -> [n], float32 nats; 128 positions of logits at a time."""
    return torch.cat([logits(model, h).float().log_softmax(-1).gather(1, t[:, None])[:, 0]
                      for h, t in zip(hidden.split(128), tokens.split(128))])


def prefill(model, prompts: list[list[int]], pad: int, layer: type[DynamicLayer]) -> tuple[Cache, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run prompts up to their last token, equal ones once; -> the cache and, per prompt, the last token [batch], mask and its position.

    mask [batch, longest] includes the last token, which is not run: what follows may be steered from it on.
    """
    unique = list(dict.fromkeys(map(tuple, prompts)))
    row = {prompt: k for k, prompt in enumerate(unique)}
    of = torch.tensor([row[tuple(p)] for p in prompts], device=model.device)
    ids, mask, positions = left_pad(list(map(list, unique)), pad, model.device)
    cache = Cache(layer_class_to_replicate=layer)
    if ids.shape[1] > 1:
        model.get_decoder()(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], past_key_values=cache, use_cache=True)
        cache.batch_select_indices(of)
    return cache, ids[of, -1], mask[of], positions[of, -1]


def next_token(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """One token per row, [batch], by inverse CDF at the uniform draws u [batch]; temperature 0 is greedy.

    The nucleus is taken over the top_k logits that are left (as transformers composes the two), so only top_k
    entries are ever sorted. One draw per row keeps a row's tokens independent of who else is in the batch.
    """
    if temperature == 0:
        return logits.argmax(-1)
    top, tokens = logits.topk(min(top_k, logits.shape[-1]))  # sorted, descending
    p = (top.float() / temperature).softmax(-1)
    p = p * (p.cumsum(-1) - p < top_p)  # smallest set whose mass reaches top_p
    cdf = p.cumsum(-1)
    choice = (cdf < u[:, None] * cdf[:, -1:]).sum(-1, keepdim=True)
    return tokens.gather(-1, choice)[:, 0]


@torch.no_grad()
def sample(model, tok, prompts: list[list[int]], vector: SteeringVector | None = None, doses=None, max_new_tokens: int = 64,
           temperature: float = 1.0, top_k: int = 64, top_p: float = 0.95, batch_size: int = 96, seed: int = 0,
           bar=None) -> list[list[int]]:
    """Sample one completion per prompt; -> lists of new token ids, the end token dropped.

    prompts: token ids from `chat_ids`. doses: one float per prompt, for `vector`, which acts from the assistant tag on.
    The prompt before it is unsteered, so equal prompts are run once for all their doses. Rows that finish leave the
    batch. Row i draws from its own stream (seed, i): its tokens do not depend on batch_size.
    Raises ValueError for a prompt that leaves no room for max_new_tokens in the model's context.
    """
    check_room(model, max(map(len, prompts), default=0), max_new_tokens)
    decoder, device, pad = model.get_decoder(), model.device, tok.pad_token_id
    stop = model.generation_config.eos_token_id
    stop = torch.tensor([stop] if isinstance(stop, int) else list(stop or [tok.eos_token_id]), device=device)
    draws = torch.rand(len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed))  # [row, step]
    doses = torch.zeros(len(prompts)) if doses is None else torch.as_tensor(doses, dtype=torch.float32)
    out: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]  # indices into prompts of the rows still running
        cache, token, mask, position = prefill(model, [prompts[i] for i in rows], pad, RoomyLayer)
        running = torch.ones(len(rows), dtype=torch.bool)
        for t in range(max_new_tokens):
            steered = vector.at(model, doses[rows]) if vector is not None else contextlib.nullcontext()
            with steered:
                h = decoder(input_ids=token[:, None], attention_mask=mask, position_ids=position[:, None],
                            past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            token = next_token(logits(model, h), draws[rows, t].to(device), temperature, top_k, top_p)
            running &= ~torch.isin(token, stop).cpu()
            for i, new, runs in zip(rows, token.tolist(), running.tolist()):
                if runs:
                    out[i].append(new)
            mask, position = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), position + 1
            if not running.any():
                break
            if running.float().mean() <= 0.875:  # regathering the cache costs about a step: wait until it pays
                keep = running.nonzero()[:, 0]
                rows, running = [rows[k] for k in keep.tolist()], running[keep]
                keep = keep.to(device)
                cache.batch_select_indices(keep)
                token, mask, position = token[keep], mask[keep], position[keep]
        if bar is not None:
            bar.update(min(batch_size, len(order) - start))
    return out


def completion_states(model, prompts: list[list[int]], completions: list[list[int]], pad: int = 0) -> torch.Tensor:
    """Final hidden states at the positions that predict the completions' tokens, [Σ len(completion), d_model].

    Equal prompts are run once, gradients included. Completions are padded on the right, where a causal model never
    looks. Prompt and completion are joined as ids: text tokenised in one piece could merge across the boundary.
    """
    cache, last, mask, position = prefill(model, prompts, pad, DynamicLayer)
    longest = max(map(len, completions))
    shifted = torch.tensor([c[:-1] + [pad] * (longest - len(c)) for c in completions], dtype=torch.long, device=model.device)
    h = model.get_decoder()(input_ids=torch.cat([last[:, None], shifted], 1), attention_mask=F.pad(mask, (0, longest - 1), value=1),
                            position_ids=position[:, None] + torch.arange(longest, device=model.device),
                            past_key_values=cache, use_cache=True).last_hidden_state  # [batch, longest, d_model]
    return torch.cat([states[:len(c)] for states, c in zip(h, completions)])


@torch.no_grad()
def score(model, prompts: list[list[int]], completions: list[list[int]], batch_size: int = 32, bar=None) -> list[torch.Tensor]:
    """Log-probability of each completion token given all before it; -> one [len(completion)] float32 tensor each, nats."""
    out = [torch.empty(0)] * len(prompts)
    order = sorted((i for i in range(len(prompts)) if completions[i]), key=lambda i: (len(prompts[i]), prompts[i], len(completions[i])))
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        states = completion_states(model, [prompts[i] for i in rows], [completions[i] for i in rows])
        wanted = torch.tensor([t for i in rows for t in completions[i]], device=model.device)
        logp = token_logp(model, states, wanted).cpu()
        for i, lp in zip(rows, logp.split([len(completions[i]) for i in rows])):
            out[i] = lp
        if bar is not None:
            bar.update(len(rows))
    return out


def perplexity(logp: torch.Tensor, tail: float = 1.0) -> float:
    """exp of the mean negative log-probability over the last `tail` share of the tokens; infinite for no tokens."""
    return math.exp(-logp[-max(1, int(len(logp) * tail)):].mean()) if len(logp) else math.inf


def repetition(text: str) -> float:
    """Share of n-grams that repeat an earlier one, the largest over word n = 2..4 and character n = 8; in [0, 1).

    0 for text without repeats, towards 1 for a loop. Words alone miss "TTTTTT" and "!!!!", one word each.
    """
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    def repeated(items, n):
        grams = list(zip(*(items[k:] for k in range(n))))
        return 1 - len(set(grams)) / len(grams) if grams else 0.0
    return max(*(repeated(words, n) for n in (2, 3, 4)), repeated(text.lower(), 8))


def load_personas(path="data/personas.json") -> dict[str, Persona]:
    """{trait: Persona} from a JSON file. Raises ValueError naming the file where it is malformed."""
    path = Path(__file__).parent / path
    try:
        return {name: Persona(p["pos"], p["neg"]) for name, p in json.loads(path.read_text())["personas"].items()}
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"{path.name} is malformed ({e}); fix: {{\"personas\": {{name: {{\"pos\": ..., \"neg\": ...}}}}}}") from None


def check_flags(*flags) -> None:
    """flags: (name, value, whether it is good, what would be). Raises ValueError naming the first that is not."""
    for name, value, good, rule in flags:
        if not good:
            shown = " ".join(map(str, value)) or "''" if isinstance(value, tuple) else value
            raise ValueError(f"--{name} {shown} is out of range; fix: {rule}")


def steering_flags(cfg, doses: str) -> list:
    """The settings every command that steers shares, for `check_flags`. doses: the name of the field that holds them."""
    values, (first, last) = getattr(cfg, doses), cfg.steer_layers
    return [(doses, values, values and all(map(math.isfinite, values)), "one finite number or more"),
            ("steer-layers", cfg.steer_layers, 0 <= first < last <= 1, "fractions of the depth, 0 <= from < to <= 1, such as 0.45 0.55"),
            ("n-contexts", cfg.n_contexts, cfg.n_contexts >= 1, "at least 1"),
            ("max-new-tokens", cfg.max_new_tokens, cfg.max_new_tokens >= 1, "at least 1"),
            ("seed", cfg.seed, 0 <= cfg.seed < 2**32, "0 to 4294967295")]


@dataclass
class Config:
    prompt: str
    """What to ask."""
    model: str = "smollm2"
    """smollm2, a local folder, or a hub id."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    """Of the weights; auto is bfloat16 where the hardware has it."""
    trait: str = "care"
    """Name of a persona pair in data/personas.json."""
    pos: str | None = None
    """System prompt of the trait, instead of --trait."""
    neg: str | None = None
    """System prompt of its opposite."""
    dose: tuple[float, ...] = (0.0, 2.0, 4.0)
    """Doses to compare, one completion each."""
    steer_layers: tuple[float, float] = (0.45, 0.55)
    """Depth range that is steered, as fractions."""
    n_contexts: int = 128
    """Contexts the vector is averaged over."""
    max_new_tokens: int = 64
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    seed: int = 0
    """Of the sampling; every dose draws the same numbers."""

    def __post_init__(self):
        check_flags(*steering_flags(self, "dose"), ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or more"))


def main(cfg: Config) -> None:
    import distil  # only the command needs the rest of the project
    import models
    persona = distil.find_persona(cfg.trait, cfg.pos, cfg.neg)
    model, tok = models.load(cfg.model, cfg.device, cfg.dtype)
    contexts = distil.load_strings(models.DATA / "contexts.json", "contexts")[:cfg.n_contexts]
    with tqdm(total=2 * len(contexts), desc="extract", leave=False) as bar:
        vector = extract_vector(model, tok, persona, contexts, band(model, cfg.steer_layers), bar=bar)
    prompt = chat_ids(tok, cfg.prompt)
    for dose in cfg.dose:  # one row at a time, so that every dose sees the same draws
        new, = sample(model, tok, [prompt], vector, [dose], cfg.max_new_tokens, cfg.temperature, seed=cfg.seed)
        text = tok.decode(new, skip_special_tokens=True)
        ppl = perplexity(score(model, [prompt], [new])[0])
        print(f"\n--- dose {dose:g}   perplexity under the original {ppl:.1f}   repetition {repetition(text):.2f}\n{text}")


@dataclass
class Export:
    command: Literal["export"]
    """Write the steering vector of a run in a format that other tools read."""
    run: Path
    """Run folder of heal_loop.py."""
    to: Literal["gguf"] = "gguf"
    """gguf: a control vector for llama.cpp."""
    out: Path = Path("vector.gguf")
    """New file."""
    round: int = 0
    """Whose vector: 0 is the original's, N that of the student after N rounds."""


def export(cfg: Export) -> None:
    if cfg.out.exists():
        raise ValueError(f"--out {cfg.out} exists; fix: another name, or delete it")
    file = cfg.run / f"vector_r{cfg.round}.safetensors"
    if not file.exists():
        found = sorted(int(f.stem.removeprefix("vector_r")) for f in cfg.run.glob("vector_r*.safetensors"))
        raise FileNotFoundError(f"no vector file {file}; fix: " + (f"--round {' or '.join(map(str, found))}" if found else "a run folder of heal_loop.py"))
    vector = SteeringVector.load(file)
    vector.export_gguf(cfg.out)
    print(f"{file}, blocks {', '.join(map(str, vector.layers))} -> {cfg.out}")


if __name__ == "__main__":
    import sys

    from models import cli
    cli(Export, export, positional=True) if sys.argv[1:2] == ["export"] else cli(Config, main)
