"""The checks of sampled texts: the first new tokens jointly, later ones one by one, and whole texts against plain ones.

After chosen prefixes the tree of likely continuations is walked with one-token forwards of the stock model, which gives
every cell's exact probability; rarer continuations stay in the cell of their first tokens. Cells are fixed before
sampling, the sample size follows from the error that must be found, and Pearson's chi-square tests the counts.

Every token of longer texts is ranked in the exact distribution that it should come from, by one-token forwards along
the drafted text. Drafted texts and plain ones of the same prompts are compared by the energy statistic of random token
features, with a permutation test within each prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from outdraft.api.generation import SpeculativeModel
from outdraft.core.statistics import Statistics
from outdraft.evaluation.audit.equality import drafting
from outdraft.evaluation.audit.findings import AuditSettings, Finding
from outdraft.evaluation.audit.goodness_of_fit import (
    Fit,
    Ranks,
    energy_p_value,
    fit,
    found_distance,
    needed_samples,
    pooled,
    ranks_finding,
    text_features,
)
from outdraft.evaluation.audit.progress import Stage
from outdraft.evaluation.audit.rounds import Watch
from outdraft.evaluation.audit.stock import SEVERAL, StockProbs

Cells = dict[tuple[int, ...], float]
"""The cells: first tokens and their probabilities; a continued cell keeps only the mass beside its continuations."""

CHILDREN = 3
"""The most continuations of one cell that get cells of their own, so that cells reach past the first token."""

LEAST = 0.01
"""The least probability of a cell of its own."""


def decoded(
    model: SpeculativeModel,
    batches: Iterable[tuple[list[list[int]], int | None]],
    generation: dict[str, Any],
    stage: Stage,
    name: str = "batch",
) -> tuple[list[list[list[int]]], Statistics]:
    """Decode batches of prompts, each with its seed; return every batch's new tokens, and the statistics of all.

    Args:
        name: tells these batches from others of the same check.
    """
    found, parts = [], []
    for number, (prompts, seed) in enumerate(batches):

        def decode(prompts: list[list[int]] = prompts, seed: int | None = seed) -> dict[str, Any]:
            output = model.generate(prompts, **generation, seed=seed)
            return {"tokens": output.tokens, "statistics": asdict(output.statistics)}

        batch = stage.part(f"{name} {number}", decode, len(prompts))
        found.append(batch["tokens"])
        parts.append(Statistics(**batch["statistics"]))
    return found, Statistics.sum(parts)


def sampled_texts(
    model: SpeculativeModel,
    prompts: Sequence[list[int]],
    settings: AuditSettings,
    use: str,
    stage: Stage,
) -> tuple[list[list[list[int]]], Statistics]:
    """Sample texts of every prompt, with the seeds of this use; also return the statistics of the decoding."""
    batches = (([prompt] * settings.texts, settings.seed_for(use, number)) for number, prompt in enumerate(prompts))
    generation = {**settings.generation, "max_new_tokens": settings.max_new_tokens}
    return decoded(model, batches, generation, stage)


@dataclass
class Prefix:
    """A prefix after which texts are sampled.

    Attributes:
        tokens: token ids.
        cells: exact probabilities of the cells.
        rounding: sum of d^2 / p over the cells, d being what many-token forwards change of p: the noncentrality that
            rounding alone may give to one sample.
        variation: half the sum of |d|, an upper bound of its total variation.
    """

    tokens: list[int]
    cells: Cells
    rounding: float = 0.0
    variation: float = 0.0

    @property
    def spread(self) -> float:
        """The spread 1 - sum p^2 of the cells, by which prefixes are chosen."""
        return 1 - sum(p * p for p in self.cells.values())


@torch.inference_mode()
def exact_cells(probs: StockProbs, prefix: list[int], tokens: int, most: int) -> Cells:
    """Split the most probable cell repeatedly, until there are `most` cells or none can be split."""
    ends = set(probs.target.eos_token_ids)
    cells: Cells = {(): 1.0}
    open_cells: Cells = {(): 1.0}
    while open_cells and len(cells) < most:
        beginning = max(open_cells, key=open_cells.__getitem__)
        mass = open_cells.pop(beginning)
        dist = probs.after(prefix, [beginning])[0].double()
        best = dist.topk(min(CHILDREN, most - len(cells), len(dist)))
        for share, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if mass * share >= LEAST:
                longer = (*beginning, token)
                cells[longer] = mass * share
                cells[beginning] -= mass * share
                if len(longer) < tokens and token not in ends:
                    open_cells[longer] = mass * share
    return {cell: max(0.0, probability) for cell, probability in cells.items()}


@torch.inference_mode()
def same_cells(probs: StockProbs, prefix: list[int], like: Cells, piece: int | None) -> Cells:
    """Return the probabilities of the same cells by forwards over several tokens."""
    cells: Cells = {(): 1.0}
    parents = {cell[:-1] for cell in like if cell}
    for length in range(max(map(len, parents), default=-1) + 1):
        level = [parent for parent in like if parent in parents and len(parent) == length]
        for parent, dist in zip(level, probs.after(prefix, level, piece), strict=True):
            whole = cells[parent]
            for child in (cell for cell in like if cell and cell[:-1] == parent):
                cells[child] = whole * float(dist[child[-1]])
                cells[parent] -= cells[child]
    return {cell: max(0.0, cells[cell]) for cell in like}


def tested_prefix(probs: StockProbs, prefix: list[int], settings: AuditSettings) -> Prefix:
    """Return the cells after one prefix with their rounding error, summed over both kinds of many-token forward, as the
    decoder's own rounding is a third kind."""
    cells = exact_cells(probs, prefix, settings.first_tokens, settings.cells)
    found = Prefix(prefix, cells)
    for piece in (SEVERAL, None):
        other = same_cells(probs, prefix, cells, piece)
        moved = {cell: other[cell] - p for cell, p in cells.items()}
        found.rounding += sum(moved[cell] ** 2 / p for cell, p in cells.items() if p > 1e-9)
        found.variation = max(found.variation, sum(map(abs, moved.values())) / 2)
    return found


def chosen_prefixes(
    probs: StockProbs, candidates: Sequence[list[int]], settings: AuditSettings, stage: Stage
) -> list[Prefix]:
    """Choose the prefixes with the largest spread; first those where rounding (at a filter's edge) hides little."""
    found = []
    for number, prefix in enumerate(candidates):

        def test(prefix: list[int] = prefix) -> dict[str, Any]:
            return asdict(tested_prefix(probs, prefix, settings))

        found.append(Prefix(**stage.part(number, test, 1)))
    hides = settings.total_variation / 4
    return sorted(found, key=lambda one: (one.variation > hides, -one.spread))[: settings.prefixes]


def cells_fit(samples: Sequence[Sequence[int]], cells: Cells, tokens: int) -> Fit:
    """Compute Pearson's statistic; each sample counts for the longest cell that it begins with."""
    counts = Counter(
        next(cell for n in range(tokens, -1, -1) if (cell := tuple(sample[:n])) in cells) for sample in samples
    )
    return fit([counts[cell] for cell in cells], [p * len(samples) for p in cells.values()])


@dataclass
class Plan:
    """The number of samples, and the error that they detect.

    Attributes:
        each: samples after every prefix.
        freedom: degrees of freedom.
        rounding: noncentrality a sample that the test allows.
        distance: the total variation that is detected with the stated power; larger than asked where rounding hides it.
        asked: True if that is the distance asked for.
    """

    each: int
    freedom: int
    rounding: float
    distance: float
    asked: bool


def plan(prefixes: Sequence[Prefix], settings: AuditSettings, alpha: float) -> Plan:
    """Compute the sample size from the stated error, power and level.

    Where rounding hides the error, the size is that of an error that it does not hide: three times its own distance.
    """
    rounding = sum(one.rounding for one in prefixes) / len(prefixes)
    # Cells can only be pooled further by smaller samples: start from all of them.
    freedom = max(1, sum(len(one.cells) - 1 for one in prefixes))
    distance = settings.total_variation
    samples = needed_samples(distance, freedom, alpha, settings.power, rounding)
    while samples is None or samples > 4 * (needed_samples(distance, freedom, alpha, settings.power) or 1):
        distance *= 1.1
        samples = needed_samples(distance, freedom, alpha, settings.power, rounding)
    each = -(-samples // len(prefixes))
    freedom = max(1, sum(len(pooled([p * each for p in one.cells.values()])) - 1 for one in prefixes))
    distance = found_distance(each * len(prefixes), freedom, alpha, settings.power, rounding)
    return Plan(each, freedom, rounding, distance, distance <= settings.total_variation * 1.001)


def beginnings_finding(
    model: SpeculativeModel,
    prefixes: Sequence[Prefix],
    planned: Plan,
    settings: AuditSettings,
    stage: Stage,
) -> Finding:
    """Sample after every prefix and test all of them together."""
    assert model.drafter is not None
    watched = model.with_drafter(Watch(model.drafter, prefill_once=True))
    generation = {**settings.generation, "max_new_tokens": settings.first_tokens}
    whole, lines, parts = Fit(0.0, 0), [], []
    for number, one in enumerate(prefixes):
        batches = [
            (
                [one.tokens] * min(settings.batch_size, planned.each - start),
                settings.seed_for("beginnings", number, start),
            )
            for start in range(0, planned.each, settings.batch_size)
        ]
        texts, statistics = decoded(watched, batches, generation, stage, f"prefix {number} batch")
        parts.append(statistics)
        own = cells_fit([text for batch in texts for text in batch], one.cells, settings.first_tokens)
        whole += own
        lines.append(
            f"prefix {number + 1} ({len(one.tokens)} tokens, {own.freedom + 1} cells): "
            f"p = {own.p_value(planned.each * one.rounding):.3g} by itself"
        )
    statistics = Statistics.sum(parts)
    total = planned.each * len(prefixes)
    allowed = total * planned.rounding
    moved = max(one.variation for one in prefixes)
    hidden = "" if planned.asked else f" (rounding hides the {settings.total_variation:g} asked for)"
    return Finding(
        "beginnings",
        f"Do the first {settings.first_tokens} sampled tokens, jointly, have the target's exact output distribution?",
        True,
        f"{total} samples after {len(prefixes)} prefixes, chi-square {whole.statistic:.1f} with {whole.freedom} "
        f"degrees of freedom; an error of total variation {planned.distance:.3g}{hidden} is found with probability "
        f"{settings.power:g}; rounding moves these distributions by {moved:.2g} and is forgiven"
        f"{drafting(statistics)}.",
        p_value=whole.p_value(allowed),
        figures={
            "samples": total,
            "prefixes": len(prefixes),
            "statistic": whole.statistic,
            "degrees_of_freedom": whole.freedom,
            "noncentrality_of_rounding": allowed,
            "total_variation_of_rounding": moved,
            "p_value_without_allowance": whole.p_value(),
            "total_variation_found": planned.distance,
            "power": settings.power,
            "drafting": statistics.as_dict(),
        },
        lines=lines,
    )


@torch.inference_mode()
def rank_tokens(
    ranks: Ranks, probs: StockProbs, prompts: Sequence[list[int]], texts: Sequence[list[list[int]]], stage: Stage
) -> None:
    """Add the ranks of every token but each text's first, which no drafter has proposed; a step is a position."""
    for number, (prompt, own) in enumerate(zip(prompts, texts, strict=True)):

        def rank(prompt: list[int] = prompt, own: list[list[int]] = own) -> None:
            for place, step in enumerate(probs.along(prompt, own)):
                rows = [row for row, dist in enumerate(step) if dist is not None]
                if place > 0 and rows:
                    ranks.add(
                        torch.stack([dist for dist in step if dist is not None]),
                        torch.tensor([own[row][place] for row in rows]),
                    )
                stage(int(bool(rows)))

        stage.part(number, rank)


def tokens_finding(ranks: Ranks, statistics: Statistics, settings: AuditSettings, alpha: float, exact: bool) -> Finding:
    """Test whether the tokens' ranks are uniform; arguments as in `ranks_finding`.

    Args:
        exact: True if a token without probability is a fault; near a filter's edge rounding in low precision lets some
            through.
    """
    question = "Does every token of longer sampled texts come from the target's exact output distribution at its place?"
    outside = f"; {ranks.impossible} tokens that have no probability there" if ranks.impossible else ""
    found = ranks_finding("tokens", question, "tokens", ranks, settings, alpha, outside + drafting(statistics))
    found.figures |= {"impossible": ranks.impossible, "drafting": statistics.as_dict()}
    if exact and ranks.impossible:
        found.p_value = 0.0
    return found


def samples_finding(
    plain: Sequence[list[list[int]]], drafted: Sequence[list[list[int]]], vocab: int, settings: AuditSettings
) -> Finding:
    """Test whether drafted texts and plain ones are samples of one distribution."""

    def features(texts: Sequence[Sequence[int]]) -> Tensor:
        return text_features(texts, vocab, settings.max_new_tokens, settings.seed_for("signs"))

    pairs = [(features(own), features(other)) for own, other in zip(plain, drafted, strict=True)]
    statistic, p_value = energy_p_value(pairs, settings.permutations, settings.seed_for("permutations"))
    count = sum(map(len, drafted))
    return Finding(
        "samples",
        "Are drafted texts and plainly sampled ones samples of the same output distribution?",
        True,
        f"{count} drafted and {count} plain texts of up to {settings.max_new_tokens} tokens after {len(plain)} "
        f"prompts; energy statistic {statistic:.3g}, {settings.permutations} permutations within prompts.",
        p_value=p_value,
        figures={"texts": count, "prompts": len(plain), "statistic": statistic, "permutations": settings.permutations},
    )
