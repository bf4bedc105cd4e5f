"""Tokenization of conversations: token ids, and a mask of the assistant's tokens.

The chat template decides the text; the mask is found by rendering prefixes of the conversation, so that it works with
any template, or taken from the template's own `{% generation %}` marks.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from outdraft.data.conversations import Conversation, Message, last_answer
from outdraft.errors import UserError, first_line

NO_SWITCHES: Mapping[str, Any] = MappingProxyType({})

GENERATION_MARK = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True)
class Example:
    """A training sequence."""

    input_ids: Tensor
    """The `(tokens,)` int32 token ids."""
    loss_mask: Tensor
    """The `(tokens,)` mask, True on the tokens of a response."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class ExampleSet:
    """The training sequences in the order of the data, and counts of omissions."""

    examples: list[Example] = field(default_factory=list)
    truncated: int = 0
    """The number of examples cut to the maximum length."""
    without_response: int = 0
    """The number of conversations dropped because no predictable response token was left."""
    unmarked_turns: int = 0
    """The number of assistant turns without loss, since the template renders them differently as the chat goes on."""
    cut_answers: int = 0
    """The number of answers that were cut off, after which no end token is learned."""
    untrained: int = 0
    """The number of answers without loss, since the data give them weight 0."""
    refused: list[str] = field(default_factory=list)
    """A line for every conversation that the chat template does not take, with the reason."""

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.examples))

    @property
    def response_tokens(self) -> int:
        return sum(int(example.loss_mask.sum()) for example in self.examples)

    def fingerprint(self) -> str:
        """Return the SHA-256 over all ids and masks, which is equal exactly when the training data are."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(len(example).to_bytes(8, "little"))
            digest.update(example.input_ids.numpy().tobytes())
            digest.update(example.loss_mask.numpy().tobytes())
        return digest.hexdigest()


class TemplateRefuses(UserError):
    """An error of a conversation that the chat template does not take; the message has the reason."""


def tokenize(
    conversations: Iterable[Conversation], tokenizer: Any, max_length: int, switches: Mapping[str, Any] = NO_SWITCHES
) -> ExampleSet:
    """Make token ids and loss masks of all conversations, in order, cut to `max_length` tokens.

    `switches` are variables of the chat template (`chat_template_kwargs`), such as `enable_thinking`.

    Raises:
        UserError: chats without a chat template, a template whose responses cannot be located, or no example left.
    """
    found = ExampleSet()
    turns = 0
    for conversation in conversations:
        if conversation.text is not None:
            ids = list(tokenizer(conversation.text)["input_ids"])
            mask, marked = [True] * len(ids), 0
            if conversation.cut and ids[-1] == tokenizer.eos_token_id:  # one that the tokenizer adds
                mask[-1] = False
        else:
            require_chat_template(tokenizer, conversation.source)
            # Unanswered questions at the end teach nothing.
            said = list(conversation.messages[: last_answer(conversation.messages) + 1])
            try:
                variables = variables_of(conversation, switches)
                ids, mask, marked = _chat(said, tokenizer, conversation.cut, conversation.untrained, variables)
            except TemplateRefuses as problem:
                found.refused.append(f"{conversation.source}: {problem}")
                continue
            spoken = sum(message["role"] == "assistant" for message in conversation.messages)
            spoken -= len(conversation.untrained)
            found.untrained += len(conversation.untrained)
            turns += spoken
            found.unmarked_turns += spoken - marked
        found.truncated += len(ids) > max_length
        ids, mask = ids[:max_length], mask[:max_length]
        if not any(mask[2:]):  # the drafter's first prediction is the third token (loss.py)
            found.without_response += 1
            continue
        found.cut_answers += len(conversation.cut)
        found.examples.append(Example(torch.tensor(ids, dtype=torch.int32), torch.tensor(mask)))
    if turns and found.unmarked_turns == turns:
        raise UserError(
            "the chat template renders no assistant turn as a continuation of its prompt, so responses cannot be told "
            'from prompts; add {% generation %} marks to the template or train on {"text"} lines'
        )
    if not found.examples and found.refused:
        raise UserError(
            f"no example is left: {len(found.refused)} conversations are refused, first {found.refused[0]}; give data "
            "that the chat template takes, or a tokenizer with another template"
        )
    if not found.examples and not turns and found.untrained:
        raise UserError(f"all {found.untrained} answers have weight 0, so that there is nothing to learn; give others")
    if not found.examples:
        raise UserError(
            f"no example has a response token within {max_length} tokens; raise --max-length or give data with answers "
            "(`outdraft regenerate` writes them)"
        )
    return found


def require_chat_template(tokenizer: Any, source: str) -> None:
    """Raise a UserError if the tokenizer cannot render a chat."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{source} is a conversation, but the target's tokenizer has no chat template; "
            'add one (tokenizer.chat_template) or train on {"text": ...} lines'
        )


def variables_of(conversation: Conversation, switches: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the chat template is told beside the messages: its switches, and the conversation's tools."""
    return {**switches, **({"tools": list(conversation.tools)} if conversation.tools else {})}


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any] = NO_SWITCHES,
) -> str:
    """Render the messages with the chat template; `variables` as `variables_of` has them.

    Raises:
        TemplateRefuses: the template does not take them, e.g. because it knows no system turn.
    """
    settings = {**variables, "tokenize": False, "add_generation_prompt": add_generation_prompt}
    if not messages:  # what stands before a conversation that the assistant begins; alone it would not pass for one
        return str(_templated(tokenizer, [[]], **settings)[0])
    return str(_templated(tokenizer, messages, **settings))


def turns_for(tokenizer: Any, messages: Sequence[Any]) -> list[Any]:
    """Return turns as the chat template shows them: those of some multimodal models read parts and skip plain text."""
    known, template = _in_parts.setdefault(tokenizer, {}), str(tokenizer.chat_template)
    if template not in known:
        known[template] = not _shows(tokenizer, _PROBE) and _shows(tokenizer, [{"type": "text", "text": _PROBE}])
    if not known[template]:
        return list(messages)
    return [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]}
        if isinstance(turn, Mapping) and isinstance(turn.get("content"), str)
        else turn
        for turn in messages
    ]


_PROBE = "probe"
_in_parts: WeakKeyDictionary[Any, dict[str, bool]] = WeakKeyDictionary()


def _shows(tokenizer: Any, content: Any) -> bool:
    try:
        return _PROBE in tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except Exception:  # templates raise what they like
        return False


def _templated(tokenizer: Any, messages: Sequence[Any], **settings: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(turns_for(tokenizer, messages), **settings)
    except Exception as problem:  # templates are programs: they raise what they like
        roles = ", ".join(message["role"] for message in messages[:8] if message) + ", ..." * (len(messages) > 8)
        raise TemplateRefuses(
            f"the chat template refuses a conversation with roles {roles}: {first_line(problem)}"
        ) from problem


def _chat(
    messages: list[Message],
    tokenizer: Any,
    cut: Collection[int],
    untrained: Collection[int],
    variables: Mapping[str, Any],
) -> tuple[list[int], list[bool], int]:
    """Return ids, mask and the number of assistant turns that were marked; turns at the indices `cut` have no end, and
    those at the indices `untrained` no mark."""
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = [place for place in answers if place not in untrained]
    if not wanted:
        return [], [], 0
    if GENERATION_MARK.search(tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""):
        marked = _templated(tokenizer, messages, **variables, return_dict=True, return_assistant_tokens_mask=True)
        if any(marked["assistant_masks"]):
            ids, mask = list(marked["input_ids"]), [bool(bit) for bit in marked["assistant_masks"]]
            marks = _without_ends(ids, mask, answers, cut, tokenizer)
            return ids, *(_without_turns(marks, mask, answers, untrained) if untrained else (marks, len(answers)))
    text = render(tokenizer, messages, variables=variables)
    found = {place: _response_span(tokenizer, messages, place, text, variables) for place in wanted}
    ended = [span for place, span in found.items() if span is not None and place not in cut]
    endless = [
        (span[0], _spoken_end(tokenizer, text, span, messages[place]["content"]))
        for place, span in found.items()
        if span is not None and place in cut
    ]
    spans = sorted([*ended, *endless])
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, starts = list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]
    else:
        ids, starts = _ids_and_starts(tokenizer, text, spans)
    both = zip(_mask(ids, starts, ended, tokenizer.eos_token_id), _mask(ids, starts, endless, None), strict=True)
    return ids, [one or other for one, other in both], len(spans)


def _spoken_end(tokenizer: Any, text: str, span: tuple[int, int], content: str) -> int:
    """Return the end of a turn's content in `text`, before the template's end mark."""
    said = content.strip()  # as many templates have it
    place = text.rfind(said, *span) if said else -1
    if place >= 0:
        return place + len(said)
    marks = [text.find(mark, *span) for mark in tokenizer.all_special_tokens]
    return min((mark for mark in marks if mark >= 0), default=span[1])


def _without_turns(
    marks: list[bool], mask: list[bool], answers: list[int], untrained: Collection[int]
) -> tuple[list[bool], int]:
    """Return the marks without those of the turns at the indices `untrained`, and the number of turns that have some;
    none where it cannot be told which run of the mask is which turn."""
    begins = [i for i, marked in enumerate(mask) if marked and not (i and mask[i - 1])]
    if len(begins) != len(answers):
        return [False] * len(marks), 0
    kept = list(marks)
    for begin, end, place in zip(begins, [*begins[1:], len(mask)], answers, strict=True):
        if place in untrained:
            kept[begin:end] = [False] * (end - begin)
    return kept, len(answers) - len(untrained)


def _without_ends(
    ids: list[int], mask: list[bool], answers: list[int], cut: Collection[int], tokenizer: Any
) -> list[bool]:
    """Return the mask without the special tokens with which the template ends the turns at the indices `cut`."""
    begins = [i for i, marked in enumerate(mask) if marked and not (i and mask[i - 1])]
    if not cut or len(begins) != len(answers):  # which run is which turn cannot be told: none has an end
        chosen = begins if cut else []
    else:
        chosen = [begin for begin, place in zip(begins, answers, strict=True) if place in cut]
    special = set(tokenizer.all_special_ids)
    kept = list(mask)
    for begin in chosen:
        end = next((i for i in range(begin, len(ids)) if not mask[i]), len(ids))
        marks = [i for i in range(begin, end) if ids[i] in special]
        first = marks[-1] if marks else end
        while first - 1 in marks:
            first -= 1
        kept[first:end] = [False] * (end - first)
    return kept


def _response_span(
    tokenizer: Any, messages: list[Message], turn: int, text: str, variables: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Return the span of an assistant's turn in `text`, without prompt marks before it; None where it is ambiguous."""
    try:
        through = text if turn == len(messages) - 1 else render(tokenizer, messages[: turn + 1], variables=variables)
        if not text.startswith(through):  # perhaps for the end token that some templates write after the last turn
            through = through.removesuffix(tokenizer.eos_token or "")
        if not text.startswith(through):
            return None
        if not turn:  # templates may put their own system turn before it
            prompt = render(tokenizer, [], True, variables)
            begin = through.find(prompt + messages[0]["content"].strip()) if prompt else -1
            return None if begin < 0 else (begin + len(prompt), len(through))
        for with_prompt in (True, False):  # some templates add to the generation prompt what a finished turn lacks
            before = render(tokenizer, messages[:turn], with_prompt, variables)
            if len(before) < len(through) and through.startswith(before):
                return len(before), len(through)
    except TemplateRefuses:  # of a conversation that it takes as a whole it may refuse a beginning
        return None
    return None


def _ids_and_starts(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Tokenize the pieces between the spans' edges one after the other, for a tokenizer without character offsets."""
    edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
    ids: list[int] = []
    starts: list[int] = []
    for start, end in pairwise(edges):
        piece = list(tokenizer(text[start:end], add_special_tokens=False)["input_ids"])
        ids += piece
        starts += [start] * len(piece)
    if ids != list(tokenizer(text, add_special_tokens=False)["input_ids"]):
        raise UserError(
            "this tokenizer gives no character offsets and tokenises a chat differently in pieces, so responses "
            "cannot be marked; use its fast version or add {% generation %} marks to the template"
        )
    return ids, starts


def _mask(ids: list[int], starts: list[int], spans: list[tuple[int, int]], eos: int | None) -> list[bool]:
    """Return the mask of tokens that begin inside a span, its end token included even where the next turn writes it."""
    mask = [False] * len(ids)
    for begin, end in spans:
        first = bisect_left(starts, begin)
        for i in range(first, len(ids)):
            if starts[i] >= end and ids[i] != eos:
                break
            mask[i] = True
            if ids[i] == eos:  # what a template writes after the end token is never generated
                break
    return mask
