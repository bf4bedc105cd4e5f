"""Which states of the target a drafter is trained on, and batches of them.

A `Reading` gives the features after the final norm, or hidden states of earlier layers beside them; they go by the name
of features here, whatever their width. Whether they are read in every step or once, from `feature_store.py`, is the
caller's choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from outdraft.data.tokenization import Example, ExampleSet
from outdraft.losses.target_like import TargetLike
from outdraft.losses.teacher import TopProbs
from outdraft.target.backends import why_not_packed
from outdraft.target.target import Target
from outdraft.target.views import Reader, Reads

SAMPLED_VALUES = 1024
COPIED_BYTES = 4e9
"""Weights of a target up to which a packed copy is made of them for reading."""


def pad(rows: Sequence[Tensor], tokens: int | None = None) -> Tensor:
    """`(tokens_i, ...)` rows -> `(batch, tokens, ...)`, zeros on the right."""
    tokens = tokens or max(map(len, rows))
    padded = rows[0].new_zeros(len(rows), tokens, *rows[0].shape[1:])
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


@torch.no_grad()
def target_features(target: TargetLike, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """Features of a right-padded batch, in the target's own precision; those on padding mean nothing.

    Args:
        input_ids: `(batch, tokens)`.
        lengths: `(batch,)`.

    Returns:
        `(batch, tokens, hidden)`.
    """
    # No mask: what stands on padding, to the right, is seen by no token, and causal attention is faster without one.
    with torch.autocast(input_ids.device.type, enabled=False):
        return target.features(input_ids)


class Reading:
    """What is read of a target for every token: its features after the final norm.

    Args:
        target: whose.
    """

    name = ""
    """What tells it from other readings of the same target; part of the cache's key."""

    def __init__(self, target: TargetLike):
        self.target = target

    @property
    def width(self) -> int:
        """Values of one token."""
        return self.target.hidden_size

    @property
    def token_nbytes(self) -> int:
        return self.width * self.target.dtype.itemsize

    def __call__(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """`(batch, tokens, width)` of a right-padded batch, as `target_features`."""
        return target_features(self.target, input_ids, lengths)

    def features(self, read: Tensor) -> Tensor:
        """`(..., hidden)` the features after the final norm among what was read, `(..., width)`."""
        return read


class ExitReading(Reading):
    """The hidden state after the target's first layers, then its features.

    Args:
        target: whose.
        exit_layer: how many layers come first.
    """

    def __init__(self, target: TargetLike, exit_layer: int):
        super().__init__(target)
        self.name = f"layer {exit_layer} and features"
        self._reader = Reader(target.model, Reads(False, (exit_layer,), exit_layer))

    @property
    def width(self) -> int:
        return 2 * self.target.hidden_size

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        # No mask: what stands on padding, to the right, is seen by no token.
        with torch.autocast(input_ids.device.type, enabled=False):
            features, hidden = self._reader(input_ids=input_ids, use_cache=False)
            return torch.cat([hidden, features], dim=-1)

    def features(self, read: Tensor) -> Tensor:
        return read[..., self.target.hidden_size :]


class TappedReading(Reading):
    """The target's features, then what some of its layers give.

    Args:
        target: whose.
        layers: which, counted from 1.
    """

    def __init__(self, target: TargetLike, layers: Sequence[int]):
        super().__init__(target)
        self.name = f"features and layers {', '.join(map(str, layers))}"
        self._reader, self._count = Reader(target.model, Reads(layers=tuple(layers))), len(layers)

    @property
    def width(self) -> int:
        return (1 + self._count) * self.target.hidden_size

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        # No mask: what stands on padding, to the right, is seen by no token.
        with torch.autocast(input_ids.device.type, enabled=False):
            return self._reader(input_ids=input_ids, use_cache=False)[1]

    def features(self, read: Tensor) -> Tensor:
        return read[..., : self.target.hidden_size]


def reader_of(target: TargetLike) -> TargetLike:
    """The same target where it only reads: on packed layers if it lies on a CPU and a second copy of it is small."""
    if not isinstance(target, Target) or target.backend != "eager" or why_not_packed(target.model) is not None:
        return target
    small = sum(weight.nbytes for weight in target.model.parameters()) <= COPIED_BYTES
    return Target(target.model, target.tokenizer, "packed", target.windows) if small else target


def weights_fingerprint(target: TargetLike) -> str:
    """Hash of names, shapes and evenly spaced values of all weights: fast on any size, different after any training."""
    digest = hashlib.sha256()
    for name, weight in target.model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().flatten()
        digest.update(flat[:: max(1, len(flat) // SAMPLED_VALUES)].double().cpu().numpy().tobytes())
    return digest.hexdigest()


class TrainingExamples(torch.utils.data.Dataset[dict[str, object]]):
    """The examples as a dataset that knows every example's place, with what was read before where there is any.

    Args:
        examples: the data.
        stored: gives what was read of the target for an example, and the teacher's most probable tokens.
    """

    def __init__(self, examples: ExampleSet, stored: Callable[[Example], tuple[Tensor, TopProbs]] | None = None):
        self.examples, self.stored = examples, stored

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, object]:
        item: dict[str, object] = {"index": index, "example": self.examples[index]}
        if self.stored is not None:
            item["features"], item["said"] = self.stored(self.examples[index])
        return item


def collate(items: Sequence[dict[str, object]]) -> dict[str, Tensor]:
    """A right-padded batch.

    Returns:
        `input_ids`, `loss_mask` `(batch, tokens)`; `lengths`, `index` `(batch,)`; where it was read before, `features`
        `(batch, tokens, width)` and, if the teacher's probabilities were kept, `teacher_ids`, `teacher_probs`
        `(predicting positions of the batch, k)`.
    """
    examples: list[Example] = [item["example"] for item in items]  # type: ignore[misc]
    batch = {
        "input_ids": pad([example.input_ids.long() for example in examples]),
        "loss_mask": pad([example.loss_mask for example in examples]),
        "lengths": torch.tensor([len(example) for example in examples]),
        "index": torch.tensor([item["index"] for item in items]),
    }
    if "features" in items[0]:
        batch["features"] = pad([item["features"] for item in items])  # type: ignore[misc]
        said: list[TopProbs] = [item["said"] for item in items]  # type: ignore[misc]
        if said[0].ids.shape[1]:
            batch["teacher_ids"] = torch.cat([one.ids for one in said])
            batch["teacher_probs"] = torch.cat([one.probs for one in said])
    return batch
