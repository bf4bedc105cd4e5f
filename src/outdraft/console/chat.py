"""`outdraft chat`: its flags, and the conversation on the terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from outdraft.console import options as o
from outdraft.console.generate import Streamed, legend, stream
from outdraft.errors import UserError
from outdraft.output import remarks, results

if TYPE_CHECKING:
    from outdraft.api.generation import SpeculativeModel

HELP = (
    "/reset forgets the conversation, /system TEXT begins one with that system message, /temperature X sets the "
    "randomness (0 is greedy), /plain turns the drafter off and on, Ctrl-C stops an answer, /quit ends (as does Ctrl-D)"
)
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
    """Chat with a model; /plain turns the drafter off and on."""
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
            line = self._read()
            if line is None or line == "/quit":
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
            self.remarks.print("the target alone" if self.plain else f"with the drafter ({self.model.method})")
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

    def _read(self) -> str | None:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
