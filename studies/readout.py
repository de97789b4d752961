"""Is the cloze readout any good? Held against labels, and against its own wordings.

    agreement    share of vignettes whose most probable foundation is the labelled one (chance 1/7)
    spread       how far a change of the trait depends on the words of its clause

    python -m studies.readout    # results/readout.md; about 8 min on 2 cores
    python -m studies.readout --dose 3.7 --adapter RUN/round_?/adapter.safetensors  # a student too

A wording is one clause for each foundation; data/clauses.json has five.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import lora
from common import checks, models, runs, texts
from common.prompts import persona_prompts
from common.readouts import cloze
from common.texts import FOUNDATIONS
from evaluate import NATS, Profile, delta
from steer import band, extract_vector
from studies.tables import OnDevice, markdown, proportion, publish, ran_on


@dataclass(kw_only=True)
class Config(OnDevice):
    model: str = models.EMBEDDED  # smollm2, a local folder, or a hub id
    trait: str = "care"  # whose vector steers
    dose: runs.Doses = (1.0, 2.0, 4.0)  # of the vector
    adapter: tuple[Path, ...] = ()  # all rounds of a student, in order: a student too
    vignettes: Path = texts.DATA / "vignettes.json"  # labelled; or tinymfv:classic
    n_vignettes: int = 0  # how many, balanced over the foundations; 0 is all
    n_contexts: runs.AtLeast1 = 128  # contexts the vector is averaged over
    out: Path = Path("results")  # folder for readout.md


def wordings() -> dict[str, dict[str, list[str]]]:
    """{name: {foundation: its clauses}}: the five together, and each alone."""
    five = texts.load_clauses()
    alone = {f"wording {k + 1}": {f: [five[f][k]] for f in FOUNDATIONS} for k in range(5)}
    return {"five wordings": five, **alone}


def profile_of(model, chat, vignettes: list[dict], clauses: dict[str, list[str]], constants=None,
               **steering) -> Profile:
    """constants: of the original's Profile under the same clauses; None on the original itself."""
    answers = cloze(model, chat, vignettes, constants, clauses=clauses, **steering)
    return Profile([v["id"] for v in vignettes], [v["foundation"] for v in vignettes], answers.p,
                   answers.valid_p, answers.constants, spread=dict(zip(NATS, answers.by_wording)))


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


def change_row(name: str, metric: str, base: Profile, after: Profile) -> list[str]:
    """Δ of a metric under the five wordings, by each of them, and their SD; nats.

    By one wording: of the metric's own foundation alone, the others by all five (Profile.spread).
    """
    five, by_wording = delta(metric, base, after), after.spread[metric] - base.spread[metric]
    return [name, f"{five.value:+.2f} [{five.low:+.2f}, {five.high:+.2f}]",
            *(f"{change:+.2f}" for change in by_wording), f"{by_wording.std(ddof=1):.2f}"]


def main(cfg: Config) -> None:
    # 1. everything that is read, before minutes of work
    vignettes = texts.load_vignettes(cfg.vignettes, cfg.n_vignettes)
    contexts = texts.load_rows(texts.DATA / "contexts.json", "contexts")[:cfg.n_contexts]
    trait, sets = texts.find_trait(cfg.trait), wordings()
    model, chat = checks.load(cfg.model, cfg.device, cfg.dtype)

    # 2. the original under every set of clauses; steered, and the student, under the five
    base = {name: profile_of(model, chat, vignettes, clauses) for name, clauses in sets.items()}
    five, clauses = base["five wordings"], sets["five wordings"]
    pair = persona_prompts(chat, trait.pos, trait.neg, contexts)
    vector = extract_vector(model, *pair, band(model, (0.45, 0.55)))
    changes = []
    for dose in cfg.dose:
        after = profile_of(model, chat, vignettes, clauses, five.constants, vector=vector,
                           dose=dose)
        changes.append(change_row(f"dose {dose:g}", "auth_nats", five, after))
    if cfg.adapter:
        lora.load(model, cfg.adapter)
        after = profile_of(model, chat, vignettes, clauses, five.constants)
        changes.append(change_row("student", "auth_nats", five, after))

    # 3. write
    adapter = " --adapter RUN/round_?/adapter.safetensors" if cfg.adapter else ""
    publish(f"""# The cloze readout, validated

`python -m studies.readout{adapter}` · {ran_on(model)} · {len(vignettes)} vignettes \
({cfg.vignettes.name}), {len(contexts)} contexts

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
