"""Incremental detokenization, and the stop strings that end an answer.

One detokenizer serves whole answers, streams, the command line, the server, stop strings and the names of tokens.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from outdraft.errors import UserError


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens with which both begin."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def decode_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))


class Detokenizer:
    """Text of a growing list of tokens, given out as soon as no later token can change it.

    The pieces add up to the tokenizer's text of prompt and tokens, without the prompt's text. So an answer keeps the
    space before its first word, if the tokenizer marks words by one.

    Args:
        prompt: tokens that stand before the first one. Their own text is never given out.
        hidden: tokens that are no text; None for the special ones.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = (), hidden: frozenset[int] | None = None
    ):
        self.tokenizer, self._skips = tokenizer, hidden is None
        self.tokens: list[int] = []
        self.special = special_ids(tokenizer) if hidden is None else hidden
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._window = self._context(prompt)  # tokens with unsettled text, and some before them
        self._given = len(self._text()) if self._window else 0  # its characters given out
        if self._unfinished():  # the character at the prompt's end belongs to the answer, which completes it
            self._given = len(self._text().rstrip("\ufffd"))
        self._seen = self._given  # its characters, certain or not
        self._chunk = 0  # index in the window where the newest text began
        self.pending = ""
        """Text of the tokens so far that later tokens may change; empty while a character is unfinished."""

    def add(self, token: int) -> str:
        """Return the new text that this token makes certain; empty while a character is unfinished."""
        self.tokens.append(token)
        if token in self.special:
            return ""
        self._window.append(token)
        text = self._text()
        # Of a run of byte tokens each may still turn all others into replacement characters.
        certain = self._given if self._is_byte(token) else len(text) - self._uncertain(text)
        new = text[self._given : certain]
        self._given = max(self._given, certain)
        self.pending = "" if text.endswith("\ufffd") else text[self._given :]
        self._seen = max(self._seen, self._given + len(self.pending))
        self._shorten(text, new)
        return new

    def finish(self) -> str:
        """Return the text that is still held back, when no token will follow."""
        text = self._text() if self._window else ""
        new, self._given, self.pending = text[self._given :], len(text), ""
        return new

    def peek(self, token: int) -> str:
        """Return the text that a token would add after the pending text, without an unfinished character."""
        if token in self.special:
            return decode_text(self.tokenizer, [token], skip_special_tokens=False)
        text = decode_text(self.tokenizer, [*self._window, token], self._skips)
        if text.endswith("\ufffd"):
            text = "" if self._is_byte(token) else text[:-1]
        return text[self._seen :]

    def _text(self) -> str:
        return decode_text(self.tokenizer, self._window, self._skips)

    def _is_byte(self, token: int) -> bool:
        return byte_of(self.tokenizer, token) is not None

    def _unfinished(self) -> bool:
        """Whether the window ends in the middle of a character; U+FFFD may also be a character of the text itself."""
        if not self._text().endswith("\ufffd"):
            return False
        own = b""
        for token in reversed(self._window):
            piece, byte = str(self.tokenizer.convert_ids_to_tokens(token)), byte_of(self.tokenizer, token)
            if byte is None and not all(letter in _BYTE_LEVEL for letter in piece):
                break
            own = (bytes(_BYTE_LEVEL[letter] for letter in piece) if byte is None else bytes([byte])) + own
        reader = codecs.getincrementaldecoder("utf-8")("replace")
        reader.decode(own)
        return bool(reader.getstate()[0])

    def _uncertain(self, text: str) -> int:
        """Count the characters at the end that further tokens may change."""
        if text.endswith("\ufffd"):  # incomplete bytes give at most one such character
            return 1
        if not self._cleans:
            return 0
        return max((n for end in _CLEANED for n in range(1, len(end)) if text.endswith(end[:n])), default=0)

    def _shorten(self, text: str, new: str) -> None:
        """Drop settled tokens but those of the newest text: decoders drop a leading space of their input."""
        if new and self._given == len(text):
            if self._chunk and len(self._window) > WINDOW:
                self._window = self._window[self._chunk :]
                self._given = self._seen = len(self._text())
            self._chunk = len(self._window)
        elif len(self._window) > 4 * WINDOW and not self._is_byte(self._window[-1]):  # endless bytes that give no text
            held = len(text) - self._given
            self._window = self._window[-WINDOW:]
            self._given, self._chunk = max(0, len(self._text()) - held), 0
            self._seen = self._given

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """Return the end of the prompt that the answer's text may depend on: nothing before a special token."""
        start = len(prompt)
        while start > max(0, len(prompt) - WINDOW) and prompt[start - 1] not in self.special:
            start -= 1
        while 0 < start < len(prompt) and self._is_byte(prompt[start]) and prompt[start - 1] not in self.special:
            start -= 1
        return list(prompt[start:])


class Stops:
    """Finds where stop strings end an answer, in its text with special tokens spelled out, so that those can be stop
    strings.

    Args:
        strings: stop strings, any of which ends the answer.
        hidden: as of the `Detokenizer` whose text it is.

    Raises:
        UserError: a string is empty, which every text contains.
    """

    def __init__(
        self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase, hidden: frozenset[int] | None = None
    ):
        if not all(strings):
            raise UserError("a stop string is empty; leave it out")
        self.strings, self._tokenizer = list(strings), tokenizer
        self._special = special_ids(tokenizer) if hidden is None else hidden
        self._spelled = ""
        self._hidden: list[tuple[int, int]] = []  # (index, characters) of its parts that are not shown

    def add(self, token: int, new: str, pending: str) -> int | None:
        """Return where the shown text ends, if this token completes a stop string; else None.

        Args:
            new: text that the token made certain.
            pending: text after that, not certain yet.
        """
        if not self.strings:
            return None
        searched = len(self._spelled)
        if token in self._special:
            spelled = decode_text(self._tokenizer, [token], skip_special_tokens=False)
            self._hidden.append((searched, len(spelled)))
            self._spelled += spelled
        self._spelled += new
        text = self._spelled + pending
        starts = [text.find(one, max(0, searched - len(one) + 1)) for one in self.strings]
        found = [place for place in starts if place >= 0]
        return self._shown(min(found)) if found else None

    def uncertain(self) -> int:
        """Count the characters at the end of the shown text that may begin a stop string."""
        longest = max((len(one) for one in self.strings), default=1) - 1
        for length in range(min(longest, len(self._spelled)), 0, -1):
            if any(one.startswith(self._spelled[-length:]) for one in self.strings):
                return self._shown(len(self._spelled)) - self._shown(len(self._spelled) - length)
        return 0

    def _shown(self, place: int) -> int:
        """Convert an index to one in the text without special tokens."""
        return place - sum(min(length, max(0, place - start)) for start, length in self._hidden)


def stops_at(
    strings: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = ()
) -> Callable[[list[int]], bool]:
    """Make a test of whether the newest token completes one of the strings; call it with each token in turn.

    Raises:
        UserError: a string is empty, which every text contains.
    """
    stops, detokenizer = Stops(strings, tokenizer), Detokenizer(tokenizer, prompt=prompt)

    def completed(tokens: list[int]) -> bool:
        stopped = False
        for token in tokens[len(detokenizer.tokens) :]:
            new = detokenizer.add(token)
            stopped = stops.add(token, new, detokenizer.pending) is not None
        return stopped

    return completed


WINDOW = 16
"""Most settled tokens that are decoded again with each new one."""

_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " n ' t", " 'm", " 's", " 've", " 're")
"""Texts that lose spaces by `clean_up_tokenization_spaces`."""

_BYTE_LEVEL = {letter: byte for byte, letter in bytes_to_unicode().items()}
"""Maps the letters that byte-level tokenizers write to the bytes that they stand for."""

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_special: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, frozenset[int]]] = WeakKeyDictionary()


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of the tokens that `skip_special_tokens` leaves out."""
    known = _special.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        added = getattr(tokenizer, "added_tokens_decoder", {})
        ids = {token for token, entry in added.items() if entry.special} | set(tokenizer.all_special_ids)
        known = _special[tokenizer] = (len(tokenizer), frozenset(ids))
    return known[1]


def byte_of(tokenizer: PreTrainedTokenizerBase, token: int) -> int | None:
    """Return the byte that a byte-fallback token stands for; None for other tokens."""
    spelled = _BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(token)))
    return None if spelled is None else int(spelled[1], 16)


def answer_text(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Return the text of a whole answer after its prompt, the same as a stream of it adds up to."""
    detokenizer = Detokenizer(tokenizer, prompt=prompt)
    detokenizer._window += tokens
    return detokenizer.finish()


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> str:
    """Return a prompt's text, without an unfinished character at its end, which belongs to the answer."""
    begun = Detokenizer(tokenizer, prompt=prompt)
    text = decode_text(tokenizer, prompt)
    return text[: len(text) - len(begun.finish())]


def bytes_of(tokenizer: PreTrainedTokenizerBase, token: int, name: str) -> bytes:
    """Return a token's own bytes, which may be a part of a character.

    Args:
        name: text that the token adds at its place; gives the bytes if they are not a part of a character.
    """
    spelled = decode_text(tokenizer, [token], skip_special_tokens=False)
    piece = str(tokenizer.convert_ids_to_tokens(token))
    byte = byte_of(tokenizer, token)
    if byte is not None and spelled != piece:
        return bytes([byte])
    if not spelled and len(piece) == 1 and piece <= "\xff":  # a part of a character, of ByT5's letters
        return piece.encode("latin-1")
    if token not in special_ids(tokenizer) and all(letter in _BYTE_LEVEL for letter in piece):
        own = bytes(_BYTE_LEVEL[letter] for letter in piece)
        # Otherwise its letters are plain text, which may be written otherwise at its place (`##at` of WordPiece).
        if own.decode("utf-8", "replace") == spelled and (spelled == name or "\ufffd" in spelled):
            return own
    return name.lstrip("\ufffd").encode("utf-8", "replace")
