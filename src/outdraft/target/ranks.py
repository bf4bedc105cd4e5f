"""The processes that share one target by tensor parallelism, each with a part of every layer.

All of them make the same rounds on the same numbers: `transformers` gathers what layers compute, and drafters are whole
in every process. Where processes would differ (a clock, numbers from the system, functions of the caller's), the first
one speaks for all.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig

from outdraft.errors import UserError, first_line

Said = TypeVar("Said")

WHOLE = "replicated_with_grad_allreduce"
"""The name that `transformers` has for a layer that is whole in every process."""


def processes_of(model: Any) -> int:
    """Return the number of processes that share the model's layers; 1 if it is whole here."""
    return getattr(model, "_tp_size", None) or 1


def sharding(path: str, plan: str, device: Any, whole_ends: bool, trust_remote_code: bool) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that share a model among the processes of `torchrun`.

    Args:
        device: the device that was asked for; must be None, since each process takes its own.
        whole_ends: True keeps embedding and output layer whole, so that training may run them on other rows in every
            process.
        trust_remote_code: as in `load`.

    Raises:
        UserError: there are no such processes, or the model cannot be shared among them.
    """
    if plan != "auto":
        raise UserError(f"tp_plan must be auto, not {plan!r}")
    if "WORLD_SIZE" not in os.environ:
        raise UserError(
            "--tp (tp_plan) shares the model among processes; start them with torchrun --nproc-per-node N -m "
            "outdraft.cli ..."
        )
    if device is not None:
        raise UserError("with --tp every process takes the device of its rank; leave the device out")
    count = int(os.environ["WORLD_SIZE"])
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # libraries under here have exceptions of their own
        raise UserError(f"the model '{path}' cannot be read: {first_line(error)}") from error
    text = config.get_text_config()
    if (name := indivisible(text, count)) is not None:
        raise UserError(f"{count} processes cannot share {getattr(text, name)} {name}; start a divisor of that number")
    if not getattr(text, "base_model_tp_plan", None):
        raise UserError(f"transformers has no plan to share a '{text.model_type}' model; leave --tp out")
    from transformers.distributed import DistributedConfig

    from outdraft.target.named import class_for  # which imports this module on its way

    leave_group_at_exit()
    if not whole_ends:
        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    with torch.device("meta"):
        model = class_for(config).from_config(config, trust_remote_code=trust_remote_code)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    rules = {name: WHOLE for name, module in model.named_modules() if any(module is end for end in ends)}
    return {"distributed_config": DistributedConfig(tp_plan=rules)}  # in place of those of `auto`


def leave_group_at_exit() -> None:
    """Leave the process group at the end: a process that ends while the group's threads run aborts, and the launcher
    then reports finished work as failed."""
    atexit.unregister(_leave_group)
    atexit.register(_leave_group)


def _leave_group() -> None:
    if in_group():
        torch.distributed.destroy_process_group()


def in_group() -> bool:
    """Return True if this process belongs to a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def end_in_group(code: int) -> NoReturn:
    """End a process of a group: what is to be done at the end is done, and then Python's modules are not taken down,
    in which threads of the group now and then abort even a process that has left it."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def indivisible(config: Any, count: int) -> str | None:
    """Return the number in a model's configuration that so many processes cannot share; None if they can share all."""
    names = ("num_attention_heads", "num_key_value_heads", "vocab_size")
    return next((name for name in names if (getattr(config, name, None) or count) % count), None)


def said_by_first(value: Said) -> Said:
    """Return the first process's value, in every process."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def whole(weight: Tensor) -> Tensor:
    """Return a weight of which this process may hold a part; every process must ask for it."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def whole_weight(layer: Any) -> Tensor:
    """Return a layer's weight, also if other processes hold parts of it or it was left on disk or in host memory."""
    elsewhere = getattr(getattr(layer, "_hf_hook", None), "weights_map", None) if layer.weight.is_meta else None
    return whole(layer.weight if elsewhere is None else elsewhere["weight"])


def over_all(run: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Run a forward over the rows of every process in turn, all processes together; return those of this one.

    Args:
        run: from `(rows, tokens)` ids to `(rows, tokens, width)`.
        ids: this process's rows; other processes may have another number of them, of another length.
    """
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, ids.cpu())
    for rank, part in enumerate(parts):
        found = run(part.to(ids.device))
        if rank == torch.distributed.get_rank():
            own = found
    return own
