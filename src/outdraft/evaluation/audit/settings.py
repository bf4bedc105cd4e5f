"""The settings of an audit, checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from outdraft.core.sampling_settings import SamplingSettings
from outdraft.errors import UserError, refuse_below

QUICK = {"limit": 8, "max_new_tokens": 24, "text_prompts": 3, "texts": 16, "seeds": 2, "trees": 8}
"""The largest values of a quick look."""
QUICK_VARIATION = 0.1
"""The error of the first tokens that a quick look must find."""


@dataclass
class AuditSettings:
    """Settings of an audit: the checks, their sizes and their chance of error."""

    generation: dict[str, Any] = field(default_factory=dict)
    """Sampling, tree and controller settings as `generate` takes them; without a temperature only greedy decoding is
    checked."""
    greedy: bool = True
    """Compare greedy texts too where the settings sample."""
    data: Path | None = None
    """Prompts: JSON lines or text; the shipped held-out ones if left out."""
    limit: int = 24
    """Prompts to use at most."""
    max_new_tokens: int = 48
    """Length of the texts that are compared."""
    total_variation: float = 0.02
    """The error in the output distribution of the first tokens that must be found, in total variation."""
    power: float = 0.95
    """Probability that such an error is found; with `total_variation` and `alpha` it sets the sample size."""
    alpha: float = 0.001
    """Probability that a lossless decoder is called wrong, over all statistical tests together."""
    seed: int = 0
    """The seed of all draws."""
    batch_size: int = 256
    """Rows sampled at once; greedy texts are decoded eight at a time."""
    first_tokens: int = 3
    """New tokens whose joint distribution is tested against the exact one."""
    prefixes: int = 4
    """Prefixes of texts after which that distribution is tested."""
    cells: int = 8
    """The most continuations that are tested apart after each prefix."""
    text_prompts: int = 8
    """Prompts of the longer sampled texts."""
    texts: int = 32
    """Texts sampled after each of these prompts, with the drafter and without."""
    seeds: int = 4
    """Seeds of the texts after each of these prompts that are compared with stock `generate`'s."""
    permutations: int = 9999
    """Permutations of the two-sample test; its p-value cannot fall below 1 / (permutations + 1)."""
    trees: int = 24
    """Draft trees whose every node is recomputed one token at a time."""
    quick: bool = False
    """Fewer and shorter texts, and only larger errors of the first tokens: a look of minutes. The verdict says so."""

    def __post_init__(self) -> None:
        # What is tested statistically is the rule that throws dice. Shared noise leaves nothing to chance: its texts
        # are plain decoding's own.
        self.generation = {"coupling": "dice", **self.generation}
        refuse_below(self, first_tokens=2, cells=2, texts=2, limit=1, max_new_tokens=1, batch_size=1, prefixes=1)
        refuse_below(self, text_prompts=1, seeds=1, permutations=1, trees=1)
        if not 0 < self.total_variation < 1:
            raise UserError(f"--total-variation must lie between 0 and 1, not {self.total_variation:g}")
        if not 0 < self.alpha < 0.5:
            raise UserError(f"--alpha must lie between 0 and 0.5, not {self.alpha:g}")
        if not 0.5 <= self.power < 1:
            raise UserError(f"--power must be at least 0.5 and less than 1, not {self.power:g}")

    def seed_for(self, use: str, *place: int) -> int:
        """Return the seed of one use of random numbers, such as the texts of prompt `place`. It is far from those of
        other uses and of other base seeds, though decoding counts on from it, a seed a row."""
        spread = np.random.SeedSequence([self.seed % 2**64, crc32(use.encode()), *place])
        return int(spread.generate_state(1, np.uint64)[0] >> np.uint64(2))

    def made_quick(self) -> AuditSettings:
        """The same as a quick look: what `QUICK` names becomes as small as that, unless it is smaller already."""
        harder = max(self.total_variation, QUICK_VARIATION)
        fewer = {name: min(getattr(self, name), most) for name, most in QUICK.items()}
        return replace(self, quick=True, total_variation=harder, **fewer)

    @property
    def sampling(self) -> dict[str, Any]:
        """The generation settings that shape the output distribution, not the tree."""
        known = SamplingSettings.__dataclass_fields__
        return {name: value for name, value in self.generation.items() if name in known or name == "do_sample"}

    @property
    def greedy_generation(self) -> dict[str, Any]:
        """The same settings at temperature 0; filters fall away, for the distribution is a point mass."""
        left_out = ("temperature", "top_k", "top_p", "min_p")
        return {name: value for name, value in self.generation.items() if name not in left_out} | {"do_sample": False}
