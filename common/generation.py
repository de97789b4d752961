"""What a model generates: sampled answers to held-out prompts, and its loss on plain text.

    drift    mean_t KL(model ‖ original) over the model's own sampled answers      (nats)
    entropy  mean_t −Σ_v p_t(v) log p_t(v) of the model on them: low where it was sharpened (nats)

Perplexity and drift measure DISTANCE from the original, which a barrier trains on. Answers
are sampled three times, so that the noise of sampling is visible.
"""
from dataclasses import dataclass

import torch

import lora
from common.prompts import NEUTRAL, Chat, stop_tokens
from common.sampling import logits, perplexity, repetition, row_states, sample, score
from steer import SteeringVector


@dataclass
class Generated:
    """Coherence where valid_p saturates: sampled answers to held-out prompts, and plain text."""
    perplexity: float  # of the answers, under the original
    drift: float  # mean over their tokens of KL(model ‖ original), nats
    drift_p95: float  # its 95th percentile, nats
    entropy: float  # mean over their tokens of the model's own entropy, nats; low: sharpened
    repetition: float  # mean of sampling.repetition
    ended: float  # share of the answers that end by themselves
    text_nats: float  # loss per token on plain text that nobody trained on (forgetting), nats
    by_draw: dict[str, list[float]]  # perplexity, drift, entropy and repetition of each draw
    texts: list[dict]  # [{prompt, text}] of the first draw


@torch.no_grad()
def generate(model, chat: Chat, prompts: list[str], plain: list[str], system: str = NEUTRAL,
             vector: SteeringVector | None = None, dose: float = 0.0, max_new_tokens: int = 64,
             seed: int = 0, draws: int = 3) -> Generated:
    """Let the model as it stands answer; the original (gates at 0) gets the neutral prompt."""
    # 1. `draws` sampled answers a prompt, drawn with the same numbers for every model
    asked = [chat.ids(p, system) for p in prompts] * draws
    plainly = [chat.ids(p) for p in prompts] * draws
    answers = sample(model, chat, asked, vector, [dose] * len(asked), max_new_tokens, seed=seed,
                     keep_stop=True)
    stop = set(stop_tokens(model, chat))
    ended = [answer[-1] in stop for answer in answers]

    # 2. model and original on these answers, one answer's logits at a time
    states = row_states(model, asked, answers, vector, dose)
    with lora.gates(model, history=0, live=0):
        originals = row_states(model, plainly, answers)
    kl, logq, entropy = zip(*(against_original(model, *row)
                              for row in zip(states, originals, answers)))
    texts = [chat.decode(answer[:-1] if end else answer) for answer, end in zip(answers, ended)]

    # 3. each draw by itself, and all of them together
    n, together = len(prompts), answer_metrics(logq, kl, entropy, texts)
    by_draw = [answer_metrics(*(values[k:k + n] for values in (logq, kl, entropy, texts)))
               for k in range(0, len(answers), n)]

    # 4. plain text: the vector acts on all of it, a system prompt stands before it
    start = [t for t in chat.tok("").input_ids[:1] if t == chat.tok.bos_token_id]
    start += [] if system == NEUTRAL else chat.encode(system + "\n\n")
    rows = [chat.encode(text) for text in plain]
    lost = score(model, [start + row[:1] for row in rows], [row[1:] for row in rows], vector, dose)
    return Generated(
        **together, drift_p95=torch.cat(kl).quantile(0.95).item(), ended=sum(ended) / len(ended),
        text_nats=-torch.cat(lost).mean().item(),
        by_draw={name: [draw[name] for draw in by_draw] for name in together},
        texts=[{"prompt": p, "text": text} for p, text in zip(prompts, texts)])


def answer_metrics(logq, kl, entropy, texts) -> dict[str, float]:
    """Of some answers, each a tensor [tokens] or a text: what is averaged over them."""
    return {"perplexity": perplexity(torch.cat(logq)), "drift": torch.cat(kl).mean().item(),
            "entropy": torch.cat(entropy).mean().item(),
            "repetition": sum(map(repetition, texts)) / len(texts)}


def against_original(model, h, reference, tokens) -> tuple[torch.Tensor, ...]:
    """KL(model ‖ original), the original's log-probability of each token, the model's entropy.

    h, reference: final states of model and original [n, d_model]; tokens: n ids. -> [n] each, nats
    """
    logp, logq = (logits(model, x).float().log_softmax(-1) for x in (h, reference))
    targets = torch.tensor(tokens, device=logq.device)
    kl, entropy = (logp.exp() * (logp - logq)).sum(-1), -(logp.exp() * logp).sum(-1)
    return kl, logq.gather(1, targets[:, None])[:, 0], entropy
