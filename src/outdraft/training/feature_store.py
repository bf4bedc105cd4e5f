"""A store of the target's features and most probable tokens on disk: written once, read by every run that follows.

A store belongs to one target and one `Reading`; its examples are found by a hash of their tokens, so more data later
costs only the new examples. Three flat files grow side by side (features, and the target's most probable next tokens
with their probabilities), and an index gets a line once an example is whole: a killed run goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import operator
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from outdraft.data.tokenization import Example, ExampleSet
from outdraft.errors import UserError
from outdraft.losses.objective import Objective, Reading, pad, weights_fingerprint
from outdraft.losses.teacher import TopProbs, most_probable, predicting, target_id
from outdraft.output import write_whole
from outdraft.target.target import Target
from outdraft.training.preparation import Preparation

try:
    import fcntl
except ImportError:  # no such thing on Windows, where two runs must not share a store while it grows
    fcntl = None  # type: ignore[assignment]

GIGABYTE = 1e9

BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
"""The number of tokens of one forward: enough rows to keep the matrix products busy."""

WINDOW = 512
"""The number of examples that are grouped by length at once, so that little is padded and the time left is known."""

Progress = Callable[[int, int], None]
"""A callback that receives the `(examples, tokens)` written since the last call."""


class Entry(NamedTuple):
    """The position of an example in the files."""

    row: int
    """The first row of the example's tokens."""
    tokens: int
    said: int
    """The first row of the example's teacher probabilities."""
    predicted: int
    """The number of teacher rows: one a position, from before the first response token to before the last."""


class Column(NamedTuple):
    """A flat file of a store, with one row a token, or one a teacher's position."""

    path: Path
    dtype: torch.dtype
    width: int
    part: int
    """0 where rows are tokens, 1 where they are the teacher's positions."""

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize


class FeatureStore:
    """Features and teacher's probabilities of examples, memory-mapped.

    Args:
        folder: holds all stores; this one gets a folder of its own, named by its key.
        reading: the hidden states that are stored.
        teacher_top_k: number of most probable target tokens to store at every position; 0 stores none.
    """

    def __init__(self, folder: str | Path, target: Target, reading: Reading, teacher_top_k: int = 0):
        self.reading = reading
        self.top_k = min(teacher_top_k, target.vocab_size)
        parts = [weights_fingerprint(target), str(target.dtype), reading.name, str(self.top_k)]
        self.key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]
        self.folder = Path(folder) / self.key
        self._columns = (
            Column(self.folder / "features.bin", target.dtype, reading.width, 0),
            Column(self.folder / "teacher_ids.bin", torch.int32, self.top_k, 1),
            Column(self.folder / "teacher_probs.bin", torch.float16, self.top_k, 1),
        )
        self._index: dict[str, Entry] = {}
        self._rows = [0, 0]
        """The numbers of stored rows, of tokens and of the teacher."""
        self._maps: tuple[Tensor, ...] | None = None
        self._read_index()

    def missing(self, examples: ExampleSet) -> list[Example]:
        """List the examples that are not stored yet, each once."""
        absent: dict[str, Example] = {}
        for one in examples.examples:
            name = fingerprint(one)
            if name in self._index and self._index[name].predicted >= len(said_range(one)):
                continue
            if name not in absent or len(said_range(one)) > len(said_range(absent[name])):  # it serves both
                absent[name] = one
        return list(absent.values())

    def nbytes(self, examples: Sequence[Example]) -> int:
        """Return the bytes that these examples take on disk, before anything is computed."""
        rows = sum(map(len, examples)), sum(len(said_range(example)) for example in examples)
        return sum(rows[column.part] * column.row_bytes for column in self._columns)

    def check_budget(self, examples: ExampleSet, budget_gb: float) -> None:
        """Raise a UserError if the examples would take more than the budget, or than the disk has left."""
        needed = self.nbytes(examples.examples) / GIGABYTE
        if needed > budget_gb:
            enough = math.ceil(100 * needed) / 100
            raise UserError(
                f"the features of these examples need {needed:.2f} GB, more than feature_cache_gb = {budget_gb:g}; "
                f"raise it to {enough:.2f}, or use features = online"
            )
        existing = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        more, free = self.nbytes(self.missing(examples)), shutil.disk_usage(existing).free
        if more > free:
            raise UserError(
                f"the features of these examples need {more / GIGABYTE:.2f} GB more and only {free / GIGABYTE:.2f} GB "
                f"are free under {existing}; set feature_cache_dir to a larger disk, or use features = online"
            )

    def build(self, examples: ExampleSet, progress: Progress | None = None) -> None:
        """Run the target over the examples that are not stored yet, and report written ones to `progress`."""
        if not self.missing(examples):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "target.json").write_text(json.dumps({"target": target_id(self.reading.target)}) + "\n")
        budget = BATCH_TOKENS.get(self.reading.target.device.type, BATCH_TOKENS["cuda"])
        with self._alone(), self._appending() as (*files, index):
            for batch in batches_of_like_length(self.missing(examples), budget):  # others may have read some meanwhile
                features, said = self._read(batch)
                for example, rows, probs in zip(batch, features, said, strict=True):
                    parts = (rows, probs.ids, probs.probs)
                    for file, column, part in zip(files, self._columns, parts, strict=True):
                        if part.numel():
                            file.write(part.to(column.dtype).contiguous().view(torch.uint8).numpy().tobytes())
                    self._note(fingerprint(example), Entry(self._rows[0], len(rows), self._rows[1], len(probs.ids)))
                for file in files:
                    file.flush()
                lines = (json.dumps([name, *self._index[name]]) for name in map(fingerprint, batch))
                index.write("".join(f"{line}\n" for line in lines).encode())
                index.flush()
                if progress is not None:
                    progress(len(batch), sum(map(len, batch)))

    def __getitem__(self, example: Example) -> tuple[Tensor, TopProbs]:
        """Return an example's `(tokens, width)` features and the teacher's `(predicting positions, k)` tokens."""
        if self._maps is None:
            self._maps = self._mapped()
        entry = self._index[fingerprint(example)]
        features, ids, probs = self._maps
        rows = features[entry.row : entry.row + entry.tokens].clone()
        positions = said_range(example)
        counted = predicting(example.loss_mask)[positions.start : positions.stop]
        said = slice(entry.said, entry.said + len(positions))
        return rows, TopProbs(ids[said][counted].long(), probs[said][counted].float())

    def reload(self) -> None:
        """Reread the index, which another process may have extended."""
        self._maps, self._rows = None, [0, 0]
        self._index.clear()
        self._read_index()

    # --- the target's part -------------------------------------------------------------------------------------

    @torch.no_grad()
    def _read(self, batch: Sequence[Example]) -> tuple[list[Tensor], list[TopProbs]]:
        """Run the target over a batch; return the features and the teacher's tokens of every example."""
        target = self.reading.target
        ids = pad([example.input_ids.long() for example in batch]).to(target.device)
        lengths = torch.tensor([len(example) for example in batch], device=ids.device)
        read = self.reading(ids, lengths)
        rows = [read[i, : len(example)] for i, example in enumerate(batch)]
        positions = [said_range(example) for example in batch]
        goals = torch.cat(
            [self.reading.features(row)[place.start : place.stop] for row, place in zip(rows, positions, strict=True)]
        )
        if self.top_k:
            all_ids, all_probs = (part.cpu() for part in most_probable(target, goals, self.top_k))
        else:
            all_ids, all_probs = torch.empty(len(goals), 0, dtype=torch.long), torch.empty(len(goals), 0)
        counts = [len(place) for place in positions]
        said = map(TopProbs, all_ids.split(counts), all_probs.split(counts))
        return [row.cpu() for row in rows], list(said)

    # --- files -------------------------------------------------------------------------------------------------

    def _note(self, name: str, entry: Entry) -> None:
        self._index.pop(name, None)  # in the order of the files, so that the last line says where they end
        self._index[name] = entry
        self._rows = [entry.row + entry.tokens, entry.said + entry.predicted]

    def _read_index(self) -> None:
        try:
            lines = (self.folder / "index.jsonl").read_bytes().splitlines(keepends=True)
        except OSError:
            return
        sizes = [column.path.stat().st_size if column.path.is_file() else 0 for column in self._columns]
        for line in lines:
            try:
                name, *numbers = json.loads(line)
                entry = Entry(*numbers)
            except (ValueError, TypeError):  # killed while it was written, or damaged: what follows is not to be found
                break
            ends = (entry.row + entry.tokens, entry.said + entry.predicted)
            needed = [ends[column.part] * column.row_bytes for column in self._columns]
            if not line.endswith(b"\n") or any(map(operator.gt, needed, sizes)):
                break
            self._note(name, entry)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock the store against other writers, and read the entries that they have added."""
        with open(self.folder / "lock", "w") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            self.reload()
            yield

    @contextlib.contextmanager
    def _appending(self) -> Iterator[Sequence[BinaryIO]]:
        """Open the files at the end of the indexed data; anything that a killed run left beyond it is cut off."""
        index, lines = self.folder / "index.jsonl", (json.dumps([k, *v]) for k, v in self._index.items())
        write_whole(index, "".join(f"{line}\n" for line in lines))
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(column.path.open("ab")) for column in self._columns]
            for file, column in zip(files, self._columns, strict=True):
                file.truncate(self._rows[column.part] * column.row_bytes)
                file.seek(0, 2)
            yield [*files, stack.enter_context(index.open("ab"))]

    def _mapped(self) -> tuple[Tensor, ...]:
        maps = []
        for path, dtype, width, part in self._columns:
            size = self._rows[part] * width
            flat = torch.from_file(str(path), shared=False, size=size, dtype=dtype) if size else torch.empty(0)
            maps.append(flat.view(self._rows[part], width).to(dtype))
        return tuple(maps)


def feature_store(target: Target, ready: Preparation, objective: Objective) -> FeatureStore | None:
    """Return the store of a run; None where the target runs in every step.

    With `features="auto"` they are stored if a run reads its data more than once and the budget has room for them.
    """
    config, examples = ready.config, ready.examples
    if target.shared and config.features == "cached":
        raise UserError("features of a target that processes share (--tp) are not stored; leave features out")
    if config.features == "online" or target.shared:
        return None
    folder = config.feature_cache_dir or config.output_dir / "features"
    store = FeatureStore(folder, target, objective.reading, objective.top_k)
    once = ready.total_steps * config.batch_size * ready.processes <= len(examples)
    if config.features == "auto" and (once or store.nbytes(examples.examples) > config.feature_cache_gb * GIGABYTE):
        return None
    return store


def batches_of_like_length(examples: Sequence[Example], tokens: int) -> Iterator[list[Example]]:
    """Divide examples into batches of at most `tokens` padded tokens; a longer example is its own batch."""
    for start in range(0, len(examples), WINDOW):
        batch: list[Example] = []
        for example in sorted(examples[start : start + WINDOW], key=len):
            if batch and (len(batch) + 1) * len(example) > tokens:
                yield batch
                batch = []
            batch.append(example)
        yield batch


def said_range(example: Example) -> range:
    """Return the teacher's positions: from before the first response token to before the last, gaps included."""
    positions = predicting(example.loss_mask).nonzero()[:, 0]
    return range(int(positions[0]), int(positions[-1]) + 1) if len(positions) else range(0)


def fingerprint(example: Example) -> str:
    """Hash an example's tokens and the start index of its first response."""
    digest = hashlib.sha256(example.input_ids.numpy().tobytes())
    digest.update(str(said_range(example).start).encode())
    return digest.hexdigest()[:24]
