"""The benchmark compares like with like: every alternative does the same work as ours."""
import numpy as np
import pytest
import torch

import heal_loop
import lora
from common import checks, texts
from common.prompts import Chat
from common.readouts import cloze
from common.sampling import completion_states, sample
from conftest import Ids, tiny
from steer import SteeringVector
from studies import bench


def rows(n=4):
    """-> prompts and completions of different lengths, random token ids."""
    g = torch.Generator().manual_seed(3)

    def tokens(k):
        return torch.randint(3, 128, (k,), generator=g).tolist()
    return [tokens(5 + 3 * i) for i in range(n)], [tokens(9 - 2 * i) for i in range(n)]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generate_and_sample_draw_the_same_greedy_tokens(name):
    model, (prompts, _), doses = tiny(name), rows(), [0.0, 1.0, -2.0, 4.0]
    vector = SteeringVector({l: torch.randn(32, generator=torch.Generator().manual_seed(l))
                             for l in (1, 2)}, {})
    theirs = bench.generate(model, prompts, vector, doses, max_new_tokens=12, do_sample=False)
    with bench.endless():
        ours = sample(model, Chat(Ids), prompts, vector, doses, 12, temperature=0)
        unsteered = sample(model, Chat(Ids), prompts, None, None, 12, temperature=0)
    assert theirs == ours != unsteered
    assert not any(block._forward_hooks for block in model.get_decoder().layers)


def test_endless_rows_all_run_to_the_last_token():
    model, (prompts, _) = tiny("llama"), rows()
    settings = dict(max_new_tokens=40, temperature=5.0, top_k=128, top_p=1.0)
    with bench.endless():
        new = sample(model, Chat(Ids), prompts * 8, **settings)
    assert {len(tokens) for tokens in new} == {40}
    assert len({len(tokens) for tokens in sample(model, Chat(Ids), prompts * 8, **settings)}) > 1


def healing(seed=1):
    """-> a tiny model with a trained adapter, prompts, completions and the original's states."""
    model, (prompts, completions) = tiny("llama"), rows()
    lora.attach(model, rank=4, alpha=8)
    torch.manual_seed(seed)
    for m in lora.adapters(model).values():
        torch.nn.init.normal_(m.B, std=0.1)
    with torch.no_grad(), lora.gates(model, history=0, live=0):
        references = [completion_states(model, [p], [c]) for p, c in zip(prompts, completions)]
    return model, prompts, completions, references


def gradients(model):
    """The live factors' gradients, taken away from the model."""
    found = [p.grad.clone() for p in lora.live_parameters(model)]
    model.zero_grad()
    return found


@pytest.mark.parametrize("reg, agg", [("kl_rev", "rmse"), ("kl_rev", "p95"), ("kl_fwd", "mean"),
                                      ("kl_fwd", "max")])
def test_whole_logits_give_a_heal_steps_losses_and_gradients(reg, agg):
    model, prompts, completions, references = healing()
    cfg = heal_loop.Config(reg=reg, agg=agg, tau=0.0)
    batch = dict(prompts=prompts, completions=completions, reference=references, teacher=None)
    log = heal_loop.heal_step(model, batch, cfg)
    ours = gradients(model)
    ce, barrier = bench.full_logits_loss(model, lambda: lora.gates(model, history=0, live=0),
                                         prompts, completions, cfg)
    (ce + barrier).backward()
    assert barrier > 1e-3
    assert log["data_loss"] == pytest.approx(ce.item(), rel=1e-5)
    assert log["barrier"] == pytest.approx(barrier.item(), rel=1e-4)
    for mine, theirs in zip(ours, gradients(model)):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_peft_adapts_the_same_linears_with_the_same_scale(ids):
    cfg, model = heal_loop.Config(rank=4, alpha=8), tiny("llama")
    ours = bench.twin(model)
    lora.attach(ours, cfg.rank, cfg.alpha, cfg.lora_layers)
    adapters = lora.adapters(ours)
    rival = bench.peft_model(bench.twin(model), list(adapters), cfg)
    theirs = {name.removeprefix("base_model.model.") for name, m in rival.named_modules()
              if hasattr(m, "lora_A")}
    assert theirs == set(adapters)
    for name, m in adapters.items():
        torch.nn.init.normal_(m.B)
        twin = rival.base_model.model.get_submodule(name)
        twin.lora_A["default"].weight.data.copy_(m.A)
        twin.lora_B["default"].weight.data.copy_(m.B)
    torch.testing.assert_close(rival(input_ids=ids).logits, ours(input_ids=ids).logits)
    assert not torch.allclose(model(input_ids=ids).logits, ours(input_ids=ids).logits)


def test_one_forward_per_clause_gives_the_cloze_scores(tiny_folder):
    loaded = checks.load(str(tiny_folder), dtype="float32")
    vignettes = texts.load_vignettes(texts.DATA / "vignettes.json", 2)
    wordings = [words for of_one in texts.load_clauses().values() for words in of_one]
    scores = bench.clause_by_clause(*loaded, vignettes, wordings).double()
    answers = cloze(*loaded, vignettes, constants=np.zeros((7, 5)))
    p = scores[:, :-1].unflatten(1, (7, 5)).mean(2).softmax(1)
    torch.testing.assert_close(p, torch.as_tensor(answers.p), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scores[:, -1].exp(), torch.as_tensor(answers.valid_p), rtol=1e-4,
                               atol=1e-9)


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_read_are_weights_each_step_and_half_grown_keys(tied):
    model = tiny("llama", tie_word_embeddings=tied)
    weights = sum(p.numel() for p in model.get_decoder().layers.parameters()) + 32 + 128 * 32
    per_position = 5 * 2 * 2 * 8  # layers, keys and values, heads, width of a head
    wanted = 10 * 4 * (weights + per_position * ((6 + 5) + (8 + 5)))
    assert bench.bytes_read(model, [[3] * 6, [4] * 8], tokens=10) == wanted


@pytest.mark.slow
def test_the_table_has_a_row_for_every_step(tiny_folder, monkeypatch, capsys):
    monkeypatch.setattr(bench, "REPEATS", 1)
    bench.main(bench.Config(model=str(tiny_folder), rows=(1, 3), tokens=8))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    assert [row[0].split(",")[0].split(":")[0] for row in cells] == [
        "decode 1 × 8 tokens", "decode 3 × 8 tokens", "heal", "evaluation", "a round"]
    assert all(float(row[1]) >= 0 for row in cells)
    assert [bool(row[4] and row[5]) for row in cells] == [True, True, False, False, False]
