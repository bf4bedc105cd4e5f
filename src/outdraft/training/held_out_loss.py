"""How well a drafter guesses on conversations that it is not trained on, without decoding: quick and smooth.

The drafter is unrolled on its own features over the held-out responses, as it drafts. Two figures come of it: top-1
agreement with the target for each draft step, and the mean number of tokens a chain of these steps would yield, the
bonus token included, where the target goes on as the text does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from outdraft.data.tokenization import ExampleSet
from outdraft.losses.features import TrainingExamples, collate
from outdraft.losses.objective import Objective

BATCH = 8
STEPS = 4
"""Draft steps that are looked at."""

CHAIN = "held_out_chain"
"""The figure that says which weights are best."""


class HeldOut:
    """Held-out examples with what the target says of them, read once.

    Args:
        objective: of the drafter in training.
        examples: not trained on.
    """

    def __init__(self, objective: Objective, examples: ExampleSet):
        self.objective, self.device = objective, objective.reading.target.device
        data = TrainingExamples(examples)
        order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
        self._batches = [
            {name: part.to(self.device) for name, part in collate([data[i] for i in order[k : k + BATCH]]).items()}
            for k in range(0, len(order), BATCH)
        ]
        self._features: list[Tensor] = []

    def measure(self) -> dict[str, float]:
        """`held_out_top1_1` .. for each draft step, and `held_out_chain`; nothing for an objective that cannot say."""
        hits = [hit for hit in self._hits() if hit is not None]
        if not hits:
            return {}
        right = torch.stack([hit.hits.sum(dim=(0, 1)) for hit in hits]).sum(0)
        count = torch.stack([hit.spoken.sum(dim=(0, 1)) for hit in hits]).sum(0).clamp(min=1)
        lengths = torch.cat([hit.chains() for hit in hits])
        found = {f"held_out_top1_{k + 1}": float(right[k] / count[k]) for k in range(len(right))}
        return {**found, CHAIN: float(lengths.mean())} if len(lengths) else found

    def _hits(self) -> Iterator[Hits | None]:
        for i, batch in enumerate(self._batches):
            if i == len(self._features):
                self._features.append(self.objective.reading(batch["input_ids"], batch["lengths"]))
            with torch.no_grad():
                found = self.objective.hits(batch, self._features[i], STEPS)
            yield None if found is None else Hits(*found)


class Hits:
    """Where a drafter guesses what the target says.

    Args:
        hits: `(rows, positions, steps)` whether the guess of this step for this position is the target's best token.
        spoken: `(rows, positions, steps)` where a guess counts.
    """

    def __init__(self, hits: Tensor, spoken: Tensor):
        self.hits, self.spoken = hits & spoken, spoken

    def chains(self) -> Tensor:
        """`(chains,)` tokens that a chain from every position yields: step 1 there, step 2 one further, and so on."""
        steps = self.hits.shape[-1]
        whole = self.spoken[:, : max(self.spoken.shape[1] - steps + 1, 0), 0]
        length, alive = torch.ones(whole.shape, device=whole.device), whole.clone()
        for k in range(steps):
            alive = alive & self.hits[:, k : k + whole.shape[1], k]
            length = length + alive
        for k in range(1, steps):  # chains that run out of the response are left out
            whole = whole & self.spoken[:, k : k + whole.shape[1], k]
        return length[whole]


class BestWeights:
    """The weights that did best on what is held out, kept beside the checkpoints of a run.

    Args:
        folder: of the run.
        drafter: in training.
        patience: measurements without a better one after which training may end; 0 never ends it.
    """

    def __init__(self, folder: Path, drafter: nn.Module, patience: int = 0):
        self.drafter, self.patience = drafter, patience
        self._weights, self._record = folder / "best.safetensors", folder / "best.json"
        self.score, self.step, self.since, self.measured = -1.0, 0, 0, 0

    def resume(self) -> None:
        """Go on with what an interrupted run has kept."""
        try:
            record = json.loads(self._record.read_text())
            found = record["score"], record["step"], record["since"], record["measured"]
        except (OSError, ValueError, KeyError):
            found = -1.0, 0, 0, 0
        self.score, self.step, self.since, self.measured = found

    def note(self, score: float, step: int) -> bool:
        """Take notice of a measurement; True where training has not got better for too long."""
        if step <= self.measured:  # a resumed run comes by a second time
            return False
        self.measured = step
        if score > self.score:
            self.score, self.step, self.since = score, step, 0
            partial = self._weights.with_suffix(".partial")
            state = {name: weight.contiguous() for name, weight in self.drafter.state_dict().items()}
            safetensors.torch.save_file(state, partial)
            os.replace(partial, self._weights)
        else:
            self.since += 1
        partial = self._record.with_suffix(".partial")
        record = {"score": self.score, "step": self.step, "since": self.since, "measured": self.measured}
        partial.write_text(json.dumps(record) + "\n")
        os.replace(partial, self._record)
        return self.out_of_patience

    @property
    def out_of_patience(self) -> bool:
        """Whether training has not got better for too long."""
        return bool(self.patience) and self.since >= self.patience

    def forget(self) -> None:
        """Of a run that begins: what an abandoned one may have left in its folder."""
        self._record.unlink(missing_ok=True)
        self._weights.unlink(missing_ok=True)

    def restore(self) -> None:
        """Put the best weights into the drafter."""
        if self._weights.is_file():
            self.drafter.load_state_dict(safetensors.torch.load_file(self._weights))
