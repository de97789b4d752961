"""Profiles, their statistics by hand, what a model says, and steering alone at equal trait."""
import json
import math

import numpy as np
import pytest
import torch

import evaluate
import lora
import readouts
import texts
from conftest import tiny
from evaluate import (Profile, coh_cost, delta_coherence, delta_nats, matched_steering, paired,
                      surgicality)
from readouts import Answers
from sampling import repetition, score
from steer import chat_ids
from texts import FOUNDATIONS, load_vignettes

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


def test_a_profile_is_the_readouts_answers_with_the_vignettes_ids_and_labels(monkeypatch):
    vignettes = load_vignettes(texts.DATA / "vignettes.json", 10)
    answers, asked = Answers(random_profile(10, 0).p, np.linspace(0, 1, 10), np.arange(7.0)), {}

    def readout(model, tok, vignettes, **how):
        asked.update(how, model=model, tok=tok, vignettes=vignettes)
        return answers
    monkeypatch.setitem(readouts.READOUTS, "mine", readout)
    how = dict(dose=2.0, constants=answers.constants)
    got = evaluate.evaluate("model", "tok", vignettes, "mine", **how)
    assert asked == dict(model="model", tok="tok", vignettes=vignettes, **how)
    assert got.ids == [v["id"] for v in vignettes]
    assert got.labels == [v["foundation"] for v in vignettes]
    for key in ("p", "mass", "constants"):
        np.testing.assert_array_equal(getattr(got, key), getattr(answers, key))


def test_an_unknown_readout_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown readout 'digits'; fix: one of cloze, tinymfv"):
        evaluate.evaluate(None, None, [], "digits")


@pytest.mark.slow
def test_the_embedded_model_blames_the_labelled_foundation_beyond_chance(embedded):
    vignettes = load_vignettes(texts.DATA / "vignettes.json", 42)
    right = round(42 * evaluate.evaluate(*embedded, vignettes).top1)
    assert right >= 14  # chance gives 6; P(14 or more of 42 at 1/7) = 0.002


def test_nats_is_the_log_of_the_mean_and_top1_the_share_of_right_labels():
    q = profile([[0.5, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05], [0.1, 0.1, 0.1, 0.4, 0.1, 0.1, 0.1]],
                mass=[0.9, 0.7], labels=["Care", "Loyalty"])
    assert q.care_nats == pytest.approx(np.log(0.3))
    assert q.auth_nats == pytest.approx(np.log(0.25))
    assert q.coherence == pytest.approx(0.8) and q.top1 == 0.5


@pytest.mark.parametrize("constants", [None, np.arange(7.0)])
def test_a_profile_survives_json(constants):
    q = random_profile(5, 0)
    q.constants = constants
    back = Profile.from_dict(json.loads(json.dumps(q.to_dict())))
    assert back.ids == q.ids and back.labels == q.labels
    assert np.array_equal(back.p, q.p) and np.array_equal(back.mass, q.mass)
    if constants is None:
        assert back.constants is None
    else:
        np.testing.assert_array_equal(back.constants, constants)


def test_what_a_student_says_is_scored_under_the_original(embedded):
    tok = embedded[1]
    model = tiny("llama", vocab_size=49152, max_position_embeddings=512)
    prompts = ["Is it kind?", "What should I do about my boss?"]
    lora.attach(model, rank=2, alpha=4)
    for m in lora.adapters(model).values():
        m.B.data.normal_(generator=torch.Generator().manual_seed(0))
    lora.fold(model)
    said = evaluate.speak(model, tok, prompts, max_new_tokens=12)

    ids = [chat_ids(tok, p) for p in prompts]
    heard = [model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False, pad_token_id=0)
             [0, len(p):].tolist() for p in ids]
    answers = [tok.decode(tokens, skip_special_tokens=True) for tokens in heard]
    assert said["texts"] == [{"prompt": p, "text": a} for p, a in zip(prompts, answers)]
    assert said["repetition"] == pytest.approx(sum(map(repetition, answers)) / 2)
    under_the_student = score(model, ids, heard)
    lora.detach(model)
    logp = score(model, ids, heard)
    assert not any(map(torch.allclose, logp, under_the_student))
    expected = math.exp(-sum(lp.mean().item() for lp in logp) / 2)
    assert said["perplexity"] == pytest.approx(expected, rel=1e-4)


# ---- steering alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("bend", [0.5, 1.0, 1.5])  # the trait moves ever less, evenly, ever more
@pytest.mark.parametrize("wanted", [-0.4, -1.0, -2.5])
def test_the_dose_of_steering_alone_is_found_in_four_evaluations_whatever_the_curve(bend, wanted):
    base, asked = random_profile(20, 0), []

    def measure(name, vector, dose):
        asked.append(dose)
        return {"auth_nats": base.auth_nats - dose**bend, "vector": vector}
    wanted += base.auth_nats
    event = matched_steering(measure, "v", base, wanted, dose=1.5, auth=base.auth_nats - 1.5**bend)
    assert abs(event["auth_nats"] - wanted) < 0.15 and len(asked) <= 4
    assert event["dose"] == asked[-1] and event["wanted"] == wanted and event["vector"] == "v"
    assert event["auth_nats"] == pytest.approx(base.auth_nats - event["dose"]**bend)


def test_a_trait_that_steering_cannot_reach_ends_at_a_finite_dose():
    base, asked = random_profile(20, 0), []

    def measure(name, vector, dose):
        asked.append(dose)
        return {"auth_nats": base.auth_nats}
    event = matched_steering(measure, "v", base, base.auth_nats - 3, dose=2.0, auth=base.auth_nats)
    assert len(asked) == 4 and all(0 <= dose <= 32 for dose in asked)
    assert event["dose"] == asked[-1]


# ---- two models ---------------------------------------------------------------------------------


def test_the_interval_of_a_paired_delta_covers_the_truth_as_often_as_it_says():
    """200 draws of 60 vignettes from one population: about 95 % of the intervals hold its delta."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(20000, 7))
    moved = z.copy()
    moved[:, AUTHORITY] += rng.normal(0.4, 0.5, size=20000)
    before, after = softmax(z), softmax(moved)

    def shift(p0, m0, p1, m1):
        return np.log(p1[..., AUTHORITY].mean(0)) - np.log(p0[..., AUTHORITY].mean(0))
    truth, hits = shift(before, None, after, None), 0
    for _ in range(200):
        rows = rng.choice(20000, 60, replace=False)
        e = paired(shift, profile(before[rows]), profile(after[rows]), n=400)
        hits += e.low <= truth <= e.high
    assert 180 <= hits <= 199  # binomial(200, 0.95): 99.8 % of the time


def test_a_paired_interval_is_narrower_than_the_spread_over_vignettes_where_the_change_is_common():
    base, after = random_profile(80, 1), random_profile(80, 1, shift=0.5)
    e = delta_nats("Authority", base, after)
    unpaired = np.std(np.log(base.p[:, AUTHORITY])) / np.sqrt(80)
    assert e.low < e.value < e.high and not e.holds_zero and e.high - e.low < 4 * unpaired


def test_no_change_is_no_effect_with_an_interval_of_zero_width():
    base = random_profile(20, 2)
    for e in (delta_nats("Care", base, base), delta_coherence(base, base)):
        assert e.value == 0 and e.low == e.high == 0 and e.holds_zero


def test_profiles_on_other_vignettes_cannot_be_compared():
    with pytest.raises(ValueError, match="different vignettes"):
        delta_coherence(random_profile(5, 0), random_profile(6, 0))


def test_coh_cost_is_the_ratio_and_has_no_value_where_the_model_collapsed_or_the_trait_stayed():
    base, after = random_profile(40, 3), random_profile(40, 3, shift=-1.0)
    after.mass = np.full(40, 0.95)
    cost = coh_cost(base, after)
    assert cost.value == pytest.approx(0.05 / abs(after.auth_nats - base.auth_nats))
    assert cost.low <= cost.value <= cost.high
    after.mass = np.full(40, 0.5)
    assert coh_cost(base, after).value is None and "below" in coh_cost(base, after).why
    assert coh_cost(base, base).value is None and "moved less" in coh_cost(base, base).why


def test_surgicality_is_positive_only_where_authority_moved_most():
    base, moved = random_profile(40, 4), random_profile(40, 4, shift=-1.0)
    assert surgicality(base, moved).value > 0
    moved.p = moved.p[:, [AUTHORITY, 1, 2, 0, 4, 5, 6]]  # Care and Authority change places
    assert surgicality(base, moved).value < 0
