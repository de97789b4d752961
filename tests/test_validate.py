"""The instruments' own checks: the labelled completions, the split, and the statistics, by hand; both commands end to end."""
import re

import numpy as np

import pytest
import torch

import distil
import evaluate
import models
import validate
from conftest import tiny
from evaluate import FOUNDATIONS, cloze, load_vignettes
from steer import Persona
from test_evaluate import random_profile
from test_run import python, tiny_folder  # noqa: F401  (a fixture)

ROWS = distil.read_jsonl(validate.LABELLED)


def labelled_profile(n, seed):
    q = random_profile(n, seed)
    q.labels = [FOUNDATIONS[i % 7] for i in range(n)]
    q.constants = np.random.default_rng(seed).normal(size=7)
    return q


def test_the_labelled_completions_are_many_distinct_and_complete():
    assert len(ROWS) >= 60 and len({r["text"] for r in ROWS}) == len(ROWS)
    assert {r["trait"] for r in ROWS} == {"care", "authority", "love"} and {r["dose"] for r in ROWS} == {1, 2, 3, 4, 6, 8}
    for r in ROWS:
        assert all(isinstance(r[k], bool) for k in ("fluent", "coherent", "enacts", "narrates", "finished")) and r["perplexity"] > 1
        assert r["fluent"] or not r["coherent"], r["text"]


def test_the_split_is_by_text_alone_and_about_even():
    second = [validate.in_second_half(r["text"]) for r in ROWS]
    assert 0.4 < np.mean(second) < 0.6
    assert second[::-1] == [validate.in_second_half(r["text"]) for r in ROWS[::-1]]


def test_precision_and_recall_count_what_is_kept_and_what_is_wanted():
    long = "the old nurse put down her pen and quietly sat with him until morning came"
    row = dict(text=long, persona=Persona("a", "b"), coherent=True, narrates=False)
    rows = [row | dict(ppl=5.0), row | dict(ppl=50.0), row | dict(ppl=5.0, coherent=False), row | dict(ppl=5.0, narrates=True), row | dict(ppl=50.0, coherent=False)]
    rules = distil.Filter(max_perplexity=10)
    assert validate.precision_recall(rows, rules) == (1, 3, 2)
    assert validate.f1(rows, rules) == pytest.approx(2 * 1 / 5)


def test_auc_is_the_chance_that_bad_ranks_above_good():
    assert validate.auc([1, 2, 3, 4], [True, True, False, False]) == 1
    assert validate.auc([1, 3, 2, 4], [True, True, False, False]) == 0.75
    assert validate.auc([1, 1, 1, 1], [True, True, False, False]) == 0.5


@torch.no_grad()
def test_constants_of_a_draw_are_those_the_readout_gives_on_the_draw_alone(embedded):
    model, tok = tiny("llama", vocab_size=49152, max_position_embeddings=1024, pad_token_id=2), embedded[1]
    vignettes = load_vignettes(models.DATA / "vignettes.json", 14)
    rows = np.array([0, 3, 5, 8, 12])
    whole, alone = cloze(model, tok, vignettes), cloze(model, tok, [vignettes[i] for i in rows])
    again = validate.recalibrated(whole, rows, validate.constants_of(whole, rows))
    np.testing.assert_allclose(again.p, alone.p, atol=1e-5)
    assert again.ids == alone.ids and again.labels == alone.labels


def test_own_constants_over_all_vignettes_change_nothing():
    q, rows = labelled_profile(35, 0), np.arange(35)
    q.constants -= validate.constants_of(q, rows)  # as cloze leaves it: the mean log-likelihood is the constant
    q.p = np.exp(np.log(q.p) - np.log(q.p).mean(0))
    q.p /= q.p.sum(1, keepdims=True)
    np.testing.assert_allclose(validate.recalibrated(q, rows, validate.constants_of(q, rows)).p, q.p, atol=1e-12)


def test_agreement_over_all_vignettes_is_the_top1_of_the_profile_in_every_draw():
    q = labelled_profile(35, 1)
    *_, (n, own, none) = validate.agreement(q, seed=0, draws=5)
    rows = np.arange(35)
    assert n == 35 and set(own) == {validate.recalibrated(q, rows, validate.constants_of(q, rows)).top1}
    assert set(none) == {validate.recalibrated(q, rows, np.zeros(7)).top1}


def test_the_halves_are_disjoint_cover_all_and_are_balanced():
    q = labelled_profile(42, 2)
    a, b = validate.halves(q)
    assert sorted([*a, *b]) == list(range(42))
    for half in (a, b):
        assert {[q.labels[i] for i in half].count(f) for f in FOUNDATIONS} == {3}


def test_both_commands_write_their_results(tiny_folder, tmp_path):
    done = python("validate.py", "readout", "--model", tiny_folder, "--n-vignettes", 14, "--n-contexts", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "readout.md").read_text()
    assert said.strip() == done.stdout.strip() and re.search(r"\| care +\| +8 +\|", said) and "nan" not in said
    assert (tmp_path / "readout.png").read_bytes()[:4] == b"\x89PNG"
    done = python("validate.py", "filter", "--model", tiny_folder, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| default " in (tmp_path / "filter.md").read_text()
    assert str(tmp_path) not in said + (tmp_path / "filter.md").read_text()
