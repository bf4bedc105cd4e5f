"""Where the target's states come from: a forward in every step, or a cache on disk written once.

A `Reading` says which states a drafter is trained on: the features after the final norm, or hidden states of earlier
layers beside them. They go by the name of features here, whatever their width.

The cache is one flat file in the target's own precision, filled example by example, so that a killed run goes on where
it stopped; its key is a hash of target, data and length. Knows the target as a function and nothing of the loss.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from outdraft.errors import UserError
from outdraft.layers import Cut, Tapped
from outdraft.training.grouping import group_cost, groups_of_like_length
from outdraft.training.protocol import TargetLike, target_id
from outdraft.training.tokenization import Example, ExampleSet

GIGABYTE = 1e9
PROGRESS = "progress.json"
DATA = "features.bin"
SAMPLED_VALUES = 1024


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
    mask = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
    with torch.autocast(input_ids.device.type, enabled=False):
        return target.features(input_ids, mask.long())


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


class ExitReading(Reading):
    """The hidden state after the target's first layers, then its features.

    Args:
        target: whose.
        exit_layer: how many layers come first.
    """

    def __init__(self, target: TargetLike, exit_layer: int):
        super().__init__(target)
        self.name = f"layer {exit_layer} and features"
        self._cut = Cut(target.model, exit_layer)

    @property
    def width(self) -> int:
        return 2 * self.target.hidden_size

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        # No mask: what stands on padding, to the right, is seen by no token.
        with torch.autocast(input_ids.device.type, enabled=False):
            return torch.cat(self._cut.both(input_ids=input_ids, use_cache=False), dim=-1)


class TappedReading(Reading):
    """The target's features, then what some of its layers give.

    Args:
        target: whose.
        layers: which, counted from 1.
    """

    def __init__(self, target: TargetLike, layers: Sequence[int]):
        super().__init__(target)
        self.name = f"features and layers {', '.join(map(str, layers))}"
        self._tapped, self._count = Tapped(target.model, layers), len(layers)

    @property
    def width(self) -> int:
        return (1 + self._count) * self.target.hidden_size

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        # No mask: what stands on padding, to the right, is seen by no token.
        with torch.autocast(input_ids.device.type, enabled=False):
            return self._tapped(input_ids=input_ids, use_cache=False)


class FeatureCache:
    """Features of all examples in one memory-mapped file `(tokens, width)`.

    Args:
        folder: where caches live; this one gets a folder of its own, named by its key.
        target: whose features.
        examples: of which data.
        max_length: to which the data were cut.
        reading: what of the target is kept; its features when not given.
    """

    def __init__(
        self,
        folder: str | Path,
        target: TargetLike,
        examples: ExampleSet,
        max_length: int,
        reading: Reading | None = None,
    ):
        self.target, self.examples = target, examples
        self.reading = reading or Reading(target)
        self.key = cache_key(target, examples, max_length, self.reading.name)
        self.folder = Path(folder) / self.key
        self.width, self.dtype = self.reading.width, target.dtype
        self.offsets = [0]
        for example in examples.examples:
            self.offsets.append(self.offsets[-1] + len(example))
        self._rows: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Size on disk, known before anything is computed."""
        return self.examples.tokens * self.reading.token_nbytes

    @property
    def done(self) -> int:
        """Examples already written."""
        try:
            progress = json.loads((self.folder / PROGRESS).read_text())
            whole = (self.folder / DATA).stat().st_size == self.nbytes
            return int(progress["done"]) if whole else 0
        except (OSError, ValueError, KeyError):
            return 0

    @property
    def complete(self) -> bool:
        return self.done == len(self.examples)

    def check_budget(self, budget_gb: float) -> None:
        """Raises a UserError when the cache would be larger than the budget or the space left on disk."""
        needed = self.nbytes / GIGABYTE
        if needed > budget_gb:
            raise UserError(
                f"the feature cache needs {needed:.2f} GB, more than feature_cache_gb = {budget_gb:g}; "
                f"raise it to {needed:.2f}, or use features = online"
            )
        existing = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        if not self.folder.exists() and self.nbytes > free:
            raise UserError(
                f"the feature cache needs {needed:.2f} GB and only {free / GIGABYTE:.2f} GB are free under {existing}; "
                "set feature_cache_dir to a larger disk, or use features = online"
            )

    def build(self, batch_size: int, progress: Callable[[int], None] | None = None) -> None:
        """Write what is not there yet.

        Args:
            batch_size: examples of one forward, at most.
            progress: called with the number of examples written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        done = self.done
        if done == len(self.examples):
            return
        rows = self._map(shared=True)
        for start in range(done, len(self.examples), batch_size):
            batch = self.examples.examples[start : start + batch_size]
            for group in groups_of_like_length([len(example) for example in batch], group_cost(self.target.device)):
                ids = pad([batch[i].input_ids.long() for i in group]).to(self.target.device)
                lengths = torch.tensor([len(batch[i]) for i in group], device=ids.device)
                features = self.reading(ids, lengths).cpu()
                for row, i in enumerate(group):
                    offset = self.offsets[start + i]
                    rows[offset : offset + len(batch[i])] = features[row, : len(batch[i])]
            self._note_done(start + len(batch))
            if progress is not None:
                progress(start + len(batch))
        del rows

    def __getitem__(self, index: int) -> Tensor:
        """`(tokens, width)` features of one example."""
        if self._rows is None:
            if not self.complete:
                raise RuntimeError("the feature cache is not complete; build it first")
            self._rows = self._map(shared=False)
        return self._rows[self.offsets[index] : self.offsets[index + 1]].clone()

    def _map(self, shared: bool) -> Tensor:
        count = self.offsets[-1] * self.width
        path = str(self.folder / DATA)
        return torch.from_file(path, shared=shared, size=count, dtype=self.dtype).view(-1, self.width)

    def _note_done(self, count: int) -> None:
        partial = self.folder / f"{PROGRESS}.partial"
        partial.write_text(json.dumps({"done": count, "of": len(self.examples), "target": target_id(self.target)}))
        os.replace(partial, self.folder / PROGRESS)


def cache_key(target: TargetLike, examples: ExampleSet, max_length: int, reading: str = "") -> str:
    """Name of the cache: equal exactly when target, weights, precision, data, length and what is read are."""
    parts = [target_id(target), weights_fingerprint(target), str(target.dtype), examples.fingerprint(), str(max_length)]
    return hashlib.sha256("\n".join(parts + [reading] * bool(reading)).encode()).hexdigest()[:20]


def weights_fingerprint(target: TargetLike) -> str:
    """Hash of names, shapes and evenly spaced values of all weights: fast on any size, different after any training."""
    digest = hashlib.sha256()
    for name, weight in target.model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().flatten()
        digest.update(flat[:: max(1, len(flat) // SAMPLED_VALUES)].double().cpu().numpy().tobytes())
    return digest.hexdigest()


class TrainingExamples(torch.utils.data.Dataset[dict[str, object]]):
    """The examples as a dataset that knows every example's place, with cached features where there are any."""

    def __init__(self, examples: ExampleSet, cache: FeatureCache | None = None):
        self.examples, self.cache = examples, cache

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, object]:
        item: dict[str, object] = {"index": index, "example": self.examples[index]}
        if self.cache is not None:
            item["features"] = self.cache[index]
        return item


def collate(items: Sequence[dict[str, object]]) -> dict[str, Tensor]:
    """A right-padded batch.

    Returns:
        `input_ids`, `loss_mask` `(batch, tokens)`; `lengths`, `index` `(batch,)`; `features` `(batch, tokens, width)`
        when they are cached.
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
    return batch
