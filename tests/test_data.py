"""The shipped data keeps what its readers rely on."""
import json
import re
from collections import Counter

import pytest

import readouts
import texts
from texts import FOUNDATIONS, load_vignettes

VIGNETTES = load_vignettes(texts.DATA / "vignettes.json")


def test_vignettes_are_enough_balanced_third_person_and_distinct():
    assert len(VIGNETTES) >= 132
    counts = Counter(v["foundation"] for v in VIGNETTES)
    assert set(counts) == set(FOUNDATIONS) and min(counts.values()) >= 16
    assert len({v["text"] for v in VIGNETTES}) == len(VIGNETTES)
    you = re.compile(r"\b(I|you|we|my|your|our)\b", re.I)
    assert not [v for v in VIGNETTES if you.search(v["text"])]


def test_no_vignette_holds_a_content_word_of_any_clause():
    function_words = {"it", "is", "and", "their", "own", "someone", "away", "takes", "s"}

    def words(text):
        return set(re.findall(r"[a-z]+", text.lower()))
    content = set().union(*map(words, readouts.CLAUSES.values())) - function_words
    stems = {w[:6] for w in content}
    for v in VIGNETTES:
        assert not {w[:6] for w in words(v["text"])} & stems, v


def test_the_first_n_vignettes_are_balanced_for_any_n():
    fewest = min(Counter(v["foundation"] for v in VIGNETTES).values())
    for n in range(1, 7 * fewest + 1):
        found = load_vignettes(texts.DATA / "vignettes.json", n)
        counts = Counter(v["foundation"] for v in found)
        assert len(found) == n and {counts[f] for f in FOUNDATIONS} <= {n // 7, -(-n // 7)}
        assert found == VIGNETTES[:n]


def test_contexts_prompts_and_personas_are_there_and_apart():
    reading = texts.read("care")
    contexts = texts.load_strings(texts.DATA / "contexts.json", "contexts")
    assert len(contexts) >= 128 and reading.contexts == contexts[:128]
    assert len(reading.dilemmas) >= 40 and len(reading.heldout) >= 8
    everything = contexts + reading.dilemmas + reading.heldout
    assert len(set(everything)) == len(everything)
    assert reading.vignettes == VIGNETTES
    assert {"care", "authority", "love"} <= set(texts.load_personas())


@pytest.mark.parametrize("trait", sorted(texts.load_personas()))
def test_every_trait_is_two_different_texts(trait):
    persona = texts.find_persona(trait)
    assert persona.pos.strip() and persona.neg.strip() and persona.pos != persona.neg


def test_every_data_file_says_where_it_comes_from():
    files = list(texts.DATA.rglob("*.json"))
    assert len(files) >= 4
    for file in files:
        assert len(json.loads(file.read_text())["source"]) > 20, file
