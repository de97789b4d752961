"""What mean, rmse, p95 and max see in the completions a student is healed on, and the τ that match.

Per completion of round --at's data: KL(student ‖ original) at each token, the student as that round
began with it. Where a few broken tokens carry the divergence, rmse and max lie far above the mean.

    matched τ = --tau times the median over completions of (this aggregation / --agg)

    python -m studies.aggregate runs/eight/nll_s? runs/eight/kl_rev_rmse_s? --at 3  # aggregate.md
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

import distil
import heal_loop
import lora
from common import checks, runs
from common.generation import against_original
from common.sampling import row_states
from studies.tables import Study, markdown, publish, ran_on

AGGS = ("mean", "rmse", "p95", "max")


@dataclass(kw_only=True)
class Config(Study):
    run: tyro.conf.Positional[tuple[Path, ...]]  # run folders
    at: runs.AtLeast1 = 1  # the round whose data is looked at, counted from 0
    agg: Literal["mean", "rmse", "p95", "max"] = "rmse"  # what --tau is of
    tau: runs.From0 = 0.8  # τ in nats that the others are matched with


@torch.no_grad()
def aggregates(model, prompts, completions) -> dict[str, torch.Tensor]:
    """{aggregation: D [completions]}, and "top 5%": the share of KL on the costliest tokens.

    kl_rev of the student, history gates on, from the original; in nats.
    """
    with lora.gates(model, history=1, live=0):
        student = row_states(model, prompts, completions)
    with lora.gates(model, history=0, live=0):
        original = row_states(model, prompts, completions)
    D = {name: [] for name in (*AGGS, "top 5%")}
    for row in zip(student, original, completions):
        kl, *_ = against_original(model, *row)  # [tokens]
        for agg in AGGS:
            D[agg].append(heal_loop.aggregate(kl, agg))
        costliest = kl.topk(-(-len(kl) // 20)).values
        D["top 5%"].append(costliest.sum() / kl.sum())
    return {name: torch.stack(values).cpu() for name, values in D.items()}


def main(cfg: Config) -> None:
    names = ["/".join(folder.resolve().parts[-2:]) for folder in cfg.run]  # as in eight/nll_s0
    rows = []
    for name, folder in zip(names, tqdm(cfg.run, "runs", leave=False, disable=None)):
        settings = runs.read_config(heal_loop.Config, folder)
        model, chat = checks.load(settings.model, cfg.device, cfg.dtype, settings.date)
        lora.load(model, [folder / f"round_{r}/adapter.safetensors" for r in range(cfg.at)])
        kept = runs.read_jsonl(folder / f"round_{cfg.at}/kept.jsonl")
        D = aggregates(model, *zip(*(distil.row_ids(chat, row) for row in kept)))
        over_mean = [f"{(D[agg] / D['mean']).median():.2f}" for agg in AGGS[1:]]
        taus = [f"{cfg.tau * (D[agg] / D[cfg.agg]).median():.2f}" for agg in AGGS]
        rows.append([name, len(kept), f"{D['mean'].mean():.2f}", *over_mean,
                     f"{D['top 5%'].median():.0%}", *taus])
    publish(f"""# What each aggregation sees

`python -m studies.aggregate {" ".join(f"runs/{name}" for name in names)} --at {cfg.at} \
--agg {cfg.agg} --tau {cfg.tau:g}`
({ran_on(model)})

Per-token KL(student ‖ original) on the completions that round {cfg.at} heals on. The mean in nats;
rmse, p95 and max as multiples of the mean of the same completion, and the share of its KL on its
costliest 5 % of tokens: medians over completions. The τ of each aggregation are as tight as
{cfg.tau:g} of {cfg.agg} on the median completion.

{markdown(rows, ["run", "completions", "mean", "rmse / mean", "p95 / mean", "max / mean", "top 5%",
                 *(f"τ, {agg}" for agg in AGGS)])}
""", cfg.out / "aggregate.md")


if __name__ == "__main__":
    runs.cli(Config, main)
