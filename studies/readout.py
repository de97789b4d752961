"""Is the cloze readout any good? Held against labels, and against its own wordings.

    agreement    share of vignettes whose most probable foundation is the labelled one (chance 1/7)
    spread       how far a change of the trait depends on the words of its clause

    python -m studies.readout    # results/readout.md; about 8 min on 2 cores
    python -m studies.readout --dose 3.7 --adapter RUN/round_*/adapter.safetensors  # a student too

A wording is one clause for each foundation; data/clauses.json has five.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import distil
import lora
from common import checks, models, runs, texts
from common.texts import FOUNDATIONS
from evaluate import Profile, delta, evaluate
from studies.tables import Study, markdown, proportion, publish, ran_on


@dataclass(kw_only=True)
class Config(Study):
    model: str = models.EMBEDDED  # smollm2, a local folder, or a hub id
    trait: str = "care"  # whose vector steers
    dose: runs.Doses = (1.0, 2.0, 4.0)  # of the vector
    adapter: tuple[Path, ...] = ()  # all rounds of a student, in order: a student too
    vignettes: Path = texts.DATA / "vignettes.json"  # labelled; or tinymfv:classic
    n_vignettes: int = 0  # how many, balanced over the foundations; 0 is all
    n_contexts: runs.AtLeast1 = 128  # contexts the vector is averaged over


def wordings() -> dict[str, dict[str, list[str]]]:
    """{name: {foundation: its clauses}}: the five together, and each alone."""
    five = texts.load_clauses()
    alone = {f"wording {k + 1}": {f: [five[f][k]] for f in FOUNDATIONS} for k in range(5)}
    return {"five wordings": five, **alone}


def agreement_table(base: dict[str, Profile]) -> str:
    """Top-1 under each set of clauses, with their constants and without, and by foundation."""
    rows = []
    for name, profile in base.items():
        n, labels = len(profile.ids), np.array([FOUNDATIONS.index(f) for f in profile.labels])
        hits = profile.p.argmax(1) == labels  # [vignettes]
        plain = np.log(profile.p) + profile.constants.mean(1)  # up to a constant of each row
        rows.append([name, proportion(hits.sum(), n),
                     proportion((plain.argmax(1) == labels).sum(), n),
                     f"{profile.p[range(n), labels].mean():.2f}",
                     *(f"{hits[labels == k].mean():.2f}" for k in range(len(FOUNDATIONS)))])
    head = ["clauses", "top-1", "without constants", "mean p of the label", *FOUNDATIONS]
    return markdown(rows, head)


def change_row(name: str, base: Profile, after: Profile) -> list[str]:
    """Δ Authority under the five wordings, by each of them, and their SD; nats.

    By one wording: of Authority alone, the other foundations by all five (Profile.spread).
    """
    five = delta("auth_nats", base, after)
    by_wording = np.subtract(after.spread["auth_nats"], base.spread["auth_nats"])
    return [name, f"{five.value:+.2f} [{five.low:+.2f}, {five.high:+.2f}]",
            *(f"{change:+.2f}" for change in by_wording), f"{by_wording.std(ddof=1):.2f}"]


def main(cfg: Config) -> None:
    # 1. everything that is read, before minutes of work
    reading, sets = replace(texts.read(cfg), controls=[]), wordings()
    model, chat = checks.load(cfg.model, cfg.device, cfg.dtype)

    # 2. the original under every set of clauses; steered, and the student, under the five
    base = {name: evaluate(model, chat, reading, clauses=clauses)
            for name, clauses in sets.items()}
    five = base["five wordings"]
    vector = distil.trait_vector(model, chat, reading)
    changes = []
    for dose in cfg.dose:
        after = evaluate(model, chat, reading, constants=five.constants, vector=vector, dose=dose)
        changes.append(change_row(f"dose {dose:g}", five, after))
    if cfg.adapter:
        lora.load(model, cfg.adapter)
        after = evaluate(model, chat, reading, constants=five.constants)
        changes.append(change_row("student", five, after))

    # 3. write
    flags = f"--trait {cfg.trait} --dose {' '.join(f'{dose:g}' for dose in cfg.dose)}"
    flags += " --adapter RUN/round_*/adapter.safetensors" if cfg.adapter else ""
    publish(f"""# The cloze readout, validated

`python -m studies.readout {flags}` · {ran_on(model)} · {len(five.ids)} vignettes \
({cfg.vignettes.name}), {cfg.n_contexts} contexts

Intervals are 95 %: Wilson's of shares, BCa bootstrap paired by vignette of changes.

## Does it agree with the labels?

Share of vignettes whose most probable foundation is the labelled one (chance {1 / 7:.2f}), of all \
and by label:

{agreement_table(base)}

## How much does a change depend on the words?

Δ Authority (nats) under the vector of {cfg.trait}{", and of the student" if cfg.adapter else ""}. \
By one wording: Authority by that clause alone, the other foundations by all five.

{markdown(changes, ["", *list(sets), "SD of the five"])}
""", cfg.out / "readout.md")


if __name__ == "__main__":
    runs.cli(Config, main)
