"""Profiles and their statistics by hand, what a model generates, steering at matched trait."""
import dataclasses
import json
from contextlib import nullcontext

import numpy as np
import pytest
import scipy.stats
import torch

import evaluate
import heal_loop
import lora
from common import texts
from common.generation import generate
from common.prompts import NEUTRAL, stop_tokens
from common.sampling import repetition, sample
from common.texts import FOUNDATIONS
from evaluate import NATS, Profile, coh_cost, delta, largest_mover, paired, surgicality
from test_distil import a_student, a_vector, embedded_chat

AUTHORITY = FOUNDATIONS.index("Authority")


def profile(p, valid_p=None, labels=None):
    p = np.array(p, dtype=float)
    valid_p = np.ones(len(p)) if valid_p is None else valid_p
    return Profile([f"v{i}" for i in range(len(p))], labels or ["Care"] * len(p), p, valid_p)


def softmax(z):
    return np.exp(z) / np.exp(z).sum(1, keepdims=True)


def random_profile(n, seed, shift=0.0):
    z = np.random.default_rng(seed).normal(size=(n, 7))
    z[:, AUTHORITY] += shift
    return profile(softmax(z))


def test_nats_is_the_log_of_the_mean_and_top1_the_share_right():
    q = profile([[0.5, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05], [0.1, 0.1, 0.1, 0.4, 0.1, 0.1, 0.1]],
                valid_p=[0.9, 0.7], labels=["Care", "Loyalty"])
    assert q.value("care_nats") == pytest.approx(np.log(0.3))
    assert q.trait == q.value("auth_nats") == pytest.approx(np.log(0.25))
    assert q.value('coherence') == pytest.approx(0.8) and q.summary()["top1"] == 0.5


def test_a_profile_survives_json():
    q = random_profile(5, 0)
    q.constants, q.probes, q.controls = np.ones((7, 3)), np.arange(4.0), np.arange(2.0)
    q.notes, q.spread, q.axis = {"frac_unscorable": 0.1}, {"auth_nats": [1.0, 2.0]}, "probe_nats"
    back = Profile(**json.loads(json.dumps(q.to_dict())))
    for name, value in vars(q).items():
        np.testing.assert_equal(getattr(back, name), value)
    assert back.summary()["control_nats"] == 0.5 and back.trait == 1.5


def reading(**changes):
    return dataclasses.replace(texts.read(heal_loop.Config(n_vignettes=7)), **changes)


def test_a_profile_has_the_readouts_answers_controls_and_spread():
    probes = [{"prompt": "Who calls?", "toward": "A friend.", "away": "A user did so."}] * 2
    asked = reading(readout="probe", axis="probe_nats", direction="up",
                     probes=probes)
    q = evaluate.evaluate(a_student(), embedded_chat(), asked, "probe")
    assert q.ids == [v["id"] for v in asked.vignettes] and q.direction == "up"
    assert q.labels == [v["foundation"] for v in asked.vignettes]
    assert len(q.probes) == 2 and q.trait == q.probes.mean() and len(q.controls) == 4
    assert q.spread["probe_nats"] == q.probes.tolist()
    assert len(q.spread["auth_nats"]) == q.constants.shape[1] > 1
    assert set(q.summary()) == {*NATS, "coherence", "probe_nats", "control_nats", "top1"}


PROMPTS, PLAIN = ["Is it kind?", "What should I do?"], ["The swift is a bird.", "Rain fell."]


@torch.no_grad()
@pytest.mark.parametrize("arm", ["student", "steered", "prompted"])
def test_generation_metrics_equal_one_unpadded_pass_an_answer(arm):
    model, chat, vector, n = a_student(), embedded_chat(), a_vector(), 8
    how = {"steered": dict(vector=vector, dose=2.0), "prompted": dict(system="You care.")}
    how = how.get(arm, {})
    model.generation_config.eos_token_id = list(range(0, 49152, 16))  # so that some answers end
    got = generate(model, chat, PROMPTS, PLAIN, max_new_tokens=n, draws=2, **how)

    def logp_of(prompt, tokens, steered=False):  # [tokens, vocab]
        with vector.at(model, 2.0, len(tokens) + 1) if steered else nullcontext():
            z = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1:-1]
        return z.log_softmax(-1)
    asked = [chat.ids(p, how.get("system", NEUTRAL)) for p in PROMPTS] * 2
    new = sample(model, chat, asked, how.get("vector"), [2.0] * 4, max_new_tokens=n, keep_stop=True)
    kl, nll, entropy = [], [], []
    for prompt, question, tokens in zip(asked, PROMPTS * 2, new):
        logp = logp_of(prompt, tokens, arm == "steered")
        with lora.gates(model, 0, 0):
            logq = logp_of(chat.ids(question), tokens)
        kl.append((logp.exp() * (logp - logq)).sum(-1))
        entropy.append(-(logp.exp() * logp).sum(-1))
        nll.append(-logq[range(len(tokens)), tokens])
    stop = set(stop_tokens(model, chat))
    said = [chat.decode(tokens[:-1] if tokens[-1] in stop else tokens) for tokens in new]
    model.generation_config.eos_token_id = 2
    early = [tokens[-1] in stop for tokens in new if len(tokens) < n]
    assert all(early) and got.ended == pytest.approx(len(early) / 4)
    assert got.texts == [{"prompt": p, "text": a} for p, a in zip(PROMPTS, said)]
    assert got.repetition == pytest.approx(sum(map(repetition, said)) / 4)
    assert got.drift == pytest.approx(torch.cat(kl).mean().item(), rel=1e-3) and got.drift > 1e-3
    assert got.drift_p95 == pytest.approx(torch.cat(kl).quantile(0.95).item(), rel=1e-3)
    assert got.entropy == pytest.approx(torch.cat(entropy).mean().item(), rel=1e-4)
    assert got.perplexity == pytest.approx(torch.cat(nll).mean().exp().item(), rel=1e-3)
    for k, rows in enumerate((slice(0, 2), slice(2, 4))):  # each draw by itself
        assert got.by_draw["drift"][k] == pytest.approx(torch.cat(kl[rows]).mean().item(), rel=1e-3)
        ppl = torch.cat(nll[rows]).mean().exp().item()
        assert got.by_draw["perplexity"][k] == pytest.approx(ppl, rel=1e-3)
        nats = torch.cat(entropy[rows]).mean().item()
        assert got.by_draw["entropy"][k] == pytest.approx(nats, rel=1e-4)

    # plain text after the system prompt, if there is one, steered from its first token on
    before, lost = chat.encode("You care.\n\n") if arm == "prompted" else [], []
    for row in map(chat.encode, PLAIN):
        logp = logp_of(before + row[:1], row[1:], arm == "steered")
        lost.append(-logp[range(len(row) - 1), row[1:]])
    assert got.text_nats == pytest.approx(torch.cat(lost).mean().item(), rel=1e-4)


def test_the_original_does_not_drift_and_says_the_same_twice():
    with lora.gates(a_student(), 0, 0):
        first, again = (generate(a_student(), embedded_chat(), PROMPTS, PLAIN, max_new_tokens=6)
                        for _ in range(2))
    assert first == again and abs(first.drift) < 1e-5 and len(first.by_draw["drift"]) == 3


def test_the_matched_dose_moves_the_trait_as_far_as_the_student():
    model, chat, asked, vector = a_student(), embedded_chat(), reading(controls=[]), a_vector(3.0)
    base = evaluate.evaluate(model, chat, asked)
    how = dict(constants=base.constants, vector=vector)
    student = evaluate.evaluate(model, chat, asked, dose=1.7, **how)
    assert abs(student.trait - base.trait) > 0.1
    dose = evaluate.matched_dose(model, chat, asked, "cloze", base, student, 0, vector)
    reached = evaluate.evaluate(model, chat, asked, dose=dose, **how).trait
    assert abs(reached - student.trait) < 0.05 and dose > 0


def test_intervals_cover_the_truth_as_often_as_they_say():
    """200 draws of 60 vignettes from one population: about 95 % of the intervals hold its delta."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(20000, 7))
    moved = z.copy()
    moved[:, AUTHORITY] += rng.normal(0.4, 0.5, size=20000)
    before, after = softmax(z), softmax(moved)
    truth, hits = np.log(after[:, AUTHORITY].mean()) - np.log(before[:, AUTHORITY].mean()), 0
    for _ in range(200):
        rows = rng.choice(20000, 60, replace=False)
        e = paired(lambda change: change("auth_nats"), profile(before[rows]), profile(after[rows]),
                   n=400)
        hits += e.low <= truth <= e.high
    assert 180 <= hits <= 199  # binomial(200, 0.95): 99.8 % of the time


def test_coh_cost_is_the_ratio_and_has_no_value_after_a_collapse():
    base, after = random_profile(40, 3), random_profile(40, 3, shift=-1.0)
    after.valid_p = np.full(40, 0.95)
    cost = coh_cost(base, after)
    assert cost.value == pytest.approx(0.05 / abs(after.trait - base.trait))
    assert cost.low <= cost.value <= cost.high
    after.valid_p = np.full(40, 0.5)
    assert coh_cost(base, after).value is None and "below" in coh_cost(base, after).why
    assert coh_cost(base, base).value is None and "moved less" in coh_cost(base, base).why
    still = delta("care_nats", base, base)
    assert still.value == still.low == still.high == 0


def with_probes(seed, n=12):
    q = random_profile(40, 3)
    q.probes, q.axis = np.random.default_rng(seed).normal(size=n), "probe_nats"
    return q


def test_probes_are_a_sample_of_their_own():
    base, after = with_probes(0), with_probes(1)
    got = delta("probe_nats", base, after)
    alone = scipy.stats.bootstrap((after.probes - base.probes,), np.mean, n_resamples=20000,
                                  rng=1).confidence_interval
    assert (got.low, got.high) == pytest.approx(tuple(alone), abs=0.1)
    for other in (with_probes(0, n=5), random_profile(41, 3)):
        with pytest.raises(ValueError, match="different vignettes or probes"):
            delta("coherence", base, other)


def test_surgicality_chooses_the_largest_mover_in_each_resample():
    base, noise = random_profile(40, 5), np.random.default_rng(6).normal(0, 0.8, size=(40, 7))
    after = profile(softmax(np.log(base.p) + noise))  # all move a little: no mover stands out
    off = NATS.index(largest_mover(base, after))
    expected = []
    for mover in (lambda moved: np.delete(moved, AUTHORITY, -1).max(-1),
                  lambda moved: moved[..., off]):  # anew in each resample; or once for all
        def margin(rows, axis=-1):
            drawn = rows.astype(int)
            moved = np.abs(np.log(after.p[drawn].mean(-2)) - np.log(base.p[drawn].mean(-2)))
            return moved[..., AUTHORITY] - mover(moved)
        bounds = scipy.stats.bootstrap((np.arange(40),), margin, n_resamples=4000, vectorized=True,
                                       rng=1).confidence_interval
        expected.append(tuple(bounds))
    got = surgicality(base, after)
    assert (got.low, got.high) == pytest.approx(expected[0], abs=0.04)
    change = [abs(after.value(m) - base.value(m)) for m in NATS]
    assert got.value == pytest.approx(change[AUTHORITY] - max(np.delete(change, AUTHORITY)))
    assert np.abs(np.subtract(*expected)).max() > 0.08, "the two must differ"
