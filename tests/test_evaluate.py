"""Profiles, their statistics by hand, what a model says, and steering alone at equal trait."""
import dataclasses
import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import scipy.stats
import torch

import evaluate
import heal_loop
import lora
from common import texts
from conftest import tiny
from evaluate import (NATS, Profile, coh_cost, delta, largest_mover, matched_steering, paired,
                      surgicality)
from common.readouts import Answers
from common.sampling import repetition, sample
from steer import NEUTRAL, SteeringVector, chat_ids
from common.texts import FOUNDATIONS

AUTHORITY = FOUNDATIONS.index("Authority")


def profile(p, mass=None, labels=None):
    p = np.array(p, dtype=float)
    mass = np.ones(len(p)) if mass is None else np.array(mass, dtype=float)
    return Profile([f"v{i}" for i in range(len(p))], labels or ["Care"] * len(p), p, mass)


def softmax(z):
    return np.exp(z) / np.exp(z).sum(1, keepdims=True)


def random_profile(n, seed, shift=0.0):
    z = np.random.default_rng(seed).normal(size=(n, 7))
    z[:, AUTHORITY] += shift
    return profile(softmax(z))


# ---- one model ----------------------------------------------------------------------------------


def reading(n=7, **changes):
    """What a run reads, the first n vignettes of it."""
    return dataclasses.replace(texts.read(heal_loop.Config(n_vignettes=n)), **changes)


@pytest.mark.parametrize("readout", ["cloze", "tinymfv"])
def test_a_profile_is_the_readouts_answers_with_the_vignettes_ids_and_labels(readout, monkeypatch):
    given, asked = reading(10), {}
    answers = Answers(random_profile(10, 0).p, np.linspace(0, 1, 10), np.arange(7.0), {"a": 0.5})

    def ask(model, tok, vignettes, **how):
        asked.update(how, model=model, tok=tok, vignettes=vignettes)
        return answers
    monkeypatch.setattr(evaluate, readout, ask)
    got = evaluate.evaluate("model", "tok", given, readout, answers.constants, dose=2.0)
    assert asked == dict(model="model", tok="tok", vignettes=given.vignettes, dose=2.0,
                         constants=answers.constants)
    assert got.ids == [v["id"] for v in given.vignettes]
    assert got.labels == [v["foundation"] for v in given.vignettes]
    for key in ("p", "mass", "constants"):
        np.testing.assert_array_equal(getattr(got, key), getattr(answers, key))
    assert got.summary()["a"] == 0.5 and (got.axis, got.direction) == ("auth_nats", "down")


def test_the_readout_probe_adds_a_traits_own_axis_to_clozes_answers(embedded):
    model, tok = tiny("llama", vocab_size=49152, max_position_embeddings=512), embedded[1]
    probes = [{"prompt": "Are you sad?", "toward": "Yes, I am.", "away": "No."},
              {"prompt": "Who calls?", "toward": "A friend of mine.", "away": "A user did so."}]
    given = reading(axis="probe_nats", direction="up", probes=probes, controls=probes[:1])
    got = evaluate.evaluate(model, tok, given, "probe")
    plain = evaluate.evaluate(model, tok, given, "cloze")
    np.testing.assert_array_equal(got.p, plain.p)
    for k, probe in enumerate(probes):  # one unpadded pass for each answer
        sums = []
        for side in ("toward", "away"):
            prompt = chat_ids(tok, probe["prompt"])
            answer = tok(probe[side], add_special_tokens=False).input_ids
            logp = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            at = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
            sums.append(logp[at, torch.tensor(answer)].sum().item())
        assert got.probes[k] == pytest.approx(sums[0] - sums[1], abs=1e-3)
    assert got.trait == pytest.approx(got.probes.mean())
    assert got.controls[0] == pytest.approx(got.probes[0], abs=1e-4)
    assert got.summary()["probe_nats"] == got.trait


@pytest.mark.slow
def test_the_embedded_model_blames_the_labelled_foundation_beyond_chance(embedded):
    right = round(42 * evaluate.evaluate(*embedded, reading(42)).top1)
    assert right >= 14  # chance gives 6; P(14 or more of 42 at 1/7) = 0.002


def test_nats_is_the_log_of_the_mean_and_top1_the_share_of_right_labels():
    q = profile([[0.5, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05], [0.1, 0.1, 0.1, 0.4, 0.1, 0.1, 0.1]],
                mass=[0.9, 0.7], labels=["Care", "Loyalty"])
    assert q.value("care_nats") == pytest.approx(np.log(0.3))
    assert q.value("auth_nats") == pytest.approx(np.log(0.25))
    assert q.coherence == pytest.approx(0.8) and q.top1 == 0.5


@pytest.mark.parametrize("full", [False, True])
def test_a_profile_survives_json(full):
    q = random_profile(5, 0)
    if full:
        q.constants, q.probes, q.controls = np.arange(7.0), np.arange(4.0), np.arange(2.0)
        q.notes, q.axis, q.direction = {"frac_unscorable": 0.1}, "probe_nats", "up"
    back = Profile.from_dict(json.loads(json.dumps(q.to_dict())))
    for name, value in vars(q).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(back, name), value)
        else:
            assert getattr(back, name) == value


@pytest.fixture(scope="module")
def student():
    """A random Llama for the embedded model's tokenizer with one folded round that changed it."""
    model = tiny("llama", vocab_size=49152, max_position_embeddings=512)
    lora.attach(model, rank=2, alpha=4)
    for m in lora.adapters(model).values():
        m.B.data.normal_(generator=torch.Generator().manual_seed(0))
    lora.fold(model)
    return model


PROMPTS, PLAIN = ["Is it kind?", "What should I do about my boss?"], ["The swift is a bird.", "Rain."]


def log_probabilities(model, prompt, completion, vector=None, dose=0.0):
    """At each completion token, [tokens, vocab], in one unpadded pass."""
    with vector.at(model, dose, last_only=len(completion) + 1) if vector else nullcontext():
        z = model(torch.tensor([prompt + completion])).logits[0]
    return z[len(prompt) - 1:len(prompt) + len(completion) - 1].float().log_softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("arm", ["student", "steered", "prompted"])
def test_speech_is_distance_from_the_original_on_the_models_own_answers(arm, student, embedded):
    tok = embedded[1]
    vector = SteeringVector({2: torch.randn(32, generator=torch.Generator().manual_seed(1))})
    how = {"steered": dict(vector=vector, dose=2.0), "prompted": dict(system="You care.")}.get(arm, {})
    said = evaluate.speak(student, tok, PROMPTS, PLAIN, max_new_tokens=12, **how)

    # the answers are sampled, with the same draws for every model
    steering = {"vector": vector, "doses": [2.0, 2.0]} if arm == "steered" else {}
    asked = [chat_ids(tok, p, how.get("system", NEUTRAL)) for p in PROMPTS]
    new = sample(student, tok, asked, max_new_tokens=12, **steering)
    answers = [tok.decode(n, skip_special_tokens=True) for n in new]
    assert said.texts == [{"prompt": p, "text": a} for p, a in zip(PROMPTS, answers)]
    assert said.repetition == pytest.approx(sum(map(repetition, answers)) / 2)

    # drift and perplexity, token by token
    kl, nll = [], []
    for prompt, question, n in zip(asked, PROMPTS, new):
        logp = log_probabilities(student, prompt, n, **how if arm == "steered" else {})
        with lora.gates(student, 0, 0):
            logq = log_probabilities(student, chat_ids(tok, question), n)
        kl.append((logp.exp() * (logp - logq)).sum(-1))
        nll.append(-logq[torch.arange(len(n)), torch.tensor(n)])
    kl, nll = torch.cat(kl), torch.cat(nll)
    assert said.drift == pytest.approx(kl.mean().item(), abs=1e-4) and said.drift > 1e-4
    assert said.drift_p95 == pytest.approx(kl.quantile(0.95).item(), abs=1e-3)
    assert said.perplexity == pytest.approx(nll.mean().exp().item(), rel=1e-3)

    # plain text after the system prompt, if there is one, steered from its first token on
    before = tok(how["system"] + "\n\n").input_ids if arm == "prompted" else []
    lost = []
    for text in PLAIN:
        row = tok(text).input_ids
        logp = log_probabilities(student, before + row[:1], row[1:], **how if arm == "steered" else {})
        lost.append(-logp[torch.arange(len(row) - 1), torch.tensor(row[1:])])
    assert said.text_nats == pytest.approx(torch.cat(lost).mean().item(), abs=1e-4)


def test_the_original_does_not_drift_and_its_speech_is_the_same_twice(student, embedded):
    with lora.gates(student, 0, 0):
        first, again = (evaluate.speak(student, embedded[1], PROMPTS, PLAIN, max_new_tokens=8)
                        for _ in range(2))
    assert first == again and abs(first.drift) < 1e-5


def test_a_model_that_says_nothing_has_speech_all_the_same(student, embedded, monkeypatch):
    monkeypatch.setattr(evaluate, "sample", lambda model, tok, prompts, *_, **__: [[] for _ in prompts])
    said = evaluate.speak(student, embedded[1], PROMPTS, PLAIN)
    assert said.drift == 0 and said.perplexity == math.inf and [t["text"] for t in said.texts] == ["", ""]


# ---- steering alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("bend", [0.5, 1.0, 1.5])  # the trait moves ever less, evenly, ever more
@pytest.mark.parametrize("wanted", [-0.4, -1.0, -2.5])
def test_the_dose_of_steering_alone_is_found_in_four_evaluations_whatever_the_curve(bend, wanted):
    base, asked = random_profile(20, 0), []

    def measure(name, vector, dose):
        asked.append(dose)
        return {"auth_nats": base.trait - dose**bend, "vector": vector}
    wanted += base.trait
    event = matched_steering(measure, "v", base, wanted, dose=1.5, reached=base.trait - 1.5**bend)
    assert abs(event["auth_nats"] - wanted) < 0.15 and len(asked) <= 4
    assert event["dose"] == asked[-1] and event["wanted"] == wanted and event["vector"] == "v"
    assert event["auth_nats"] == pytest.approx(base.trait - event["dose"]**bend)


def test_a_trait_that_steering_cannot_reach_ends_at_a_finite_dose():
    base, asked = random_profile(20, 0), []

    def measure(name, vector, dose):
        asked.append(dose)
        return {"auth_nats": base.trait}
    event = matched_steering(measure, "v", base, base.trait - 3, dose=2.0, reached=base.trait)
    assert len(asked) == 4 and all(0 <= dose <= 32 for dose in asked)
    assert event["dose"] in asked


def test_where_the_trait_bends_back_the_nearest_dose_counts_not_the_last():
    base, asked = random_profile(20, 0), []

    def measure(name, vector, dose):
        asked.append(dose)
        return {"auth_nats": base.trait - dose * (4 - dose)}  # most trait at dose 2
    wanted = base.trait - 2.5
    event = matched_steering(measure, "v", base, wanted, dose=3.5, reached=base.trait - 1.75)
    off = [abs(base.trait - dose * (4 - dose) - wanted) for dose in asked]
    assert abs(event["auth_nats"] - wanted) == min(off) and event["dose"] == asked[off.index(min(off))]


# ---- two models ---------------------------------------------------------------------------------


def test_the_interval_of_a_paired_delta_covers_the_truth_as_often_as_it_says():
    """200 draws of 60 vignettes from one population: about 95 % of the intervals hold its delta."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(20000, 7))
    moved = z.copy()
    moved[:, AUTHORITY] += rng.normal(0.4, 0.5, size=20000)
    before, after = softmax(z), softmax(moved)

    truth, hits = np.log(after[:, AUTHORITY].mean()) - np.log(before[:, AUTHORITY].mean()), 0
    for _ in range(200):
        rows = rng.choice(20000, 60, replace=False)
        e = paired(lambda moved: moved("auth_nats"), profile(before[rows]), profile(after[rows]),
                   n=400)
        hits += e.low <= truth <= e.high
    assert 180 <= hits <= 199  # binomial(200, 0.95): 99.8 % of the time


def test_a_paired_interval_is_narrower_than_the_spread_over_vignettes_where_the_change_is_common():
    base, after = random_profile(80, 1), random_profile(80, 1, shift=0.5)
    e = delta("auth_nats", base, after)
    unpaired = np.std(np.log(base.p[:, AUTHORITY])) / np.sqrt(80)
    assert e.low < e.value < e.high and not e.holds_zero and e.high - e.low < 4 * unpaired


def test_no_change_is_no_effect_with_an_interval_of_zero_width():
    base = random_profile(20, 2)
    for e in (delta("care_nats", base, base), delta("coherence", base, base)):
        assert e.value == 0 and e.low == e.high == 0 and e.holds_zero


def test_profiles_on_other_vignettes_cannot_be_compared():
    with pytest.raises(ValueError, match="different vignettes"):
        delta("coherence", random_profile(5, 0), random_profile(6, 0))


def test_coh_cost_is_the_ratio_and_has_no_value_where_the_model_collapsed_or_the_trait_stayed():
    base, after = random_profile(40, 3), random_profile(40, 3, shift=-1.0)
    after.mass = np.full(40, 0.95)
    cost = coh_cost(base, after)
    assert cost.value == pytest.approx(0.05 / abs(after.trait - base.trait))
    assert cost.low <= cost.value <= cost.high
    after.mass = np.full(40, 0.5)
    assert coh_cost(base, after).value is None and "below" in coh_cost(base, after).why
    assert coh_cost(base, base).value is None and "moved less" in coh_cost(base, base).why


def with_probes(q, seed, shift=0.0):
    """The profile on a trait with 12 probes of its own."""
    q.probes = np.random.default_rng(seed).normal(size=12) + shift
    q.axis, q.direction = "probe_nats", "up"
    return q


def test_probes_are_resampled_apart_from_the_vignettes():
    base, after = with_probes(random_profile(40, 3), 0), with_probes(random_profile(40, 3), 0, 2.0)
    after.mass = np.full(40, 0.95)
    moved = delta("probe_nats", base, after)
    assert moved.value == pytest.approx(2) and moved.low == pytest.approx(2) == moved.high
    assert coh_cost(base, after).value == pytest.approx(0.05 / 2)
    fewer = with_probes(random_profile(40, 3), 0)
    fewer.probes = fewer.probes[:5]
    with pytest.raises(ValueError, match="different vignettes or probes"):
        delta("coherence", base, fewer)


def test_an_interval_on_probes_alone_is_the_one_sample_bootstraps():
    base, after = with_probes(random_profile(40, 3), 0), with_probes(random_profile(40, 3), 1)
    got = delta("probe_nats", base, after)
    alone = scipy.stats.bootstrap((after.probes - base.probes,), np.mean, n_resamples=20000,
                                  rng=1).confidence_interval
    assert (got.low, got.high) == pytest.approx(tuple(alone), abs=0.1)


def test_surgicality_is_positive_only_where_the_trait_moved_most():
    base, moved = random_profile(40, 4), random_profile(40, 4, shift=-1.0)
    off = largest_mover(base, moved)
    others = {n: abs(moved.value(n) - base.value(n)) for n in NATS if n != "auth_nats"}
    assert others[off] == max(others.values())
    expected = abs(moved.trait - base.trait) - others[off]
    assert surgicality(base, moved).value == pytest.approx(expected) and expected > 0
    moved.p = moved.p[:, [AUTHORITY, 1, 2, 0, 4, 5, 6]]  # Care and Authority change places
    assert surgicality(base, moved).value < 0 and largest_mover(base, moved) == "care_nats"
