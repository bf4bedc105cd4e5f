"""A KV cache addressed by slot: every row of the batch has its own length.

Row `b` keeps its committed tokens in slots `0 .. lengths[b]-1`. A forward writes its tokens into the slots after that,
which `reserve` returns. Only `commit` makes some of them part of the row; the others no longer count. Nothing is ever
re-padded. The attention mask (`tree.py`) decides which slots a token sees.

It is a `transformers` Cache, so stock models write to it. It does not depend on trees, tokens or drafters.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from outdraft.core.tensors import counting, integers, sent
from outdraft.target.buffers import BufferPool, rounded_rows, rounded_slots
from outdraft.target.huge_pages import zeros


class LayerCache(Cache):
    """A cache that keeps keys and values in its own way, and what it answers `transformers` without layers there."""

    def get_query_offset(self, layer_idx: int | None = None) -> int:
        return self.get_seq_length()

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    @property
    def is_compileable(self) -> bool:
        return False


class SlotCache(LayerCache):
    """Keys and values of all layers for `rows` sequences of different lengths.

    Layers of one shape on one device share one buffer `(layers, 2, rows, kv_heads, capacity, head_dim)`, so that a
    commit moves the accepted path in all of them at once. Buffers may have more rows than the cache: rows that leave
    make room for others to join, and only rows that change their index are copied.

    Args:
        num_layers: layers that will write here, or for each layer how many lie on its device; a layer whose shape
            differs from the first one's there gets a buffer of its own.
        capacity: slots per row, doubled when a forward needs more.
        pool: lends buffers of rounded sizes; None makes them as large as asked for.
    """

    def __init__(
        self,
        rows: int,
        num_layers: int | Sequence[int],
        capacity: int,
        pool: BufferPool | None = None,
    ):
        super().__init__(layers=[])
        self.lengths: list[int] = [0] * rows
        self.pending = 0  # slots written after the committed ones, the same number in every row
        self.capacity = max(1, capacity)
        self.room = rows  # rows of the buffers
        self._pool = pool
        if pool is not None:
            self.room, self.capacity = rounded_rows(rows), rounded_slots(self.capacity)
        self._num_layers = num_layers
        self._buffers: list[Tensor] = []
        self._located: dict[int, tuple[int, int]] = {}  # layer index -> (buffer, place in it)
        self._wholes: dict[int, tuple[Tensor, Tensor]] = {}  # layer index -> its whole keys and values
        self._writing = 0  # tokens per row of the last reserved forward
        self._slots: Tensor | None = None  # (rows, tokens) slots being written; None when all rows write the same ones
        self._rows = torch.empty(0)  # (rows, 1) row indices for these slots
        self._views: dict[int, _Views] = {}  # buffer -> what this forward reads and writes of it
        if pool is not None:
            weakref.finalize(self, pool.give_back, self._buffers)

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def extent(self) -> int:
        """Slots that a reader of the current forward sees, `(max length + pending)`."""
        return max(self.lengths, default=0) + self.pending

    # --- one forward -------------------------------------------------------------------------------------------

    def reserve(self, count: int, device: torch.device | str) -> Tensor:
        """Announce a forward of `count` tokens per row.

        Returns:
            `(rows, count)` slots of the forward's keys and values.
        """
        slots = self.pending_slots(self.pending, count, device)
        self._write(slots)
        self.pending += count
        if self.extent > self.capacity:
            self._fit(self.rows, max(self.extent, 2 * self.capacity))
        return slots

    def pending_slots(self, first: int, count: int, device: torch.device | str) -> Tensor:
        """Return the `(rows, count)` slots of pending tokens, from the `first` on."""
        device = torch.device(device)
        return integers(self.lengths, device)[:, None] + counting(first, count, device)

    def _write(self, slots: Tensor) -> None:
        """Set the slots of the next update."""
        self._writing = slots.shape[1]
        self._slots = None if len(set(self.lengths)) <= 1 else slots
        self._rows = counting(0, self.rows, slots.device)[:, None]
        self._views = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write `(rows, kv_heads, tokens, head_dim)` into the reserved slots; return all visible keys and values."""
        count = key_states.shape[2]
        if count != self._writing:
            raise RuntimeError(f"{count} tokens written, {self._writing} reserved")
        buffer, index = self._locate(key_states, value_states, layer_idx)
        views = self._views.get(buffer) or self._open(buffer, count)
        keys, values = views.read[2 * index], views.read[2 * index + 1]
        width, value_width = key_states.shape[-1], value_states.shape[-1]
        if width != keys.shape[-1] or value_width != values.shape[-1]:
            keys, values = keys[..., :width], values[..., :value_width]
        if views.places is None:
            new_keys, new_values = views.written[2 * index], views.written[2 * index + 1]
            if width != new_keys.shape[-1] or value_width != new_values.shape[-1]:
                new_keys, new_values = new_keys[..., :width], new_values[..., :value_width]
            new_keys.copy_(key_states)
            new_values.copy_(value_states)
        else:
            row, slots = views.places
            keys[row, :, slots] = key_states.transpose(1, 2)
            values[row, :, slots] = value_states.transpose(1, 2)
        return keys, values

    def whole(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return a layer's whole buffers of keys and of values, `(room, kv_heads, capacity, width)`.

        Args:
            key_states, value_states: states of that layer, any number of tokens; only their shapes are read.
        """
        known = self._wholes.get(layer_idx)
        if known is None:
            buffer, index = self._locate(key_states, value_states, layer_idx)
            both = self._buffers[buffer][index]
            known = both[0, ..., : key_states.shape[-1]], both[1, ..., : value_states.shape[-1]]
            self._wholes[layer_idx] = known
        return known

    @property
    def addresses(self) -> tuple[int, ...]:
        """Return the addresses of the buffers; while they stay the same, a recorded forward remains valid."""
        return (self.room, self.capacity, *(buffer.data_ptr() for buffer in self._buffers))

    def _open(self, buffer: int, count: int) -> _Views:
        """Make the views of all layers at once, which is faster than many small views per layer."""
        extent = self.extent
        held = self._buffers[buffer].flatten(0, 1)[:, : self.rows]
        places = None if self._slots is None else (self._rows.to(held.device), self._slots.to(held.device))
        self._views[buffer] = views = _Views(
            held[..., :extent, :].unbind(0), held[..., extent - count : extent, :].unbind(0), places
        )
        return views

    def arrange(self, offsets: Sequence[Sequence[int]]) -> None:
        """Reorder the pending tokens of every row to those given, mark them as being written, and forget the others.

        Another forward through further layers may then write beside them.

        Args:
            offsets: for every row, offsets among its pending tokens, in their new order; the same number in every row.
        """
        self._move(offsets)
        self.pending = len(offsets[0])
        self._write(self.pending_slots(0, self.pending, self._rows.device))

    def room_for(self, pending: int) -> None:
        """Make room for `pending` tokens per row beyond the committed ones, which a forward writes by itself."""
        self._fit(self.rows, max(self.lengths, default=0) + pending)

    def advance(self, counts: Sequence[int]) -> None:
        """Commit `counts` tokens of every row that were written right after the committed ones."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def cut(self, lengths: Sequence[int]) -> None:
        """Forget the committed tokens of every row after its first `lengths`."""
        self.lengths = list(lengths)

    # --- after the verdict -------------------------------------------------------------------------------------

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Commit, for every row, the pending tokens named by `paths` (ascending offsets) and forget the others."""
        self._move(paths)
        self.lengths = [length + len(path) for length, path in zip(self.lengths, paths, strict=True)]
        self.rollback()

    def rollback(self) -> None:
        """Forget every pending token."""
        self.pending = self._writing = 0
        self._views = {}

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        moves = [(to, row) for to, row in enumerate(rows) if to != row]
        extent = self.extent
        self._fit(len(rows), self.capacity)
        for buffer, (to, source) in self._with(moves):
            # All are read before one is written.
            buffer[:, :, to, :, :extent] = buffer[:, :, source, :, :extent]
        self.lengths = [self.lengths[row] for row in rows]

    def join(self, other: SlotCache) -> None:
        """Append the rows of another cache; nothing may be pending in either."""
        if self.pending or other.pending:
            raise RuntimeError("rows join between rounds, when nothing is pending")
        first, rows, extent = self.rows, self.rows + other.rows, other.extent
        self._fit(rows, max(self.capacity, other.capacity))
        for layer_idx, (buffer, index) in other._located.items():
            theirs = other._buffers[buffer][index, :, : other.rows, :, :extent]
            buffer, index = self._locate(theirs[0], theirs[1], layer_idx)
            self._buffers[buffer][index, :, first:rows, :, :extent] = theirs
        self.lengths += other.lengths

    # --- what transformers asks of a cache ---------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.extent - self._writing

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.extent, 0

    @property
    def is_initialized(self) -> bool:
        return bool(self._located)

    @property
    def max_batch_size(self) -> int:
        return self.rows

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    # --- storage -----------------------------------------------------------------------------------------------

    def _locate(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[int, int]:
        if layer_idx in self._located:
            return self._located[layer_idx]
        _, heads, _, width = key_states.shape
        width = max(width, value_states.shape[-1])
        for i, buffer in enumerate(self._buffers):
            taken = {index for owner, index in self._located.values() if owner == i}
            alike = (buffer.shape[3], buffer.shape[5], buffer.device) == (heads, width, key_states.device)
            if alike and len(taken) < buffer.shape[0]:
                self._located[layer_idx] = (i, len(taken))
                return self._located[layer_idx]
        layers, device = 1, key_states.device
        if all(buffer.device != device for buffer in self._buffers):
            layers = self._num_layers if isinstance(self._num_layers, int) else self._num_layers[layer_idx]
        shape = (layers, 2, self.room, heads, self.capacity, width)
        self._buffers.append(self._new(shape, key_states))
        self._located[layer_idx] = (len(self._buffers) - 1, 0)
        return self._located[layer_idx]

    def _move(self, offsets: Sequence[Sequence[int]]) -> None:
        """Move pending tokens of every row, named by their offsets, to the beginning of its pending slots."""
        moves = [
            (row, start + to, start + index)
            for row, (start, order) in enumerate(zip(self.lengths, offsets, strict=True))
            for to, index in enumerate(order)
            if to != index
        ]
        for buffer, (row, to, source) in self._with(moves):
            # All are read before one is written.
            buffer[:, :, row, :, to] = buffer[:, :, row, :, source]

    def _with(self, moves: Sequence[tuple[int, ...]]) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Return every buffer with the moves in it, by columns, on its device; nothing where there are no moves."""
        there: dict[torch.device, tuple[Tensor, ...]] = {}
        for buffer in self._buffers if moves else ():
            if buffer.device not in there:
                there[buffer.device] = sent(moves, buffer.device).unbind(1)
            yield buffer, there[buffer.device]

    def _fit(self, rows: int, capacity: int) -> None:
        """Make the buffers hold at least so many rows and slots per row."""
        if rows <= self.room and capacity <= self.capacity:
            return
        room, slots, extent = max(rows, self.room), max(capacity, self.capacity), min(self.extent, self.capacity)
        if self._pool is not None:
            room, slots = rounded_rows(room), rounded_slots(slots)
        for i, buffer in enumerate(self._buffers):
            grown = self._new((*buffer.shape[:2], room, buffer.shape[3], slots, buffer.shape[5]), buffer)
            grown[:, :, : self.rows, :, :extent] = buffer[:, :, : self.rows, :, :extent]
            self._buffers[i] = grown
            if self._pool is not None:
                self._pool.give_back([buffer])
        self._views, self._wholes = {}, {}
        self.room, self.capacity = room, slots

    def _new(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Make a buffer of zeros, or take one of the pool, so that unwritten slots hold no NaN."""
        if self._pool is not None:
            return self._pool.take(shape, like)
        return zeros(shape, like.dtype) if like.device.type == "cpu" else like.new_zeros(shape)


class _Views(NamedTuple):
    """Views of one buffer: keys and values of every layer in turn, each `(rows, kv_heads, slots, width)`."""

    read: tuple[Tensor, ...]
    """All slots that the forward reads."""
    written: tuple[Tensor, ...]
    """Slots that the forward writes, if they are the same in all rows."""
    places: tuple[Tensor, Tensor] | None
    """Indices `(rows, 1)` of rows and `(rows, tokens)` of the slots that it writes there, if rows differ."""
