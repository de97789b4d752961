"""The shipped data keeps what its readers rely on."""
import json
import re
from collections import Counter

import pytest

import heal_loop
from common import readouts
from common import texts
from common.texts import FOUNDATIONS, load_vignettes

pytestmark = pytest.mark.usefixtures("all_texts")
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


def read(trait):
    return texts.read(heal_loop.Config(trait=trait))


def test_contexts_prompts_and_personas_are_there_and_apart():
    reading = read("care")
    contexts = texts.load_strings(texts.DATA / "contexts.json", "contexts")
    assert len(contexts) >= 128 and reading.contexts == contexts[:128]
    everything = list(contexts)
    for file in ("prompts.json", "prompts_love.json"):
        pool = [texts.load_strings(texts.DATA / file, key) for key in ("dilemmas", "heldout")]
        assert len(pool[0]) >= 40 and len(pool[1]) >= 8
        everything += sum(pool, [])
    assert len(set(everything)) == len(everything)
    assert reading.vignettes == VIGNETTES
    assert {"care", "authority", "love"} <= set(texts.load_traits())


@pytest.mark.parametrize("name", sorted(texts.load_traits()))
def test_every_trait_is_two_different_texts_and_can_be_measured(name):
    trait, reading = texts.load_traits()[name], read(name)
    pos, neg = trait.persona.pos, trait.persona.neg
    assert pos.strip() and neg.strip() and pos != neg
    assert (reading.axis, reading.direction) == (trait.axis, trait.direction)
    assert (reading.axis == "probe_nats") == bool(reading.probes)


def content_words(text):
    """The words of a text that carry its meaning, cut to five letters: love, loves, loved."""
    short = "a an and any are at be but by for from have how i in is it me my no not of on one or "
    short += "so that the them they this to us what who will with you your like were was had has "
    short += "do does did been them than then there their when which would could can all its it's "
    short += "as at if only say state plainly openly without own very whole always never"
    return {w[:5] for w in re.findall(r"[a-z']+", text.lower())} - {w[:5] for w in short.split()}


def test_probes_of_love_share_no_content_word_with_its_personas_nor_their_prompts_with_training():
    reading = read("love")
    persona = content_words(reading.persona.pos) | content_words(reading.persona.neg)
    for probe in reading.probes:
        shared = content_words(" ".join(probe.values())) & persona
        assert not shared, (probe, shared)
    trained_on = set(reading.dilemmas) | set(reading.contexts) | set(reading.heldout)
    assert not trained_on & {p["prompt"] for p in reading.probes + reading.controls}
    assert len(reading.probes) >= 20 and len(reading.controls) >= 8


def test_what_flags_leave_open_is_as_the_trait_has_it_and_flags_win():
    love = texts.complete(heal_loop.Config(trait="love"))
    trait = texts.load_traits()["love"]
    assert (love.readout, love.doses) == ("probe", trait.doses)
    assert love.probes.name == "love.json" and love.prompts.name == "prompts_love.json"
    mine = texts.complete(heal_loop.Config(trait="love", doses=(3.0,), readout="cloze"))
    assert (mine.doses, mine.readout) == ((3.0,), "cloze")
    with pytest.raises(ValueError, match="cloze takes no probes, and 'love' is measured by some"):
        texts.read(mine)
    assert texts.complete(love) == love
    assert texts.complete(heal_loop.Config(dose_nats=(1.0,))).doses is None
    own = texts.complete(heal_loop.Config(pos="a", neg="b", probes=love.probes))
    assert own.readout == "probe" and texts.read(own).direction == "up" and own.trait == "custom"
    with pytest.raises(ValueError, match="--n-contexts 500 of 256 .*contexts.json"):
        texts.read(heal_loop.Config(n_contexts=500))


def test_every_data_file_says_where_it_comes_from():
    files = list(texts.DATA.rglob("*.json"))
    assert len(files) >= 4
    for file in files:
        assert len(json.loads(file.read_text())["source"]) > 20, file
