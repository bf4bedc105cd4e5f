"""What is held out of training: conversations, measurements on them during training, and the best weights by these.

A quick and smooth measurement unrolls the drafter on its own features over the held-out responses, without decoding. It
gives the top-1 agreement with the target for each draft step, and the mean number of tokens of a chain, the bonus token
included, where the target continues as the text does. `tau_meter` makes a function that measures the mean
acceptance length tau of real decoding.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import TrainerCallback

from outdraft.api.generation import SpeculativeModel
from outdraft.api.loading import load_drafter_for
from outdraft.api.prompts import Prompt, encode, prompt_of
from outdraft.data.conversations import Conversation, OnBadLine, read_conversations
from outdraft.data.records import json_lines
from outdraft.data.tokenization import ExampleSet, tokenize
from outdraft.errors import UserError
from outdraft.losses.objective import Objective, TrainingExamples, collate
from outdraft.methods.checkpoint import Network
from outdraft.output import write_whole
from outdraft.target.ranks import said_by_first
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig

HELD_OUT = 32
"""The default number of held-out conversations."""

SMALLEST_SPLIT = 10
"""The fewest conversations of which some are held out."""

LONGEST_BEGINNING = 64
"""The most tokens of a plain text that serve as its prompt; a quarter of a shorter text."""


@dataclass
class Split:
    """A divided training set, before anything is written."""

    data: Path
    """The file that was divided."""
    trained: list[Conversation]
    held_out: list[Conversation]
    notes: list[str]
    """The remarks for the user, a line each."""

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts to measure tau on: held-out ones, else some of the training data."""
        return [prompt_of(conversation.record()) for conversation in self.held_out or self.trained[:HELD_OUT]]

    def write(self, folder: Path) -> Path:
        """Write `train.jsonl` and `held_out.jsonl` to the folder, and return the file to train on; without held-out
        data this is the original.

        Equal data give equal files.
        """
        if not self.held_out:
            return self.data
        folder.mkdir(parents=True, exist_ok=True)
        for name, conversations in (("held_out", self.held_out), ("train", self.trained)):
            write_whole(folder / f"{name}.jsonl", json_lines(one.record() for one in conversations))
        return folder / "train.jsonl"


def hold_out(data: Path, count: int = HELD_OUT, on_bad_line: OnBadLine = "error") -> Split:
    """Keep the last `count` conversations out of training, but at most a tenth, and none of very small data.

    Several answers to one prompt that follow each other, as `regenerate` writes them, are kept together.
    """
    found = read_conversations(data, on_bad_line)
    everything, notes = found.conversations, []
    if found.skipped:
        notes.append(f"{len(found.skipped)} lines could not be used (first: {found.skipped[0]})")
    kept = 0 if len(everything) < SMALLEST_SPLIT else min(count, len(everything) // 10)
    while 0 < kept < len(everything):
        one, other = everything[-kept - 1], everything[-kept]
        if one.text is not None or other.text is not None or one.questions != other.questions:
            break
        kept += 1
    kept = 0 if kept == len(everything) else kept
    if kept:
        notes.append(f"held out for measuring tau: the last {kept} of {len(everything)} conversations")
    else:
        notes.append("no conversation is held out: tau is measured on prompts that are trained on")
    split = len(everything) - kept
    return Split(data, everything[:split], everything[split:], notes)


def beginnings(prompts: Sequence[Prompt], target: Target, switches: Mapping[str, Any] | None = None) -> list[list[int]]:
    """Return the prompts' token ids; a plain text is cut to its first tokens, so that a continuation is left."""
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str) and target.tokenizer is not None:
            ids = list(target.tokenizer(prompt).input_ids)
            encoded.append(ids[: max(2, min(LONGEST_BEGINNING, len(ids) // 4))])
        else:
            encoded += encode([prompt], target, switches)
    return encoded


def tau_meter(
    target: Target, prompts: Sequence[list[int]], max_new_tokens: int = 64
) -> Callable[[Network], dict[str, float]]:
    """Build a function that decodes the prompts greedily, in one batch, with the current drafter.

    The drafter is copied, in the target's precision: training goes on with the original untouched.
    """

    # Of the network alone, and as far as it drafts when nobody stops it.
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "prompt_lookup_min": 0,
        "do_sample": False,
        "controller": "fixed",
    }

    def measure(network: Network) -> dict[str, float]:
        drafter = load_drafter_for(target, network, backend=target.backend)
        with warnings.catch_warnings():  # few right guesses say nothing of a drafter that is still learning
            warnings.filterwarnings("ignore", ".*drafts began right")
            found = SpeculativeModel(target, drafter).generate(list(prompts), **settings).statistics
        if not found.rounds:
            return {}
        measured = {"tau": found.tau, "acceptance_rate": found.acceptance_rate}
        if found.drafted == sum(found.depths):  # chains, whose positions `outdraft doctor` compares with its own
            shares = enumerate(found.acceptance_by_position, start=1)
            measured |= {f"acceptance_at_{position}": share for position, share in shares}
        return measured

    return measure


BATCH = 8
STEPS = 4
"""The number of draft steps that are compared, and that a chain has."""

CHAIN = "held_out_chain"
"""The metric that selects the best weights."""

MeasureTau = Callable[[Network], dict[str, float]]
"""A function that decodes with the current drafter and returns metrics, with the mean acceptance length as `tau`."""


class HeldOut:
    """The held-out examples with the target's features, which are read once."""

    def __init__(self, objective: Objective, examples: ExampleSet):
        self.objective, self.device = objective, objective.reading.target.device
        data = TrainingExamples(examples)
        order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
        self._batches = [
            {name: part.to(self.device) for name, part in collate([data[i] for i in order[k : k + BATCH]]).items()}
            for k in range(0, len(order), BATCH)
        ]
        self._features: list[Tensor] = []

    def measure(self) -> dict[str, float]:
        """Return `held_out_top1_1` .. for each draft step, and `held_out_chain`; empty if the objective compares no
        guesses."""
        hits = [hit for hit in self._hits() if hit is not None]
        if not hits:
            return {}
        right = torch.stack([hit.hits.sum(dim=(0, 1)) for hit in hits]).sum(0)
        count = torch.stack([hit.spoken.sum(dim=(0, 1)) for hit in hits]).sum(0).clamp(min=1)
        lengths = torch.cat([hit.chains() for hit in hits])
        found = {f"held_out_top1_{k + 1}": float(right[k] / count[k]) for k in range(len(right))}
        return {**found, CHAIN: float(lengths.mean())} if len(lengths) else found

    def _hits(self) -> Iterator[Hits | None]:
        for i, batch in enumerate(self._batches):
            if i == len(self._features):
                self._features.append(self.objective.reading(batch["input_ids"], batch["lengths"]))
            with torch.no_grad():
                found = self.objective.hits(batch, self._features[i], STEPS)
            yield None if found is None else Hits(*found)


class Hits:
    """The positions at which a drafter guesses the target's best token.

    Args:
        hits: `(rows, positions, steps)` True where the step's guess for the position is that token.
        spoken: `(rows, positions, steps)` True where a guess counts.
    """

    def __init__(self, hits: Tensor, spoken: Tensor):
        self.hits, self.spoken = hits & spoken, spoken

    def chains(self) -> Tensor:
        """Return `(chains,)` tokens that a chain from each position yields: step 1 there, step 2 one further, and so
        on."""
        steps = min(self.hits.shape[-1], STEPS)
        whole = self.spoken[:, : max(self.spoken.shape[1] - steps + 1, 0), 0]
        length, alive = torch.ones(whole.shape, device=whole.device), whole.clone()
        for k in range(steps):
            alive = alive & self.hits[:, k : k + whole.shape[1], k]
            length = length + alive
        for k in range(1, steps):  # chains that run out of the response are left out
            whole = whole & self.spoken[:, k : k + whole.shape[1], k]
        return length[whole]


class BestWeights:
    """The best weights on the held-out examples, kept beside the checkpoints of a run.

    Args:
        patience: measurements without a better one after which training may end; 0 never ends it.
    """

    def __init__(self, folder: Path, drafter: Network, patience: int = 0):
        self.drafter, self.patience = drafter, patience
        self._weights, self._record = folder / "best.safetensors", folder / "best.json"
        self.score, self.step, self.since, self.measured = -1.0, 0, 0, 0

    def resume(self) -> None:
        """Load the best weights of an interrupted run."""
        try:
            record = json.loads(self._record.read_text())
            found = record["score"], record["step"], record["since"], record["measured"]
        except (OSError, ValueError, KeyError):
            found = -1.0, 0, 0, 0
        self.score, self.step, self.since, self.measured = found

    def note(self, score: float, step: int) -> bool:
        """Record a measurement; return True where training has not improved within the patience."""
        if step <= self.measured:  # a resumed run comes by a second time
            return False
        self.measured = step
        if score > self.score:
            self.score, self.step, self.since = score, step, 0
            state = {name: weight.contiguous() for name, weight in self.drafter.state_dict().items()}
            partial = self._weights.with_suffix(".partial")
            safetensors.torch.save_file(state, partial)
            partial.replace(self._weights)
        else:
            self.since += 1
        record = {"score": self.score, "step": self.step, "since": self.since, "measured": self.measured}
        write_whole(self._record, json.dumps(record) + "\n")
        return self.out_of_patience

    @property
    def out_of_patience(self) -> bool:
        """Return True where training has not improved within the patience."""
        return bool(self.patience) and self.since >= self.patience

    def forget(self) -> None:
        """Delete files that an abandoned run may have left in the folder of a new one."""
        self._record.unlink(missing_ok=True)
        self._weights.unlink(missing_ok=True)

    def restore(self) -> None:
        if self._weights.is_file():
            self.drafter.load_state_dict(safetensors.torch.load_file(self._weights))


class TauMeter(TrainerCallback):
    """A callback that measures the held-out metrics every `every` steps in the first process.

    The others wait, or measure the same with it if processes share the target's layers.
    """

    def __init__(self, measure: MeasureTau, every: int, best: BestWeights, shared: bool = False):
        self._measure, self.every, self.best, self.shared = measure, every, best, shared
        self.log: Callable[[dict[str, float]], None] = lambda logs: None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        measures = args.should_save or self.shared
        if state.global_step % self.every == 0 and state.global_step < state.max_steps and measures:
            found = self.measured()
            if not args.should_save:
                return
            due = control.should_log
            self.log(dict(found))
            control.should_log = due  # an entry of our own does not stand in for the step's
            if CHAIN in found and self.best.note(found[CHAIN], state.global_step) and args.world_size == 1:
                control.should_log = control.should_save = control.should_training_stop = True

    def measured(self) -> dict[str, float]:
        """Measure the drafter in evaluation mode, without gradients."""
        drafter = self.best.drafter
        training = drafter.training
        drafter.eval()
        with torch.no_grad():
            found = self._measure(drafter)
        drafter.train(training)
        return found

    def last(self) -> tuple[dict[str, float], bool]:
        """Measure the final weights; restore earlier weights if these did better, and return True then."""
        found = self.measured()
        self.log(dict(found))
        worse = found.get(CHAIN, 0.0) < self.best.score
        if said_by_first(worse) if self.shared else worse:
            self.best.restore()
            return self.measured(), True
        return found, False


def measurement(
    objective: Objective,
    measure_tau: MeasureTau | None,
    conversations: Sequence[Conversation],
    tokenizer: Any,
    config: DrafterConfig,
) -> MeasureTau | None:
    """Combine the measurements of tau and of guesses on held-out conversations; None with neither."""
    spoken = [
        one for one in conversations if one.text is not None or any(m["role"] == "assistant" for m in one.messages)
    ]
    held = None
    with contextlib.suppress(UserError):  # none is left within the length of training: then nothing is measured on them
        if spoken:
            held = HeldOut(objective, tokenize(spoken, tokenizer, config.max_length, config.chat_template_kwargs))
    if measure_tau is None and held is None:
        return None

    def measure(network: Network) -> dict[str, float]:
        found = measure_tau(objective.finished()) if measure_tau is not None else {}
        return {**found, **(held.measure() if held is not None else {})}

    return measure
