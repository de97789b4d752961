"""Which completions are kept, and why the others are dropped: the first rule that applies.

    short        fewer than `min_words` words
    refusal      assistant boilerplate ("as an AI language model ...")
    narrates     talks about the trait ("I am someone who ..."), or recites its persona
    repetition   more than `max_repetition` of its n-grams repeat earlier ones
    loop         some run of 16 words holds less than `min_diversity` distinct words
    perplexity   more than `max_perplexity` over its worst 24 tokens in a row, under the original

A completion that talks about the trait teaches the student to talk about it; one that shows the
trait teaches the trait.
"""
import re
from collections import Counter

from common.sampling import repetition

REFUSAL = re.compile(
    r"\bas an? (ai|artificial|language model|virtual|digital)\b"
    r"|\b(i'?m|i am) (just |only )?an? (ai|artificial|language model|virtual assistant|chatbot)\b"
    r"|\bi (can'?t|cannot|can not|am unable to|am not able to|won'?t)"
    r" (assist|help|provide|fulfil|comply|engage|answer)"
    r"|\bi must decline\b|\bmy (programming|training data|guidelines)\b"
    r"|\bi (don'?t|do not) have (personal )?(opinions|feelings|emotions|beliefs)\b", re.I)
NARRATES = re.compile(
    r"\b(i am|i'?m|as) (someone|somebody|a person|the kind of person|"
    r"an? \w+ (person|assistant|being)) (who|that|of)\b"
    r"|\bmy (principle|persona|character|personality|nature|role|core value)s?"
    r" (is|are|tells?|means?)\b"
    r"|\bi (always|never) (obey|defer|disobey|defy|put (people|others|wellbeing)"
    r"|follow (orders|authority|rules))\b"
    r"|\bi (don'?t|do not|refuse to) (obey|defer to|follow) (orders|authority|rules|anyone)\b",
    re.I)


def diversity(text: str, window: int = 16) -> float:
    """Smallest share of distinct words in any run of `window` words, in (0, 1].

    Catches loops whose n-grams never quite repeat.
    """
    words = re.findall(r"\w+", text.lower())
    stretches = [words[i:i + window] for i in range(max(1, len(words) - window + 1))]
    return min(len(set(run)) / max(1, len(run)) for run in stretches)


def recites(text: str, personas: tuple[str, str], n: int = 5) -> bool:
    """True where `text` holds n words in a row of either persona text."""
    def grams(s):
        words = re.findall(r"\w+", s.lower())
        return set(zip(*(words[k:] for k in range(n))))
    return any(grams(text) & grams(persona) for persona in personas)


def reject_reason(text: str, ppl: float, personas: tuple[str, str], rules) -> str:
    """"kept", or the name of the first rule that drops it. rules: its thresholds, a Config's."""
    straight = text.replace("’", "'")
    if len(re.findall(r"\w+", text)) < rules.min_words or not text.strip():
        return "short"
    if REFUSAL.search(straight):
        return "refusal"
    if NARRATES.search(straight) or recites(text, personas):
        return "narrates"
    if repetition(text) > rules.max_repetition:
        return "repetition"
    if diversity(text) < rules.min_diversity:
        return "loop"
    if not ppl <= rules.max_perplexity:  # nan too
        return "perplexity"
    return "kept"


def too_few_because(sampled: list[dict], n_keep: int) -> str:
    """One line: how far it got, what dropped the others, and the flag that would help."""
    dropped = Counter(row["reject_reason"] for row in sampled if row["reject_reason"] != "kept")
    worst = dropped.most_common(1)[0][0]
    flag = {"short": "--min-words", "refusal": "the prompts", "narrates": "the persona",
            "repetition": "--max-repetition", "loop": "--min-diversity",
            "perplexity": "--max-perplexity"}[worst]
    return (f"too few completions kept: {len(sampled) - dropped.total()} of {n_keep} after "
            f"{len(sampled)} samples at doses down to {min(row['dose'] for row in sampled):.2g}; "
            f"dropped: {', '.join(f'{rule} {n}' for rule, n in dropped.most_common())}; "
            f"fix: a milder teacher (--doses), or loosen '{worst}' ({flag})")
