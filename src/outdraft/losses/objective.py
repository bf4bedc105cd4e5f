"""The objective of a drafter in training: the hidden states of the target that it reads, batches of them, and the loss.

Here the word features includes hidden states of earlier layers that are read beside them. The caller reads them in
every step, or once and then from `feature_store.py`. Each method defines its objective beside its loss. Settings are a
`DrafterConfig`, of which this folder uses only names.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from outdraft.data.tokenization import Example, ExampleSet
from outdraft.losses.teacher import TopProbs, most_probable, predicting
from outdraft.target.backends import best_backend
from outdraft.target.ranks import over_all, whole
from outdraft.target.target import Target
from outdraft.target.views import Reader, Reads

SAMPLED_VALUES = 1024
COPIED_BYTES = 4e9
"""The largest size, in bytes, of a target's weights of which a packed copy is made for reading."""


def pad(rows: Sequence[Tensor]) -> Tensor:
    """Pad `(tokens_i, ...)` rows with zeros on the right to `(batch, tokens, ...)`."""
    return pad_sequence(list(rows), batch_first=True)


class Reading:
    """A reader of a target's features after the final norm at every token, with or without hidden states of its layers.

    Args:
        layers: layers, counted from 1, whose outputs are read too; they stand after the features.
        exit_layer: in place of `layers`, the layer after which the model is cut; its output stands before the features.

    Attributes:
        name: distinguishes readings of one target; part of the key under which features are stored.
        width: number of values of one token.
    """

    def __init__(self, target: Target, layers: Sequence[int] = (), exit_layer: int | None = None):
        self.target = target
        states, before = 1 + len(layers), 0  # hidden states of one token, and how many stand before the features
        self._run: Callable[[Tensor], Tensor] = lambda ids: target.features(ids)
        self.name = ""
        if exit_layer is not None:
            split = Reader(target.model, Reads(False, (exit_layer,), exit_layer))
            states, before = 2, 1
            self._run = lambda ids: torch.cat(split(input_ids=ids, **target.causal_inputs(*ids.shape))[::-1], dim=-1)
            self.name = f"layer {exit_layer} and features"
        elif layers:
            reader = Reader(target.model, Reads(layers=tuple(layers)))
            self._run = lambda ids: reader(input_ids=ids, **target.causal_inputs(*ids.shape))[1]
            self.name = f"features and layers {', '.join(map(str, layers))}"
        size = target.hidden_size
        self.width, self._features = states * size, slice(before * size, (before + 1) * size)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Read a right-padded batch in the target's own precision; values on padding are meaningless.

        If processes share the target's layers, all of them must call this equally often, each with its own batch.

        Args:
            input_ids: `(batch, tokens)`.
            lengths: `(batch,)` tokens that are no padding.

        Returns:
            `(batch, tokens, width)`.
        """
        # Padding repeats the example: on one token over and over models are chaotic, so that backends seem to differ.
        places = torch.arange(input_ids.shape[1], device=input_ids.device) % lengths.to(input_ids.device)[:, None]
        input_ids = input_ids.gather(1, places)
        # No mask: no token sees the padding to its right, and causal attention is faster without one.
        with torch.autocast(input_ids.device.type, enabled=False):
            return over_all(self._run, input_ids) if self.target.shared else self._run(input_ids)

    def features(self, read: Tensor) -> Tensor:
        """Return the `(..., hidden)` features after the final norm among the values read, `(..., width)`."""
        return read[..., self._features]


def reader_of(target: Target) -> Target:
    """Return the target for reading only, on its fastest backend if it is on a CPU and a second copy is small."""
    if not isinstance(target, Target) or target.backend != "eager" or target.device.type != "cpu":
        return target
    small = sum(weight.nbytes for weight in target.model.parameters()) <= COPIED_BYTES
    best = best_backend(target.model)
    return Target(target.model, target.tokenizer, best, target.windows) if small and best != "eager" else target


def weights_fingerprint(target: Target) -> str:
    """Hash names, shapes and evenly spaced values of all weights; fast at any size, and any training changes it."""
    digest = hashlib.sha256()
    # Not by state_dict, at which bitsandbytes converts 4-bit weights in place.
    for name, weight in _weights(target.model):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        for part in _parts(whole(weight.detach())):
            flat = part.flatten()
            digest.update(flat[:: max(1, len(flat) // SAMPLED_VALUES)].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and kept buffers, in the order of `state_dict`."""
    for path, module in model.named_modules(remove_duplicate=False):
        kept = {name: part for name, part in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, weight in (*module._parameters.items(), *kept.items()):
            if weight is not None:
                yield f"{path}.{name}" if path else name, weight


def _parts(weight: Any) -> list[Tensor]:
    """Return the plain tensors that a tensor consists of: itself, or the numbers and scales of a quantised one."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    return [part for name in weight.__tensor_flatten__()[0] for part in _parts(getattr(weight, name))]


class TrainingExamples(torch.utils.data.Dataset[dict[str, object]]):
    """A dataset of examples, each with its index and its stored features, if any.

    Args:
        stored: gives the features of an example, and the teacher's most probable tokens.
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
    """Make a right-padded batch of items of `TrainingExamples`.

    Returns:
        `input_ids`, `loss_mask` `(batch, tokens)`; `lengths`, `index` `(batch,)`; where features are stored, `features`
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


class Objective(ABC):
    """A drafter in training, with its loss."""

    parts: ClassVar[dict[str, str]]
    """The logged names of parts of the loss, mapped to the sums that they are means of."""
    reading: Reading
    """The reading of the target that the loss needs."""
    top_k: int
    """The number of most probable target tokens that the loss uses; 0 for the whole distribution, or none."""
    drafter: Any
    """The network, an instance of its method's class."""
    loss: nn.Module
    """The loss, which holds the drafter as `drafter` and gives a tuple of sums, among them `agreed` and `positions`."""
    target: Target
    """The target that the drafter is trained for."""
    rows: int
    """The number of positions whose logits the target's head makes at once."""
    scale: float = 1.0
    """The factor on embeddings in training only, until `finished` folds it into the weights."""

    @abstractmethod
    def counted(self, loss_mask: Tensor) -> Tensor:
        """Return the mask of positions that carry loss, from a `(batch, tokens)` mask of response tokens."""

    @abstractmethod
    def arguments(
        self, batch: Mapping[str, Tensor], features: Tensor, step: int, progress: float = 1.0
    ) -> tuple[Any, ...]:
        """Return the loss's arguments in a step at this share of the run, for a batch (`collate`) and its features."""

    def finished(self) -> Any:
        """Return the drafter for decoding and saving: itself, or a copy with training's scaling folded in."""
        return self.drafter

    def hits(self, batch: Mapping[str, Tensor], features: Tensor, steps: int) -> tuple[Tensor, Tensor] | None:
        """Mark where the drafter guesses the target's best token, and where a guess counts.

        Args:
            steps: the most draft steps to compare; a drafter of blocks compares all places of a block.

        Returns:
            Two `(rows, positions, steps)` masks; None for a drafter whose guesses are not compared.
        """
        return None

    def teacher(self, batch: Mapping[str, Tensor], features: Tensor, first: int = 0) -> TopProbs | None:
        """Return the target's most probable tokens at the positions of a batch that predict a response token, those
        from position `first` on: stored ones, else by its head; None where the loss uses none."""
        if (said := stored_teacher(batch, first)) is not None or not self.top_k:
            return said
        goal = self.reading.features(features)[:, first:-1][predicting(batch["loss_mask"])[:, first:]]
        return most_probable(self.target, goal, self.top_k, self.rows)

    @abstractmethod
    def total(self, sums: Any, progress: float = 0.0) -> Tensor:
        """Return the sum to be minimised.

        Args:
            progress: the share of the run that is done, from 0 to 1.
        """


def stored_teacher(batch: Mapping[str, Tensor], first: int = 0) -> TopProbs | None:
    """Return a batch's most probable target tokens (`collate`) from position `first` on; None where none were kept."""
    if "teacher_ids" not in batch:
        return None
    ids, probs = batch["teacher_ids"], batch["teacher_probs"]
    later = predicting(batch["loss_mask"]).nonzero()[:, 1] >= first
    return TopProbs(ids[later], probs[later])


def teacher_of(config: Any) -> int:
    """Return the number of target tokens that EESD and Medusa learn from a position; 0 where only hard labels count."""
    return 0 if weight_of_tokens(config) == 1 else config.teacher_top_k


def weight_of_tokens(config: Any) -> float:
    """Return the weight of the responses' tokens in the cross-entropy; the target's distribution has the rest."""
    return {"soft": 0.0, "hard": 1.0, "mixed": config.hard_weight}[config.loss]
