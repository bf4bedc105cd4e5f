"""The program's error policy: one line on stderr and exit code 2 for a user's mistake, 130 for Ctrl-C, no traceback.

`--debug` or OUTDRAFT_DEBUG=1 shows tracebacks after all.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from outdraft.errors import TRAINING_NAMES, UserError, flag
from outdraft.output import is_main_process

USER_MISTAKE, INTERNAL, INTERRUPTED = 2, 1, 130


OTHER_FLAGS = {
    "--max-length": "--max-new-tokens",
    "--max-tokens": "--max-new-tokens",
    "--stop-strings": "--stop",
    "--torch-dtype": "--dtype",
    "--device-map": "--device",
    "--assistant-model": "--draft-model",
    "--speculative-model": "--draft-model",
    "--draft-model-path": "--draft-model",
    "--output-file": "--output",
    **{flag(other): flag(own) for other, own in TRAINING_NAMES.items()},
}
"""The names of flags in other programs, mapped to their names here."""


class _Bare:
    """A command whose help shows no value behind a flag that takes none, and one behind a flag that may be repeated."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
            elif getattr(param, "multiple", False):  # one value each time
                param.metavar = param.metavar or "<str>"
        return params


class Verb(_Bare, TyperCommand):
    """One verb."""


class Verbs(_Bare, TyperGroup):
    """The group of all verbs, with the error policy around them."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run and exit; errors in the options themselves are one line, too."""
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
            if not standalone_mode:
                return code
        except typer.Abort:
            code = INTERRUPTED
        except Exception as error:
            if not hasattr(error, "format_message"):  # every mistake that click finds has one
                raise
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context is not None else ""
            said = _unknown_flag(error) or _torn_text(error) or error.format_message()
            code = _say(f"error: {said}{hint}", USER_MISTAKE)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run a verb, and turn its exceptions into a line and an exit code."""
        quiet_libraries()
        debug = bool(ctx.params.get("debug"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.filterwarnings("default", category=UserWarning, module=r"outdraft\b")
                warnings.showwarning = _note
                return super().invoke(ctx)
        except UserError as error:
            _end(f"error: {error}", USER_MISTAKE, debug)
        except KeyboardInterrupt as stop:  # with a message where there is something to go on with
            _end(str(stop) or "interrupted", INTERRUPTED, debug)
        except BrokenPipeError:  # the reader of our output, `head` for one, has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(INTERNAL) from None
        except OSError as error:  # a file that cannot be read or written
            where = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
            _end(f"error: {where}; check the path, its permissions and the space left", USER_MISTAKE, debug)
        except Exception as error:
            if type(error).__module__.startswith(("typer", "click")):
                raise
            what = f"{type(error).__name__}: {error}"
            _end(f"internal error: {what} (outdraft --debug shows where; please report it)", INTERNAL, debug)


def quiet_libraries() -> None:
    """Silence the libraries' loading bars and warnings; best before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # without a network it says every retry
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _unknown_flag(error: Any) -> str | None:
    """Return the message for an unknown flag: the nearest flag, or outdraft's for another program's name."""
    given, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if given is None or context is None:
        return None
    known = [name for parameter in context.command.params for name in (*parameter.opts, *parameter.secondary_opts)]
    others = {other: own for other, own in OTHER_FLAGS.items() if own in known and other not in known}
    longer = [name for name in known if name.startswith(given)] if len(given) > len("--x") else []
    (near, *_) = longer or difflib.get_close_matches(given, [*known, *others], n=1) or [""]
    if near in others:
        return f"no such option: {given}; here it is {others[near]}"
    return f"no such option: {given}" + (f"; did you mean {near}?" if near else "")


def _torn_text(error: Any) -> str | None:
    """Return the message for more words than a verb takes: a text without quotes, or with a word processor's."""
    found = re.match(r"Got unexpected extra arguments?\(?s?\)? \((.*)\)", error.format_message())
    if found is None:
        return None
    return f"did not expect {found[1]}; put a text in straight quotes ('...'), and begin a flag with --"


def _end(message: str, code: int, debug: bool) -> NoReturn:
    """Print the message and exit; with `debug`, let the exception go on."""
    if debug:
        raise
    _say(message, code)
    raise typer.Exit(code) from None


def _say(message: str, code: int) -> int:
    typer.echo(" ".join(message.split()), err=True)
    return code


def _note(message: Warning | str, *rest: Any, **more: Any) -> None:
    if is_main_process():
        typer.echo(f"note: {' '.join(str(message).split())}", err=True)
