"""/v1/responses through OpenAI's own client: what it gets is what the model says offline, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from running import NAME, Served, tiny_model

openai = pytest.importorskip("openai", reason="OpenAI's client")

QUESTION = [{"role": "user", "content": "red cat one"}]
ADD = {
    "type": "function",
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"x": {"enum": [1, 23]}},
        "required": ["x"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    },
}
WITH_TOOLS = (
    "{% if tools %}T{% for t in tools %}{{ t.function.name }}{% endfor %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'][0] }}{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments.x }}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>a{% endif %}"
)


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    return client_of(served)


def client_of(served: Served) -> Any:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0, timeout=3600)


@pytest.fixture
def calling(starting: Callable[..., Served]) -> Any:
    """A client of a server whose chat template takes tools."""
    pytest.importorskip("llguidance", reason="outdraft[guided]")
    model = tiny_model()
    model.tokenizer.chat_template = WITH_TOOLS  # type: ignore[union-attr]
    return client_of(starting(model=model))


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.2, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("asked", ["red cat one", QUESTION], ids=["text", "messages"])
def test_an_answer_is_the_offline_one_with_its_usage(client: Any, served: Served, settings: Any, asked: Any) -> None:
    given = {"model": NAME, "input": asked, "max_output_tokens": 24, **settings}
    answer = client.responses.create(**given, extra_body={"seed": 3})
    offline = served.model.generate(QUESTION, max_new_tokens=24, seed=3, **settings)
    assert answer.output_text == offline.text and answer.object == "response" and answer.id.startswith("resp_")
    (said,) = answer.output
    assert (said.type, said.role, said.status) == ("message", "assistant", answer.status)
    ended = offline.finish_reasons[0] == "eos"
    assert answer.status == ("completed" if ended else "incomplete")
    assert ended or answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.input_tokens == len(offline.prompts[0])
    assert answer.usage.output_tokens == len(offline.tokens[0])
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.temperature == settings["temperature"] and answer.top_p == settings.get("top_p", 1.0)
    assert (answer.max_output_tokens, answer.error, answer.tools) == (24, None, [])


def test_the_real_client_reads_the_stream(client: Any) -> None:
    given: dict[str, Any] = {"model": NAME, "input": "red", "max_output_tokens": 12, "temperature": 0}
    whole = client.responses.create(**given)
    kinds: list[str] = []
    text = ""
    with client.responses.stream(**given) as stream:
        for number, event in enumerate(stream):
            kinds.append(event.type.removeprefix("response."))
            assert event.sequence_number == number
            text += event.delta if event.type == "response.output_text.delta" else ""
            if event.type == "response.output_text.delta":
                assert event.snapshot == text
    assert text == whole.output_text
    deltas = kinds.count("output_text.delta")
    assert deltas > 1
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    events = list(client.responses.create(**given, stream=True))
    assert events[0].response.status == "in_progress" and not events[0].response.output
    assert not events[2].item.content and events[2].item.status == "in_progress"
    last = events[-1].response
    assert last.output_text == whole.output_text and last.usage.output_tokens == whole.usage.output_tokens == 12
    assert events[-2].item.id == last.output[0].id == events[2].item.id


def test_events_have_names_and_no_further_mark(served: Served) -> None:
    with served.client() as http:
        body = {"model": NAME, "input": "red", "max_output_tokens": 2, "temperature": 0, "stream": True}
        lines = http.post("/v1/responses", json=body).text.strip().split("\n\n")
    for line in lines:
        name, data = line.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert lines[-1].startswith("event: response.incomplete")


def test_instructions_are_a_system_message_and_answers_can_be_sent_back(client: Any, served: Served) -> None:
    given: dict[str, Any] = {"model": NAME, "max_output_tokens": 8, "temperature": 0, "instructions": "be old"}
    first = client.responses.create(**given, input=QUESTION)
    system = {"role": "system", "content": "be old"}
    assert first.output_text == served.model.generate([system, *QUESTION], max_new_tokens=8).text
    assert first.instructions == "be old"
    again = {"role": "user", "content": [{"type": "input_text", "text": "bl"}, {"type": "input_text", "text": "ue"}]}
    expected = served.model.generate(
        [system, *QUESTION, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "blue"}],
        max_new_tokens=8,
    )
    for back in (first.output, [item.model_dump() for item in first.output]):
        assert client.responses.create(**given, input=[*QUESTION, *back, again]).output_text == expected.text


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_a_chat(client: Any, stream: bool) -> None:
    asked: dict[str, Any] = {"model": NAME, "temperature": 0, "top_logprobs": 2}
    chat = client.chat.completions.create(**asked, messages=QUESTION, max_tokens=6, logprobs=True)
    asked |= {"input": QUESTION, "max_output_tokens": 6, "include": ["message.output_text.logprobs"]}
    given = client.responses.create(**asked, stream=stream)
    answer = list(given)[-1].response if stream else given
    found = answer.output[0].content[0].logprobs
    expected = chat.choices[0].logprobs.content
    assert [(one.token, one.bytes) for one in found] == [(one.token, one.bytes) for one in expected]
    # Rows of another batch round otherwise.
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected], abs=1e-6)
    assert all(len(one.top_logprobs) == 2 for one in found)


@pytest.mark.parametrize("stream", [False, True])
def test_a_format_is_followed(client: Any, served: Served, stream: bool) -> None:
    pytest.importorskip("llguidance", reason="outdraft[guided]")
    schema = {**ADD["parameters"], "properties": {"x": {"enum": ["new", "old"]}}}  # type: ignore[dict-item]
    form = {"type": "json_schema", "name": "thing", "schema": schema, "strict": True}
    given = client.responses.create(
        model=NAME, input=QUESTION, max_output_tokens=60, temperature=0, text={"format": form}, stream=stream
    )
    answer = list(given)[-1].response if stream else given
    assert json.loads(answer.output_text)["x"] in ("new", "old") and answer.status == "completed"
    assert answer.text.format.name == "thing" and answer.text.format.schema_ == schema
    chat_format = {"type": "json_schema", "json_schema": {"schema": schema}}
    assert answer.output_text == served.model.generate(QUESTION, max_new_tokens=60, response_format=chat_format).text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "add"}], ids=str)
def test_functions_are_called_and_their_output_goes_back(calling: Any, choice: Any) -> None:
    asked = {"model": NAME, "input": QUESTION, "tools": [ADD], "tool_choice": choice, "max_output_tokens": 70}
    answer = calling.responses.create(**asked, extra_body={"seed": 1})
    (call,) = answer.output
    assert (call.type, call.name, call.status) == ("function_call", "add", "completed")
    assert json.loads(call.arguments) in ({"x": 1}, {"x": 23}) and answer.status == "completed"
    assert answer.tools[0].name == "add" and not answer.output_text
    with calling.responses.stream(**asked, extra_body={"seed": 1}) as stream:
        kinds = [event.type.removeprefix("response.") for event in stream]
        streamed = stream.get_final_response()
    assert streamed.output[0].arguments == call.arguments
    assert kinds[2:] == [
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
        *("output_item.done", "completed"),
    ]
    back = [*QUESTION, *answer.output, {"type": "function_call_output", "call_id": call.call_id, "output": "24"}]
    next_one = calling.responses.create(model=NAME, input=back, tools=[ADD], max_output_tokens=3)
    called = {"name": "add", "arguments": call.arguments}
    chat = [
        *QUESTION,
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "type": "function", "function": called}],
        },
        {"role": "tool", "content": "24", "tool_call_id": "c"},
    ]
    tool = {"type": "function", "function": {name: ADD[name] for name in ("name", "parameters")}}
    same = calling.chat.completions.create(model=NAME, messages=chat, tools=[tool], max_tokens=3)
    assert next_one.usage.input_tokens == same.usage.prompt_tokens


def test_a_text_before_a_call_and_the_call_are_of_one_message(served: Served) -> None:
    from outdraft.serving.responses import ResponsesRequest

    items = [
        {"role": "user", "content": "a"},
        {"type": "message", "role": "assistant", "content": "I call"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "y"}]},
        {"type": "function_call", "call_id": "3", "name": "f", "arguments": "{}"},
    ]
    messages = [one.plain() for one in ResponsesRequest.model_validate({"input": items}).chat().messages]
    assert [one["role"] for one in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert messages[1]["content"] == "I call" and [one["id"] for one in messages[1]["tool_calls"]] == ["1", "2"]
    assert [one.get("tool_call_id") for one in messages[2:4]] == ["1", "2"] and messages[3]["content"] == "y"
    assert messages[4]["content"] == "" and messages[4]["tool_calls"][0]["id"] == "3"


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "input", "required"),
        ({"input": []}, "input", "at least 1"),
        ({"input": ""}, None, None),
        ({"input": "a", "max_tokens": 4}, "max_tokens", "unknown parameter 'max_tokens'"),
        ({"input": "a", "n": 2}, "n", "unknown"),
        ({"input": "a", "max_output_tokens": 100_000}, "max_output_tokens", "the context is"),
        ({"input": "x" * 500}, "input", "the context is"),
        ({"input": "a", "temperature": -1}, "temperature", "greater than or equal"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored"),
        ({"input": "a", "background": True}, "background", "nothing is stored"),
        ({"input": "a", "store": True}, "store", "nothing is stored"),
        ({"input": "a", "truncation": "auto"}, "truncation", "never cut"),
        ({"input": "a", "reasoning": {"effort": "high"}}, "reasoning", "no such setting"),
        ({"input": "a", "top_logprobs": 2}, "top_logprobs", "needs include"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools.0.type", "'function'"),
        ({"input": "a", "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"input": "a", "text": {"format": {"type": "json_schema", "name": "x"}}}, "text", "needs json_schema"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input", "role"),
        ({"input": [{"type": "reasoning", "summary": ["x"]}]}, "input", "'reasoning'"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "'item_reference'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input", "input_image"),
        ({"input": [{"role": "user", "content": "a", "phase": "x"}]}, "input", "phase"),
        ({"input": "a", "model": "gpt"}, "model", "there is no model 'gpt'"),
        ({"input": "a", "seen": [1]}, "seen", "unknown parameter 'seen'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(served: Served, body: Any, param: Any, says: Any) -> None:
    with served.client() as http:
        answer = http.post("/v1/responses", json={"max_output_tokens": 2, **body})
    if param is None:
        assert answer.status_code == 200
        return
    error = answer.json()["error"]
    assert answer.status_code in (400, 404) and error["type"] == "invalid_request_error"
    assert error["param"].startswith(param) and says in error["message"]


def test_parameters_that_ask_for_nothing_are_accepted(client: Any) -> None:
    client.responses.create(
        model=NAME,
        input="a",
        max_output_tokens=2,
        store=False,
        truncation="disabled",
        tools=[],
        tool_choice="none",
        include=["reasoning.encrypted_content"],
        reasoning={"effort": None, "summary": None},
        previous_response_id=None,
        metadata={"a": "b"},
        text={"format": {"type": "text"}, "verbosity": "medium"},
        parallel_tool_calls=True,
        service_tier="auto",
        extra_body={"unheard_of": None, "extra": {}},
    )


def test_a_request_that_fails_says_so(starting: Callable[..., Served]) -> None:
    import torch

    model = tiny_model()
    with torch.no_grad():
        model.target.model.get_output_embeddings().weight.fill_(float("nan"))  # type: ignore[union-attr]
    served = starting(model=model)
    body = {"input": "red", "max_output_tokens": 4}
    with served.client() as http:
        assert http.post("/v1/responses", json=body).status_code == 500
    (event,) = list(client_of(served).responses.create(**body, stream=True))
    assert event.type == "response.failed" and event.response.status == "failed"
    assert "not finite" in event.response.error.message
