"""Checks of the draft probabilities that a drafter declares: a distribution, or a point mass.

Verification corrects for exactly the declared probabilities. A declared distribution is compared with the one that was
sampled from, and with the draws; a point mass is checked by drafting twice after the same text with other seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outdraft.api.draft_settings import AUTO
from outdraft.api.generation import SpeculativeModel
from outdraft.core.dice import Dice
from outdraft.core.tree import Tree
from outdraft.evaluation.audit.findings import AuditSettings, Finding
from outdraft.evaluation.audit.goodness_of_fit import Ranks, ranks_finding
from outdraft.evaluation.audit.rounds import Round, Watch
from outdraft.evaluation.audit.stock import total_variation

SAME_LAW = 1e-5
"""The total variation by which equal float32 probabilities may differ."""


@dataclass
class Draws:
    """The check of every drawn candidate against its declared distribution.

    Attributes:
        ranks: ranks of candidates in their declared distributions, reduced to the rest without replacement.
        drawn: number of draws from the row's random generator.
        proposed: number of candidates in trees.
        unmatched: number of rows of rounds whose draws and candidates differ.
        difference: largest total variation between the sampled and the declared distribution.
    """

    ranks: Ranks
    drawn: int = 0
    proposed: int = 0
    unmatched: int = 0
    difference: float = 0.0
    rounds: int = 0

    def state(self) -> dict[str, Any]:
        return {**vars(self), "ranks": self.ranks.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        ranks = self.ranks
        ranks.restore(state["ranks"])
        vars(self).update(state, ranks=ranks)

    def __call__(self, seen: Round) -> None:
        self.rounds += 1
        if seen.tree.draft_probs is None:  # a point mass
            return
        for row in range(seen.tree.rows):
            nodes, probs = declared(seen.tree, row)
            draws = seen.draws[row]
            self.drawn, self.proposed = self.drawn + len(draws), self.proposed + len(nodes)
            if not nodes:
                continue
            tokens = seen.tree.tokens[row, nodes]
            self.ranks.add(probs, tokens)
            if [draw.token for draw in draws] != tokens.tolist():
                self.unmatched += 1
                continue
            for dist, draw in zip(probs, draws, strict=True):
                handed = draw.dist.double()
                self.difference = max(self.difference, total_variation(dist / dist.sum(), handed / handed.sum()))


def declared(tree: Tree, row: int) -> tuple[list[int], Tensor]:
    """Return the row's candidates, in order, and the declared `(candidates, vocab)` draft probabilities of each."""
    assert tree.draft_probs is not None
    tokens = tree.tokens[row].tolist()
    probs: dict[int, Tensor] = {}
    for parent, children in tree.children(row).items():
        left = tree.draft_probs[row, parent].double()
        if tree.candidates == "spine":
            children = children[:1] if left.any() else []
        for child in children:
            probs[child] = left
            if tree.candidates == "without_replacement":
                left = left.clone()
                left[tokens[child]] = 0
    nodes = sorted(probs)
    return nodes, torch.stack([probs[node] for node in nodes]) if nodes else torch.empty(0)


def declared_finding(draws: Draws) -> Finding | None:
    """Compare what was declared with what was drawn from; None where all candidates were point masses."""
    if draws.proposed == 0:
        return None
    exact = draws.difference <= SAME_LAW and draws.ranks.impossible == 0
    matched = (
        "every draw is a candidate" if draws.unmatched == 0 else f"in {draws.unmatched} rounds draws are no candidates"
    )
    lines = []
    if draws.drawn > draws.proposed:
        lines.append(
            f"{draws.drawn - draws.proposed} draws were not proposed: allowed only if they were not dropped for what "
            "they turned out to be, which the next check tests"
        )
    if draws.ranks.impossible:
        lines.append(f"{draws.ranks.impossible} candidates have no probability in the distribution declared for them")
    return Finding(
        "declared_laws",
        "Are the distributions that the drafter declares the ones that it draws from?",
        exact,
        f"{draws.proposed} candidates of {draws.rounds} rounds, {draws.drawn} draws; {matched}; largest total "
        f"variation between declared and drawn distribution {draws.difference:.2g}.",
        figures={
            "candidates": draws.proposed,
            "draws": draws.drawn,
            "unmatched_rounds": draws.unmatched,
            "largest_total_variation": draws.difference,
            "impossible": draws.ranks.impossible,
        },
        lines=lines,
    )


def draws_finding(draws: Draws, settings: AuditSettings, alpha: float) -> Finding | None:
    """Test whether candidates follow their declared distributions; None where all were point masses."""
    question = "Do the drafter's candidates follow the distributions that it declares?"
    if draws.proposed == 0:
        return None
    return ranks_finding("draws", question, "candidates", draws.ranks, settings, alpha)


Proposals = dict[tuple[int, ...], tuple[list[int], list[int]]]
"""The trees (tokens, parents) by the text after which they were drafted."""


def proposals(
    model: SpeculativeModel, prompts: Sequence[list[int]], generation: dict[str, Any], drafting_seed: int
) -> tuple[Proposals, int]:
    """Collect all point-mass trees of a decoding whose drafter has its own seed, and count the other trees."""
    found: Proposals = {}
    drawn = 0

    def listen(seen: Round) -> None:
        nonlocal drawn
        for row, count in enumerate(seen.tree.counts):
            if seen.tree.draft_probs is not None:
                drawn += 1
                continue
            tree = (seen.tree.tokens[row, :count].tolist(), seen.tree.parents[row, :count].tolist())
            found[tuple(seen.prefixes[row].tolist())] = tree

    assert model.drafter is not None
    own = iter(range(drafting_seed, drafting_seed + 1_000_000))
    watch = Watch(model.drafter, [listen], chance=lambda _: Dice(next(own)))
    with torch.random.fork_rng():
        torch.manual_seed(drafting_seed)
        model.with_drafter(watch).generate(
            list(prompts), **generation | {"prompt_lookup_min": None if watch.limits.looks_back else 0}
        )
    return found, drawn


def twice_finding(
    model: SpeculativeModel,
    prompts: Sequence[list[int]],
    generation: dict[str, Any],
    settings: AuditSettings,
    name: str,
    advance: Callable[[int], None],
) -> Finding | None:
    """Check point masses by drafting twice; None where no candidates are declared one.

    No controller and no tuner decides here: they weigh seconds, which differ, and what they cut is cut before it is
    drawn.
    """
    generation = {**generation, "controller": "fixed"}
    if generation.get("tree_size") == AUTO:
        del generation["tree_size"]
    both = []
    seed = settings.seed_for(name)
    for turn in range(2):
        both.append(proposals(model, prompts, {**generation, "seed": seed}, settings.seed_for(name, turn)))
        advance(1)
    (first, drawn), (second, _) = both
    common = first.keys() & second.keys()
    if not common and drawn:
        return None
    differing = [prefix for prefix in common if first[prefix] != second[prefix]]
    lines = []
    if differing:
        shortest = min(differing, key=len)
        lines.append(
            f"after {len(shortest)} tokens: {first[shortest][0][1:]} first, {second[shortest][0][1:]} the second time"
        )
    return Finding(
        name,
        "Does the drafter propose the same candidates twice where it declares that nothing is random?",
        not differing and len(common) > 0,
        f"{len(common) - len(differing)} of {len(common)} trees are the same when drafted with other random numbers.",
        figures={"trees": len(common), "differing": len(differing)},
        lines=lines,
    )
