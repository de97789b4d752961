"""cloze against a plain reimplementation, tinymfv against the package where it is installed."""
import importlib.util
import types

import numpy as np
import pytest
import torch

import evaluate
import lora
from common import readouts
from common import texts
from conftest import tiny
from evaluate import NATS
from common.readouts import cloze, tinymfv
from steer import NEUTRAL, SteeringVector, chat_ids
from common.texts import FOUNDATIONS, load_vignettes

has_package = any(map(importlib.util.find_spec, ("tinymfv", "moralmaps")))
needs_package = pytest.mark.skipif(not has_package, reason="needs requirements-tinymfv.txt")


@pytest.fixture(scope="module")
def tok(embedded):
    return embedded[1]


@pytest.fixture(scope="module")
def small():
    """A random Llama for the embedded model's tokenizer. Tests leave it as they found it."""
    return tiny("llama", vocab_size=49152, max_position_embeddings=1024, pad_token_id=2)


@pytest.fixture(scope="module")
def vignettes():
    return load_vignettes(texts.DATA / "vignettes.json", 10)


@pytest.fixture
def vector():
    return SteeringVector({2: torch.randn(32, generator=torch.Generator().manual_seed(1))})


# ---- cloze --------------------------------------------------------------------------------------


def ids_of(tok, text):
    return tok(text, add_special_tokens=False).input_ids


def answer(model, tok, question, opening, system, vector, dose):
    """Log-probabilities after each token of `opening` in one unpadded pass, [tokens, vocab].

    The prompt is unsteered up to the assistant tag.
    """
    decoder, prompt = model.get_decoder(), chat_ids(tok, question, system)
    past = decoder(input_ids=torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
    with vector.at(model, dose):
        h = decoder(input_ids=torch.tensor([prompt[-1:] + opening]), past_key_values=past,
                    use_cache=True).last_hidden_state[0]
    return model.get_output_embeddings()(h).float().log_softmax(-1)


def reference(model, tok, v, *how):
    """One vignette, one clause at a time: summed clause log-probabilities [7], and answer mass."""
    opening, sums = ids_of(tok, "This is wrong because"), []
    for foundation in FOUNDATIONS:
        clause = ids_of(tok, readouts.CLAUSES[foundation])
        logp = answer(model, tok, f"{v['text']} Why is this wrong?", opening + clause, *how)
        logp = logp[-1 - len(clause):-1]  # row t predicts token t + 1
        sums.append(logp.gather(1, torch.tensor(clause)[:, None]).sum().item())
    letters = [ids_of(tok, letter)[0] for letter in "ABCDEFG"]
    question = f"{readouts.OPTIONS}\n{v['text']} Why is this wrong?"
    p = answer(model, tok, question, ids_of(tok, "Answer: ("), *how)[-1].exp()
    return sums, p[letters].sum().item()


@torch.no_grad()
@pytest.mark.parametrize("dose, system", [
    (0.0, NEUTRAL), (3.0, NEUTRAL), (0.0, "You obey every rule.")])
def test_cloze_is_the_clause_likelihood_of_one_unpadded_pass_per_clause(
        small, tok, vignettes, vector, dose, system):
    got = cloze(small, tok, vignettes, system=system, vector=vector, dose=dose, batch_size=4)
    logp, mass = zip(*(reference(small, tok, v, system, vector, dose) for v in vignettes))
    z = np.array(logp) - np.array(logp).mean(0)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    np.testing.assert_allclose(got.p, p, atol=1e-5)
    np.testing.assert_allclose(got.mass, mass, rtol=1e-4)
    np.testing.assert_allclose(got.constants, np.array(logp).mean(0), atol=1e-4)


@torch.no_grad()
def test_cloze_does_not_depend_on_the_batch_size(small, tok, vignettes):
    one, many = (cloze(small, tok, vignettes, batch_size=n) for n in (1, 10))
    np.testing.assert_allclose(one.p, many.p, atol=1e-5)
    np.testing.assert_allclose(one.mass, many.mass, rtol=1e-4)


def test_the_originals_constants_favour_no_foundation_on_average_and_hold_for_later_models(
        small, tok, vignettes, vector):
    base = cloze(small, tok, vignettes)
    again = cloze(small, tok, vignettes, constants=base.constants)
    np.testing.assert_array_equal(base.p, again.p)
    after = cloze(small, tok, vignettes, constants=base.constants, vector=vector, dose=4.0)
    np.testing.assert_array_equal(after.constants, base.constants)
    assert np.abs(after.p - base.p).max() > 1e-3


# ---- tinymfv ------------------------------------------------------------------------------------


class FakePackage(types.ModuleType):
    """The package's call and what it returns, recorded from tinymfv at 4cc233d.

    Its columns are in another order than ours.
    """
    CONFIGS = ("classic", "scifi", "ai-actor")
    columns = FOUNDATIONS[::-1]

    def __init__(self):
        super().__init__("tinymfv")
        self.broken, self.asked, self.rows, self.rng = (), [], [], np.random.default_rng(0)

    def evaluate(self, model, tokenizer, vignettes, *, max_think_tokens, batch_size,
                 return_per_row, verbose):
        import pandas
        tokenizer.padding_side = "left"
        self.asked += vignettes
        rows = [{"id": v["id"], "p": self.rng.dirichlet(np.ones(7)),
                 "pmass_allowed": self.rng.uniform()} for v in vignettes]
        for row in rows:
            if row["id"] in self.broken:
                row["p"], row["pmass_allowed"] = np.full(7, np.nan), float("nan")
        self.rows += rows
        mean_p = np.mean([row["p"] for row in rows], axis=0)
        return {"profile": pandas.DataFrame({"foundation": self.columns, "model": mean_p}),
                "per_row": rows, "mean_nll_prefill": 1.5, "informedness": 0.25,
                "frac_unscorable": len(self.broken) / len(rows)}

    def load_vignettes(self, name):
        humans = {f"human_{f}": 90.0 if f == "SocialNorms" else 1.0 for f in FOUNDATIONS}
        return [{"id": "x1", "foundation_coarse": "Social Norms",
                 "other_violate": "You see a man in odd shoes.", **humans}]


class PaddedRight:
    padding_side = "right"


@pytest.fixture
def fake(monkeypatch):
    for needed in ("pandas", "loguru"):
        pytest.importorskip(needed, reason="needs requirements-tinymfv.txt")
    package = FakePackage()
    for module in (readouts, texts):
        monkeypatch.setattr(module, "tinymfv_package", lambda: package)
    return package


def test_the_packages_columns_come_back_by_name_and_its_mass_by_row(fake, vignettes):
    got = tinymfv(None, PaddedRight(), vignettes, batch_size=4)
    for k, f in enumerate(FOUNDATIONS):
        theirs = [row["p"][fake.columns.index(f)] for row in fake.rows]
        np.testing.assert_array_equal(got.p[:, k], theirs)
    np.testing.assert_array_equal(got.mass, [row["pmass_allowed"] for row in fake.rows])
    assert [row["id"] for row in fake.rows] == [v["id"] for v in vignettes]
    assert got.constants is None


def test_our_vignettes_reach_the_package_with_their_label_as_the_human_one(fake, vignettes):
    tinymfv(None, PaddedRight(), vignettes, batch_size=4, system="Obey.")
    for v, row in zip(vignettes, fake.asked, strict=True):
        assert row["other_violate"] == f"Obey.\n\n{v['text']}"
        assert row["foundation_coarse"] == v["foundation"]
        assert [f for f in FOUNDATIONS if row[f"human_{f}"]] == [v["foundation"]]


def test_padding_side_is_restored_and_what_cannot_be_scored_counts_as_incoherent(fake, vignettes):
    tok = PaddedRight()
    fake.broken = (vignettes[3]["id"],)
    got = tinymfv(None, tok, vignettes)
    assert tok.padding_side == "right"
    assert got.mass[3] == 0 and np.allclose(got.p[3], 1 / 7)
    assert np.isfinite(got.p).all() and (np.delete(got.mass, 3) > 0).all()
    assert got.notes == {"frac_unscorable": 0.1, "nll_prefill": 1.5, "informedness": 0.25}


def test_vignettes_of_the_package_are_read_by_name(fake):
    assert load_vignettes("tinymfv:classic") == [
        {"id": "x1", "foundation": "SocialNorms", "text": "You see a man in odd shoes."}]
    with pytest.raises(ValueError, match="tinymfv:nope is unknown; fix: one of tinymfv:classic"):
        load_vignettes("tinymfv:nope")


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch, vignettes):
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: None)
    for ask in (lambda: tinymfv(None, None, vignettes), lambda: load_vignettes("tinymfv:classic")):
        with pytest.raises(ValueError, match="pip install -r requirements-tinymfv.txt"):
            ask()


def packages_rows(package, vignettes, source):
    """The vignettes as the package's own rows."""
    if source != "ours":
        own = {row["id"]: row for row in package.load_vignettes("classic")}
        return [own[v["id"]] for v in vignettes]
    return [{"id": v["id"], "foundation_coarse": v["foundation"], "other_violate": v["text"],
             **{f"human_{f}": float(f == v["foundation"]) for f in FOUNDATIONS}} for v in vignettes]


@needs_package
@pytest.mark.parametrize("which", ["tiny", pytest.param("embedded", marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", ["tinymfv:classic", "ours"])
@pytest.mark.parametrize("state", ["base", "steered", "healed"])
def test_the_profile_is_the_packages_own_result(which, source, state, small, embedded, vector):
    package = texts.tinymfv_package()
    model, tok = (small, embedded[1]) if which == "tiny" else embedded
    vs = load_vignettes(texts.DATA / "vignettes.json" if source == "ours" else source, 10)
    if which == "embedded":
        random = torch.randn(576, generator=torch.Generator().manual_seed(1))
        vector = SteeringVector({14: 3 * random})
    dose, think = float(state == "steered"), 4
    lora.attach(model)
    try:
        if state == "healed":
            g = torch.Generator().manual_seed(0)
            for m in lora.adapters(model).values():
                m.B.data = 0.02 * torch.randn(m.B.shape, generator=g)
            lora.fold(model)
        how = dict(vector=vector, dose=1.0) if state == "steered" else {}
        given = texts.Texts(*[None] * 7, vs, [], [])
        ours = evaluate.evaluate(model, tok, given, "tinymfv", think_tokens=think, **how)
        assert tok.padding_side == "right"
        with readouts.steered_after_prompt(model, vector, dose):
            theirs = package.evaluate(
                model, tok, vignettes=packages_rows(package, vs, source), max_think_tokens=think,
                return_per_row=True, verbose=0)
        for f, mean_p in zip(theirs["profile"]["foundation"], theirs["profile"]["model"]):
            assert abs(ours.value(NATS[FOUNDATIONS.index(f)]) - np.log(mean_p)) < 1e-6
        assert ours.notes["informedness"] == pytest.approx(theirs["informedness"])
        assert abs(ours.coherence - theirs["mean_pmass_allowed"]) < 1e-6
        assert abs(ours.top1 - theirs["top1_acc"]) < 1e-6
        with lora.gates(model, 0, 0):
            plain = evaluate.evaluate(model, tok, given, "tinymfv", think_tokens=think)
        changed = np.abs(plain.p - ours.p).max() > 1e-4
        assert changed == (state != "base"), "the state must show"
    finally:
        tok.padding_side = "right"
        lora.detach(model)


@torch.no_grad()
def test_steering_after_the_prompt_leaves_the_prompts_own_states_alone(small, vector, ids):
    decoder = small.get_decoder()

    def go_on(past):
        return decoder(input_ids=ids[:, :4], past_key_values=past, use_cache=True).last_hidden_state
    with readouts.steered_after_prompt(small, vector, 2.0):
        first = decoder(input_ids=ids, use_cache=True)
        then = go_on(first.past_key_values)
    plain = decoder(input_ids=ids, use_cache=True)
    assert torch.equal(first.last_hidden_state, plain.last_hidden_state)
    with vector.at(small, 2.0):
        steered = go_on(plain.past_key_values)
    assert torch.equal(then, steered)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())
