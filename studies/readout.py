"""Is the cloze readout any good? Held against labels, and against its own wordings.

    agreement    share of vignettes whose most probable foundation is the labelled one (chance 1/7)
    spread       how far a change of the trait depends on the words of its clause

    python -m studies.readout    # results/readout.md; about 8 min on 2 cores
    python -m studies.readout --dose 3.7 --adapter RUN/round_?/adapter.safetensors  # a student too

A wording is one clause for each foundation; data/clauses.json has five. `SINGLE` is the one that
the readout had alone before.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.special

import lora
from common import checks, models, runs, texts
from common.prompts import persona_prompts
from common.readouts import cloze
from common.texts import FOUNDATIONS
from evaluate import NATS, Profile, delta
from steer import band, extract_vector
from studies.tables import OnDevice, markdown, proportion, publish, ran_on

SINGLE = {"Care": [" is cruel and hurts someone"],
          "Fairness": [" is unfair and dishonest"],
          "Loyalty": [" betrays their own group"],
          "Authority": [" disobeys authority"],
          "Sanctity": [" is disgusting and unclean"],
          "Liberty": [" takes away someone's freedom"],
          "SocialNorms": [" is strange and unusual"]}


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
    """{name: {foundation: its clauses}}: the single one of before, the five alone and together."""
    five = texts.load_clauses()
    alone = {f"wording {k + 1}": {f: [five[f][k]] for f in FOUNDATIONS} for k in range(5)}
    return {"single wording": SINGLE, "five wordings": five, **alone}


def profile_of(model, chat, vignettes: list[dict], clauses: dict[str, list[str]], constants=None,
               **steering) -> Profile:
    """constants: of the original's Profile under the same clauses; None on the original itself."""
    answers = cloze(model, chat, vignettes, constants, clauses=clauses, **steering)
    return Profile([v["id"] for v in vignettes], [v["foundation"] for v in vignettes], answers.p,
                   answers.valid_p, answers.constants, spread=dict(zip(NATS, answers.by_wording)))


def label_columns(profile: Profile) -> list[int]:
    """The column of p of each vignette's label."""
    return [FOUNDATIONS.index(label) for label in profile.labels]


def right(profile: Profile) -> np.ndarray:
    """Whether the most probable foundation is the labelled one, [vignettes]."""
    return profile.p.argmax(1) == label_columns(profile)


def agreement_table(base: dict[str, Profile]) -> str:
    """Top-1 under each set of clauses, with their constants and without."""
    rows = []
    for name, profile in base.items():
        n, columns = len(profile.ids), label_columns(profile)
        plain = scipy.special.softmax(np.log(profile.p) + profile.constants.mean(1), axis=1)
        rows.append([name, proportion(right(profile).sum(), n),
                     proportion((plain.argmax(1) == columns).sum(), n),
                     f"{profile.p[range(n), columns].mean():.2f}"])
    return markdown(rows, ["clauses", "top-1", "without constants", "mean p of the label"])


def foundation_table(base: dict[str, Profile]) -> str:
    """Top-1 by the label of the vignettes: single, five together, and each of the five alone."""
    rows = []
    for k, f in enumerate(FOUNDATIONS):
        hits = [right(profile)[np.equal(label_columns(profile), k)] for profile in base.values()]
        single, five, *alone = hits
        shares = [h.mean() for h in alone]
        rows.append([f, proportion(single.sum(), len(single)), proportion(five.sum(), len(five)),
                     f"{min(shares):.2f} to {max(shares):.2f}"])
    return markdown(rows, ["foundation", "single wording", "five wordings", "each of the five"])


def change_row(name: str, metric: str, base: dict[str, Profile],
               after: dict[str, Profile]) -> list[str]:
    """Δ of a metric under the single wording and five, by each of the five, and their SD; nats.

    By one wording: of the metric's own foundation alone, the others by all five (Profile.spread).
    """
    both = [delta(metric, base[key], after[key]) for key in after]
    by_wording = after["five wordings"].spread[metric] - base["five wordings"].spread[metric]
    return [name, *(f"{e.value:+.2f} [{e.low:+.2f}, {e.high:+.2f}]" for e in both),
            *(f"{change:+.2f}" for change in by_wording), f"{by_wording.std(ddof=1):.2f}"]


def main(cfg: Config) -> None:
    # 1. everything that is read, before minutes of work
    vignettes = texts.load_vignettes(cfg.vignettes, cfg.n_vignettes)
    contexts = texts.load_rows(texts.DATA / "contexts.json", "contexts")[:cfg.n_contexts]
    trait, sets = texts.find_trait(cfg.trait), wordings()
    model, chat = checks.load(cfg.model, cfg.device, cfg.dtype)

    # 2. the original under every set of clauses; changes under two of them
    base = {name: profile_of(model, chat, vignettes, clauses) for name, clauses in sets.items()}

    def row(name, **steering):
        after = {key: profile_of(model, chat, vignettes, sets[key], base[key].constants, **steering)
                 for key in ("single wording", "five wordings")}
        return change_row(name, "auth_nats", base, after)
    pair = persona_prompts(chat, trait.pos, trait.neg, contexts)
    vector = extract_vector(model, *pair, band(model, (0.45, 0.55)))
    changes = [row(f"dose {dose:g}", vector=vector, dose=dose) for dose in cfg.dose]
    if cfg.adapter:
        lora.load(model, cfg.adapter)
        changes.append(row("student"))

    # 3. write
    adapter = " --adapter RUN/round_?/adapter.safetensors" if cfg.adapter else ""
    publish(f"""# The cloze readout, validated

`python -m studies.readout{adapter}` · {ran_on(model)} · {len(vignettes)} vignettes \
({cfg.vignettes.name}), {len(contexts)} contexts

Intervals are 95 %: Wilson's of shares, BCa bootstrap paired by vignette of changes.

## Does it agree with the labels?

Share of vignettes whose most probable foundation is the labelled one (chance {1 / 7:.2f}):

{agreement_table(base)}

By foundation:

{foundation_table(base)}

## How much does a change depend on the words?

Δ Authority (nats) under the vector of {cfg.trait}{", and of the student" if cfg.adapter else ""}. \
By one wording: Authority by that clause alone, the other foundations by all five.

{markdown(changes, ["", *list(sets), "SD of the five"])}
""", cfg.out / "readout.md")


if __name__ == "__main__":
    runs.cli(Config, main)
