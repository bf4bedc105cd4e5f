"""The one-sample and two-sample tests of longer sampled texts.

One sample: every token against the exact distribution that it should come from, by one-token forwards of the stock
model along the drafted text (`goodness_of_fit.ranks`). Two samples: drafted texts against plainly sampled ones of the
same prompts, by the energy statistic of random token features, with a permutation test within each prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from outdraft.api.generation import SpeculativeModel
from outdraft.core.statistics import Statistics
from outdraft.evaluation.audit.findings import Finding
from outdraft.evaluation.audit.goodness_of_fit import Ranks, found_distance
from outdraft.evaluation.audit.greedy import drafting
from outdraft.evaluation.audit.settings import AuditSettings
from outdraft.evaluation.audit.stock import StockProbs

SEGMENTS, WIDTH = 4, 16
"""The number of parts of a text, and of random features of a part's tokens."""

PERMUTATIONS_AT_ONCE = 1000


def sampled_texts(
    model: SpeculativeModel,
    prompts: Sequence[list[int]],
    settings: AuditSettings,
    use: str,
    advance: Callable[[int], None],
) -> tuple[list[list[list[int]]], Statistics]:
    """Sample texts of every prompt, with the seeds of this use; also return the statistics of the decoding."""
    found, parts = [], []
    for number, prompt in enumerate(prompts):
        output = model.generate(
            [prompt] * settings.texts,
            **settings.generation,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed_for(use, number),
        )
        found.append(output.tokens)
        parts.append(output.statistics)
        advance(1)
    return found, Statistics.sum(parts)


@torch.inference_mode()
def token_ranks(
    probs: StockProbs,
    prompts: Sequence[list[int]],
    texts: Sequence[list[list[int]]],
    seed: int,
    advance: Callable[[int], None],
) -> Ranks:
    """Rank every token but each text's first, which no drafter has proposed."""
    ranks = Ranks(seed)
    for prompt, own in zip(prompts, texts, strict=True):
        for place, step in enumerate(probs.along(prompt, own)):
            rows = [row for row, dist in enumerate(step) if dist is not None]
            if place > 0 and rows:
                ranks.add(
                    torch.stack([dist for dist in step if dist is not None]),
                    torch.tensor([own[row][place] for row in rows]),
                )
        advance(1)
    return ranks


def tokens_finding(ranks: Ranks, statistics: Statistics, settings: AuditSettings, alpha: float, exact: bool) -> Finding:
    """Test whether the tokens' ranks are uniform.

    Args:
        alpha: level that the stated power refers to.
        exact: True if a token without probability is a fault; near a filter's edge rounding in low precision lets some
            through.
    """
    own = ranks.fit()
    count = len(ranks.values)
    found = found_distance(count, own.freedom, alpha, settings.power)
    outside = f"; {ranks.impossible} tokens that have no probability there" if ranks.impossible else ""
    return Finding(
        "tokens",
        "Does every token of longer sampled texts come from the target's exact output distribution at its place?",
        True,
        f"{count} tokens, {own.freedom + 1} classes of rank, chi-square {own.statistic:.1f}; an error that favours "
        f"likely or unlikely tokens by a total variation of {found:.2g} is found with probability {settings.power:g}"
        f"{outside}{drafting(statistics)}.",
        p_value=0.0 if exact and ranks.impossible else own.p_value(),
        figures={
            "tokens": count,
            "statistic": own.statistic,
            "degrees_of_freedom": own.freedom,
            "total_variation_found": found,
            "impossible": ranks.impossible,
            "histogram": ranks.histogram(),
            "drafting": statistics.as_dict(),
        },
    )


def text_features(texts: Sequence[Sequence[int]], vocab: int, length: int, seed: int) -> Tensor:
    """Compute `(texts, features)`: random signs of the tokens, summed over each part of the text, and its length.

    Texts that share tokens in the same part are near to each other, whatever the tokens are.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (vocab, WIDTH), generator=generator).double() * 2 - 1
    part = -(-length // SEGMENTS)
    rows = []
    for text in texts:
        sums = []
        for start in range(0, length, part):
            tokens = torch.tensor(list(text[start : start + part]), dtype=torch.long)
            sums += [signs[tokens].sum(0) / part, torch.tensor([4 * len(tokens) / part], dtype=torch.double)]
        rows.append(torch.cat(sums))
    return torch.stack(rows)


def energy_p_value(pairs: Sequence[tuple[Tensor, Tensor]], permutations: int, seed: int) -> tuple[float, float]:
    """Test by permutation that both samples of every pair come from one distribution.

    Args:
        pairs: `(n, features)` and `(n, features)` for every stratum; labels are exchanged within it.

    Returns:
        the statistic and its p-value, (1 + as large) / (1 + permutations).
    """
    generator = torch.Generator().manual_seed(seed)
    observed, drawn = 0.0, torch.zeros(permutations, dtype=torch.double)
    for one, other in pairs:
        distances = torch.cdist(torch.cat([one, other]), torch.cat([one, other]))
        signs = torch.cat([torch.full((len(one),), 1 / len(one)), torch.full((len(other),), -1 / len(other))]).double()
        observed += float(-(signs @ distances @ signs))
        for start in range(0, permutations, PERMUTATIONS_AT_ONCE):
            count = min(PERMUTATIONS_AT_ONCE, permutations - start)
            order = torch.rand(count, len(signs), generator=generator).argsort(1)
            shuffled = signs[order]
            drawn[start : start + count] -= ((shuffled @ distances) * shuffled).sum(1)
    as_large = int((drawn >= observed - 1e-12).sum())
    return observed, (1 + as_large) / (1 + permutations)


def samples_finding(
    plain: Sequence[list[list[int]]],
    drafted: Sequence[list[list[int]]],
    vocab: int,
    settings: AuditSettings,
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
