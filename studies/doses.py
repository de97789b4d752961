"""Does one dose in nats fit every trait and model, where a raw dose does not?

    p95    95th percentile over prompts and the first 16 tokens of KL(steered ‖ unsteered), nats

    pip install -r requirements-dev.txt
    python -m studies.doses        # results/doses.md; about 10 min

For every trait of data/traits on the embedded model and on Gemma 3 270M: the dose that
`steer.calibrate` finds; p95 at that dose on its own prompts, computed another way (through the
cache), and on prompts that it did not see; p95 at the raw dose 1.
"""
from dataclasses import dataclass

import torch
from tqdm import tqdm

import distil
import heal_loop
from common import checks, models, runs, texts
from common.generation import against_original
from common.prompts import stop_tokens
from common.sampling import row_states, sample
from steer import SteeringVector, calibrate
from studies import gemma
from studies.tables import Study, markdown, publish, ran_on


@dataclass(kw_only=True)
class Config(Study):
    dose_nats: runs.DoseNats = (0.5, 1.0)  # what is asked for
    n_contexts: runs.AtLeast1 = 128  # contexts a vector is averaged over


@torch.no_grad()
def p95_at(model, chat, vector: SteeringVector, prompts: list[list[int]],
           doses: list[float]) -> list[float]:
    """p95 at each dose, nats; the answers are the unsteered model's, greedy."""
    answers = sample(model, chat, prompts, max_new_tokens=16, temperature=0, keep_stop=True)
    unsteered = row_states(model, prompts, answers)
    p95 = []
    for dose in doses:
        steered = row_states(model, prompts, answers, vector, dose)
        kl = [against_original(model, *row)[0] for row in zip(steered, unsteered, answers)]
        p95.append(torch.cat(kl).quantile(0.95).item())
    return p95


def main(cfg: Config) -> None:
    rows, where = [], []
    for name in (models.EMBEDDED, str(gemma.folder())):
        model, chat = checks.load(name, cfg.device, cfg.dtype)
        where.append(ran_on(model))
        for trait in tqdm(texts.load_traits(), leave=False, disable=None):
            reading = texts.read(heal_loop.Config(trait=trait, n_contexts=cfg.n_contexts))
            vector = distil.trait_vector(model, chat, reading)
            prompts = list(map(chat.ids, reading.train[:32]))
            seen, unseen = prompts[:16], prompts[16:]
            stop = stop_tokens(model, chat)
            doses = [calibrate(model, vector, seen, nats, stop=stop) for nats in cfg.dose_nats]
            *there, at_one = p95_at(model, chat, vector, seen, [*doses, 1.0])
            elsewhere = p95_at(model, chat, vector, unseen, doses)
            rows += [[models.base_name(model), trait, f"{nats:g}",
                      *(f"{x:.2f}" for x in (*values, at_one))]
                     for nats, *values in zip(cfg.dose_nats, doses, there, elsewhere)]
    head = ["model", "trait", "nats wanted", "dose", "p95 there", "p95, other prompts",
            "p95 at dose 1"]
    publish(f"""# Doses in nats

`python -m studies.doses` · {"; ".join(where)} · {cfg.n_contexts} contexts per vector

{markdown(rows, head)}
""", cfg.out / "doses.md")


if __name__ == "__main__":
    runs.cli(Config, main)
