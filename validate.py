"""Are the instruments any good? The cloze readout against labels, doses and itself; the filter against labelled completions.

    python validate.py readout      # results/readout.md, results/readout.png      (embedded model, 2 cores: about 8 min)
    python validate.py filter       # results/filter.md                            (about 1 min)

Readout: the share of vignettes whose most probable foundation is the labelled one, the response of the profile to steering
doses, and both again on two disjoint halves of the vignettes. Filter: precision and recall of `distil.verdict` on
tests/data/labelled.jsonl, thresholds chosen on one half of it and reported on the other.
"""
import hashlib
import io
import itertools
import os
from collections import Counter
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.special
import scipy.stats
import tyro
from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

import distil
import evaluate
import lora
import models
from evaluate import FOUNDATIONS, Profile, delta_coherence, delta_nats
from plot import show
from steer import NEUTRAL, band, extract_vector, load_personas, perplexity, repetition, score

DOSES = (-4, -2, -1, 0, 1, 2, 4, 6, 8)
LABELLED = Path(__file__).parent / "tests" / "data" / "labelled.jsonl"


@dataclass
class Config:
    what: tyro.conf.Positional[Literal["readout", "filter"]]
    """Which instrument."""
    model: str = models.EMBEDDED
    """smollm2, a local folder, or a hub id."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    """Of the weights; auto is bfloat16 where the hardware has it."""
    adapter: Path | None = None
    """readout: adapter.safetensors of a run, the healed student on which the tinymfv package is compared too."""
    vignettes: Path = models.DATA / "vignettes.json"
    """readout: the labelled vignettes."""
    n_vignettes: int = 0
    """readout: how many, balanced over the foundations; 0 is all."""
    n_contexts: int = 128
    """readout: contexts each vector is averaged over."""
    seed: int = 0
    """readout: of the draws of vignettes."""
    out: Path = Path("results")
    """Folder of the results."""


def machine(model) -> str:
    return f"{os.cpu_count()} cores, {model.device.type}, {str(model.dtype).removeprefix('torch.')}"


def markdown(rows, head) -> str:
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def share(right: int, n: int) -> str:
    """`12/20 = 0.60 [0.39, 0.78]`, Wilson's 95 % interval."""
    if not n:
        return "0/0"
    ci = scipy.stats.binomtest(int(right), int(n)).proportion_ci(method="wilson")
    return f"{right}/{n} = {right / n:.2f} [{ci.low:.2f}, {ci.high:.2f}]"


# ---- the readout ------------------------------------------------------------------------------------------------------


def constants_of(base: Profile, rows) -> np.ndarray:
    """[7] the constants that the vignettes `rows` alone would have given (up to one scalar, which the softmax drops)."""
    return (np.log(base.p[rows]) + base.constants).mean(0)


def recalibrated(profile: Profile, rows, constants) -> Profile:
    """The profile on the vignettes `rows` under other constants; zeros for none."""
    p = scipy.special.softmax(np.log(profile.p[rows]) + profile.constants - constants, axis=1)
    return Profile([profile.ids[i] for i in rows], [profile.labels[i] for i in rows], p, profile.mass[rows], constants)


def by_foundation(profile: Profile) -> list[list[int]]:
    return [[i for i, label in enumerate(profile.labels) if label == f] for f in FOUNDATIONS]


def agreement(base: Profile, seed: int, draws: int = 500) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """[(n, top-1 with the draw's own constants [draws], without constants [draws])] over balanced draws of n vignettes."""
    groups, rng, out = by_foundation(base), np.random.default_rng(seed), []
    smallest = min(map(len, groups))
    for each in sorted({k for k in (1, 2, 4, 8, 12, 16) if k < smallest} | {smallest}):
        top1 = []
        for _ in range(draws):
            rows = np.concatenate([rng.choice(g, each, replace=False) for g in groups])
            top1.append([recalibrated(base, rows, c).top1 for c in (constants_of(base, rows), np.zeros(7))])
        out.append((7 * each, *np.array(top1).T))
    return out


def halves(base: Profile) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint halves of the vignettes, every other one of each foundation."""
    groups = by_foundation(base)
    return tuple(np.array(sorted(i for g in groups for i in g[k::2])) for k in (0, 1))


def package_parity(model, tok, vignettes: list[dict], vector, dose: float) -> tuple[Profile, list[float]]:
    """Readout tinymfv on the package's own vignettes, and its largest differences to what the package returns: nats, coherence, top-1."""
    with evaluate.steered_after_prompt(model, vector, dose):
        ours = evaluate.evaluate(model, tok, vignettes, "tinymfv")
        package, side = evaluate.tinymfv_package(), tok.padding_side
        rows = {row["id"]: row for row in package.load_vignettes("classic")}
        with redirect_stderr(io.StringIO()):
            theirs = package.evaluate(model, tok, vignettes=[rows[v["id"]] for v in vignettes], return_per_row=True, verbose=0)
        tok.padding_side = side
    logs = dict(zip(theirs["profile"]["foundation"], np.log(theirs["profile"]["model"])))
    return ours, [max(abs(ours.nats(f) - logs[f]) for f in FOUNDATIONS), abs(ours.coherence - theirs["mean_pmass_allowed"]),
                  abs(ours.top1 - theirs["top1_acc"])]


def readout(cfg: Config) -> None:
    vignettes = evaluate.load_vignettes(cfg.vignettes, cfg.n_vignettes)
    contexts = distil.load_strings(models.DATA / "contexts.json", "contexts")[:cfg.n_contexts]
    model, tok = models.load(cfg.model, cfg.device, cfg.dtype)
    lora.attach(model)
    traits = load_personas()
    vectors, profiles = {}, {}
    with tqdm(total=1 + len(traits) * (len(DOSES) - 1), desc="evaluations", leave=False) as bar:
        base = evaluate.evaluate(model, tok, vignettes)
        bar.update()
        for trait, persona in traits.items():
            vectors[trait] = extract_vector(model, tok, persona, contexts, band(model, (0.45, 0.55)))
            for dose in DOSES:
                profiles[trait, dose] = base
                if dose:
                    profiles[trait, dose] = evaluate.evaluate(model, tok, vignettes, constants=base.constants, vector=vectors[trait], dose=dose)
                    bar.update()

    every = agreement(base, cfg.seed)
    agreed = [[n, f"{own.mean():.2f} [{np.quantile(own, 0.025):.2f}, {np.quantile(own, 0.975):.2f}]",
               f"{none.mean():.2f} [{np.quantile(none, 0.025):.2f}, {np.quantile(none, 0.975):.2f}]"] for n, own, none in every]
    plain = recalibrated(base, np.arange(len(base.ids)), np.zeros(7))
    per_foundation = [[f, *(share(sum(q.p[i].argmax() == k for i in rows), len(rows)) for q in (base, plain)),
                       *(f"{np.mean([q.p[i][k] for i in rows]):.2f}" for q in (base, plain))]
                      for k, (f, rows) in enumerate(zip(FOUNDATIONS, by_foundation(base)))]

    doses, correlations = [], []
    for trait in traits:
        for dose in DOSES:
            after = profiles[trait, dose]
            deltas = [show(d, digits) if dose else "" for d, digits in ((delta_nats("Authority", base, after), 2),
                                                                        (delta_nats("Care", base, after), 2), (delta_coherence(base, after), 4))]
            doses.append([trait, dose, f"{after.auth_nats:.2f}", deltas[0], f"{after.care_nats:.2f}", deltas[1], f"{after.coherence:.4f}", deltas[2]])
        correlations.append([trait, *(f"{scipy.stats.spearmanr(DOSES, [read(profiles[trait, d]) for d in DOSES]).statistic:+.2f}"
                                      for read in (lambda q: q.auth_nats, lambda q: q.care_nats, lambda q: q.coherence))])

    half_rows, half_lines = halves(base), []
    constants = [constants_of(base, rows) for rows in half_rows]
    tops = [[recalibrated(base, rows, c).top1 for c in constants] for rows in half_rows]
    for trait in traits:
        moved = np.array([[[recalibrated(profiles[trait, d], rows, c).nats(f) - recalibrated(base, rows, c).nats(f) for rows, c in zip(half_rows, constants)]
                           for d in DOSES if d] for f in ("Authority", "Care")])  # [foundation, dose, half]
        for f, both in zip(("Authority", "Care"), moved):
            half_lines.append([trait, f, f"{np.corrcoef(both.T)[0, 1]:.3f}", f"{np.abs(both[:, 0] - both[:, 1]).mean():.2f}",
                               f"{(np.sign(both[:, 0]) == np.sign(both[:, 1])).sum()} of {len(both)}", f"{np.abs(both).mean():.2f}"])

    parity = ["The package is not installed here (requirements-tinymfv.txt); the comparison was not made."]
    if evaluate.importlib.util.find_spec("tinymfv") or evaluate.importlib.util.find_spec("moralmaps"):
        classic, lines = evaluate.load_vignettes("tinymfv:classic", 14), []
        if cfg.adapter:
            lora.detach(model)
            lora.load(model, cfg.adapter)
        for name, history, dose in (("base", 0, 0.0), ("steered (care, dose 2)", 0, 2.0), *([("healed", 1, 0.0)] if cfg.adapter else [])):
            with lora.gates(model, history, live=0):
                ours, off = package_parity(model, tok, classic, vectors["care"], dose)
            lines.append([name, f"{ours.auth_nats:.3f}", f"{ours.care_nats:.3f}", f"{ours.coherence:.4f}", f"{ours.top1:.2f}", *(f"{d:.1e}" for d in off)])
        parity = [markdown(lines, ["model", "auth (nats)", "care (nats)", "coherence", "top-1", "max off, nats", "off, coherence", "off, top-1"])]

    n = len(vignettes)
    text = f"""# The cloze readout, validated

`python validate.py readout{" --adapter RUN/adapter.safetensors" if cfg.adapter else ""}` · {lora.base_name(model)}, {machine(model)} · \
{n} vignettes ({cfg.vignettes.name}), {len(contexts)} contexts per vector, seed {cfg.seed}

Intervals are 95 %. Deltas are paired by vignette, BCa bootstrap (`evaluate.paired`); n.s.: the interval holds 0.

## Does it agree with the labels?

Share of vignettes whose most probable foundation is the labelled one (chance {1 / 7:.2f}): mean and central 95 % of 500 balanced draws,
the constants taken from the draw itself.

{markdown(agreed, ["vignettes", "with constants", "without"])}

Per foundation, on all {n}:

{markdown(per_foundation, ["foundation", "right, with constants", "right, without", "mean p of the label, with", "without"])}

## Does it move with the dose?

{markdown(doses, ["trait", "dose", "auth", "Δauth (nats)", "care", "Δcare (nats)", "coherence", "Δcoherence"])}

Rank correlation (Spearman) with the dose:

{markdown(correlations, ["trait", "auth", "care", "coherence"])}

![agreement, Authority, Care and coherence](readout.png)

## Do two disjoint halves say the same?

Every other vignette of each foundation, {len(half_rows[0])} and {len(half_rows[1])}. Agreement on the first half with its own constants {tops[0][0]:.2f}, with the
other half's {tops[0][1]:.2f}; on the second {tops[1][1]:.2f} and {tops[1][0]:.2f}. Deltas over the {len(DOSES) - 1} doses, each half under its own constants:

{markdown(half_lines, ["trait", "foundation", "Pearson r", "mean difference of the halves (nats)", "same sign", "mean size of the delta (nats)"])}

## Does our Profile equal the tinymfv package's own result?

14 of its classic vignettes, balanced, against one call of the package. `tests/test_evaluate.py` does the same with our vignettes and with a tiny random model.

{parity[0]}
"""
    cfg.out.mkdir(parents=True, exist_ok=True)
    models.write_text(cfg.out / "readout.md", text)
    figure(base, every, profiles, list(traits)).savefig(cfg.out / "readout.png", dpi=160, metadata={"Software": None})
    print(text)


def figure(base: Profile, every, profiles, traits) -> Figure:
    """Agreement over the number of vignettes; Authority, Care and coherence over the dose, 95 % intervals."""
    fig = Figure(figsize=(9, 6), layout="constrained")
    (agree, auth), (care, mass) = fig.subplots(2, 2)
    n = [k for k, *_ in every]
    for column, name, colour in ((1, "with constants", "#1e8449"), (2, "without", "#555555")):
        low, high = np.quantile([line[column] for line in every], (0.025, 0.975), axis=1)
        agree.plot(n, [line[column].mean() for line in every], "o-", color=colour, label=name, markersize=4)
        agree.fill_between(n, low, high, color=colour, alpha=0.15, linewidth=0)
    agree.axhline(1 / 7, color="#c0392b", linewidth=0.8, linestyle=":", label="chance")
    agree.set(xlabel="vignettes", ylabel="share labelled right", ylim=(0, None), title="agreement with the labels")
    for trait, colour, shift in zip(traits, ("#1f77b4", "#d95f02", "#7b3294"), (-0.08, 0, 0.08)):
        for axis, delta in ((auth, lambda q: delta_nats("Authority", base, q)), (care, lambda q: delta_nats("Care", base, q)),
                            (mass, lambda q: delta_coherence(base, q))):
            e = [delta(profiles[trait, d]) if d else evaluate.Estimate(0.0, 0.0, 0.0) for d in DOSES]
            axis.errorbar([d + shift for d in DOSES], [x.value for x in e], [[x.value - x.low for x in e], [x.high - x.value for x in e]],
                          color=colour, marker="o", markersize=4, linewidth=1.2, capsize=2, label=trait)
    for axis, ylabel, title in ((auth, "Δ Authority (nats)", "Authority"), (care, "Δ Care (nats)", "Care"), (mass, "Δ answer mass", "coherence")):
        axis.axhline(0, color="#999999", linewidth=0.6)
        axis.set(xlabel="dose of the vector", ylabel=ylabel, title=title, xticks=DOSES)
    for axis in (agree, auth, care, mass):
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    return fig


# ---- the filter -------------------------------------------------------------------------------------------------------


def in_second_half(text: str) -> bool:
    """A split that no order of the rows can change."""
    return hashlib.sha256(text.encode()).digest()[0] % 2 == 1


def wanted(row: dict) -> bool:
    """What the filter should keep."""
    return row["coherent"] and not row["narrates"]


def kept(row: dict, rules: distil.Filter) -> bool:
    return distil.verdict(row["text"], row["ppl"], row["persona"], rules) == "kept"


def precision_recall(rows: list[dict], rules: distil.Filter) -> tuple[int, int, int]:
    """-> kept and wanted, kept, wanted."""
    keep = [kept(r, rules) for r in rows]
    return sum(k and wanted(r) for k, r in zip(keep, rows)), sum(keep), sum(map(wanted, rows))


def f1(rows, rules) -> float:
    both, n_kept, n_wanted = precision_recall(rows, rules)
    return 2 * both / (n_kept + n_wanted)


def auc(signal: list[float], good: list[bool]) -> float:
    """Probability that a bad completion scores higher than a good one (ties half)."""
    x, good = np.array(signal), np.array(good)
    return scipy.stats.mannwhitneyu(x[~good], x[good]).statistic / ((~good).sum() * good.sum())


def filter(cfg: Config) -> None:
    rows, personas = distil.read_jsonl(LABELLED), load_personas()
    model, tok = models.load(cfg.model, cfg.device, cfg.dtype)
    lora.attach(model)
    with tqdm(total=2 * len(rows), desc="score", leave=False) as bar:
        for trait, persona in personas.items():
            of = [r for r in rows if r["trait"] == trait]
            messages = [{**r, "messages": [{"role": "system", "content": NEUTRAL}, {"role": "user", "content": r["prompt"]},
                                           {"role": "assistant", "content": r["text"]}]} for r in of]
            scored = distil.keep(model, tok, messages, persona, distil.Filter(), bar)
            logp = score(model, *map(list, zip(*(distil.row_ids(tok, m) for m in messages))), bar=bar)
            for r, s, lp in zip(of, scored, logp):
                r.update(persona=persona, ppl=s["perplexity"], verdict=s["verdict"], logp=lp)
    pick, report = ([r for r in rows if in_second_half(r["text"]) == half] for half in (False, True))

    default = distil.Filter()
    grid = [distil.Filter(default.min_words, *t) for t in itertools.product((0.2, 0.35, 0.5), (0.4, 0.5, 0.6, 0.7),
                                                                            (8, 10, 12, 14, 16, 18, 20, 25, 30, 40, 60))]
    chosen = max(grid, key=lambda rules: f1(pick, rules))
    overall, everything = [], distil.Filter(min_words=0, max_repetition=1, min_diversity=0, max_perplexity=np.inf)
    thresholds = {"no thresholds": everything, "default": default} | ({} if chosen == default else {"chosen on the first half": chosen})
    for name, rules in thresholds.items():
        for half, of in (("first half", pick), ("second half", report)):
            both, n_kept, n_wanted = precision_recall(of, rules)
            fluent = sum(kept(r, rules) and r["fluent"] and not r["narrates"] for r in of)
            overall.append([name, half, share(both, n_kept), share(both, n_wanted), f"{f1(of, rules):.2f}", share(fluent, n_kept)])

    alone = {"short": dict(min_words=default.min_words), "refusal": {}, "narrates": {}, "repetition": dict(max_repetition=default.max_repetition),
             "loop": dict(min_diversity=default.min_diversity), "perplexity": dict(max_perplexity=default.max_perplexity)}
    n_bad = sum(not wanted(r) for r in rows)
    per_rule = []
    for rule, setting in alone.items():
        hit = [r for r in rows if distil.verdict(r["text"], r["ppl"], r["persona"], replace(everything, **setting)) == rule]
        bad = sum(not wanted(r) for r in hit)
        per_rule.append([rule, len(hit), share(bad, len(hit)), share(bad, n_bad)])

    signals = {"perplexity, last quarter": lambda r: perplexity(r["logp"], 0.25), "perplexity, last half": lambda r: perplexity(r["logp"], 0.5),
               "perplexity, whole": lambda r: perplexity(r["logp"]),
               "perplexity, worst 24 tokens in a row": lambda r: max(perplexity(w) for w in r["logp"].unfold(0, min(24, len(r["logp"])), 1)),
               "repetition": lambda r: repetition(r["text"]), "lack of diversity": lambda r: -distil.diversity(r["text"])}
    signal_rows = [[name, *(f"{auc([f(r) for r in rows], [good(r) for r in rows]):.2f}" for good in (wanted, lambda r: r["fluent"]))]
                   for name, f in signals.items()]
    by_dose = [[f"{dose:g}", len(of), *(sum(r[key] for r in of) for key in ("fluent", "coherent", "enacts", "narrates")),
                sum(r["verdict"] == "kept" for r in of), sum(r["verdict"] == "kept" and wanted(r) for r in of)] for dose in sorted({r["dose"] for r in rows}) for of in [[r for r in rows if r["dose"] == dose]]]

    text = f"""# The filter on labelled completions

`python validate.py filter` · {lora.base_name(model)}, {machine(model)}

{len(rows)} steered completions of the embedded model ({", ".join(f"{n} {t}" for t, n in Counter(r["trait"] for r in rows).items())}; at most 64 tokens, \
`distil.sample_doses` on the dilemmas of data/prompts.json) in tests/data/labelled.jsonl, each read and labelled by one reader who saw prompt and text
but not dose, perplexity or verdict:

- fluent: every sentence is English that parses, and follows from the one before
- coherent: fluent, and makes sense as a reply to its prompt (the criterion of Betley et al. 2025, arXiv 2502.17424); naive advice counts
- enacts: acts the trait out. narrates: talks about having it instead

The filter should keep a completion if and only if it is coherent and does not narrate: {sum(map(wanted, rows))} of {len(rows)}. Narration is rare here
({sum(r["narrates"] for r in rows)} of {len(rows)}), so the narrates rule is hardly tested. Brackets: Wilson's 95 % interval.

{markdown(by_dose, ["dose", "n", "fluent", "coherent", "enacts", "narrates", "kept by the defaults", "of these rightly"])}

## Overall

Halves by a hash of the text ({len(pick)} and {len(report)}). Thresholds with the largest F1 on the first half: {", ".join(f"{k} {v:g}" for k, v in asdict(chosen).items())};
{"these are the defaults" if chosen == default else "defaults: " + ", ".join(f"{k} {v:g}" for k, v in asdict(default).items())}. The numbers to quote are those of the second half.

{markdown(overall, ["thresholds", "on", "precision", "recall", "F1", "kept that are fluent and do not narrate"])}

## Each rule alone, all rows

{markdown(per_rule, ["rule", "drops", "of these rightly", "of all that should go"])}

## Which signal ranks bad above good?

Area under the ROC curve, 0.5 is chance:

{markdown(signal_rows, ["signal", "coherent and not narrating", "fluent"])}
"""
    cfg.out.mkdir(parents=True, exist_ok=True)
    models.write_text(cfg.out / "filter.md", text)
    print(text)


def main(cfg: Config) -> None:
    {"readout": readout, "filter": filter}[cfg.what](cfg)


if __name__ == "__main__":
    models.cli(Config, main)
