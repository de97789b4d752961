"""The shipped data keeps what its readers rely on; a user's is checked before a model loads."""
import json
import os
import re
from collections import Counter

import pytest
from conftest import ROOT, python

from common import checks, readouts, texts
from common.texts import FOUNDATIONS, load_vignettes
from heal_loop import Config


@pytest.fixture(autouse=True)
def few_texts(all_texts):
    """Here the data is read as it is shipped."""


VIGNETTES = load_vignettes(ROOT / "data/vignettes.json")
TRAITS = texts.load_traits()
PERSONAS = " ".join(f"{trait.pos} {trait.neg}" for trait in TRAITS.values())
CARE = json.loads((ROOT / "data/traits/care.json").read_text(encoding="utf-8"))
FUNCTION_WORDS = set("""a about above after against an and any are as at away be both but by do even
    every for from has have how i if in is it its me much my no not of on one only or other own s
    so takes that the their them they this those to us very was we what when which who will with
    without you your""".split())


def stems(text):
    """The words of a text that carry meaning, cut so that disobeys is obey and loved is love."""
    words = set(re.findall("[a-z]+", text.lower())) - FUNCTION_WORDS
    words = [re.sub("^(dis|un|in|im)(?=...)", "", w.replace("y", "i")) for w in words]
    return {re.sub("(ing|ed|e|li)?s?$", "", w)[:5] for w in words}


def test_vignettes_are_balanced_third_person_and_distinct():
    counts = Counter(v["foundation"] for v in VIGNETTES)
    assert set(counts) == set(FOUNDATIONS) and min(counts.values()) >= 16
    assert len({v["text"] for v in VIGNETTES}) == len(VIGNETTES)
    assert not [v for v in VIGNETTES if re.search(r"\b(I|you|we|my|your|our)\b", v["text"], re.I)]


def test_the_first_n_vignettes_are_balanced_for_any_n():
    for n in range(1, len(VIGNETTES) + 1):
        assert load_vignettes(texts.DATA / "vignettes.json", n) == VIGNETTES[:n]
        counts = Counter(v["foundation"] for v in VIGNETTES[:n])
        assert {counts[f] for f in FOUNDATIONS} <= {n // 7, -(-n // 7)}


def test_clauses_share_no_content_word_with_personas_or_vignettes():
    clauses = texts.load_clauses()
    assert list(clauses) == list(FOUNDATIONS)
    for foundation, wordings in clauses.items():
        assert len(set(wordings)) == 5
        for wording in wordings:
            assert re.fullmatch(r"( [a-z]+){2,6}", wording), wording
            for text in [PERSONAS, *(v["text"] for v in VIGNETTES)]:
                assert not stems(wording) & stems(text), (wording, text)


def test_no_prompt_has_two_uses():
    everything = texts.load_rows(texts.DATA / "contexts.json", "contexts")
    for trait in (TRAITS["care"], TRAITS["love"]):  # authority has care's prompts
        everything += trait.train + trait.heldout
        everything += [p["prompt"] for p in trait.probes + trait.controls]
    assert len(set(everything)) == len(everything) >= 256 + 92 + 80


def test_probes_share_no_content_word_with_their_persona():
    for trait in TRAITS.values():
        for probe in trait.probes:
            assert not stems(" ".join(probe.values())) & stems(f"{trait.pos} {trait.neg}"), probe


def test_controls_are_questions_of_fact_that_the_base_knows():
    controls = TRAITS["care"].controls
    assert len(controls) == 40
    for c in controls:
        assert len(c["toward"].split()) == len(c["away"].split()), c
        assert not stems(" ".join(c.values())) & stems(PERSONAS), c
    assert (readouts.probe(*checks.load("smollm2"), controls) > 0).mean() >= 0.85


def test_flags_win_over_the_trait():
    love = texts.complete(Config(trait="love"))
    assert (love.readout, love.doses) == ("probe", TRAITS["love"].doses)
    assert texts.complete(Config(trait="love", doses=(3.0,))).doses == (3.0,)
    assert texts.complete(Config(dose_nats=(1.0,))).doses is None
    assert texts.complete(love) == love
    with pytest.raises(ValueError, match="--readout cloze cannot measure 'love', which has probes"):
        texts.read(texts.complete(Config(trait="love", readout="cloze")))
    with pytest.raises(ValueError, match="unknown trait 'x'; fix: one of authority, care, love,"):
        texts.read(Config(trait="x"))
    with pytest.raises(ValueError, match="--n-contexts 500 of 256 .*contexts.json"):
        texts.read(Config(n_contexts=500))


def test_every_prompt_that_is_answered_has_the_suffix():
    care, usual, plain = TRAITS["care"], texts.read(Config()), texts.read(Config(prompt_suffix=""))
    assert (plain.train, plain.heldout) == (care.train, care.heldout)
    assert usual.train == [f"{prompt} Answer in one sentence." for prompt in care.train]
    assert usual.heldout == [f"{prompt} Answer in one sentence." for prompt in care.heldout]


def test_a_pair_of_ones_own_is_measured_as_care_is():
    own = texts.complete(Config(pos="Be brief.", neg="Be wordy."))
    reading = texts.read(own)
    assert (own.trait, reading.pos, reading.neg) == ("custom", "Be brief.", "Be wordy.")
    assert (reading.axis, reading.train) == ("auth_nats", texts.read(Config()).train)
    wrong = {"": "--neg: neg '' ", "Be brief.": "--neg: is not allowed; fix: two different",
             "\udce9t\udce9": "surrogate"}
    for neg, words in wrong.items():
        with pytest.raises(ValueError, match=words):
            texts.read(Config(pos="Be brief.", neg=neg))


PROBES = [{"prompt": "Hi.", "toward": "Yes.", "away": "No."}] * 2
FAULTS = {  # what is wrong: (the fields changed, what the line must say)
    "unknown readout": ({"readout": "multi"}, "readout 'multi' 'cloze'"),
    "unknown direction": ({"direction": "left"}, "direction 'left' 'up'"),
    "no dose": ({"doses": []}, "doses [] 1"),
    "dose as text": ({"doses": [1, "2"]}, "doses entry 2 '2'"),
    "one control": ({"controls": PROBES[:1]}, "controls 2"),
    "its own name": ({"name": "x"}, "name unknown"),
    "dose that is no JSON": ({"doses": [float("inf")]}, "malformed"),
    "a prompt that is a number": ({"heldout": ["Hi.", 3]}, "heldout entry 2 3"),
    "half a surrogate pair": ({"train": ["Hi.", "\ud83d"]}, "train entry 2 surrogate \\ud83d"),
    "unknown field": ({"prompts": ["Hi."]}, "prompts unknown"),
    "probes for cloze": ({"probes": PROBES}, "'readout' 'axis' together"),
    "answers alike": ({"controls": [*PROBES, {**PROBES[0], "away": "Yes."}]}, "entry 3 different"),
    "an answer missing": ({"controls": [*PROBES, {"prompt": "Hi."}]}, "entry 3 toward missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_trait_is_refused_in_one_line(fault, tmp_path):
    changes, words = FAULTS[fault]
    path = tmp_path / "my.json"
    path.write_text(json.dumps(CARE | changes))
    with pytest.raises(ValueError) as error:
        texts.read(Config(trait=str(path)))
    [line] = str(error.value).splitlines()
    assert all(word in line for word in [str(path), "fix:", *words.split()]), line


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8", "utf-16", "latin-1"])
def test_files_are_utf8_in_any_locale(encoding, tmp_path):
    path = tmp_path / "my.json"
    path.write_text(json.dumps(CARE | {"pos": "Café."}, ensure_ascii=False), encoding=encoding)
    code = f"from common import texts; print(ascii(texts.load_trait({str(path)!r}).pos))"
    done = python("-c", code, env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"})
    is_utf8 = encoding.startswith("utf-8")
    expected = "'Caf\\xe9.'" if is_utf8 else "fix: save it in encoding UTF-8"
    assert expected in (done.stdout if is_utf8 else done.stderr)


def test_every_data_file_says_where_it_comes_from():
    for file in texts.DATA.rglob("*.json"):
        found = json.loads(file.read_text(encoding="utf-8"))
        assert len(found.get("source") or found["about"]) > 20, file
