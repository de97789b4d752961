"""Is the cloze readout any good? Held against labels, against doses, and against itself.

    agreement    share of vignettes whose most probable foundation is the labelled one
    response     how Authority, Care and coherence move with the dose of each trait's vector
    halves       both again on two disjoint halves of the vignettes
    package      our Profile against what one call of the package tinymfv returns, if installed

    python -m studies.readout    # results/readout.md, results/readout.png; about 8 min on 2 cores
    python -m studies.readout --adapter RUN/round_?/adapter.safetensors   # a healed student too

The constants c of `cloze` are means over the vignettes, so other vignettes have others. With c' for
c a row of the profile is softmax(log p + c − c').
"""
import contextlib
import io
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import scipy.special
import scipy.stats
from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

import lora
from common import models
from common import runs
from common import texts
from evaluate import NATS, Estimate, Profile, delta
from tools.plot import GREEN, GREY, RED, show
from common.readouts import Answers, cloze, steered_after_prompt, tinymfv
from steer import SteeringVector, band, extract_vector
from common.texts import FOUNDATIONS

DOSES = (-4, -2, -1, 0, 1, 2, 4, 6, 8)
COLOURS = ("#1f77b4", "#d95f02", "#7b3294")  # of the traits


@dataclass
class Config:
    model: str = models.EMBEDDED  # smollm2, a local folder, or a hub id
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"  # auto: bfloat16 where native
    adapter: tuple[Path, ...] = ()  # all rounds of a student, in order: for the package's part
    vignettes: Path = texts.DATA / "vignettes.json"  # labelled; or tinymfv:classic
    n_vignettes: int = 0  # how many, balanced over the foundations; 0 is all
    n_contexts: runs.AtLeast1 = 128  # contexts each vector is averaged over
    seed: runs.Seed = 0  # of the draws of vignettes
    out: Path = Path("results")  # folder for readout.md and readout.png


# ---- how a study prints --------------------------------------------------------------------------


def markdown(rows, head) -> str:
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def ran_on(model) -> str:
    """`SmolLM2-135M-Instruct-Q4_1, 2 cores, cpu, bfloat16`"""
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{models.base_name(model)}, {os.cpu_count()} cores, {model.device.type}, {dtype}"


def proportion(k: int, n: int) -> str:
    """`12/20 = 0.60 [0.39, 0.78]`, with Wilson's 95 % interval."""
    if not n:
        return "0/0"
    ci = scipy.stats.binomtest(int(k), int(n)).proportion_ci(method="wilson")
    return f"{k}/{n} = {k / n:.2f} [{ci.low:.2f}, {ci.high:.2f}]"


# ---- the profile on fewer vignettes --------------------------------------------------------------


def profile_of(answers: Answers, vignettes: list[dict]) -> Profile:
    return Profile([v["id"] for v in vignettes], [v["foundation"] for v in vignettes],
                   answers.p, answers.mass, answers.constants)


def constants_of(base: Profile, rows) -> np.ndarray:
    """[7] nats: the constants that `cloze` would take from the vignettes `rows` alone.

    Up to one scalar for all seven, which the softmax drops.
    """
    return (np.log(base.p[rows]) + base.constants).mean(0)


def recalibrated(profile: Profile, rows, constants: np.ndarray) -> Profile:
    """The profile on the vignettes `rows`, under other constants [7]; zeros for none."""
    z = np.log(profile.p[rows]) + profile.constants - constants
    ids, labels = [profile.ids[i] for i in rows], [profile.labels[i] for i in rows]
    return Profile(ids, labels, scipy.special.softmax(z, axis=1), profile.mass[rows], constants)


def rows_by_label(profile: Profile) -> list[list[int]]:
    """The rows labelled with each foundation, in the order of FOUNDATIONS."""
    return [[i for i, label in enumerate(profile.labels) if label == f] for f in FOUNDATIONS]


def halves(base: Profile) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint halves of the vignettes: every other one of each foundation."""
    groups = rows_by_label(base)
    first = [i for group in groups for i in group[0::2]]
    second = [i for group in groups for i in group[1::2]]
    return np.array(sorted(first)), np.array(sorted(second))


def check_every_foundation(vignettes: list[dict], path) -> None:
    """Raises ValueError where one of the halves would lack a foundation."""
    n = Counter(v["foundation"] for v in vignettes)
    for f in FOUNDATIONS:
        if n[f] < 2:
            raise ValueError(f"{n[f]} of {len(vignettes)} vignettes from {path} are labelled {f}, "
                             "too few for two halves; fix: --n-vignettes 14 or more, or 0 for all, "
                             "of a file with two or more per foundation")


# ---- agreement with the labels -------------------------------------------------------------------


class Agreement(NamedTuple):
    """Shares of vignettes labelled right, in many draws of n vignettes."""
    n: int
    own: np.ndarray  # [draws], under the constants of the draw itself
    none: np.ndarray  # [draws], without constants


def agreement(base: Profile, seed: int, draws: int = 500) -> list[Agreement]:
    """Over balanced draws of 1, 2, 4 ... vignettes per foundation, up to as many as there are."""
    groups, rng, found = rows_by_label(base), np.random.default_rng(seed), []
    most = min(map(len, groups))
    for each in [*(k for k in (1, 2, 4, 8, 12, 16) if k < most), most]:
        own, none = [], []
        for _ in range(draws):
            rows = np.concatenate([rng.choice(group, each, replace=False) for group in groups])
            own.append(recalibrated(base, rows, constants_of(base, rows)).top1)
            none.append(recalibrated(base, rows, np.zeros(7)).top1)
        found.append(Agreement(7 * each, np.array(own), np.array(none)))
    return found


def agreement_table(found: list[Agreement]) -> str:
    rows = []
    for n, *kinds in found:
        row = [n]
        for top1 in kinds:
            low, high = np.quantile(top1, (0.025, 0.975))
            row.append(f"{top1.mean():.2f} [{low:.2f}, {high:.2f}]")
        rows.append(row)
    return markdown(rows, ["vignettes", "with constants", "without"])


def foundation_table(base: Profile) -> str:
    """All vignettes by their label: how many are right, and the probability of the label."""
    plain = recalibrated(base, np.arange(len(base.ids)), np.zeros(7))
    table = []
    for k, (foundation, rows) in enumerate(zip(FOUNDATIONS, rows_by_label(base))):
        p_with, p_without = base.p[rows], plain.p[rows]  # [rows of the foundation, 7]
        right = [(p.argmax(1) == k).sum() for p in (p_with, p_without)]
        table.append([foundation, proportion(right[0], len(rows)), proportion(right[1], len(rows)),
                      f"{p_with[:, k].mean():.2f}", f"{p_without[:, k].mean():.2f}"])
    return markdown(table, ["foundation", "right, with constants", "right, without",
                            "mean p of the label, with", "without"])


# ---- response to the dose ------------------------------------------------------------------------


class Response(NamedTuple):
    """A steered profile, and how far it is from the base's."""
    profile: Profile
    auth: Estimate  # Δ log mean p[Authority], nats
    care: Estimate  # Δ log mean p[Care], nats
    coherence: Estimate  # Δ answer mass


Responses = dict[str, dict[int, Response]]  # by trait and dose


def responses(model, tok, vignettes: list[dict], base: Profile,
              vectors: dict[str, SteeringVector]) -> Responses:
    """One evaluation per trait and dose, all under the constants of the base."""
    zero = Estimate(0.0, 0.0, 0.0)
    found = {trait: {} for trait in vectors}
    pairs = [(trait, dose) for trait in vectors for dose in DOSES]
    for trait, dose in tqdm(pairs, "doses", leave=False, disable=None):
        if dose == 0:
            found[trait][0] = Response(base, zero, zero, zero)
            continue
        answers = cloze(model, tok, vignettes, base.constants, vector=vectors[trait], dose=dose)
        after = profile_of(answers, vignettes)
        found[trait][dose] = Response(after, delta("auth_nats", base, after),
                                      delta("care_nats", base, after),
                                      delta("coherence", base, after))
    return found


def dose_table(found: Responses) -> str:
    rows = []
    for trait, by_dose in found.items():
        for dose, (after, auth, care, coherence) in by_dose.items():
            deltas = ["", "", ""]  # none at dose 0, which is the base
            if dose:
                deltas = [show(auth), show(care), show(coherence, 4)]
            rows.append([trait, dose, f"{after.value('auth_nats'):.2f}", deltas[0],
                         f"{after.value('care_nats'):.2f}", deltas[1],
                         f"{after.coherence:.4f}", deltas[2]])
    return markdown(rows, ["trait", "dose", "auth", "Δauth (nats)", "care", "Δcare (nats)",
                           "coherence", "Δcoherence"])


def correlation_table(found: Responses) -> str:
    rows = []
    for trait, by_dose in found.items():
        row = [trait]
        for number in ("auth_nats", "care_nats", "coherence"):
            values = [response.profile.value(number) for response in by_dose.values()]
            row.append(f"{scipy.stats.spearmanr(list(by_dose), values).statistic:+.2f}")
        rows.append(row)
    return markdown(rows, ["trait", "auth", "care", "coherence"])


# ---- two halves ----------------------------------------------------------------------------------


def top1_of_halves(base: Profile) -> list[list[float]]:
    """[half][constants]: agreement on either half, under the constants of the one and the other."""
    both = halves(base)
    constants = [constants_of(base, rows) for rows in both]
    return [[recalibrated(base, rows, c).top1 for c in constants] for rows in both]


def deltas_of_halves(base: Profile, after: list[Profile], number: str) -> np.ndarray:
    """Δ of a number on either half, under the half's own constants: [profiles, 2], nats."""
    columns = []
    for rows in halves(base):
        constants = constants_of(base, rows)
        before = recalibrated(base, rows, constants).value(number)
        columns.append([recalibrated(profile, rows, constants).value(number) - before
                        for profile in after])
    return np.array(columns).T


def halves_table(base: Profile, found: Responses) -> str:
    rows = []
    for trait, by_dose in found.items():
        steered = [response.profile for dose, response in by_dose.items() if dose]
        for foundation, number in (("Authority", "auth_nats"), ("Care", "care_nats")):
            deltas = deltas_of_halves(base, steered, number)
            first, second = deltas.T
            same_sign = (np.sign(first) == np.sign(second)).sum()
            rows.append([trait, foundation, f"{np.corrcoef(first, second)[0, 1]:.3f}",
                         f"{np.abs(first - second).mean():.2f}", f"{same_sign} of {len(deltas)}",
                         f"{np.abs(deltas).mean():.2f}"])
    return markdown(rows, ["trait", "foundation", "Pearson r",
                           "mean difference of the halves (nats)", "same sign",
                           "mean size of the delta (nats)"])


# ---- the package ---------------------------------------------------------------------------------


def has_package() -> bool:
    try:
        texts.tinymfv_package()
    except ValueError:
        return False
    return True


def package_row(name: str, model, tok, vignettes, vector: SteeringVector | None = None,
                dose: float = 0.0) -> list[str]:
    """Our Profile of the model as it stands, and how far the package's own result is from it."""
    # 1. ours, on rows made from the vignettes
    ours = profile_of(tinymfv(model, tok, vignettes, vector=vector, dose=dose), vignettes)

    # 2. theirs, on rows of their own
    package, side = texts.tinymfv_package(), tok.padding_side
    own = {row["id"]: row for row in package.load_vignettes("classic")}
    own_rows = [own[v["id"]] for v in vignettes]
    steered = steered_after_prompt(model, vector, dose) if vector else contextlib.nullcontext()
    with steered, contextlib.redirect_stderr(io.StringIO()):  # its own progress bar
        theirs = package.evaluate(model, tok, vignettes=own_rows, return_per_row=True, verbose=0)
    tok.padding_side = side  # the package sets it

    # 3. how far apart
    mean_p = dict(zip(theirs["profile"]["foundation"], theirs["profile"]["model"]))
    nats = max(abs(ours.value(number) - np.log(mean_p[f])) for f, number in zip(FOUNDATIONS, NATS))
    coherence = abs(ours.coherence - theirs["mean_pmass_allowed"])
    top1 = abs(ours.top1 - theirs["top1_acc"])
    return [name, f"{ours.value('auth_nats'):.3f}", f"{ours.value('care_nats'):.3f}",
            f"{ours.coherence:.4f}", f"{ours.top1:.2f}", f"{nats:.1e}", f"{coherence:.1e}",
            f"{top1:.1e}"]


def package_table(model, tok, care: SteeringVector, adapter: tuple[Path, ...]) -> str:
    """Base, steered and, given an adapter, healed. Leaves the model as it was."""
    if not has_package():
        return ("The package is not installed here (requirements-tinymfv.txt); "
                "the comparison was not made.")
    vignettes = texts.load_vignettes("tinymfv:classic", 14)
    rows = [package_row("base", model, tok, vignettes),
            package_row("steered (care, dose 2)", model, tok, vignettes, care, 2.0)]
    if adapter:
        lora.load(model, adapter)
        rows.append(package_row("healed", model, tok, vignettes))
        lora.detach(model)
    return markdown(rows, ["model", "auth (nats)", "care (nats)", "coherence", "top-1",
                           "max off, nats", "off, coherence", "off, top-1"])


# ---- the picture ---------------------------------------------------------------------------------


def draw_agreement(axis, agreed: list[Agreement]) -> None:
    """Share labelled right over the number of vignettes, with the central 95 % of draws."""
    n = [a.n for a in agreed]
    for name, colour, draws in (("with constants", GREEN, [a.own for a in agreed]),
                                ("without", GREY, [a.none for a in agreed])):
        low, high = np.quantile(draws, (0.025, 0.975), axis=1)
        axis.plot(n, np.mean(draws, axis=1), "o-", color=colour, label=name, markersize=4)
        axis.fill_between(n, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.axhline(1 / 7, color=RED, linewidth=0.8, linestyle=":", label="chance")
    axis.set(xlabel="vignettes", ylabel="share labelled right", ylim=(0, None),
             title="agreement with the labels")


def draw_response(axis, found: Responses, name: str) -> None:
    """One delta over the dose, a line per trait, 95 % intervals."""
    for k, (trait, by_dose) in enumerate(found.items()):
        shift = 0.08 * (k - (len(found) - 1) / 2)  # else their whiskers cover each other
        estimates = [getattr(response, name) for response in by_dose.values()]
        whiskers = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
        axis.errorbar([dose + shift for dose in by_dose], [e.value for e in estimates], whiskers,
                      color=COLOURS[k % len(COLOURS)], marker="o", markersize=4, linewidth=1.2,
                      capsize=2, label=trait)
    axis.axhline(0, color="#999999", linewidth=0.6)


def picture(agreed: list[Agreement], found: Responses) -> Figure:
    """Agreement over the number of vignettes; Authority, Care and coherence over the dose."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    (labels, auth), (care, mass) = figure.subplots(2, 2)
    draw_agreement(labels, agreed)
    for axis, name, ylabel, title in ((auth, "auth", "Δ Authority (nats)", "Authority"),
                                      (care, "care", "Δ Care (nats)", "Care"),
                                      (mass, "coherence", "Δ answer mass", "coherence")):
        draw_response(axis, found, name)
        axis.set(xlabel="dose of the vector", ylabel=ylabel, title=title, xticks=DOSES)
    for axis in (labels, auth, care, mass):
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


# ---- the command ---------------------------------------------------------------------------------


def page(cfg: Config, about: str, base: Profile, agreed: list[Agreement], found: Responses,
         package: str) -> str:
    """readout.md. about: what was run on what."""
    n, (first, second), top1 = len(base.ids), halves(base), top1_of_halves(base)
    adapter = " --adapter RUN/round_?/adapter.safetensors" if cfg.adapter else ""
    return f"""# The cloze readout, validated

`python -m studies.readout{adapter}` · {about}

Intervals are 95 %. Deltas are paired by vignette, BCa bootstrap (`evaluate.paired`); n.s.: the \
interval holds 0.

## Does it agree with the labels?

Share of vignettes whose most probable foundation is the labelled one (chance {1 / 7:.2f}): mean \
and central 95 % of 500 balanced draws,
the constants taken from the draw itself.

{agreement_table(agreed)}

Per foundation, on all {n}:

{foundation_table(base)}

## Does it move with the dose?

{dose_table(found)}

Rank correlation (Spearman) with the dose:

{correlation_table(found)}

![agreement, Authority, Care and coherence](readout.png)

## Do two disjoint halves say the same?

Every other vignette of each foundation, {len(first)} and {len(second)}. Agreement on the first \
half with its own constants {top1[0][0]:.2f}, with the
other half's {top1[0][1]:.2f}; on the second {top1[1][1]:.2f} and {top1[1][0]:.2f}. \
Deltas over the {len(DOSES) - 1} doses, each half under its own constants:

{halves_table(base, found)}

## Does our Profile equal the tinymfv package's own result?

14 of its classic vignettes, balanced, against one call of the package. \
`tests/test_readouts.py` does the same with our vignettes and with a tiny random model.

{package}
"""


def main(cfg: Config) -> None:
    # 1. everything that is read, before minutes of work
    vignettes = texts.load_vignettes(cfg.vignettes, cfg.n_vignettes)
    check_every_foundation(vignettes, cfg.vignettes)
    contexts = texts.load_strings(texts.DATA / "contexts.json", "contexts")[:cfg.n_contexts]
    traits = texts.load_traits()
    if cfg.adapter and not has_package():
        raise ValueError("--adapter is for the comparison with the package tinymfv, which is not "
                         "installed; fix: pip install -r requirements-tinymfv.txt, or no --adapter")
    model, tok = models.load(cfg.model, cfg.device, cfg.dtype)
    cfg.out.mkdir(parents=True, exist_ok=True)

    # 2. measure
    layers = band(model, (0.45, 0.55))
    vectors = {name: extract_vector(model, tok, trait.persona, contexts, layers)
               for name, trait in traits.items()}
    package = package_table(model, tok, vectors["care"], cfg.adapter)
    base = profile_of(cloze(model, tok, vignettes), vignettes)
    found = responses(model, tok, vignettes, base, vectors)
    agreed = agreement(base, cfg.seed)

    # 3. write
    about = (f"{ran_on(model)} · {len(vignettes)} vignettes ({cfg.vignettes.name}), "
             f"{len(contexts)} contexts per vector, seed {cfg.seed}")
    text = page(cfg, about, base, agreed, found, package)
    runs.write_text(cfg.out / "readout.md", text)
    picture(agreed, found).savefig(cfg.out / "readout.png", dpi=160, metadata={"Software": None})
    print(text)


if __name__ == "__main__":
    runs.cli(Config, main)
