"""Is the cloze readout any good? Held against labels, and against its own wordings.

    agreement    share of vignettes whose most probable foundation is the labelled one (chance 1/7)
    spread       how far the readout depends on the words of its clauses: each wording alone

    python -m studies.readout    # results/readout.md; about 8 min on 2 cores
    python -m studies.readout --adapter RUN/round_?/adapter.safetensors --dose 3.7  # a student too

A wording is one clause for each foundation; data/clauses.json has five of each. `OLD` is the
wording that the readout had alone before.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import lora
from common import checks, models, runs, texts
from common.prompts import persona_prompts
from common.readouts import cloze
from common.texts import FOUNDATIONS
from evaluate import Estimate, Profile, delta
from steer import band, extract_vector
from studies.tables import markdown, proportion, publish, ran_on

OLD = {"Care": " it is cruel and hurts someone",
       "Fairness": " it is unfair and dishonest",
       "Loyalty": " it betrays their own group",
       "Authority": " it disobeys authority",
       "Sanctity": " it is disgusting and unclean",
       "Liberty": " it takes away someone's freedom",
       "SocialNorms": " it is strange and unusual"}


@dataclass
class Config:
    model: str = models.EMBEDDED  # smollm2, a local folder, or a hub id
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"  # auto: bfloat16 where native
    trait: str = "care"  # whose vector steers
    dose: runs.Doses = (1.0, 2.0, 4.0)  # of the vector
    adapter: tuple[Path, ...] = ()  # all rounds of a student, in order: a student too
    vignettes: Path = texts.DATA / "vignettes.json"  # labelled; or tinymfv:classic
    n_vignettes: int = 0  # how many, balanced over the foundations; 0 is all
    n_contexts: runs.AtLeast1 = 128  # contexts the vector is averaged over
    out: Path = Path("results")  # folder for readout.md


Wordings = dict[str, dict[str, list[str]]]  # by name: {foundation: its clauses}


def wordings() -> Wordings:
    """The old wording, each of today's alone, and today's together."""
    clauses = texts.load_clauses()
    n = min(map(len, clauses.values()))
    alone = {f"wording {k + 1}": {f: [clauses[f][k]] for f in FOUNDATIONS} for k in range(n)}
    old = {f: [clause] for f, clause in OLD.items()}
    return {"old wording": old, **alone, "all together": clauses}


def profile_of(model, chat, vignettes: list[dict], clauses: dict[str, list[str]], constants=None,
               **steering) -> Profile:
    """constants: of the original's Profile under the same clauses; None on the original itself."""
    answers = cloze(model, chat, vignettes, clauses, constants=constants, **steering)
    return Profile([v["id"] for v in vignettes], [v["foundation"] for v in vignettes],
                   answers.p, answers.valid_p, answers.constants)


# ---- agreement with the labels -------------------------------------------------------------------


def right(profile: Profile) -> np.ndarray:
    """Whether the most probable foundation is the labelled one, [vignettes]."""
    return profile.p.argmax(1) == [FOUNDATIONS.index(label) for label in profile.labels]


def agreement_table(base: dict[str, Profile], plain: dict[str, Profile]) -> str:
    """base: by wording; plain: the same without the clauses' constants."""
    rows = []
    for name, profile in base.items():
        of_label = profile.p[range(len(profile.labels)), [FOUNDATIONS.index(label)
                                                          for label in profile.labels]]
        rows.append([name, *(proportion(right(p).sum(), len(p.ids)) for p in (profile, plain[name])),
                     f"{of_label.mean():.2f}"])
    return markdown(rows, ["clauses", "top-1", "top-1 without constants", "mean p of the label"])


def foundation_table(base: dict[str, Profile]) -> str:
    """Top-1 by the label of the vignettes: of the old wording, of today's, and over wordings."""
    rows = []
    for f in FOUNDATIONS:
        of_label = {name: right(profile)[[label == f for label in profile.labels]]
                    for name, profile in base.items()}
        alone = [hits.mean() for name, hits in of_label.items() if name.startswith("wording")]
        old, together = of_label["old wording"], of_label["all together"]
        rows.append([f, proportion(old.sum(), len(old)), proportion(together.sum(), len(together)),
                     f"{min(alone):.2f} to {max(alone):.2f}"])
    return markdown(rows, ["foundation", "old wording", "all together", "each wording alone"])


# ---- the spread over wordings --------------------------------------------------------------------


def change_table(metric: str, changes: dict[str, dict[str, Estimate]]) -> str:
    """changes: {model: {wording: Δ of the metric}}, nats; a row for each model."""
    rows = []
    for name, by_wording in changes.items():
        alone = [e.value for w, e in by_wording.items() if w.startswith("wording")]
        rows.append([name, *(f"{e.value:+.2f} [{e.low:+.2f}, {e.high:+.2f}]"
                             for e in by_wording.values()), f"{np.std(alone, ddof=1):.2f}"])
    return markdown(rows, [f"Δ{metric} (nats)", *by_wording, "SD over wordings"])


# ---- the command ---------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    # 1. everything that is read, before minutes of work
    vignettes = texts.load_vignettes(cfg.vignettes, cfg.n_vignettes)
    contexts = texts.load_strings(texts.DATA / "contexts.json", "contexts")[:cfg.n_contexts]
    trait, sets = texts.find_trait(cfg.trait), wordings()
    metric = trait.axis if trait.axis != "probe_nats" else "auth_nats"
    model, chat = checks.load(cfg.model, cfg.device, cfg.dtype)

    # 2. the original under every wording, with the clauses' constants and without
    base = {name: profile_of(model, chat, vignettes, clauses) for name, clauses in sets.items()}
    plain = {name: profile_of(model, chat, vignettes, clauses, 0 * base[name].constants)
             for name, clauses in sets.items()}

    # 3. steered, and a student, under every wording
    def change(**steering):
        return {name: delta(metric, base[name], profile_of(
            model, chat, vignettes, clauses, base[name].constants, **steering))
            for name, clauses in sets.items()}
    pair = persona_prompts(chat, trait.pos, trait.neg, contexts)
    vector = extract_vector(model, *pair, band(model, (0.45, 0.55)))
    changes = {f"dose {dose:g}": change(vector=vector, dose=dose) for dose in cfg.dose}
    if cfg.adapter:
        lora.load(model, cfg.adapter)
        changes["student"] = change()

    # 4. write
    adapter = " --adapter RUN/round_?/adapter.safetensors" if cfg.adapter else ""
    publish(f"""# The cloze readout, validated

`python -m studies.readout{adapter}` · {ran_on(model)} · {len(vignettes)} vignettes \
({cfg.vignettes.name}), {len(contexts)} contexts

Intervals are 95 %: Wilson's of shares, BCa bootstrap paired by vignette of changes.

## Does it agree with the labels?

Share of vignettes whose most probable foundation is the labelled one (chance {1 / 7:.2f}):

{agreement_table(base, plain)}

By foundation:

{foundation_table(base)}

## How much does a change depend on the words?

The vector of {cfg.trait}{", and the student" if cfg.adapter else ""}, under each wording:

{change_table(metric, changes)}
""", cfg.out / "readout.md")


if __name__ == "__main__":
    runs.cli(Config, main)
