"""The readouts against plain reimplementations, the real tinymfv package where it is installed, and the statistics by hand."""
import importlib.util
import json
import sys
import types

import numpy as np
import pytest
import torch

import evaluate
import lora
import models
from conftest import tiny
from evaluate import FOUNDATIONS, Profile, cloze, coh_cost, delta_coherence, delta_nats, load_vignettes, paired, surgicality
from steer import NEUTRAL, SteeringVector, chat_ids

needs_package = pytest.mark.skipif(not (importlib.util.find_spec("tinymfv") or importlib.util.find_spec("moralmaps")),
                                   reason="needs the package of requirements-tinymfv.txt")


@pytest.fixture(scope="module")
def tok(embedded):
    return embedded[1]


@pytest.fixture
def small():
    """A random Llama for the embedded model's tokenizer."""
    return tiny("llama", vocab_size=49152, max_position_embeddings=1024, pad_token_id=2)


@pytest.fixture(scope="module")
def vignettes():
    return load_vignettes(models.DATA / "vignettes.json", 10)


@pytest.fixture
def vector():
    return SteeringVector({2: torch.randn(32, generator=torch.Generator().manual_seed(1))})


def profile(p, mass=None, labels=None):
    p = np.array(p, dtype=float)
    return Profile([f"v{i}" for i in range(len(p))], labels or ["Care"] * len(p), p, np.ones(len(p)) if mass is None else np.array(mass, dtype=float))


def random_profile(n, seed, shift=0.0):
    z = np.random.default_rng(seed).normal(size=(n, 7))
    z[:, FOUNDATIONS.index("Authority")] += shift
    p = np.exp(z)
    return profile(p / p.sum(1, keepdims=True))


# ---- the cloze readout


def reference(model, tok, v, system, vector, dose):
    """One vignette, one clause at a time, no padding: summed clause log-probabilities [7] and answer mass."""
    def answer(question, opening, after):
        prompt = chat_ids(tok, question, system)
        tail = tok(opening, add_special_tokens=False).input_ids + after
        past = model.get_decoder()(input_ids=torch.tensor([prompt[:-1]]), use_cache=True).past_key_values  # unsteered
        with vector.at(model, dose):
            h = model.get_decoder()(input_ids=torch.tensor([prompt[-1:] + tail]), past_key_values=past, use_cache=True).last_hidden_state[0]
        return model.get_output_embeddings()(h).float().log_softmax(-1)  # row t predicts token t of `tail`
    logp = []
    for clause in evaluate.CLAUSES.values():
        ids = tok(clause, add_special_tokens=False).input_ids
        z = answer(f"{v['text']} Why is this wrong?", "This is wrong because", ids)[-1 - len(ids):-1]
        logp.append(z.gather(1, torch.tensor(ids)[:, None]).sum().item())
    letters = [tok(c, add_special_tokens=False).input_ids[0] for c in "ABCDEFG"]
    mass = answer(f"{evaluate.OPTIONS}\n{v['text']} Why is this wrong?", "Answer: (", [])[-1].exp()[letters].sum().item()
    return logp, mass


@torch.no_grad()
@pytest.mark.parametrize("dose, system", [(0.0, NEUTRAL), (3.0, NEUTRAL), (0.0, "You obey every rule.")])
def test_cloze_is_the_clause_likelihood_of_one_unpadded_pass_per_clause(small, tok, vignettes, vector, dose, system):
    got = cloze(small, tok, vignettes, system=system, vector=vector, dose=dose, batch_size=4)
    logp, mass = zip(*(reference(small, tok, v, system, vector, dose) for v in vignettes))
    z = np.array(logp) - np.array(logp).mean(0)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    np.testing.assert_allclose(got.p, p, atol=1e-5)
    np.testing.assert_allclose(got.mass, mass, rtol=1e-4)
    np.testing.assert_allclose(got.constants, np.array(logp).mean(0), atol=1e-4)


@torch.no_grad()
def test_cloze_does_not_depend_on_the_batch_size(small, tok, vignettes):
    one, many = cloze(small, tok, vignettes, batch_size=1), cloze(small, tok, vignettes, batch_size=10)
    np.testing.assert_allclose(one.p, many.p, atol=1e-5)
    np.testing.assert_allclose(one.mass, many.mass, rtol=1e-4)


def test_the_constants_of_the_original_leave_no_foundation_favoured_on_average_and_hold_for_later_models(small, tok, vignettes, vector):
    base = cloze(small, tok, vignettes)
    again = cloze(small, tok, vignettes, constants=base.constants)
    np.testing.assert_array_equal(base.p, again.p)
    after = cloze(small, tok, vignettes, constants=base.constants, vector=vector, dose=4.0)
    np.testing.assert_array_equal(after.constants, base.constants)
    assert np.abs(after.p - base.p).max() > 1e-3


def test_the_embedded_model_blames_the_labelled_foundation_beyond_chance(embedded):
    model, tok = embedded
    vs = load_vignettes(models.DATA / "vignettes.json", 42)
    right = round(42 * cloze(model, tok, vs).top1)
    assert right >= 14  # chance gives 6; P(14 or more of 42 at 1/7) = 0.002


# ---- the tinymfv readout


class FakePackage(types.ModuleType):
    """The package's call and the shape of what it returns, recorded from tinymfv at 4cc233d, with columns in another order."""
    CONFIGS = ("classic", "scifi", "ai-actor")
    columns = FOUNDATIONS[::-1]

    def __init__(self, broken=()):
        super().__init__("tinymfv")
        self.broken, self.asked, self.rng = broken, [], np.random.default_rng(0)

    def evaluate(self, model, tokenizer, vignettes, *, max_think_tokens, batch_size, return_per_row, verbose):
        import pandas
        tokenizer.padding_side = "left"
        self.asked += vignettes
        rows = [{"id": v["id"], "p": self.rng.dirichlet(np.ones(7)), "pmass_allowed": self.rng.uniform()} for v in vignettes]
        for row in rows:
            if row["id"] in self.broken:
                row["p"], row["pmass_allowed"] = np.full(7, np.nan), float("nan")
        frame = pandas.DataFrame({"foundation": self.columns, "model": np.mean([r["p"] for r in rows], axis=0)})
        self.mean_p, self.rows = frame, getattr(self, "rows", []) + rows
        return {"profile": frame, "per_row": rows}

    def load_vignettes(self, name):
        return [{"id": "x1", "foundation_coarse": "Social Norms", "other_violate": "You see a man in odd shoes.",
                 **{f"human_{f}": 90.0 if f == "SocialNorms" else 1.0 for f in FOUNDATIONS}}]


class PaddedRight:
    padding_side = "right"


@pytest.fixture
def fake(monkeypatch):
    pytest.importorskip("pandas", reason="needs the packages of requirements-tinymfv.txt")
    pytest.importorskip("loguru", reason="needs the packages of requirements-tinymfv.txt")
    package = FakePackage()
    monkeypatch.setattr(evaluate, "tinymfv_package", lambda: package)
    return package


def test_the_packages_columns_come_back_by_name_and_its_mass_by_row(fake, vignettes):
    got = evaluate.evaluate(None, PaddedRight(), vignettes, "tinymfv", batch_size=4)
    for k, f in enumerate(FOUNDATIONS):
        np.testing.assert_array_equal(got.p[:, k], [r["p"][fake.columns.index(f)] for r in fake.rows])
    np.testing.assert_array_equal(got.mass, [r["pmass_allowed"] for r in fake.rows])
    assert got.ids == [v["id"] for v in vignettes] and got.labels == [v["foundation"] for v in vignettes]


def test_our_vignettes_reach_the_package_with_their_label_as_the_human_one(fake, vignettes):
    evaluate.tinymfv(None, PaddedRight(), vignettes, batch_size=4, system="Obey.")
    for v, row in zip(vignettes, fake.asked):
        assert row["other_violate"] == f"Obey.\n\n{v['text']}" and row["foundation_coarse"] == v["foundation"]
        assert [f for f in FOUNDATIONS if row[f"human_{f}"]] == [v["foundation"]]


def test_padding_side_is_restored_and_a_vignette_that_cannot_be_scored_is_an_error(fake, vignettes):
    tok = PaddedRight()
    evaluate.tinymfv(None, tok, vignettes)
    assert tok.padding_side == "right"
    fake.broken = (vignettes[3]["id"],)
    with pytest.raises(ValueError, match=f"'{vignettes[3]['id']}'.*not finite; fix"):
        evaluate.tinymfv(None, tok, vignettes)
    assert tok.padding_side == "right"


def test_vignettes_of_the_package_are_read_by_name(fake):
    assert load_vignettes("tinymfv:classic") == [{"id": "x1", "foundation": "SocialNorms", "text": "You see a man in odd shoes."}]
    with pytest.raises(ValueError, match="tinymfv:nope is unknown; fix: one of tinymfv:classic"):
        load_vignettes("tinymfv:nope")


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch, vignettes):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    for ask in (lambda: evaluate.evaluate(None, None, vignettes, "tinymfv"), lambda: load_vignettes("tinymfv:classic")):
        with pytest.raises(ValueError, match="pip install -r requirements-tinymfv.txt"):
            ask()


@needs_package
@pytest.mark.parametrize("which", ["tiny", "embedded"])
@pytest.mark.parametrize("source", ["tinymfv:classic", "ours"])
@pytest.mark.parametrize("state", ["base", "steered", "healed"])
def test_the_profile_is_the_packages_own_result(which, source, state, small, embedded, vector):
    model, tok = (small, embedded[1]) if which == "tiny" else embedded
    package = evaluate.tinymfv_package()
    vs = load_vignettes(source if source != "ours" else models.DATA / "vignettes.json", 10)
    if source == "ours":
        rows = [{"id": v["id"], "foundation_coarse": v["foundation"], "other_violate": v["text"],
                 **{f"human_{f}": float(f == v["foundation"]) for f in FOUNDATIONS}} for v in vs]
    else:
        own = {r["id"]: r for r in package.load_vignettes("classic")}
        rows = [own[v["id"]] for v in vs]
    if which == "embedded":
        vector = SteeringVector({14: 3 * torch.randn(576, generator=torch.Generator().manual_seed(1))})
    lora.attach(model)
    try:
        if state == "healed":
            torch.manual_seed(0)
            for m in lora.adapters(model).values():
                torch.nn.init.normal_(m.B, std=0.02)
            lora.fold(model)
        think = 4
        ours = evaluate.evaluate(model, tok, vs, "tinymfv", max_think_tokens=think, **(dict(vector=vector, dose=1.0) if state == "steered" else {}))
        assert tok.padding_side == "right"
        with evaluate.steered_after_prompt(model, vector, 1.0 if state == "steered" else 0.0):
            theirs = package.evaluate(model, tok, vignettes=rows, max_think_tokens=think, return_per_row=True, verbose=0)
        for f, mean_p in zip(theirs["profile"]["foundation"], theirs["profile"]["model"]):
            assert abs(ours.nats(f) - np.log(mean_p)) < 1e-6
        assert abs(ours.coherence - theirs["mean_pmass_allowed"]) < 1e-6
        assert abs(ours.top1 - theirs["top1_acc"]) < 1e-6
        with lora.gates(model, 0, 0):
            plain = evaluate.evaluate(model, tok, vs, "tinymfv", max_think_tokens=think)
        assert (np.abs(plain.p - ours.p).max() > 1e-4) == (state != "base"), "the state must show"
    finally:
        tok.padding_side = "right"
        lora.detach(model)


@torch.no_grad()
def test_steering_after_the_prompt_leaves_the_prompts_own_states_alone(small, vector, ids):
    decoder = small.get_decoder()
    with evaluate.steered_after_prompt(small, vector, 2.0):
        first = decoder(input_ids=ids, use_cache=True)
        then = decoder(input_ids=ids[:, :4], past_key_values=first.past_key_values, use_cache=True).last_hidden_state
    plain = decoder(input_ids=ids, use_cache=True)
    assert torch.equal(first.last_hidden_state, plain.last_hidden_state)
    with vector.at(small, 2.0):
        steered = decoder(input_ids=ids[:, :4], past_key_values=plain.past_key_values, use_cache=True).last_hidden_state
    assert torch.equal(then, steered)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())


# ---- profiles and their statistics


def test_nats_is_the_log_of_the_mean_and_top1_the_share_of_right_labels():
    q = profile([[0.5, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05], [0.1, 0.1, 0.1, 0.4, 0.1, 0.1, 0.1]], mass=[0.9, 0.7], labels=["Care", "Loyalty"])
    assert q.care_nats == pytest.approx(np.log(0.3)) and q.auth_nats == pytest.approx(np.log(0.25))
    assert q.coherence == pytest.approx(0.8) and q.top1 == 0.5


def test_a_profile_survives_json():
    q = random_profile(5, 0)
    back = Profile.from_dict(json.loads(json.dumps(q.to_dict())))
    assert back.ids == q.ids and np.array_equal(back.p, q.p) and np.array_equal(back.mass, q.mass)


def test_the_interval_of_a_paired_delta_covers_the_truth_as_often_as_it_says():
    """200 draws of 60 vignettes from one population: about 95 % of the intervals hold the population's delta."""
    rng, auth = np.random.default_rng(0), FOUNDATIONS.index("Authority")
    z = rng.normal(size=(20000, 7))
    step = rng.normal(0.4, 0.5, size=20000)
    def p_of(z):
        return np.exp(z) / np.exp(z).sum(1, keepdims=True)
    moved = z.copy()
    moved[:, auth] += step
    before, after = p_of(z), p_of(moved)
    truth = np.log(after[:, auth].mean()) - np.log(before[:, auth].mean())
    hits = 0
    for _ in range(200):
        rows = rng.choice(20000, 60, replace=False)
        e = paired(lambda p0, m0, p1, m1: np.log(p1[..., auth].mean(0)) - np.log(p0[..., auth].mean(0)), profile(before[rows]), profile(after[rows]), n=400)
        hits += e.low <= truth <= e.high
    assert 180 <= hits <= 199  # binomial(200, 0.95): 99.8 % of the time


def test_a_paired_interval_is_narrower_than_the_spread_over_vignettes_where_the_change_is_common():
    base = random_profile(80, 1)
    after = random_profile(80, 1, shift=0.5)
    e = delta_nats("Authority", base, after)
    unpaired = np.std(np.log(base.p[:, 3])) / np.sqrt(80)
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
    assert cost.value == pytest.approx(0.05 / abs(after.auth_nats - base.auth_nats)) and cost.low <= cost.value <= cost.high
    after.mass = np.full(40, 0.5)
    assert coh_cost(base, after).value is None and "below" in coh_cost(base, after).why
    assert coh_cost(base, base).value is None and "moved less" in coh_cost(base, base).why


def test_surgicality_is_positive_only_where_authority_moved_most():
    base = random_profile(40, 4)
    assert surgicality(base, random_profile(40, 4, shift=-1.0)).value > 0
    swapped = random_profile(40, 4, shift=-1.0)
    swapped.p = swapped.p[:, [3, 1, 2, 0, 4, 5, 6]]
    assert surgicality(base, swapped).value < 0


def test_the_first_n_vignettes_are_balanced_for_any_n():
    for n in (7, 21, 70, 140):
        labels = [v["foundation"] for v in load_vignettes(models.DATA / "vignettes.json", n)]
        assert {labels.count(f) for f in FOUNDATIONS} == {n // 7}


def test_an_unknown_readout_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown readout 'digits'; fix: one of cloze, tinymfv"):
        evaluate.evaluate(None, None, [], "digits")
