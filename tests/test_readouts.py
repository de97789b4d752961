"""cloze and probe against a plain loop, how the package tinymfv is steered."""
import numpy as np
import pytest
import torch

from common import readouts, texts
from common.prompts import NEUTRAL
from common.readouts import cloze, probe, tinymfv
from common.texts import FOUNDATIONS, load_vignettes
from test_distil import a_student, a_vector, embedded_chat


@pytest.fixture(scope="module")
def vignettes():
    return load_vignettes(texts.DATA / "vignettes.json", 4)


@torch.no_grad()
def logp_of(prompt, answer, dose):
    """At each token of an answer in one unpadded pass, [tokens, vocab]; steered from the tag on."""
    with a_vector().at(a_student(), dose, last_only=len(answer) + 1):
        z = a_student()(torch.tensor([prompt + answer])).logits[0]
    return z[len(prompt) - 1:-1].float().log_softmax(-1)


def summed(prompt, begun, answer, dose):
    logp = logp_of(prompt, begun + answer, dose)[len(begun):]
    return logp[range(len(answer)), answer].sum().item()


@pytest.mark.parametrize("dose, system", [(0.0, NEUTRAL), (3.0, NEUTRAL), (0.0, "You obey.")])
def test_cloze_is_its_equation_over_all_wordings(vignettes, dose, system):
    chat = embedded_chat()
    clauses = {f: [f" is {f.lower()}", f" breaks with {f.lower()} and more"] for f in FOUNDATIONS}
    got = cloze(a_student(), chat, vignettes, None, system, a_vector(), dose, clauses)
    raw, valid = np.zeros((len(vignettes), 7, 2)), []
    because, answer = chat.encode("This is wrong because it"), chat.encode("Answer: (")
    letters = [chat.encode(letter)[0] for letter in "ABCDEFG"]
    for v, vignette in enumerate(vignettes):
        question = f"{vignette['text']} Why is this wrong?"
        prompt = chat.ids(question, system)
        for f, name in enumerate(FOUNDATIONS):
            for w, words in enumerate(clauses[name]):
                raw[v, f, w] = summed(prompt, because, chat.encode(words), dose)
        prompt = chat.ids(f"{readouts.OPTIONS}\n{question}", system)
        valid.append(logp_of(prompt, answer + letters[:1], dose)[-1].exp()[letters].sum().item())
    s = raw - raw.mean(0)
    np.testing.assert_allclose(got.constants, raw.mean(0), atol=1e-3)
    np.testing.assert_allclose(got.p, torch.tensor(s.mean(2)).softmax(1), atol=1e-4)
    np.testing.assert_allclose(got.valid_p, valid, rtol=1e-3)
    for f in range(7):
        for w in range(2):  # this foundation by one wording, the others by all of theirs
            z = torch.tensor(s.mean(2))
            z[:, f] = torch.tensor(s[:, f, w])
            expected = z.softmax(1)[:, f].mean().log().item()
            assert got.by_wording[f, w] == pytest.approx(expected, abs=1e-3)


def test_the_originals_constants_hold_for_later_models(vignettes):
    ask = (a_student(), embedded_chat(), vignettes)
    base = cloze(*ask)
    np.testing.assert_allclose(cloze(*ask, constants=base.constants).p, base.p)
    steered = dict(vector=a_vector(), dose=4.0)
    after = cloze(*ask, constants=base.constants, **steered)
    np.testing.assert_array_equal(after.constants, base.constants)
    own = cloze(*ask, **steered)
    moved = np.exp(np.log(after.p) - np.log(own.p))  # what the steered model's own would hide
    assert np.abs(moved / moved[:, :1] - 1).max() > 1e-2


def test_probe_is_the_difference_of_two_answers_log_probabilities():
    chat = embedded_chat()
    probes = [{"prompt": "Are you sad?", "toward": "Yes, I am.", "away": "No."},
              {"prompt": "Who calls?", "toward": "A friend of mine.", "away": "A user did so."}]
    for dose, system in ((0.0, NEUTRAL), (2.0, "You obey.")):
        got = probe(a_student(), chat, probes, system, a_vector(), dose)
        for k, p in enumerate(probes):
            toward, away = (summed(chat.ids(p["prompt"], system), [], chat.encode(p[side]), dose)
                            for side in ("toward", "away"))
            assert got[k] == pytest.approx(toward - away, abs=1e-3)


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch, vignettes):
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: None)
    for ask in (lambda: tinymfv(None, None, vignettes), lambda: load_vignettes("tinymfv:classic")):
        with pytest.raises(ValueError, match="'tinymfv' is not installed; fix: .*requirements-dev"):
            ask()


@torch.no_grad()
def test_steering_after_the_prompt_leaves_the_prompts_states_alone(ids):
    model, vector = a_student(), a_vector()
    decoder = model.get_decoder()

    def go_on(past):
        return decoder(input_ids=ids[:, :4], past_key_values=past, use_cache=True).last_hidden_state
    with readouts.steered_after_prompt(model, vector, 2.0):
        first = decoder(input_ids=ids, use_cache=True)
        then = go_on(first.past_key_values)
    plain = decoder(input_ids=ids, use_cache=True)
    assert torch.equal(first.last_hidden_state, plain.last_hidden_state)
    with vector.at(model, 2.0):
        assert torch.equal(then, go_on(plain.past_key_values))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
