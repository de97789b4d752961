"""Decode and score in batches: sample, stream, score, completion_states, logits.

    tokens = sample(model, chat, [prompt] * 3, vector, doses=[0, 2, 4])     # one dose per row
    logp = score(model, prompts, completions)                               # per token, nats

    next token ~ softmax(z / temperature) over the top_k logits z, cut to their top_p nucleus

Rows of one batch may have different lengths, doses and prompts. Decoding has one fixed shape: keys
and values in transformers' StaticLayer, and all that changes from token to token in tensors that
are written in place. So one step is a function of no arguments, which a CPU calls and a GPU records
once as a CUDA graph and replays.
"""
import contextlib
import math
import os
import re
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers.cache_utils import (Cache, DummyLayer, DynamicCache, DynamicLayer,
                                      DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin,
                                      StaticLayer)

from common.prompts import Chat, stop_tokens
from steer import SteeringVector, batches, check_room, left_pad, rope_switch

NO_GRAPH = weakref.WeakSet()  # models whose step a GPU could not record
LOOK_EVERY = 8  # steps between two checks which rows are done: a check waits for the GPU


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
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)  # ignored
    decoder.forward = lambda *args, **kwargs: FinalStates([hidden[None]])
    try:
        return model(input_ids=ids, use_cache=False).logits[0]
    finally:
        del decoder.forward
        if before is not None:
            decoder.forward = before


def next_token(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_k: int,
               top_p: float) -> torch.Tensor:
    """One token per row, [batch], by inverse CDF at the uniform draws u [batch].

    Temperature 0 is greedy, top_k 0 the whole vocabulary. The nucleus is taken over the top_k
    logits that are left, so only top_k entries are ever sorted. One draw per row keeps a row's
    tokens independent of its batch.
    """
    if temperature == 0:
        return logits.argmax(-1)
    size = logits.shape[-1]
    if top_k == 0 and top_p == 1:  # nothing to cut: the order of the vocabulary does as well
        top, tokens = logits, torch.arange(size, device=logits.device).expand(logits.shape)
    else:
        top, tokens = logits.topk(min(top_k or size, size))  # sorted, descending
    p = (top.float() / temperature).softmax(-1)
    if top_p < 1:
        p = p * (p.cumsum(-1) - p < top_p)  # smallest set whose mass reaches top_p
    cdf = p.cumsum(-1)
    choice = (cdf < u[:, None] * cdf[:, -1:]).sum(-1, keepdim=True)
    return tokens.gather(-1, choice.clamp(max=cdf.shape[-1] - 1))[:, 0]


def rows_at_once(model) -> int:
    """Rows of a batch: on a GPU 256 rows cost little more than one."""
    return 96 if model.device.type == "cpu" else 256


def even_batches(model, lengths: list[int], rows: int) -> list[list[int]]:
    """Rows in order, in as few batches of at most `rows` as need be, all of about one size.

    lengths: of each row, in tokens. `batches` splits one further where memory or long rope asks.
    """
    n_batches = math.ceil(len(lengths) / rows)
    parts = []
    for group in torch.arange(len(lengths)).tensor_split(n_batches):
        parts += batches(model, group.tolist(), lengths, rows)
    return parts


def halving(step, rows: list[int]) -> None:
    """step(rows), or one half after the other where the memory does not hold them all.

    Raises the error where a half, or a lone row, is too much.
    """
    try:
        return step(rows)
    except RuntimeError as e:  # of a GPU torch.OutOfMemoryError, of a CPU its allocator's words
        full = isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)
        if not full or len(rows) == 1:
            raise
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()  # outside the except: the error holds on to its tensors
    halving(step, rows[:len(rows) // 2])
    halving(step, rows[len(rows) // 2:])


@contextlib.contextmanager
def training(model):
    """What holds while gradients are taken, and for the reference they are compared with.

    On a CPU attention is plain products, whose memory grows with the square of a row's length: with
    the backward pass of torch's sdpa a step takes a fifth longer. On a GPU deterministic kernels
    run where there are some (not while decoding: its writes in place would be sorted).
    """
    decoder, on_cpu = model.get_decoder(), model.device.type == "cpu"  # towers keep their own
    usual = decoder.config._attn_implementation
    if on_cpu:
        decoder.set_attn_implementation("eager")
    torch.use_deterministic_algorithms(not on_cpu, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        if on_cpu:
            decoder.set_attn_implementation(usual)


PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)  # cache layers of keys and values


def special_layers(model) -> list:
    """The cache layers this model asks for, where some are more than keys and values; else [].

    Linear attention keeps a state instead of keys (Qwen3-Next, Granite 4, LFM2, Jamba, ...), and
    DeepSeek's sparse attention a key more.
    """
    layers = DynamicCache(config=model.config).layers
    return layers if any(type(layer) not in (*PLAIN, DummyLayer) for layer in layers) else []


def new_cache(model) -> Cache:
    """An empty cache that grows: every key is kept, of sliding windows too.

    The model's own masks hide what is outside a window. Choose rows with `reorder_cache(indices)`.
    """
    layers = special_layers(model)
    if not layers:
        return Cache(layer_class_to_replicate=DynamicLayer)
    return Cache(layers=[DynamicLayer() if type(own) in PLAIN else own for own in layers])


def is_plain(model) -> bool:
    """Whether attention depends on nothing but the visible tokens and their position ids.

    Rotary positions under full attention. A window would count what stands between, and a recurrent
    state would absorb it.
    """
    layers = DynamicCache(config=model.config).layers
    return (all(type(layer) is DynamicLayer for layer in layers) and not rope_switch(model)
            and hasattr(model.get_decoder(), "rotary_emb"))


def common_beginning(model, prompts: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens that all prompts begin with, where it is exact to run them once; else none.

    A shorter prompt has its padding between them and its rest.
    """
    if len(prompts) < 2 or not is_plain(model):
        return ()
    return os.path.commonprefix([prompt[:-1] for prompt in prompts])


def steering(model, vector: SteeringVector | None, dose, last: int):
    """The context in which the last `last` positions of each pass are steered, if there is a v."""
    return vector.at(model, dose, last_only=last) if vector else contextlib.nullcontext()


def prefill(model, prompts: list[list[int]], begun: list[int] = (), vector=None, dose=0.0):
    """Run prompts, and what their answers begin with, up to the last token; equal ones once.

    -> the cache, and per prompt its last token [batch], mask [batch, longest] and the last token's
    position [batch]. The mask includes the last token, which is not run: it may be steered.
    """
    # 1. which of the different prompts each row has
    decoder, device = model.get_decoder(), model.device
    unique = list(dict.fromkeys(map(tuple, prompts)))
    place = {prompt: k for k, prompt in enumerate(unique)}
    rows = torch.tensor([place[tuple(p)] for p in prompts], device=device)
    unique = [(*prompt, *begun) for prompt in unique]

    # 2. what all of them begin with, such as the system turn
    head = common_beginning(model, unique) if device.type == "cpu" else ()
    cache = new_cache(model)
    if head:
        decoder(input_ids=torch.tensor([head], device=device), past_key_values=cache,
                use_cache=True)
        cache.reorder_cache(torch.zeros(len(unique), dtype=torch.long, device=device))

    # 3. the rest of each, but for its last token; steered from the assistant tag on
    ids, mask, _ = left_pad([list(prompt[len(head):]) for prompt in unique], device)
    mask = torch.cat([mask.new_ones(len(unique), len(head)), mask], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if ids.shape[1] > 1:
        with steering(model, vector if begun else None, dose, len(begun)):
            decoder(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache,
                    position_ids=positions[:, len(head):-1], use_cache=True)
    if mask.shape[1] > 1:
        cache.reorder_cache(rows)
    return cache, ids[rows, -1], mask[rows], positions[rows, -1]


def shares_prompts(model, prompts: list[list[int]]) -> bool:
    """Whether equal prompts are run once: in three passes, where one pass would repeat them.

    On a CPU products take the time: always. On a GPU launches do: only where more than
    four rows have the same prompt, as in the cloze readout. Never under linear attention, which no
    cache continues with gradients, nor under long rope, which the length of the whole row decides.
    """
    if rope_switch(model) or any(isinstance(layer, LinearAttentionCacheLayerMixin)
                                 for layer in special_layers(model)):
        return False
    return model.device.type == "cpu" or len(prompts) > 4 * len(set(map(tuple, prompts)))


def completion_states(model, prompts: list[list[int]], completions: list[list[int]],
                      vector: SteeringVector | None = None, dose: float = 0.0,
                      begun: list[int] = ()) -> torch.Tensor:
    """Final hidden states at the positions that predict the completions' tokens.

    -> [Σ tokens, d_model], completion after completion, with gradients.
    Prompt and completion are joined as ids: tokenised in one piece they could merge.
    vector: acts from the prompt's last token on, the assistant tag, as in `sample`.
    begun: what every answer begins with, between prompt and completion. Under long rope all rows
    must be of one side of its switch, as those of one part of `batches` are.
    Raises ValueError for a row that exceeds the model's context.
    """
    longest = max(map(len, completions))
    lengths = [len(p) + len(begun) + len(c) - 1 for p, c in zip(prompts, completions)]
    check_room(model, max(lengths) + 1)
    # padded on the right, where a causal model never looks; position t predicts t + 1
    shifted = [c[:-1] + [0] * (longest - len(c)) for c in completions]
    if shares_prompts(model, prompts):
        # 1. the prompts without their last token, then that token and the completions on top
        cache, last, mask, position = prefill(model, prompts, begun, vector, dose)
        shifted = torch.tensor(shifted, dtype=torch.long, device=model.device)
        positions = position[:, None] + torch.arange(longest, device=model.device)
        inputs = dict(input_ids=torch.cat([last[:, None], shifted], 1), position_ids=positions,
                      attention_mask=F.pad(mask, (0, longest - 1), value=1),
                      past_key_values=cache, use_cache=True)
        steered = longest
    else:
        # 1. prompt and completion of each row in one pass
        rows = [[*p, *begun, *c] for p, c in zip(prompts, shifted)]
        ids, mask, positions = left_pad(rows, model.device)
        positions = positions.clamp(max=max(lengths) - 1)  # the right padding makes no row longer
        inputs = dict(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        steered = len(begun) + longest

    # 2. steered from the assistant tag on
    with steering(model, vector, dose, steered):
        states = model.get_decoder()(**inputs).last_hidden_state[:, -longest:]

    # 3. the padding dropped, [batch, longest, d_model] -> [Σ tokens, d_model]
    return torch.cat([h[:len(c)] for h, c in zip(states, completions)])


@torch.no_grad()
def row_states(model, prompts: list[list[int]], completions: list[list[int]],
               vector: SteeringVector | None = None, dose: float = 0.0, begun: list[int] = (),
               batch_size: int | None = None) -> list[torch.Tensor]:
    """`completion_states` of any number of rows, in batches: -> [len(completion), d_model] each,
    empty for an empty completion.

    batch_size: None is a third of `rows_at_once`. dose: one float, or one per row [rows].
    """
    out = [torch.empty(0)] * len(prompts)
    lengths = [len(p) + len(begun) + len(c) - 1 for p, c in zip(prompts, completions)]
    # equal prompts, and then completions of like length, share a batch
    with_tokens = [i for i, c in enumerate(completions) if c]
    order = sorted(with_tokens, key=lambda i: (len(prompts[i]), prompts[i], len(completions[i])))

    def run_rows(rows):
        answers = [completions[i] for i in rows]
        of_rows = dose[rows] if torch.is_tensor(dose) else dose
        states = completion_states(model, [prompts[i] for i in rows], answers, vector, of_rows,
                                   begun)
        for i, of_row in zip(rows, states.split(list(map(len, answers)))):
            out[i] = of_row

    parts = batches(model, order, lengths, batch_size or rows_at_once(model) // 3)
    for rows in tqdm(parts, "score", leave=False, disable=None, delay=5):
        halving(run_rows, rows)
    return out


@torch.no_grad()
def score(model, prompts: list[list[int]], completions: list[list[int]],
          vector: SteeringVector | None = None, dose: float = 0.0, begun: list[int] = (),
          batch_size: int | None = None) -> list[torch.Tensor]:
    """Log-probability of each completion token given all before it, nats: as `row_states` batches.

    -> one [len(completion)] float32 tensor each.
    """
    if not any(completions):
        return [torch.empty(0)] * len(completions)
    by_row = row_states(model, prompts, completions, vector, dose, begun, batch_size)
    states = torch.cat([h for h in by_row if len(h)])  # [Σ tokens, d_model]
    tokens = torch.tensor([token for c in completions for token in c], device=states.device)
    logp = []
    for h, t in zip(states.split(128), tokens.split(128)):  # the logits of 128 positions at a time
        logp.append(logits(model, h).float().log_softmax(-1).gather(1, t[:, None])[:, 0].cpu())
    return list(torch.cat(logp).split(list(map(len, completions))))


@torch.no_grad()
def score_answers(model, prompts: list[list[int]], answers: list[list[int]],
                  vector: SteeringVector | None = None, dose: float = 0.0,
                  begun: list[int] = ()) -> torch.Tensor:
    """Log-probability of each of the same answers after each prompt: [prompts, answers], nats.

    The answers stand side by side in one row a prompt, and each sees the prompt and itself: a tree
    in place of a row an answer. Where `is_plain` is false, each answer gets a row of its own.
    """
    if not is_plain(model):
        repeated = [prompt for prompt in prompts for _ in answers]
        scored = score(model, repeated, answers * len(prompts), vector, dose, begun=begun)
        return torch.stack([logp.double().sum() for logp in scored]).view(len(prompts), -1)

    # 1. one token that all answers begin from, then every answer without its last token
    owner = [0] + [k for k, answer in enumerate(answers, 1) for _ in answer[:-1]]
    owner = torch.tensor(owner, device=model.device)  # [n], whose token it is; 0 is everybody's
    offset = [0] + [t for answer in answers for t in range(1, len(answer))]
    offset = torch.tensor(offset, device=model.device)  # [n], from that token
    tokens = torch.tensor([t for answer in answers for t in answer[:-1]], dtype=torch.long,
                          device=model.device)
    sees = (owner == 0) | (owner[:, None] == owner) & (offset <= offset[:, None])  # [query, key]

    # 2. which position predicts each token of each answer
    targets = torch.tensor([t for answer in answers for t in answer], device=model.device)
    predicts = torch.cat([torch.cat([owner.new_zeros(1), (owner == k).nonzero()[:, 0]])
                          for k in range(1, len(answers) + 1)])
    out = torch.zeros(len(prompts), len(answers), dtype=torch.float64)

    def score_rows(rows):
        cache, last, mask, position = prefill(model, [prompts[i] for i in rows], begun, vector,
                                              dose)
        ids = torch.cat([last[:, None], tokens.expand(len(rows), -1)], 1)
        past = mask[:, None, :-1].bool().expand(-1, len(owner), -1)
        visible = torch.cat([past, sees.expand(len(rows), -1, -1)], 2)[:, None]
        hidden = torch.zeros(visible.shape, dtype=model.dtype, device=model.device)
        hidden = hidden.masked_fill(~visible, torch.finfo(model.dtype).min)  # added to the scores
        with steering(model, vector, dose, len(owner)):
            states = model.get_decoder()(
                input_ids=ids, attention_mask=hidden, position_ids=position[:, None] + offset,
                past_key_values=cache, use_cache=True).last_hidden_state  # [rows, n, d_model]
        for i, h in zip(rows, states):
            logp = logits(model, h).float().log_softmax(-1).cpu()[predicts, targets].double()
            out[i] = torch.stack([part.sum() for part in logp.split(list(map(len, answers)))])

    lengths = [len(prompt) + len(begun) + len(owner) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: lengths[i])
    parts = batches(model, order, lengths, rows_at_once(model) // 3)
    for rows in tqdm(parts, "ask", leave=False, disable=None):
        halving(score_rows, rows)
    return out


class Decoder:
    """One batch that decodes. Everything that changes from step to step is a tensor that stays.

    prompts: token ids; doses [batch]; draws [batch, steps], uniform; stop: ids that end a row.
    pick: what `next_token` takes besides, temperature, top_k and top_p.
    """

    def __init__(self, model, prompts, vector, doses, draws, stop, pick: dict):
        # 1. run the prompts up to the assistant tag
        self.model, self.pick, device = model, pick, model.device
        if vector:  # on the device before the first step
            layers = {l: v.to(device) for l, v in vector.layers.items()}
            vector = replace(vector, layers=layers)
        self.vector = vector
        cache, token, mask, position = prefill(model, prompts)
        batch, steps = draws.shape
        self.length = mask.shape[1]  # with the last token, which is not run yet

        # 2. keys and values in layers of fixed size; a past that is more than these grows
        self.fixed = not special_layers(model) and self.length > 1
        if self.fixed:
            for k, old in enumerate(cache.layers):
                if old.is_initialized:  # a layer may use another's keys (Gemma 3n)
                    cache.layers[k] = StaticLayer(max_cache_len=self.length + steps)
                    cache.layers[k].update(old.keys, old.values)
        self.cache, self.n = cache, 0  # steps so far

        # 3. what a step reads and writes; a slot of the mask opens when its token is run
        self.state = {
            "token": token.clone(), "position": position.clone(),
            "mask": F.pad(mask, (0, steps)),  # [batch, slots]
            "t": torch.zeros(1, dtype=torch.long, device=device),
            "draws": draws.to(device), "dose": torch.as_tensor(doses).to(device),
            "new": torch.zeros(batch, steps, dtype=torch.long, device=device),
            "done": torch.zeros(batch, dtype=torch.bool, device=device)}
        self.ends = torch.tensor(sorted(stop), device=device)
        self.rows = list(range(batch))  # whose rows these are
        self.graph = None  # the recorded step

    def step(self) -> None:
        """Run the newest token of each row, steered, and draw the next one."""
        s = self.state
        mask = s["mask"] if self.fixed else s["mask"][:, :self.length + self.n]
        with steering(self.model, self.vector, s["dose"], 1):
            states = self.model.get_decoder()(
                input_ids=s["token"][:, None], attention_mask=mask,
                position_ids=s["position"][:, None], past_key_values=self.cache,
                use_cache=True).last_hidden_state  # [batch, 1, d_model]
        self.z = logits(self.model, states[:, -1]).to(s["token"].device)  # [batch, vocab]
        token = next_token(self.z, s["draws"].index_select(1, s["t"])[:, 0], **self.pick)
        s["new"].index_copy_(1, s["t"], token[:, None])
        s["done"].logical_or_((token[:, None] == self.ends).any(1))
        s["token"].copy_(token)
        s["position"].add_(1)
        s["t"].add_(1)
        s["mask"].index_fill_(1, self.length - 1 + s["t"], 1)

    def record(self) -> None:
        """On a GPU: record `step` once as a CUDA graph, which is replayed from now on."""
        self.graph = None
        left = self.state["draws"].shape[1] - self.n
        on_several = len({p.device for p in self.model.parameters()}) > 1
        if (self.model.device.type != "cuda" or on_several or not self.fixed or left < 4
                or self.model in NO_GRAPH):
            return
        lengths = [layer.cumulative_length for layer in self.cache.layers if layer.is_initialized]
        changing = [*self.state.values(), *lengths]
        # gates that are tensors are read at every replay, so they must not be freed meanwhile
        self.gates = [getattr(m, "c_history", None) for m in self.model.modules()]
        before = [x.clone() for x in changing]
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        try:
            # two steps to warm up, on a stream of their own; then all is put back as it was
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.step(), self.step()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                self.step()
            self.graph = graph
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            NO_GRAPH.add(self.model)
            warnings.warn(f"this model's decoding step cannot be recorded, so it is slow: {e}")
        for x, was in zip(changing, before):
            x.copy_(was)

    def advance(self) -> None:
        """One step, recorded or not."""
        if self.graph:
            self.graph.replay()
        else:
            self.step()
        self.n += 1

    def keep(self, keep: list[int]) -> None:
        """Go on with these rows alone."""
        index = torch.tensor(keep, device=self.model.device)
        self.cache.reorder_cache(index)
        self.state = {k: x if k == "t" else x[index] for k, x in self.state.items()}
        self.rows = [self.rows[k] for k in keep]

    def run(self) -> list[list[int]]:
        """-> each row's new tokens, up to a stop token and with it.

        Rows are looked at every few steps. When at most half of them are unfinished (three quarters
        where nothing is recorded), these continue as a smaller batch.
        """
        out, steps = [[] for _ in self.rows], self.state["draws"].shape[1]
        self.record()
        while self.n < steps:
            self.advance()
            if self.n % LOOK_EVERY and self.n < steps:
                continue
            done = self.state["done"].tolist()
            going_on = [k for k in range(len(done)) if not done[k]]
            # a smaller batch is recorded anew on a GPU, which costs as much as a few steps
            few = 0.5 if self.graph else 0.75
            if self.n == steps or len(going_on) <= few * len(done):
                for row, tokens in zip(self.rows, self.state["new"][:, :self.n].tolist()):
                    out[row] = tokens
                if self.n == steps or not going_on:
                    break
                self.keep(going_on)
                self.record()
        ends = set(self.ends.tolist())
        firsts = [next((t for t, token in enumerate(row) if token in ends), steps) for row in out]
        return [row[:first + 1] for row, first in zip(out, firsts)]


@torch.no_grad()
def sample(model, chat: Chat, prompts: list[list[int]], vector: SteeringVector | None = None,
           doses=None, max_new_tokens: int = 64, temperature: float = 1.0, top_k: int = 64,
           top_p: float = 0.95, batch_size: int | None = None, seed: int = 0,
           keep_stop: bool = False) -> list[list[int]]:
    """Sample one completion per prompt; -> lists of new token ids.

    prompts: token ids from `chat.ids`. doses: one float per prompt, for `vector`, which acts from
    the assistant tag on, so that equal prompts are run once for all doses.
    keep_stop: keep the stop token at the end of a completion that has one.
    batch_size: None is `rows_at_once`.
    Row i draws from its own stream (seed, i): its tokens do not depend on batch_size.
    Raises ValueError for a prompt that leaves no room for max_new_tokens in the model's context.
    """
    check_room(model, max(map(len, prompts), default=0), max_new_tokens)
    for n in map(len, prompts):
        if rope_switch(model) and n - 1 <= rope_switch(model) < n + max_new_tokens:
            raise ValueError(f"a prompt of {n} tokens and {max_new_tokens} new ones cross the "
                             f"{rope_switch(model)} at which this model changes its rope; "
                             "fix: a shorter or a longer prompt, or fewer new tokens")
    stop = set(stop_tokens(model, chat))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(prompts), max_new_tokens, generator=generator)  # [row, step]
    doses = torch.zeros(len(prompts)) if doses is None else torch.as_tensor(doses).float()
    pick = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    out: list[list[int]] = [[] for _ in prompts]

    def draw_rows(rows):
        decoder = Decoder(model, [prompts[i] for i in rows], vector, doses[rows], draws[rows],
                          stop, pick)
        for i, tokens in zip(rows, decoder.run()):
            out[i] = tokens if keep_stop or tokens[-1] not in stop else tokens[:-1]

    # equal prompts, and prompts of like length, share a batch
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    parts = batches(model, order, lengths, batch_size or rows_at_once(model))
    for rows in tqdm(parts, "sample", leave=False, disable=None):
        halving(draw_rows, rows)
    return out


@torch.no_grad()
def stream(model, chat: Chat, prompt: list[int], vector: SteeringVector | None = None,
           dose: float = 0.0, max_new_tokens: int = 64, temperature: float = 1.0,
           top_k: int = 64, top_p: float = 0.95, seed: int = 0) -> Iterator[int]:
    """The new tokens of one prompt, one at a time, as `sample` draws them; no stop token.

    What surrounds each `next`, such as `lora.gates`, holds for that token's pass; on a GPU what
    surrounds the first holds for all.
    """
    check_room(model, len(prompt), max_new_tokens)
    stop = set(stop_tokens(model, chat))
    draws = torch.rand(1, max_new_tokens, generator=torch.Generator().manual_seed(seed))
    pick = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    decoder = Decoder(model, [prompt], vector, torch.tensor([dose]), draws, stop, pick)
    decoder.record()
    for _ in range(max_new_tokens):
        decoder.advance()
        token = decoder.state["token"].item()
        if token in stop:
            return
        yield token


def perplexity(logp: torch.Tensor) -> float:
    """exp of the mean negative log-probability; infinite for no tokens."""
    return math.exp(-logp.mean()) if len(logp) else math.inf


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
