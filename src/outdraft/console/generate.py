"""`outdraft generate` and `outdraft chat`: their flags, where prompts come from, and how answers stream."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from outdraft.console import options as o
from outdraft.data.records import whole_text
from outdraft.errors import UserError
from outdraft.output import ACCEPTED, number, print_json, remarks, results

if TYPE_CHECKING:
    from outdraft.api.generation import SpeculativeModel
    from outdraft.api.output import Piece

NEAR_TIES = (
    "{}: where two tokens are nearly tied, rounding may choose another than in plain decoding; --exact rules it out"
)


@o.with_flags(o.SAMPLED, o.DRAFTED, o.LOADED)
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; from stdin when left out.")] = None,
    model: o.Model = "reference",
    draft_model: o.DraftModel = None,
    method: o.Method = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="Read the prompt from this file.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="Through the chat template or as it is; chat where there is a template."),
    ] = None,
    max_new_tokens: o.MaxNewTokens = 256,
    seed: o.Seed = None,
    coupling: o.Coupling = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End at this string; may be repeated.")] = None,
    exact: o.Exact = False,
    tp: o.TensorParallel = False,
    chat_template_kwargs: o.TemplateKwargs = None,
    response_format: o.ResponseFormat = None,
    show_drafts: o.ShowDrafts = False,
    json: o.Json = False,
    **flags: Any,
) -> None:
    """Answer one prompt, streaming the text.

    Greedy, unless --temperature or the model's own generation config says otherwise.
    """
    text = _prompt_text(prompt, prompt_file)
    from outdraft.api.generation import load
    from outdraft.target.backends import is_native

    loaded = load(model, draft_model, **o.loading(method=method, tp=tp, **flags))
    settings = {
        "max_new_tokens": max_new_tokens,
        **o.given(seed=seed, coupling=coupling, stop_strings=stop, exact=exact or None),
        **o.given(chat_template_kwargs=chat_template_kwargs, response_format=response_format),
        **o.sampling(**flags),
        **o.tree(loaded.drafter, **flags),
    }
    if chat is None:
        chat = getattr(loaded.tokenizer, "chat_template", None) is not None
    asked: Any = [{"role": "user", "content": text}] if chat else text
    if not json:
        said = remarks()
        if show_drafts:
            said.print(legend(), soft_wrap=True)
        streamed = stream(loaded.stream(asked, **settings), results(show_drafts), show_drafts)
        said.print(streamed.line(loaded.plain_seconds), style="dim", markup=False, soft_wrap=True)
        rounds = loaded.target.dtype.itemsize < 4 and not is_native(loaded.target.backend)
        if any(streamed.accepted) and rounds and not settings.get("temperature") and not exact:
            said.print(NEAR_TIES.format(str(loaded.target.dtype).removeprefix("torch.")), style="dim", soft_wrap=True)
        return
    output = loaded.generate(asked, **settings)
    print_json(
        {
            "text": output.texts[0] if output.texts else None,
            "tokens": output.tokens[0],
            "from_draft": output.accepted[0],
            "finish_reason": output.finish_reasons[0],
            "prompt_tokens": len(output.prompts[0]),
            "method": loaded.method,
            "tokens_per_second": output.tokens_per_second,
            "exactness": None if output.exactness is None else asdict(output.exactness),
            **output.statistics.as_dict(),
        }
    )


def _prompt_text(prompt: str | None, file: Path | None) -> str:
    """Return the prompt from the argument, the file or stdin."""
    if prompt is not None and file is not None:
        raise UserError("a prompt and --prompt-file are two prompts; give one")
    if file is not None and str(file) != "-":
        try:
            text = whole_text(file).replace("\r\n", "\n")
        except OSError as error:
            raise UserError(f"--prompt-file {file} cannot be read ({type(error).__name__}); check the path") from None
    elif prompt is not None:
        text = prompt
    elif file is None and sys.stdin.isatty():
        raise UserError("no prompt; give one as an argument, with --prompt-file, or on stdin")
    else:
        text = sys.stdin.read()
    if not text.strip():
        raise UserError("the prompt is empty; give some text")
    return text if prompt is not None else text.rstrip("\n")


@dataclass
class Streamed:
    """A streamed answer with its figures."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    finish_reason: str | None = None
    seconds: float = 0.0
    first_seconds: float = 0.0
    """The seconds until the first token."""

    @property
    def tau(self) -> float:
        """The mean tokens a round; every round ends with a token of the target's own, unless cut there."""
        rounds = self.accepted.count(False) - 1 + (self.accepted[-1] if self.accepted else 0)
        return (len(self.accepted) - 1) / rounds if rounds > 0 else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """The tokens per second, prefill included."""
        return len(self.accepted) / self.seconds if self.seconds else float("nan")

    def as_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "tokens": len(self.tokens),
            "tau": self.tau,
            "tokens_per_second": self.tokens_per_second,
            "from_draft": self.accepted,
        }

    def line(self, plain_seconds: float | None = None) -> str:
        """Return the figures in a line.

        Args:
            plain_seconds: seconds of a token without drafting, where known; the line then says how many times as fast
                this answer was.
        """
        count, rate = len(self.accepted), self.tokens_per_second
        parts = [f"tau {number(self.tau)}", f"{number(rate, '.1f')} tokens/s", f"{count} tokens"]
        if any(self.accepted):
            parts.append(f"{sum(self.accepted) / count:.0%} of the text came from drafts")
        decoding = self.seconds - self.first_seconds
        if plain_seconds is not None and count > 1 and decoding > 0:
            parts.append(f"{(count - 1) * plain_seconds / decoding:.2f}x of plain")
        if end := {"context": "the context is full", "length": "max_new_tokens reached"}.get(str(self.finish_reason)):
            parts.append(end)
        return " | ".join(parts)


LEGEND = "= drafted, and accepted by the model; it wrote the rest itself"
"""The legend of the tint of drafted tokens."""


def legend() -> Text:
    """Return the line that says what the tint means."""
    return Text.assemble((" tinted ", ACCEPTED), (f" {LEGEND}", "dim"))


def stream(
    pieces: Iterable[Piece], console: Console, show_drafts: bool = False, streamed: Streamed | None = None
) -> Streamed:
    """Print the pieces of a row as they come.

    Args:
        streamed: filled in place, for callers that need the answer so far where Ctrl-C ends it.
    """
    streamed = Streamed() if streamed is None else streamed
    start = time.perf_counter()
    for piece in pieces:
        streamed.first_seconds = streamed.first_seconds or time.perf_counter() - start
        streamed.text += piece.text
        streamed.tokens.append(piece.token)
        streamed.accepted.append(piece.accepted)
        streamed.finish_reason = piece.finish_reason
        if show_drafts and piece.accepted:
            console.print(piece.text, end="", style=ACCEPTED, markup=False, highlight=False, emoji=False)
        elif not console.quiet:  # as it is: printing would make spaces of tabs and pictures of :names:
            console.file.write(piece.text)
        console.file.flush()
    streamed.seconds = time.perf_counter() - start
    console.print()
    return streamed


HELP = (
    "/reset forgets the conversation, /system TEXT begins one with that system message, /temperature X sets the "
    "randomness (0 is greedy), /plain turns drafts off and on, Ctrl-C stops an answer, /quit ends (as does Ctrl-D)"
)
QUIT = ("/quit", "/exit", "/bye", "exit", "quit")
"""The lines that end a conversation, in the words of other programs too."""
TAU = "; after an answer, tau is how many tokens a pass of the model brought; plain decoding has 1."


@o.with_flags(o.SAMPLED, o.DRAFTED, o.LOADED)
def chat(
    model: o.Model = "reference",
    draft_model: o.DraftModel = None,
    method: o.Method = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message to begin with.")] = None,
    max_new_tokens: o.MaxNewTokens = 512,
    seed: o.Seed = None,
    coupling: o.Coupling = None,
    exact: o.Exact = False,
    chat_template_kwargs: o.TemplateKwargs = None,
    show_drafts: o.ShowDrafts = False,
    **flags: Any,
) -> None:
    """Chat with a model; /plain turns drafts off and on.

    Greedy, unless --temperature or the model's own generation config says otherwise.
    """
    from outdraft.api.generation import load

    loaded = load(model, draft_model, **o.loading(method=method, **flags))
    settings = {
        "max_new_tokens": max_new_tokens,
        **o.given(seed=seed, coupling=coupling, exact=exact or None, chat_template_kwargs=chat_template_kwargs),
        **o.sampling(**flags),
    }
    tree = o.tree(loaded.drafter, **flags)
    Chat(loaded, settings, tree, results(show_drafts), remarks(), show_drafts, system).run()


class Chat:
    """A conversation with a model on the terminal."""

    def __init__(
        self,
        model: SpeculativeModel,
        settings: dict[str, Any],
        tree: dict[str, Any],
        console: Console,
        remarks: Console,
        show_drafts: bool = False,
        system: str | None = None,
    ):
        tokenizer = model.tokenizer
        if tokenizer is None or tokenizer.chat_template is None:
            raise UserError("the model has no chat template, so it cannot chat; use `outdraft generate --raw`")
        self.model, self.settings, self.tree = model, settings, tree
        self.console, self.remarks, self.show_drafts = console, remarks, show_drafts
        self.beginning = [{"role": "system", "content": system}] if system else []
        self.history = list(self.beginning)
        self.plain = model.drafter is None

    def run(self) -> None:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 -- gives `input` line editing and a history
        self.remarks.print(HELP, style="dim")
        if self.show_drafts:
            self.remarks.print(legend())
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            if line in QUIT:
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.answer(line)

    def command(self, line: str) -> None:
        """Run a command line that begins with a slash."""
        name, _, value = (part.strip() for part in line.partition(" "))
        if name == "/system" and value:
            self.beginning = [{"role": "system", "content": value}]
            self.command("/reset")
        elif name == "/temperature":
            with contextlib.suppress(ValueError):
                if 0 <= (temperature := float(value)) < float("inf"):
                    self.settings = {**self.settings, "temperature": temperature}
                    self.remarks.print(f"temperature {temperature:g}")
                    return
            self.remarks.print("/temperature needs a number of 0 or more, such as /temperature 0.7")
        elif line == "/reset":
            self.history = list(self.beginning)
            self.remarks.print("the conversation begins anew")
        elif line == "/plain" and self.model.drafter is None:
            self.remarks.print("there is no drafter to turn on; start with --draft-model")
        elif line == "/plain":
            self.plain = not self.plain
            drafted = f"with drafts ({self.model.method})"
            self.remarks.print("without drafts: plain decoding" if self.plain else drafted)
        else:
            self.remarks.print(HELP + TAU if line == "/help" else f"unknown command {name}: {HELP}", markup=False)

    def answer(self, question: str) -> None:
        """Ask, stream the answer, and keep both, a stopped one too; a turn too long for the context is not kept."""
        self.history.append({"role": "user", "content": question})
        model = self.model.with_drafter(None) if self.plain else self.model
        settings = self.settings if self.plain else {**self.settings, **self.tree}
        streamed, stopped = Streamed(), False
        try:
            stream(model.stream(self.history, **settings), self.console, self.show_drafts, streamed)
        except UserError as error:
            self.history.pop()
            self.remarks.print(f"{error}; /reset begins anew", markup=False)
            return
        except KeyboardInterrupt:
            stopped = True
        if stopped and not streamed.text:
            self.history.pop()
            self.remarks.print("\nstopped before the answer began, and the question is forgotten; /quit ends")
            return
        self.history.append({"role": "assistant", "content": streamed.text})
        if stopped:
            self.remarks.print("\nstopped; what was said so far is kept; /quit ends")
            return
        line = streamed.line(None if self.plain else model.plain_seconds)
        self.remarks.print(line, style="dim", markup=False, soft_wrap=True)
        if streamed.finish_reason == "context":
            self.remarks.print("the conversation has filled the model's context; /reset begins anew")
