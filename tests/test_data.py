"""The shipped data keeps what its readers rely on."""
import json
import re
from collections import Counter

import distil
import evaluate
import models
from steer import load_personas

VIGNETTES = evaluate.load_vignettes(models.DATA / "vignettes.json")


def test_vignettes_are_enough_balanced_third_person_and_distinct():
    assert len(VIGNETTES) >= 132
    counts = Counter(v["foundation"] for v in VIGNETTES)
    assert set(counts) == set(evaluate.FOUNDATIONS) and min(counts.values()) >= 16
    assert len({v["text"] for v in VIGNETTES}) == len(VIGNETTES)
    assert not [v for v in VIGNETTES if re.search(r"\b(I|you|we|my|your|our)\b", v["text"], re.I)]


def test_no_vignette_holds_a_content_word_of_any_clause():
    function_words = {"it", "is", "and", "their", "own", "someone", "away", "takes", "s"}
    stems = {w[:6] for clause in evaluate.CLAUSES.values() for w in re.findall(r"[a-z]+", clause) if w not in function_words}
    for v in VIGNETTES:
        assert not {w[:6] for w in re.findall(r"[a-z]+", v["text"].lower())} & stems, v


def test_a_subset_of_the_vignettes_is_balanced():
    counts = Counter(v["foundation"] for v in evaluate.load_vignettes(models.DATA / "vignettes.json", 21))
    assert set(counts.values()) == {3} and len(counts) == 7


def test_contexts_prompts_and_personas_are_there_and_apart():
    contexts = distil.load_strings(models.DATA / "contexts.json", "contexts")
    dilemmas = distil.load_strings(models.DATA / "prompts.json", "dilemmas")
    heldout = distil.load_strings(models.DATA / "prompts.json", "heldout")
    assert len(contexts) >= 128 and len(dilemmas) >= 40 and len(heldout) >= 8
    everything = contexts + dilemmas + heldout
    assert len(set(everything)) == len(everything)
    assert {"care", "authority", "love"} <= set(load_personas())


def test_every_data_file_says_where_it_comes_from():
    for file in models.DATA.glob("*.json"):
        assert len(json.loads(file.read_text())["source"]) > 20, file
