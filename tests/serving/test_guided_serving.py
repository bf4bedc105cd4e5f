"""Formats and tools through OpenAI's own client: texts follow them, calls come as calls, what cannot be is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict
from running import NAME, Served, tiny_model

from outdraft.serving import jobs
from outdraft.serving.tools import CLOSE, OPEN, CallReader, Tools

openai = pytest.importorskip("openai", reason="OpenAI's client")
pytest.importorskip("llguidance", reason="outdraft[guided]")

QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "red cat one"}]
SCHEMA = {
    "type": "object",
    "properties": {"k": {"enum": ["new", "old"]}, "n": {"type": "boolean"}},
    "required": ["k", "n"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
FORMAT: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
NUMBER = {"$ref": "#/$defs/N"}
SHORT = {"x-guidance": {"whitespace_flexible": False}, "type": "object", "additionalProperties": False}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {**SHORT, "properties": {"x": NUMBER}, "required": ["x"], "$defs": {"N": {"enum": [1, 23]}}},
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": SHORT}},
]
WITH_TOOLS = (
    "{% if tools %}T{% for t in tools %}{{ t.function.name }}{% endfor %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'][0] }}{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments.x }}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>a{% endif %}"
)


def client_of(served: Served) -> Any:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0, timeout=3600)


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    return client_of(served)


@pytest.fixture
def calling(starting: Callable[..., Served]) -> Served:
    """A server whose chat template takes tools."""
    model = tiny_model()
    model.tokenizer.chat_template = WITH_TOOLS  # type: ignore[union-attr]
    return starting(model=model)


def joined(chunks: Any) -> tuple[str, list[dict[str, Any]], str]:
    """The text, the calls and the end of a stream of one answer."""
    text, calls, reason = "", dict[int, dict[str, Any]](), None
    for chunk in chunks:
        (choice,) = chunk.choices
        text, reason = text + (choice.delta.content or ""), choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            known = calls.setdefault(call.index, {"id": call.id, "name": call.function.name, "arguments": ""})
            known["arguments"] += call.function.arguments
    return text, list(calls.values()), str(reason)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.5, "seed": 3}], ids=str)
@pytest.mark.parametrize("speculative", [True, False])
def test_a_chat_follows_its_schema_and_is_the_offline_answer(client, served, settings, speculative):
    asked = {"model": NAME, "messages": QUESTION, "max_tokens": 60, "response_format": FORMAT, **settings}
    answer = client.chat.completions.create(**asked, extra_body={"speculative": speculative})
    (choice,) = answer.choices
    thing = json.loads(choice.message.content)
    assert thing["k"] in ("new", "old") and isinstance(thing["n"], bool) and choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    offline = served.model.generate(QUESTION, max_new_tokens=60, response_format=FORMAT, **settings)
    assert offline.text == choice.message.content
    text, _, reason = joined(client.chat.completions.create(**asked, stream=True))
    assert (text, reason) == (choice.message.content, "stop")


def test_rows_of_one_batch_keep_to_their_own_formats(client):
    formats: list[Any] = [
        {"regex": "[0-9]{3}"},
        {"choice": ["red", "blue"]},
        {"json": SCHEMA},
        {"grammar": 'start: "x"+ "y"'},
    ]
    for one in formats:
        answer = client.completions.create(
            model=NAME, prompt=["a", "b"], n=2, max_tokens=30, seed=1, extra_body={"structured_outputs": one}
        )
        texts = [choice.text for choice in answer.choices]
        right = {
            "regex": lambda text: len(text) == 3 and text.isdigit(),
            "choice": lambda text: text in ("red", "blue"),
            "json": lambda text: json.loads(text)["k"] in ("new", "old"),
            "grammar": lambda text: text.strip("x") in ("", "y"),
        }[next(iter(one))]
        assert len(texts) == 4 and all(map(right, texts))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}], ids=str)
def test_a_required_call_is_made_whole_and_streamed(calling, choice):
    client = client_of(calling)
    asked = {
        "model": NAME,
        "messages": QUESTION,
        "tools": TOOLS,
        "tool_choice": choice,
        "temperature": 1,
        "max_tokens": 70,
    }
    names = set()
    for seed in range(6):
        answer = client.chat.completions.create(**asked, seed=seed).choices[0]
        (call,) = answer.message.tool_calls
        names.add(call.function.name)
        arguments = json.loads(call.function.arguments)
        assert arguments in ([{"x": 1}, {"x": 23}] if call.function.name == "add" else [{}])
        assert answer.finish_reason == "tool_calls" and answer.message.content is None and call.type == "function"
        text, (streamed,), reason = joined(client.chat.completions.create(**asked, seed=seed, stream=True))
        assert (text, reason) == ("", "tool_calls") and streamed["id"] != call.id
        assert (streamed["name"], streamed["arguments"]) == (call.function.name, call.function.arguments)
    assert names == ({"add", "now"} if choice == "required" else {"add"})
    # What the server sent can be sent back, with what the tool said.
    message = answer.message.model_dump()
    back = [*QUESTION, message, {"role": "tool", "tool_call_id": call.id, "content": "24"}]
    client.chat.completions.create(model=NAME, messages=back, tools=TOOLS, max_tokens=3, temperature=0)


def test_marks_of_calls_that_are_special_tokens_stay_in_the_text(starting, monkeypatch):
    """Else a call would be told from text by nothing."""
    model, hidden = tiny_model(), []
    model.tokenizer.chat_template = WITH_TOOLS
    model.tokenizer.add_special_tokens({"additional_special_tokens": [OPEN, CLOSE]})
    made = jobs.AnswerText
    monkeypatch.setattr(jobs, "AnswerText", lambda *given: (hidden.append(given[3]), made(*given))[1])
    client = client_of(starting(model=model))
    for more in ({"tools": TOOLS}, {}, {"tools": TOOLS, "extra_body": {"skip_special_tokens": True}}):
        client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=2, **more)
    assert hidden == [frozenset(model.target.eos_token_ids), None, None]


def test_a_function_without_parameters_is_called_with_none(calling):
    """As OpenAI says of them; otherwise the model would make some up."""
    tools = [{"type": "function", "function": {"name": "now"}}]
    for seed in range(3):
        answer = client_of(calling).chat.completions.create(
            model=NAME, messages=QUESTION, tools=tools, tool_choice="required", temperature=1, seed=seed, max_tokens=100
        )
        (call,) = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {}


def test_an_answer_that_may_call_says_text_too(calling):
    client = client_of(calling)
    asked: dict[str, Any] = {"model": NAME, "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    answer = client.chat.completions.create(**asked, tools=TOOLS)
    assert answer.choices[0].message.tool_calls is None and answer.choices[0].message.content
    assert (
        joined(client.chat.completions.create(**asked, tools=TOOLS, stream=True))[0]
        == answer.choices[0].message.content
    )
    plain = client.chat.completions.create(**asked)
    untold = client.chat.completions.create(**asked, tools=TOOLS, tool_choice="none")
    assert untold.choices[0].message.content == plain.choices[0].message.content
    assert answer.usage.prompt_tokens == plain.usage.prompt_tokens + len("Taddnow"), "the template is told of the tools"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "response_format"),
        ({"response_format": FORMAT, "tools": TOOLS}, "response_format"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"response_format": FORMAT, "structured_outputs": {"regex": "a"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "if": {}}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_refused(calling, body, param):
    with pytest.raises(openai.BadRequestError) as refusal:
        client_of(calling).post("/chat/completions", body={"model": NAME, "messages": QUESTION, **body}, cast_to=object)
    assert refusal.value.body["param"] == param


@pytest.mark.parametrize(
    ("key", "schema"),
    [
        ("not", {"not": {"type": "string"}}),
        ("uniqueItems", {"type": "array", "uniqueItems": True}),
        ("propertyNames", {"type": "object", "propertyNames": {"pattern": "^a"}}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_known_of_json_schema_is_refused_before_anything_is_decoded(
    served: Served, client: Any, key: str, schema: dict[str, Any], stream: bool
) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    with served.held(), pytest.raises(openai.BadRequestError) as refusal:  # a forward would never end
        client.chat.completions.create(
            model=NAME, messages=QUESTION, response_format=asked, stream=stream, max_tokens=4
        )
    assert refusal.value.status_code == 400 and refusal.value.body["param"] == "response_format"
    assert f'["{key}"]; leave them out of the schema' in refusal.value.body["message"]
    assert "\n" not in refusal.value.body["message"]


class Answer(BaseModel):
    """No white space, for a model that would write nothing else."""

    model_config = ConfigDict(json_schema_extra={"x-guidance": {"whitespace_flexible": False}})
    a: bool


def test_what_the_client_has_parsed_can_be_sent_back(calling: Served) -> None:
    """With what it put beside the server's text: the text as an object."""
    client, asked = client_of(calling), {"model": NAME, "temperature": 0}
    tool = openai.pydantic_function_tool(Answer)
    told = {"messages": QUESTION, "max_tokens": 60, **asked}
    parsed = client.chat.completions.parse(response_format=Answer, **told).choices[0].message
    called = client.chat.completions.parse(tools=[tool], tool_choice="required", **told).choices[0].message
    assert isinstance(parsed.parsed, Answer)
    assert isinstance(called.tool_calls[0].function.parsed_arguments, Answer)
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "7"}
    for said, after in ((parsed, QUESTION), (called, [result])):
        for back in (said.model_dump(), said.to_dict()):
            client.chat.completions.create(messages=[*QUESTION, back, *after], max_tokens=2, **asked)
    function = {"type": "function", "name": "Answer", **{k: tool["function"][k] for k in ("parameters", "strict")}}
    told = {"input": "red", "max_output_tokens": 60, **asked}
    for first in (
        client.responses.parse(text_format=Answer, **told),
        client.responses.parse(tools=[function], tool_choice="required", **told),
    ):
        results = [
            {"type": "function_call_output", "call_id": item.call_id, "output": "7"}
            for item in first.output
            if item.type == "function_call"
        ]
        for back in (first.output, [item.model_dump() for item in first.output]):
            client.responses.create(input=[*QUESTION, *back, *results, *QUESTION], max_output_tokens=2, **asked)


def test_a_template_without_tools_refuses_them(client):
    asked: dict[str, Any] = {"model": NAME, "max_tokens": 3}
    with pytest.raises(openai.BadRequestError, match="chat template takes none"):
        client.chat.completions.create(**asked, messages=QUESTION, tools=TOOLS)
    called = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "now"}}]}
    with pytest.raises(openai.BadRequestError, match="takes no tool_calls"):
        client.chat.completions.create(**asked, messages=[*QUESTION, called, {"role": "tool", "content": "1"}])


def test_a_server_without_the_library_says_what_to_install(client, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(openai.BadRequestError, match=r"pip install 'outdraft\[guided\]'"):
        client.chat.completions.create(model=NAME, messages=QUESTION, response_format=FORMAT, max_tokens=3)
    client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=3)


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (" Hello <b> there", " Hello <b> there", []),
        ("\n<b", "\n<b", []),
        ('\n<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>', "", ["add"]),
        ('<tool_call>{"name":"add"}</tool_call>\n<tool_call>{"name":"now"}</tool_call>', "", ["add", "now"]),
        ('Let me. <tool_call>{"name":"now"}</tool_call> Done <x', "Let me. Done <x", ["now"]),
        ('a <tool_call>{"name":"other"}</tool_call> b', 'a <tool_call>{"name":"other"}</tool_call> b', []),
        ('<tool_call>{"name":"now","arguments":{}}', "", ["now"]),
        ('<tool_call>{"name":"now", ...', '<tool_call>{"name":"now", ...', []),
        ('{"name":"add","parameters":{"x":2}}', "", ["add"]),
        ('[{"name":"add"},{"name":"now"}]', "", ["add", "now"]),
        ('{"x": 1}', '{"x": 1}', []),
        ('{"name": ["add"]}', '{"name": ["add"]}', []),
        ("[]", "[]", []),
        ("[" * 5000, "[" * 5000, []),
        ('{"name":"add","arguments":{"x":NaN}}', '{"name":"add","arguments":{"x":NaN}}', []),
        ("a <tool_", "a <tool_", []),
    ],
    ids=lambda value: str(value)[:40],
)
def test_calls_are_told_from_text_however_it_comes(text, said, calls, step):
    for single in (False, True):
        reader = CallReader(Tools(TOOLS, single=single))
        found_text, found = "", []
        for start in range(0, len(text), step):
            more, new = reader.add(text[start : start + step], last=start + step >= len(text))
            found_text, found = found_text + more, found + new
        assert found_text == said
        wanted = calls[:1] if single else calls
        assert [(call["index"], call["function"]["name"]) for call in found] == list(enumerate(wanted))
        assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in found)
