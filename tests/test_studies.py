"""The studies' own checks: labelled completions, the split, statistics by hand; whole commands."""
import re

import numpy as np
import pytest
import torch

from studies import frontier
import lora
from common import models
from common import runs
from common import texts
from conftest import ROOT, command, python, tiny
from distil import Rules
from evaluate import Profile
from common.readouts import cloze
from steer import Persona, SteeringVector, calibrate
from studies import aggregate, cause, doses, gemma, judge, paper, readout
from studies import filter as filter_study
from common.texts import FOUNDATIONS, load_vignettes

FRESH = runs.read_jsonl(filter_study.FRESH)
ROWS = runs.read_jsonl(filter_study.LABELLED)


# ---- readout ------------------------------------------------------------------------------------


def labelled_profile(n, seed):
    rng = np.random.default_rng(seed)
    p, labels = rng.dirichlet(np.ones(7), size=n), [FOUNDATIONS[i % 7] for i in range(n)]
    return Profile([f"v{i}" for i in range(n)], labels, p, np.ones(n), rng.normal(size=7))


@torch.no_grad()
def test_constants_of_a_draw_are_those_the_readout_gives_on_the_draw_alone(embedded):
    model = tiny("llama", vocab_size=49152, max_position_embeddings=1024, pad_token_id=2)
    tok, rows = embedded[1], np.array([0, 3, 5, 8, 12])
    vignettes = load_vignettes(texts.DATA / "vignettes.json", 14)
    drawn = [vignettes[i] for i in rows]
    whole = readout.profile_of(cloze(model, tok, vignettes), vignettes)
    alone = readout.profile_of(cloze(model, tok, drawn), drawn)
    again = readout.recalibrated(whole, rows, readout.constants_of(whole, rows))
    np.testing.assert_allclose(again.p, alone.p, atol=1e-5)
    assert np.abs(whole.p[rows] - alone.p).max() > 5e-4, "other constants must show"
    assert again.ids == alone.ids and again.labels == alone.labels


def test_own_constants_over_all_vignettes_change_nothing():
    profile, rows = labelled_profile(35, 0), np.arange(35)
    # as cloze leaves it: the mean log-likelihood is the constant
    profile.constants -= readout.constants_of(profile, rows)
    profile.p = np.exp(np.log(profile.p) - np.log(profile.p).mean(0))
    profile.p /= profile.p.sum(1, keepdims=True)
    again = readout.recalibrated(profile, rows, readout.constants_of(profile, rows))
    np.testing.assert_allclose(again.p, profile.p, atol=1e-12)


def test_agreement_over_all_vignettes_is_the_top1_of_the_profile_in_every_draw():
    profile, rows = labelled_profile(35, 1), np.arange(35)
    *_, (n, own, none) = readout.agreement(profile, seed=0, draws=5)
    recalibrated = readout.recalibrated(profile, rows, readout.constants_of(profile, rows))
    assert n == 35 and len(own) == len(none) == 5
    assert set(own) == {recalibrated.top1}
    assert set(none) == {readout.recalibrated(profile, rows, np.zeros(7)).top1}


def test_the_halves_are_disjoint_cover_all_and_are_balanced():
    profile = labelled_profile(42, 2)
    first, second = readout.halves(profile)
    assert sorted([*first, *second]) == list(range(42))
    for half in (first, second):
        labels = [profile.labels[i] for i in half]
        assert {labels.count(f) for f in FOUNDATIONS} == {3}


def test_vignettes_too_few_for_two_halves_are_refused_in_one_line(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "studies/readout", "--n-vignettes", 13, "--out", tmp_path / "out")
    assert stopped.value.code == 1 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "fix: --n-vignettes 14" in said
    assert re.search("1 of 13 vignettes from .*vignettes.json are labelled SocialNorms", said)


def test_an_adapter_that_nothing_would_read_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "studies/readout", "--adapter", "a.safetensors", "b.safetensors",
                "--out", tmp_path)
    assert stopped.value.code == 1
    assert "not installed; fix: pip install -r requirements-tinymfv.txt" in capsys.readouterr().err


@pytest.mark.slow
def test_the_readout_study_writes_page_and_picture(tiny_folder, tmp_path):
    done = python("-m", "studies.readout", "--model", tiny_folder, "--n-vignettes", 14,
                  "--n-contexts", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "readout.md").read_text()
    assert said.strip() == done.stdout.strip()
    assert re.search(r"\| care +\| +8 +\|", said) and "nan" not in said
    assert str(tmp_path) not in said and str(tiny_folder) not in said
    assert (tmp_path / "readout.png").read_bytes()[:4] == b"\x89PNG"


# ---- filter -------------------------------------------------------------------------------------


def test_the_labelled_completions_are_many_distinct_and_complete():
    assert len(ROWS) >= 60 and len({row["text"] for row in ROWS}) == len(ROWS)
    assert {row["trait"] for row in ROWS} == {"care", "authority", "love"}
    assert {row["dose"] for row in ROWS} == {1, 2, 3, 4, 6, 8}
    for row in ROWS:
        for label in ("fluent", "coherent", "enacts", "narrates", "finished"):
            assert isinstance(row[label], bool)
        assert row["perplexity"] > 1
        assert row["fluent"] or not row["coherent"], row["text"]


def test_the_fresh_completions_are_others_and_were_read_twice():
    assert len(FRESH) >= 100
    assert not {row["text"] for row in FRESH} & {row["text"] for row in ROWS}
    assert np.mean([row["dose"] <= 1.5 for row in FRESH]) > 0.5, "mild doses above all"
    for reader in (0, 1):
        for row in filter_study.as_read_by(FRESH, reader):
            assert isinstance(row["fluent"], bool) and (row["fluent"] or not row["coherent"])


def test_kappa_is_one_for_the_same_labels_and_nought_for_chance():
    same = [{"x": [a, a]} for a in (True, False, True)]
    chance = [{"x": [a, b]} for a in (True, False) for b in (True, False)]
    assert filter_study.agreement(same, "x") == 1
    assert filter_study.agreement(chance, "x") == 0
    assert filter_study.agreement(chance[:3], "x") == pytest.approx((1 / 3 - 5 / 9) / (4 / 9))


def test_precision_and_recall_count_what_is_kept_and_what_is_wanted():
    text = "the old nurse put down her pen and quietly sat with him until morning came"
    row = dict(text=text, persona=Persona("a", "b"), ppl=5.0, coherent=True, narrates=False)
    rows = [row, row | dict(ppl=50.0), row | dict(coherent=False), row | dict(narrates=True),
            row | dict(ppl=50.0, coherent=False)]
    rules = Rules(max_perplexity=10)
    assert filter_study.count(rows, rules) == (1, 3, 2)
    assert filter_study.f1(rows, rules) == pytest.approx(2 * 1 / 5)


def test_auc_is_the_chance_that_bad_ranks_above_good():
    good = [True, True, False, False]
    assert filter_study.auc([1, 2, 3, 4], good) == 1
    assert filter_study.auc([1, 3, 2, 4], good) == 0.75
    assert filter_study.auc([1, 1, 1, 1], good) == 0.5


@pytest.mark.slow
def test_the_filter_study_writes_its_page(tiny_folder, tmp_path):
    done = python("-m", "studies.filter", "--model", tiny_folder, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "filter.md").read_text()
    assert said.strip() == done.stdout.strip() and "| shipped " in said
    assert str(tmp_path) not in said and str(tiny_folder) not in said


# ---- doses, cause, aggregate, judge, paper ------------------------------------------------------


def test_a_calibrated_dose_reaches_its_nats_through_the_cache_too(embedded):
    model = tiny("llama", vocab_size=49152, max_position_embeddings=512, initializer_range=0.5)
    vector = SteeringVector({2: torch.randn(32, generator=torch.Generator().manual_seed(1))})
    prompts = ["Is it kind?", "What should I do about my boss and the rain?"]
    dose = calibrate(model, embedded[1], vector, prompts, 0.5)
    there, twice = doses.reached(model, embedded[1], vector, prompts, [dose, 2 * dose])
    assert there == pytest.approx(0.5, rel=0.05) and twice > 1.2 * there


def test_a_projection_takes_its_direction_out_of_the_last_positions_alone():
    model, seen = tiny("llama"), []
    v = torch.randn(32, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(3, 15).reshape(2, 6)
    hook = model.model.layers[1].register_forward_hook
    with torch.no_grad(), cause.Projection({1: v}).at(model, 1.0, last_only=2):
        with hook(lambda block, args, output: seen.append(output)):
            model(ids)
    with torch.no_grad(), hook(lambda block, args, output: seen.append(output)):
        model(ids)
    projected, plain = seen
    assert torch.equal(projected[:, :4], plain[:, :4])
    assert (projected[:, 4:] @ v).abs().max() < 1e-5 < (plain[:, 4:] @ v).abs().min()
    across = plain[:, 4:] - (plain[:, 4:] @ v)[..., None] * v / (v @ v)
    torch.testing.assert_close(projected[:, 4:], across)


def test_the_shares_are_what_the_shift_brings_and_takes_and_none_where_nothing_moved():
    moved = {"student": 2.0, "original + s": 1.5, "original + random": 0.1,
             "student without s": 0.5, "student without random": 1.9, "original without s": -0.2}
    assert list(cause.shares(moved).values()) == pytest.approx([0.75, 0.05, 0.75, 0.05])
    assert set(cause.shares({**moved, "student": 0.01}).values()) == {None}


def test_the_causes_of_runs_are_written_for_each_and_for_all(run, tmp_path, monkeypatch):
    command(monkeypatch, "studies/cause", run, run, "--out", tmp_path / "new")
    said = (tmp_path / "new" / "cause.md").read_text()
    one, two = re.findall(r"\| run +\|([^\n]+)", said)[1:]
    assert one == two and str(run) not in said
    [everything] = re.findall(r"\| all +\|([^\n]+)", said)
    numbers = [[float(x) for x in row.strip(" |").split("|")] for row in (one, everything)]
    assert numbers[0] == numbers[1]


@torch.no_grad()
def test_what_the_aggregations_see_is_that_of_whole_rows_one_at_a_time():
    model = tiny("llama")
    lora.attach(model, rank=4)
    for m in lora.adapters(model).values():
        torch.nn.init.normal_(m.B, std=0.1)
    lora.fold(model)
    rows = torch.randint(3, 128, (3, 25), generator=torch.Generator().manual_seed(2)).tolist()
    found = aggregate.of_completions(model, [row[:5] for row in rows], [row[5:] for row in rows])
    for i, row in enumerate(rows):
        logp = model(torch.tensor([row[:-1]])).logits[0, 4:].log_softmax(-1)
        with lora.gates(model, history=0, live=0):
            logq = model(torch.tensor([row[:-1]])).logits[0, 4:].log_softmax(-1)
        kl = (logp.exp() * (logp - logq)).sum(-1)  # [20]: 5 % of it is one token
        by_hand = {"mean": kl.mean(), "rmse": kl.square().mean().sqrt(), "p95": kl.quantile(0.95),
                   "max": kl.max(), "top 5%": kl.max() / kl.sum()}
        for name, value in by_hand.items():
            assert found[name][i] == pytest.approx(value.item(), rel=1e-3)


def test_what_the_aggregations_see_is_written_for_each_run(run, tmp_path, monkeypatch):
    command(monkeypatch, "studies/aggregate", run, run, "--out", tmp_path / "new")
    said = (tmp_path / "new/aggregate.md").read_text()
    one, two = re.findall(r"\| runs\d*/run +\|([^\n]+)", said)
    n, _, rmse, p95, most, top, *_ = one.replace("%", "").split("|")
    assert one == two and int(n) == 6 and str(tmp_path) not in said
    assert 1 < float(rmse) < float(most) and float(p95) < float(most)
    assert 0 < float(top) < 100


def test_a_matched_tau_is_as_tight_on_the_median_completion():
    rmse = torch.tensor([0.5, 1.0, 2.0])
    D = {"mean": rmse / 2, "rmse": rmse, "p95": 2 * rmse, "max": rmse * torch.tensor([3, 4, 9])}
    assert aggregate.matched(D, "rmse", 0.8) == pytest.approx(
        {"mean": 0.4, "rmse": 0.8, "p95": 1.6, "max": 3.2})
    assert aggregate.matched(D, "mean", 0.4)["rmse"] == pytest.approx(0.8)


def test_an_unrelated_model_judges_what_was_said(run, tiny_folder, tmp_path, monkeypatch):
    records = tmp_path / "records"
    frontier.save(frontier.record(run, arm="kl_rev_rmse", command=""), records)
    monkeypatch.setattr(gemma, "folder", lambda: tiny_folder)
    command(monkeypatch, "studies/judge", run.parent, records)
    [record] = frontier.load(records)
    [healed] = [e for e in runs.read_events(run) if (e["stage"], e["round"]) == ("healed", 1)]
    model, tok = models.load(str(tiny_folder), dtype="float32")
    lost = []
    for row in healed["texts"]:  # one unpadded text at a time
        asked = tok(row["prompt"] + "\n\n").input_ids
        said = tok(row["text"], add_special_tokens=False).input_ids
        with torch.no_grad():
            logp = model(torch.tensor([asked + said])).logits[0].log_softmax(-1)
        lost += [-logp[len(asked) + t - 1, token].item() for t, token in enumerate(said)]
    assert record.of("healed")[1]["judge_perplexity"] == pytest.approx(np.exp(np.mean(lost)), rel=1e-3)
    assert "judge_perplexity" in frontier.costs_of([record])


def test_the_paper_is_made_of_the_committed_records(tmp_path):
    paper.main(paper.Config(ROOT / "results/runs", tmp_path / "paper.md"))
    assert (tmp_path / "paper.md").read_text() == (ROOT / "results/paper.md").read_text()
