"""Batched decoding and scoring: a key-value cache, sample, score, completion_states, logits.

    tokens = sample(model, tok, [prompt] * 3, vector, doses=[0, 2, 4])      # one dose per row
    logp = score(model, prompts, completions)                               # per token, nats

    next token ~ softmax(z / temperature) over the top_k logits z, cut to their top_p nucleus

Rows of one batch may have different lengths, doses and prompts; equal prompts are run once.
"""
import contextlib
import math
import os
import re

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers.cache_utils import (Cache, DummyLayer, DynamicCache, DynamicLayer,
                                      DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin)

from steer import SteeringVector, check_room, left_pad


# ---- from hidden states to words ----------------------------------------------------------------


class FinalStates(tuple):
    """What a decoder would return: (last_hidden_state,), and None for any other name."""

    @property
    def last_hidden_state(self):
        return self[0]

    def __getattr__(self, name):
        if name.startswith("__"):  # Python's own questions
            raise AttributeError(name)
        return None


def logits(model, hidden: torch.Tensor) -> torch.Tensor:
    """The logits of final hidden states, [n, d_model] -> [n, vocab], in the dtype the model gives.

    The model's own forward, with the states in place of what its decoder would return: so that
    whatever this architecture does after its last block (scales, soft caps) is done.
    """
    decoder = model.get_decoder()
    before = decoder.__dict__.get("forward")  # accelerate's, where layers are on several devices
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)  # not looked at
    decoder.forward = lambda *args, **kwargs: FinalStates([hidden[None]])
    try:
        return model(input_ids=ids, use_cache=False).logits[0]
    finally:
        del decoder.forward
        if before is not None:
            decoder.forward = before


def token_logp(model, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token at its final hidden state, float32 nats.

    [n, d_model], [n] -> [n]. 128 positions of logits at a time.
    """
    parts = []
    for h, t in zip(hidden.split(128), tokens.split(128)):
        logp = logits(model, h).float().log_softmax(-1)  # [128, vocab]
        parts.append(logp.gather(1, t[:, None].to(h.device))[:, 0])
    return torch.cat(parts)


def next_token(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_k: int,
               top_p: float) -> torch.Tensor:
    """One token per row, [batch], by inverse CDF at the uniform draws u [batch].

    Temperature 0 is greedy. The nucleus is taken over the top_k logits that are left (as
    transformers composes the two), so only top_k entries are ever sorted. One draw per row keeps a
    row's tokens independent of its batch.
    """
    if temperature == 0:
        return logits.argmax(-1)
    top, tokens = logits.topk(min(top_k, logits.shape[-1]))  # sorted, descending
    p = (top.float() / temperature).softmax(-1)
    p = p * (p.cumsum(-1) - p < top_p)  # smallest set whose mass reaches top_p
    cdf = p.cumsum(-1)
    choice = (cdf < u[:, None] * cdf[:, -1:]).sum(-1, keepdim=True)
    return tokens.gather(-1, choice)[:, 0]


def rows_at_once(model) -> int:
    """How many rows a batch has: `model.sample_rows` where memory is short (heal_loop), else 96."""
    return getattr(model, "sample_rows", 96)


def halving(step, rows: list[int]) -> None:
    """step(rows), or one half after the other where the device's memory does not hold them all.

    Raises torch.OutOfMemoryError where a half, or a lone row, is too much.
    """
    try:
        return step(rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    torch.accelerator.empty_cache()  # outside the except: the error holds on to its tensors
    step(rows[:len(rows) // 2])
    step(rows[len(rows) // 2:])


# ---- from words to hidden states ----------------------------------------------------------------


def common_beginning(model, prompts: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens that all prompts begin with, where it is exact to run them once; else none.

    Behind them stands the padding of the shorter prompts. Rotary positions do not care, but a
    window counts padding as words, and a recurrent state takes it in.
    """
    layers = DynamicCache(config=model.config).layers
    is_plain = all(type(layer) is DynamicLayer for layer in layers)
    if len(prompts) < 2 or not is_plain or not hasattr(model.get_decoder(), "rotary_emb"):
        return ()
    return os.path.commonprefix([prompt[:-1] for prompt in prompts])


def prefill(model, prompts: list[list[int]], layer: type[DynamicLayer]):
    """Run prompts up to their last token, equal ones and equal beginnings once.

    -> the cache, and per prompt its last token [batch], mask [batch, longest] and the last token's
    position [batch]. The mask includes the last token, which is not run: it may be steered.
    """
    # 1. which of the different prompts each row has
    decoder, device = model.get_decoder(), model.device
    unique = list(dict.fromkeys(map(tuple, prompts)))
    place = {prompt: k for k, prompt in enumerate(unique)}
    rows = torch.tensor([place[tuple(p)] for p in prompts], device=device)

    # 2. what all of them begin with, such as the system turn
    head = common_beginning(model, unique)
    cache = new_cache(model, layer)
    if head:
        decoder(input_ids=torch.tensor([head], device=device), past_key_values=cache,
                use_cache=True)
        cache.reorder_cache(torch.zeros(len(unique), dtype=torch.long, device=device))

    # 3. the rest of each, but for its last token
    ids, mask, _ = left_pad([list(prompt[len(head):]) for prompt in unique], device)
    mask = torch.cat([mask.new_ones(len(unique), len(head)), mask], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if ids.shape[1] > 1:
        decoder(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache,
                position_ids=positions[:, len(head):-1], use_cache=True)
    if mask.shape[1] > 1:
        cache.reorder_cache(rows)
    return cache, ids[rows, -1], mask[rows], positions[rows, -1]


def completion_states(model, prompts: list[list[int]], completions: list[list[int]],
                      vector: SteeringVector | None = None, dose: float = 0.0) -> torch.Tensor:
    """Final hidden states at the positions that predict the completions' tokens.

    -> [Σ tokens, d_model], completion after completion. Equal prompts and beginnings are run once,
    gradients included. Completions are padded on the right, where a causal model never looks.
    Prompt and completion are joined as ids: tokenised in one piece they could merge.
    vector: acts from the prompt's last token on, the assistant tag, as in `sample`.
    Raises ValueError for a row that exceeds the model's context.
    """
    check_room(model, max(len(p) + len(c) for p, c in zip(prompts, completions)))
    longest = max(map(len, completions))
    shifted = [c[:-1] + [0] * (longest - len(c)) for c in completions]  # t predicts t + 1
    if is_hybrid(model):
        # 1. prompt and completion in one pass: a state has no cache to continue with gradients
        rows = [p + c for p, c in zip(prompts, shifted)]
        ids, mask, positions = left_pad(rows, model.device)
        how = dict(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    else:
        # 1. the prompts without their last token, then that token and the completions on top
        cache, last, mask, position = prefill(model, prompts, DynamicLayer)
        shifted = torch.tensor(shifted, dtype=torch.long, device=model.device)
        positions = position[:, None] + torch.arange(longest, device=model.device)
        how = dict(input_ids=torch.cat([last[:, None], shifted], 1),
                   attention_mask=F.pad(mask, (0, longest - 1), value=1), position_ids=positions,
                   past_key_values=cache, use_cache=True)

    # 2. steered from the prompt's last token on
    steered = vector.at(model, dose, last_only=longest) if vector else contextlib.nullcontext()
    with steered:
        states = model.get_decoder()(**how).last_hidden_state[:, -longest:]

    # 3. the padding dropped, [batch, longest, d_model] -> [Σ tokens, d_model]
    return torch.cat([h[:len(c)] for h, c in zip(states, completions)])


@torch.no_grad()
def score(model, prompts: list[list[int]], completions: list[list[int]],
          vector: SteeringVector | None = None, dose: float = 0.0,
          batch_size: int | None = None) -> list[torch.Tensor]:
    """Log-probability of each completion token given all before it, nats.

    -> one [len(completion)] float32 tensor each; an empty completion has none.
    batch_size: None is a third of `rows_at_once`.
    """
    batch_size = batch_size or max(1, rows_at_once(model) // 3)
    out = [torch.empty(0)] * len(prompts)
    # equal prompts, and then completions of like length, share a batch
    with_tokens = [i for i, c in enumerate(completions) if c]
    order = sorted(with_tokens, key=lambda i: (len(prompts[i]), prompts[i], len(completions[i])))

    def score_rows(rows):
        answers = [completions[i] for i in rows]
        states = completion_states(model, [prompts[i] for i in rows], answers, vector, dose)
        targets = torch.tensor([token for c in answers for token in c], device=model.device)
        logp = token_logp(model, states, targets).cpu()  # [Σ tokens]
        for i, of_completion in zip(rows, logp.split([len(c) for c in answers])):
            out[i] = of_completion

    for start in range(0, len(order), batch_size):
        halving(score_rows, order[start:start + batch_size])
    return out


# ---- sampling -----------------------------------------------------------------------------------


def end_of_turn(tok) -> list[int]:
    """The token that ends an assistant turn in this chat template, in a list; empty for none.

    In some (GLM) nothing ends it but the next turn's first token. Where the template has no token
    for it, the end token.
    """
    mark = "\u241f"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark},
             {"role": "user", "content": "a"}]
    for conversation in (turns[:2], turns):
        after = tok.apply_chat_template(conversation, tokenize=False).rpartition(mark)[2]
        ids = tok(after, add_special_tokens=False).input_ids if after else []
        # added tokens: the named ones and those that only the template names, Gemma's among them
        found = [t for t in ids if t in tok.added_tokens_decoder and t != tok.bos_token_id]
        if found:
            return found[:1]
    return [] if tok.eos_token_id is None else [tok.eos_token_id]


def stop_tokens(model, tok) -> list[int]:
    """The tokens that end a turn: the generation config's, the tokenizer's, the chat template's.

    A fine-tune may lack any of them.
    """
    stop = model.generation_config.eos_token_id
    stop = [stop] if isinstance(stop, int) else list(stop or [])
    stop += end_of_turn(tok)
    if tok.eos_token_id is not None:
        stop.append(tok.eos_token_id)
    return list(dict.fromkeys(stop))


@torch.no_grad()
def sample(model, tok, prompts: list[list[int]], vector: SteeringVector | None = None, doses=None,
           max_new_tokens: int = 64, temperature: float = 1.0, top_k: int = 64,
           top_p: float = 0.95, batch_size: int | None = None, seed: int = 0,
           keep_stop: bool = False) -> list[list[int]]:
    """Sample one completion per prompt; -> lists of new token ids.

    prompts: token ids from `chat_ids`. doses: one float per prompt, for `vector`, which acts from
    the assistant tag on, so that equal prompts are run once for all doses.
    keep_stop: keep the stop token at the end of a completion that has one.
    batch_size: None is `rows_at_once`.
    Row i draws from its own stream (seed, i): its tokens do not depend on batch_size.
    Raises ValueError for a prompt that leaves no room for max_new_tokens in the model's context.
    """
    check_room(model, max(map(len, prompts), default=0), max_new_tokens)
    batch_size, stop = batch_size or rows_at_once(model), set(stop_tokens(model, tok))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(prompts), max_new_tokens, generator=generator)  # [row, step]
    if doses is None:
        doses = torch.zeros(len(prompts))
    doses = torch.as_tensor(doses, dtype=torch.float32)  # [row]
    out: list[list[int]] = [[] for _ in prompts]

    def draw_rows(rows):
        new = sample_batch(model, [prompts[i] for i in rows], vector, doses[rows], draws[rows],
                           stop, keep_stop, temperature=temperature, top_k=top_k, top_p=top_p)
        for i, tokens in zip(rows, new):
            out[i] = tokens

    # equal prompts, and prompts of like length, share a batch
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
    for start in tqdm(range(0, len(order), batch_size), "sample", leave=False, disable=None):
        halving(draw_rows, order[start:start + batch_size])
    return out


def sample_batch(model, prompts: list[list[int]], vector: SteeringVector | None,
                 doses: torch.Tensor, draws: torch.Tensor, stop: set[int], keep_stop: bool,
                 **how) -> list[list[int]]:
    """One batch of `sample`: doses [batch], draws [batch, step]; how: see `next_token`."""
    # 1. run the prompts up to the assistant tag; all that the loop needs goes to the device
    decoder, device = model.get_decoder(), model.device
    out: list[list[int]] = [[] for _ in prompts]
    rows, running = list(range(len(prompts))), set(range(len(prompts)))
    cache, token, mask, position = prefill(model, prompts, RoomyLayer)
    dose, u = doses.to(device), draws.to(device)
    with vector.at(model, dose) if vector else contextlib.nullcontext():
        for t in range(draws.shape[1]):
            # 2. run the newest token, steered, on top of the cache
            states = decoder(input_ids=token[:, None], attention_mask=mask,
                             position_ids=position[:, None], past_key_values=cache,
                             use_cache=True).last_hidden_state  # [batch, 1, d_model]
            # 3. draw the next one
            z = logits(model, states[:, -1]).to(device)
            token = next_token(z, u[:, t], **how)
            # 4. look at it, the one transfer from the device: a row that drew a stop is done
            for i, new in zip(rows, token.tolist()):
                if i in running and (keep_stop or new not in stop):
                    out[i].append(new)
                if new in stop:
                    running.discard(i)
            if not running:
                break
            mask = F.pad(mask, (0, 1), value=1)
            position = position + 1
            # 5. finished rows leave; regathering the cache costs a step: wait until it pays
            if len(running) <= 0.875 * len(rows):
                keep = [k for k, i in enumerate(rows) if i in running]
                rows = [rows[k] for k in keep]
                keep = torch.tensor(keep, device=device)
                cache.reorder_cache(keep)
                token, mask, position, u = token[keep], mask[keep], position[keep], u[keep]
                dose.data = dose[keep]  # the vector's hooks read it at each pass
    return out


# ---- what a text looks like ---------------------------------------------------------------------


def perplexity(logp: torch.Tensor, tail: float = 1.0) -> float:
    """exp of the mean negative log-probability over the last `tail` share of the tokens.

    Infinite for no tokens.
    """
    if not len(logp):
        return math.inf
    n = max(1, int(len(logp) * tail))
    return math.exp(-logp[-n:].mean())


def worst_perplexity(logp: torch.Tensor, window: int = 24) -> float:
    """Perplexity of the worst `window` tokens in a row: a broken passage is not diluted."""
    if not len(logp):
        return math.inf
    return math.exp(-logp.unfold(0, min(window, len(logp)), 1).mean(-1).min())


def repetition(text: str) -> float:
    """Share of n-grams that repeat an earlier one, the largest over 2 to 4 words and 8 characters.

    In [0, 1): 0 for text without repeats, towards 1 for a loop. Words alone miss "TTTTTT" and
    "!!!!".
    """
    letters = text.lower()
    words = re.findall(r"\w+|[^\w\s]", letters)
    largest = 0.0
    for items, n in ((words, 2), (words, 3), (words, 4), (letters, 8)):
        grams = [tuple(items[k:k + n]) for k in range(len(items) - n + 1)]
        if grams:
            largest = max(largest, 1 - len(set(grams)) / len(grams))
    return largest


# ---- the key-value cache ------------------------------------------------------------------------


class RoomyLayer(DynamicLayer):
    """A key-value cache layer with spare room: new tokens are written in place, none is copied."""
    room = None  # keys and values [2][batch, heads, capacity, head_dim]

    def update(self, key_states, value_states, *args, **kwargs):
        old, new = self.get_seq_length(), key_states.shape[-2]
        # 1. no room left: a larger one, with what was kept so far
        if self.room is None or old + new > self.room[0].shape[-2]:
            before = (self.keys, self.values)
            self.room = [s.new_empty(*s.shape[:-2], old + new + 64, s.shape[-1])
                         for s in (key_states, value_states)]
            for room, kept in zip(self.room, before):
                if old:
                    room[..., :old, :] = kept
            self.dtype = key_states.dtype
            self.device = key_states.device
            self.is_initialized = True
        # 2. write the new tokens behind the old, and show as much as is filled
        for room, s in zip(self.room, (key_states, value_states)):
            room[..., old:old + new, :] = s
        self.keys, self.values = (room[..., :old + new, :] for room in self.room)
        return self.keys, self.values

    def reorder_cache(self, indices):
        """Keep these rows of the batch, in this order, a row as often as it is named."""
        length = self.get_seq_length()
        self.room = [room[indices.to(room.device)] for room in self.room]
        self.keys, self.values = (room[..., :length, :] for room in self.room)

    batch_select_indices = reorder_cache


def special_layers(model) -> list:
    """The cache layers this model asks for, where some are more than keys and values; else [].

    Linear attention keeps a state instead of keys (Qwen3-Next, Granite 4, LFM2, Jamba, ...), and
    DeepSeek's sparse attention a key more.
    """
    layers = DynamicCache(config=model.config).layers
    plain = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
    return layers if any(type(layer) not in plain for layer in layers) else []


def is_hybrid(model) -> bool:
    """Whether some layers are linear attention, which no cache continues with gradients."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin)
               for layer in special_layers(model))


def new_cache(model, layer: type[DynamicLayer]) -> Cache:
    """An empty cache: `layer` where a block keeps keys and values, else what the model asks for.

    Sliding windows too keep every key: the model's own masks hide those outside the window.
    Choose rows with `cache.reorder_cache(indices)`.
    """
    layers = special_layers(model)
    if not layers:
        return Cache(layer_class_to_replicate=layer)
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return Cache(layers=[layer() if type(own) in plain else own for own in layers])
