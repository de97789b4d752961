"""The studies' own checks: labelled completions, statistics by hand, whole commands."""
import re

import numpy as np
import pytest
import torch

import lora
from common import checks, runs
from common.texts import FOUNDATIONS
from conftest import ROOT, command, tiny
from steer import SteeringVector, calibrate
from studies import aggregate, cause, doses, gemma, paper, readout
from studies import filter as filter_study
from tools import sweep


def table_rows(text: str) -> dict[str, list[str]]:
    """{first cell: the other cells} of every markdown table in a text."""
    cells = [[c.strip() for c in line.strip("| ").split("|")] for line in text.splitlines()
             if line.startswith("|")]
    return {first: rest for first, *rest in cells}


def test_the_five_wordings_hold_each_of_the_five_alone():
    five, *alone = readout.wordings().values()
    assert all(set(clauses) == set(FOUNDATIONS) for clauses in (five, *alone))
    assert five == {f: [clauses[f][0] for clauses in alone] for f in FOUNDATIONS}


@pytest.mark.slow
def test_the_readout_study_writes_its_page(run, tiny_folder, tmp_path, monkeypatch, capsys):
    command(monkeypatch, "readout", "--model", tiny_folder, "--n-vignettes", 7, "--dose", 0,
            "--n-contexts", 2, "--out", tmp_path, "--adapter", *run.glob("round_*/adapter*"))
    text = (tmp_path / "readout.md").read_text()
    rows = table_rows(text)
    assert text.strip() == capsys.readouterr().out.strip() and str(tmp_path) not in text
    assert {"five wordings", "wording 5", "student"} <= rows.keys()
    assert rows["dose 0"] == ["+0.00 [+0.00, +0.00]"] + 5 * ["+0.00"] + ["0.00"]


def test_kappa_is_one_for_equal_labels_and_nought_for_chance():
    same = [{"x": [a, a]} for a in (True, False, True)]
    chance = [{"x": [a, b]} for a in (True, False) for b in (True, False)]
    assert filter_study.kappa(same, "x") == 1
    assert filter_study.kappa(chance, "x") == 0
    assert filter_study.kappa(chance[:3], "x") == pytest.approx((1 / 3 - 5 / 9) / (4 / 9))


def test_precision_and_recall_count_kept_and_wanted():
    row = dict(reject_reason="kept", fluent=True, coherent=True, narrates=False)
    rows = [row, row | dict(reject_reason="loop"), row | dict(coherent=False),
            row | dict(narrates=True), row | dict(reject_reason="loop", coherent=False)]
    precision, recall, fluent = table_rows(filter_study.kept_table({"old": rows}))["old"]
    assert precision.startswith("1/3 = ") and recall.startswith("1/2 = ")
    assert fluent.startswith("2/3 = ")


def test_auc_is_the_chance_that_bad_ranks_above_good():
    good = [True, True, False, False]
    assert [filter_study.auc(signal, good) for signal in
            ([1, 2, 3, 4], [1, 3, 2, 4], [1, 1, 1, 1])] == [1, 0.75, 0.5]


@pytest.mark.slow
def test_the_filter_study_writes_its_page(tiny_folder, tmp_path, monkeypatch):
    command(monkeypatch, "filter", "--model", tiny_folder, "--out", tmp_path)
    rows = table_rows((tmp_path / "filter.md").read_text())
    assert len(rows["perplexity, whole"]) == 6 and "/" in rows["fresh, reader 2"][0]


def test_a_calibrated_dose_reaches_its_nats_through_the_cache(embedded):
    model, chat = tiny("llama", vocab_size=49152, max_position_embeddings=512,
                       initializer_range=0.5), embedded[1]
    vector = SteeringVector({2: torch.randn(32, generator=torch.Generator().manual_seed(1))}, {})
    prompts = [chat.ids("Is it kind?"), chat.ids("What should I do about my boss and the rain?")]
    dose = calibrate(model, vector, prompts, 0.5)
    there, twice = doses.p95_at(model, chat, vector, prompts, [dose, 2 * dose])
    assert there == pytest.approx(0.5, rel=0.05) and twice > 1.2 * there


@torch.no_grad()
def test_a_projection_takes_its_direction_out_of_last_positions():
    model, streams, ids = tiny("llama"), [], torch.arange(3, 15).reshape(2, 6)
    v = torch.randn(32, generator=torch.Generator().manual_seed(1))
    model(ids)
    for projection in (cause.Projection({1: v}, {}), SteeringVector({1: 0 * v}, {})):
        with projection.at(model, 1.0, last_only=2), model.model.layers[1].register_forward_hook(
                lambda block, args, output: streams.append(output)):
            model(ids)
    projected, plain = streams
    across = plain[:, 4:] - (plain[:, 4:] @ v)[..., None] * v / (v @ v)
    assert torch.equal(projected[:, :4], plain[:, :4])
    torch.testing.assert_close(projected[:, 4:], across)


def test_shares_are_none_where_the_student_hardly_changed():
    changes = {"student": 2.0, "original + s": 1.5, "original + random": 0.1,
               "student without s": 0.5, "student without random": 1.9, "original without s": -0.2}
    assert list(cause.shares(changes).values()) == pytest.approx([0.75, 0.05, 0.75, 0.05])
    assert set(cause.shares({**changes, "student": 0.01}).values()) == {None}


def test_cause_writes_each_run_and_their_mean(run, tmp_path, monkeypatch):
    command(monkeypatch, "cause", run, run, "--out", tmp_path / "new")
    text = (tmp_path / "new/cause.md").read_text()
    rows = table_rows(text)
    assert rows[run.name] == rows["all"] and len(rows["all"]) == 6
    assert len(re.findall(rf"\| {run.name} +\| [-\d]", text)) == 2 and str(run) not in text


@torch.no_grad()
def test_aggregates_are_those_of_whole_rows_one_at_a_time():
    model = tiny("llama")
    lora.attach(model, rank=4)
    for m in lora.adapters(model).values():
        torch.nn.init.normal_(m.B, std=0.1)
    lora.fold(model)
    rows = torch.randint(3, 128, (3, 25), generator=torch.Generator().manual_seed(2)).tolist()
    D = aggregate.aggregates(model, [row[:5] for row in rows], [row[5:] for row in rows])
    for i, row in enumerate(rows):
        logp = model(torch.tensor([row[:-1]])).logits[0, 4:].log_softmax(-1)
        with lora.gates(model, history=0, live=0):
            logq = model(torch.tensor([row[:-1]])).logits[0, 4:].log_softmax(-1)
        kl = (logp.exp() * (logp - logq)).sum(-1)  # [20]: 5 % of it is one token
        by_hand = {"mean": kl.mean(), "rmse": kl.square().mean().sqrt(), "p95": kl.quantile(0.95),
                   "max": kl.max(), "top 5%": kl.max() / kl.sum()}
        for name, value in by_hand.items():
            assert D[name][i] == pytest.approx(value.item(), rel=1e-3)


def test_aggregate_writes_a_row_for_each_run(run, tmp_path, monkeypatch):
    command(monkeypatch, "aggregate", run, run, "--out", tmp_path / "new")
    text = (tmp_path / "new/aggregate.md").read_text()
    one, two = re.findall(r"\| runs\d*/run +\|([^\n]+)", text)
    n, _, rmse, p95, most, top, *_ = one.replace("%", "").split("|")
    assert one == two and int(n) == 6 and str(tmp_path) not in text
    assert 1 < float(rmse) < float(most) and float(p95) < float(most) and 0 < float(top) < 100


@torch.no_grad()
def test_judge_perplexity_is_that_of_each_text_alone(run, tiny_folder, tmp_path, monkeypatch):
    sweep.save(sweep.record(run, arm="kl_rev_rmse", command=""), tmp_path / "records")
    monkeypatch.setattr(gemma, "folder", lambda: tiny_folder)
    command(monkeypatch, "judge", run.parent, tmp_path / "records")
    [record] = sweep.load(tmp_path / "records")
    [healed] = [e for e in runs.read_events(run) if (e["stage"], e["round"]) == ("healed", 1)]
    model, chat = checks.load(str(tiny_folder), dtype="float32")
    losses = []
    for row in healed["texts"]:  # one unpadded text at a time
        prompt = chat.tok(row["prompt"] + "\n\n").input_ids
        answer = chat.tok(row["text"], add_special_tokens=False).input_ids
        logp = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        losses += [-logp[len(prompt) + t - 1, token].item() for t, token in enumerate(answer)]
    judged = record.of("healed")[1]["judge_perplexity"]
    assert judged == pytest.approx(np.exp(np.mean(losses)), rel=1e-3)


def test_the_paper_is_made_of_the_committed_records(tmp_path):
    paper.main(paper.Config(ROOT / "results/runs", tmp_path, tmp_path / "barrier.png"))
    assert (tmp_path / "barrier.png").exists()
    assert (tmp_path / "paper.md").read_text() == (ROOT / "results/paper.md").read_text()
