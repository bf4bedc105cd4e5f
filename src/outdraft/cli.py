"""The command line: the verbs, each from the file of its name in `console/`, and the options before a verb.

What a verb calls is imported when it runs; `console/app.py` reports mistakes.
"""

from __future__ import annotations

from typing import Annotated

import typer

from outdraft.console.advise import advise
from outdraft.console.app import Verb, Verbs
from outdraft.console.bench import bench
from outdraft.console.chat import chat
from outdraft.console.demo import demo
from outdraft.console.doctor import doctor
from outdraft.console.export import export
from outdraft.console.generate import generate
from outdraft.console.info import info
from outdraft.console.regenerate import regenerate
from outdraft.console.serve import serve
from outdraft.console.train import train
from outdraft.console.verify import verify

VERBS = (demo, generate, chat, advise, train, regenerate, info, doctor, bench, verify, serve, export)
"""The verbs in the order of the help."""

app = typer.Typer(
    name="outdraft",
    cls=Verbs,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Lossless speculative decoding: train a drafter for your model, decode faster, measure it.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in VERBS:
    app.command(cls=Verb)(verb)


def main() -> None:
    """The console script."""
    app()


@app.callback(invoke_without_command=True)
def entry(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", envvar="OUTDRAFT_DEBUG", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Without a verb, print the help."""
    if version:
        from outdraft import __version__

        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


if __name__ == "__main__":
    main()
