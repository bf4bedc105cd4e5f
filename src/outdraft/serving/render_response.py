"""An answer in the format of OpenAI's Responses API: whole, and the events of a streamed one."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from outdraft.serving.errors import ApiError
from outdraft.serving.jobs import Delta, Job
from outdraft.serving.render import Renderer
from outdraft.serving.responses import ResponsesRequest


class ResponseRenderer(Renderer):
    """Renders one request's answer as a response, from what it is as a chat."""

    def __init__(self, request: ResponsesRequest, job: Job, model: str, tokenizer: PreTrainedTokenizerBase):
        super().__init__(job, model, tokenizer, chat=True)
        self.request = request
        self._output: list[dict[str, Any]] = []
        self._events = 0
        self._message: dict[str, Any] | None = None  # the item that is being written
        self._end: str | None = None  # why the answer ended

    def whole(self) -> dict[str, Any]:
        choice = super().whole()["choices"][0]
        message, self._end = choice["message"], choice["finish_reason"]
        calls = message.get("tool_calls") or []
        if message["content"] or not calls:
            part = self._part(message["content"] or "", (choice["logprobs"] or {}).get("content"))
            self._output.append(self._said([part]))
        self._output += [self._call(call) for call in calls]
        return self._response()

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        events = []
        if not self._events:
            events += [
                self._event(f"response.{name}", response=self._response()) for name in ("created", "in_progress")
            ]
        for chunk in super().chunks(delta):
            choice = chunk["choices"][0]
            said, logprobs = choice["delta"], (choice["logprobs"] or {}).get("content") or []
            if said.get("content") or logprobs:
                events += self._add_text(said.get("content") or "", logprobs)
            for call in said.get("tool_calls") or []:
                events += [*self._close(), *self._add_call(call)]
            self._end = choice["finish_reason"] or self._end
        if self._end is not None:
            if not self._output:  # an answer of no text is a message, too
                events += self._add_text("", [])
            events += self._close()
            kind = "incomplete" if self._end == "length" else "completed"
            events.append(self._event(f"response.{kind}", response=self._response()))
        return events

    def failed(self, error: ApiError) -> list[dict[str, Any]]:
        failure = {"code": "server_error" if error.status >= 500 else "invalid_prompt", "message": error.message}
        return [self._event("response.failed", response={**self._response(), "status": "failed", "error": failure})]

    def _event(self, kind: str, **said: Any) -> dict[str, Any]:
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **said}

    def _add_text(self, text: str, logprobs: list[Any]) -> Iterator[dict[str, Any]]:
        """Events of more text, which may begin a message."""
        if self._message is None:
            self._message = self._said([], "in_progress")
            self._output.append(self._message)
            place = len(self._output) - 1
            yield self._event("response.output_item.added", output_index=place, item={**self._message, "content": []})
            self._message["content"].append(self._part("", []))
            yield self._event("response.content_part.added", **self._at(), part=self._part("", []))
        part = self._message["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        if text or logprobs:
            yield self._event("response.output_text.delta", **self._at(), delta=text, logprobs=logprobs)

    def _close(self) -> Iterator[dict[str, Any]]:
        """Events of the end of the message that is being written."""
        if self._message is None:
            return
        part = self._message["content"][0]
        self._message["status"] = self._status
        done = {name: part[name] for name in ("text", "logprobs")}
        yield self._event("response.output_text.done", **self._at(), **done)
        yield self._event("response.content_part.done", **self._at(), part=part)
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=self._message)
        self._message = None

    def _at(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "content_index": 0}

    def _add_call(self, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Events of a whole call."""
        item = self._call(call)
        self._output.append(item)
        place = len(self._output) - 1
        at = {"item_id": item["id"], "output_index": place}
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=place, item=begun)
        yield self._event("response.function_call_arguments.delta", **at, delta=item["arguments"])
        done = {"arguments": item["arguments"], "name": item["name"]}
        yield self._event("response.function_call_arguments.done", **at, **done)
        yield self._event("response.output_item.done", output_index=place, item=item)

    # --- parts -------------------------------------------------------------------------------------------------

    @property
    def _status(self) -> str:
        return "incomplete" if self._end == "length" else "in_progress" if self._end is None else "completed"

    def _said(self, content: list[Any], status: str | None = None) -> dict[str, Any]:
        identity = f"msg_{uuid.uuid4().hex}"
        about = {"type": "message", "id": identity, "role": "assistant", "status": status or self._status}
        return {**about, "content": content}

    def _part(self, text: str, logprobs: list[Any] | None) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        identity = {"id": f"fc_{uuid.uuid4().hex}", "call_id": call["id"]}
        return {"type": "function_call", **identity, **call["function"], "status": "completed"}

    def _response(self) -> dict[str, Any]:
        asked, sampling = self.request, self.job.params.sampling
        echoed = asked.model_dump(
            mode="json",
            by_alias=True,
            exclude_none=True,
            include={"instructions", "max_output_tokens", "metadata", "tool_choice", "tools", "top_logprobs", "user"},
        )
        form = {"type": "text"} if asked.text is None or asked.text.format is None else asked.text.format
        return {
            "id": self.job.id,
            "object": "response",
            "created_at": self.created,
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._end == "length" else None,
            "instructions": None,
            "max_output_tokens": None,
            "model": self.model,
            "output": [*self._output],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": form if isinstance(form, dict) else form.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": "auto",
            "tools": [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None if self._end is None else self._usage(),
            "metadata": {},
            **echoed,
        }

    def _usage(self) -> dict[str, Any]:
        used = self.usage()
        return {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
            "speculation": used["speculation"],
        }
