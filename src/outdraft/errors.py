"""The one exception for mistakes that a user can mend, and how other libraries' errors are put in one line.

Raised with a one-line message that names the fix; the command line prints it and exits with code 2. Knows nothing of
what raised it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(ValueError):
    """A setting, file or input that cannot work; the message is one line and names the fix."""


def first_line(error: BaseException) -> str:
    """The first line of another library's exception, for a message of our own; two where the first announces more."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__


def flag(name: str) -> str:
    """Return the flag of a setting: `--max-length` of `max_length`."""
    return "--" + name.replace("_", "-")


def refuse_below(settings: Any, **least: int) -> None:
    """Raise the UserError that names the flag of a setting below its least value; None is no value."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and value < bound:
            raise UserError(f"{flag(name)} must be at least {bound}, not {value}")


OTHER_NAMES = {
    "stop": "stop_strings",
    "stop_sequences": "stop_strings",
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens (which does not count the prompt)",
    "torch_dtype": "dtype",
    "device_map": "device",
    "assistant_model": "draft_model in load",
    "speculative_model": "draft_model in load",
    "prompt_lookup_max": "prompt_lookup_num_tokens",
}
"""What other libraries call a setting -> its name here."""

TRAINING_NAMES = {
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "max_seq_length": "max_length",
    "model_max_length": "max_length",
    "lr_scheduler_type": "lr_schedule",
    "dataset": "data",
    "train_file": "data",
    "train_data_path": "data",
}
"""The same for settings of training."""


def meant(name: str, known: Iterable[str], others: Mapping[str, str] = OTHER_NAMES) -> str:
    """What stands in a message after an unknown name: `; did you mean 'temperature'?`, or nothing where none is near.

    Args:
        others: names of other libraries, and what they are called here.
    """
    if name in others:
        return f"; here it is {others[name]}"
    near = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
