"""The settings of a training run: every field with its help text, and their checks.

A field's docstring is the only source of its help on the command line and in the documentation. A method's record
(`methods/registry.py`) lists the settings that it reads and how its presets differ.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from pydantic_core import PydanticCustomError

from outdraft.errors import TRAINING_NAMES, UserError, flag, meant
from outdraft.methods.registry import method_called, readers, trained

Preset = Literal["auto", "tiny", "small", "base", "paper"]

PRESETS: dict[str, dict[str, Any]] = {
    # On a target of 0.26M, 300 steps at 1e-3 and 3e-3 ended at an agreement of 0.48 and 0.60.
    "tiny": {
        **{"learning_rate": 2e-3, "lr_schedule": "cosine", "warmup_steps": 50},
        **{"max_steps": 2000, "max_length": 512},
    },
    # On SmolLM2-135M-Instruct four examples a step learn more of each than sixteen (docs/measurements/training.md).
    "small": {
        **{"learning_rate": 1e-3, "lr_schedule": "cosine", "warmup_steps": 100},
        **{"epochs": 4.0, "batch_size": 4, "max_length": 1024},
        **{"w_cls": 1.0, "w_reg": 0.1, "unroll_steps": 3, "unroll_from": 0.6},
    },
    # The published optimiser with a quarter of its passes: set epochs for more.
    "base": {"epochs": 5.0},
    "paper": {
        **{"learning_rate": 5e-5, "lr_schedule": "linear", "warmup_steps": 2000, "max_steps": None, "epochs": 20.0},
        **{"max_length": 2048, "batch_size": 16, "clip_value": 0.5, "precision": "bf16", "feature_noise": True},
        **{"w_reg": 1.0, "w_reg_schedule": "constant", "w_cls": 0.1, "token_loss": "soft", "teacher_top_k": 0},
        **{"embedding_scale": 1.0, "draft_vocab_size": None, "unroll_steps": 1},
        **{"tap_layers": None, "state_norm": False},
    },
}
"""The values of each preset where the method has no other; every other setting keeps its default."""


def _trained(name: str) -> str:
    """Return the name of a trainable method, or raise the error that pydantic raises for a `Literal`."""
    known = [repr(one) for one in trained()]
    if repr(name) not in known:
        raise PydanticCustomError("literal_error", f"Input should be {', '.join(known[:-1])} or {known[-1]}")
    return name


class DrafterConfig(BaseModel):
    """How a drafter is trained; FSPAD's defaults are the published recipe (arXiv 2408.15562), see `with_preset`.

    Raises:
        UserError: an unknown key or a value out of range, in one line.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_assignment=True)

    data: Path | None = None
    """Conversations or texts to train on: JSON lines, a JSON list, Parquet, a folder of such files, or hf:NAME."""
    output_dir: Path
    """Folder of the trained drafter, its checkpoints and logs."""
    method: Annotated[str, AfterValidator(_trained)] = "fspad"
    """The drafter's method, of those that can be trained."""
    preset: Preset = "auto"
    """Defaults of the settings that are not given: tiny (targets below 30M parameters), small (below 1B), base, paper
    (the published values exactly), or auto (by the target's size)."""

    # --- data
    on_bad_line: Literal["error", "skip"] = "error"
    """What to do with a line that cannot be used: stop, or leave it out and report it."""
    max_length: int = Field(2048, ge=3)
    """Tokens of an example; longer ones are cut."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template, as JSON: {"enable_thinking": false}."""

    # --- the drafter
    intermediate_size: int | None = Field(None, ge=1)
    """Width of the drafter's MLP; the target's own when not given."""
    feature_sampling: bool | None = None
    """FSPAD's token-gated fusion; the method decides when not given (an ablation switch)."""
    partial_alignment: bool | None = None
    """FSPAD's separate outputs for token and feature; the method decides when not given (an ablation switch)."""

    tap_layers: list[int] | Literal["auto"] | None = None
    """The target's layers whose outputs the drafter reads, counted from 1, or auto for a low, a middle and a high one
    (beyond FSPAD's paper; EAGLE-3's default)."""
    state_norm: bool = False
    """Normalise what the drafter reads of the target and of itself (beyond FSPAD's paper; EAGLE-3.1's norms)."""
    draft_vocab_size: PositiveInt | Literal["auto", "all"] | None = "auto"
    """Draft only so many tokens, the most frequent ones of the responses, or all of them; auto takes 16,384 where the
    target has 32,000 or more, 32,768 from 100,000 on, and all of a smaller vocabulary."""
    embedding_scale: PositiveFloat | Literal["auto"] = "auto"
    """Train on embeddings times this, and fold it into the weights that are saved: with auto embeddings come near to
    the size of the features beside them, which are ten times as large in many models. 1 trains on them as they are."""
    init_from: str | None = None
    """Drafter whose weights to begin with: a folder, a hub id (official FSPAD, EAGLE and EAGLE-3 ones too), `smollm2`
    or `reference`. Its sizes must be those of this run's settings; EAGLE-3 takes them from it, and so do DFlash and
    DSpark, which always begin with a drafter."""
    exit_layer: int | Literal["auto"] | None = None
    """The target's layers that run before EESD's exit layer, or auto: measured on the data, the fastest is taken."""
    own_head: bool = False
    """Train a copy of the target's output layer with EESD's exit layer, or one with each of Medusa's heads."""
    medusa_num_heads: int = Field(5, ge=1)
    """Medusa's heads: tokens guessed ahead."""
    medusa_num_layers: int = Field(1, ge=1)
    """Residual blocks of each of Medusa's heads."""
    block_size: int = Field(8, ge=2)
    """FSPAD-1F's tokens of one draft forward, the first of which is FSPAD's own."""
    second_layer: bool = True
    """FSPAD-1F's second layer, over all but the first of them."""
    transition_rank: int = Field(128, ge=1)
    """Rank of FSPAD-1F's transition between neighbouring tokens of a draft."""
    slot_candidates: int = Field(16, ge=1)
    """Most probable tokens of each place of a draft that FSPAD-1F's transition compares."""
    anchors: int = Field(32, ge=1)
    """Places of each example from which FSPAD-1F, DFlash and DSpark learn to draft, drawn anew in every step."""
    train_base: bool | None = None
    """Train the FSPAD that FSPAD-1F begins with too, its second stage; when not given only where there is none to begin
    with."""

    # --- the loss
    loss: Literal["soft", "hard", "mixed"] = "soft"
    """Goal of EESD's and Medusa's training: the target's distribution (soft), the responses' tokens (hard), or both
    (mixed)."""
    hard_weight: float = Field(0.5, ge=0, le=1)
    """Weight of the tokens in the mixed loss; the distribution has the rest."""
    w_reg: float = Field(1.0, ge=0)
    """Weight of the feature loss (SmoothL1)."""
    w_reg_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of w_reg over the run: as it is, or down to 0 at the end (beyond the paper)."""
    w_cls: float = Field(0.1, ge=0)
    """Weight of the token loss."""
    token_loss: Literal["soft", "top-k", "total-variation", "log-acceptance"] = "soft"
    """The token loss: cross-entropy against the target's distribution (soft, the paper's), the same with the target's
    most probable tokens counted again (top-k), 1 less the probability that a sampled candidate is accepted
    (total-variation), or the negative logarithm of that probability (log-acceptance)."""
    token_top_k: int = Field(10, ge=1)
    """The target's most probable tokens that the top-k loss counts again."""
    token_top_k_weight: float = Field(1.0, gt=0)
    """Weight with which the top-k loss counts them again."""
    teacher_top_k: int = Field(64, ge=0)
    """The target's most probable tokens that a drafter learns from at every position; 0 takes its whole distribution,
    which needs its output layer in every step."""
    feature_noise: bool = True
    """Add the published uniform noise, (U(0,1) - 0.5) * 0.2 * 512 / length, to the features that the drafter reads."""
    unroll_steps: int = Field(1, ge=1, le=16)
    """Draft steps trained on the drafter's own features, as it decodes (beyond FSPAD's paper, EAGLE-3's training-time
    test; each costs a forward)."""
    unroll_decay: float = Field(0.8, gt=0, le=1)
    """Weight of every further draft step relative to the one before."""
    unroll_from: float = Field(0.0, ge=0, lt=1)
    """Share of the run after which further draft steps are trained; before it only the first one is, which is several
    times as fast and what a young drafter learns most from."""
    loss_chunk_size: int = Field(512, ge=1)
    """Positions whose logits are held at once; smaller needs less memory."""

    # --- optimisation
    learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = Field(2000, ge=0)
    """Steps over which the learning rate rises; at most a tenth of the run unless set by hand."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps; `epochs` decides when not given."""
    epochs: float = Field(20.0, gt=0)
    """Passes over the data when `max_steps` is not given."""
    batch_size: int = Field(16, ge=1)
    """Examples of one optimizer step and process, gradient accumulation included."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Pieces in which a batch is computed; more need less memory and give the same result."""
    length_groups: bool = True
    """Compute the examples of a batch in groups of like length, so that little work goes to padding; the same sums,
    rounded differently."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's first beta."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW's second beta."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's weight decay."""
    clip_value: float = Field(0.5, ge=0)
    """Every gradient entry is clipped to this absolute value; 0 does not clip."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the drafter's training: bf16 autocast over float32 weights, or float32; auto takes bf16 where the
    hardware has it."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the drafter's first weights, the data order and the noise."""

    # --- features
    features: Literal["auto", "online", "cached"] = "auto"
    """Run the target in every step (online), or once over the data with its features kept on disk (cached); auto keeps
    them where the run reads its data more than once and `feature_cache_gb` has room for them."""
    feature_cache_gb: float = Field(50.0, gt=0)
    """Largest feature cache to write, in GB."""
    feature_cache_dir: Path | None = None
    """Folder of the feature cache; `features` under the output folder when not given."""

    # --- checkpoints and reports
    save_steps: int = Field(500, ge=1)
    """Steps between checkpoints."""
    save_total_limit: int = Field(2, ge=1)
    """Checkpoints to keep."""
    logging_steps: int = Field(10, ge=1)
    """Steps between log entries."""
    eval_steps: int = Field(500, ge=1)
    """Steps between measurements on what is held out: the real acceptance length tau, and top-1 agreement for each
    draft step. A tenth of the run where that is less, unless set by hand."""
    patience: int = Field(0, ge=0)
    """Stop the training of FSPAD, EAGLE or EAGLE-3 after so many measurements in a row without a longer held-out
    chain; 0 runs to the end. In any case the weights with the longest one are saved."""
    report_to: list[str] = Field(default_factory=lambda: ["tensorboard"])
    """Trackers to log to, as in transformers (tensorboard, wandb, none)."""

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as problem:
            raise UserError(_one_line(problem)) from None
        self._check_method()
        self._check_parts()

    def _check_method(self) -> None:
        """Refuse settings of another method, instead of ignoring them."""
        for name in sorted(self.model_fields_set):
            if not self._reads(name) and getattr(self, name) is not None:
                *some, last = readers(name)
                these = f"{', '.join(some)} and {last}" if some else last
                raise UserError(f'"{name}" is a setting of {these}, not of {self.method}; leave it out')
        method = method_called(self.method)
        if self.preset == "paper" and not method.paper_preset:
            raise UserError(
                f"preset paper is FSPAD's published recipe; choose tiny, small, base or auto for {self.method}"
            )
        method.check(self)

    def _reads(self, name: str) -> bool:
        """Return True if this method reads a setting."""
        some = readers(name)
        return not some or self.method in some

    def _check_parts(self, filled: bool = False) -> None:
        """Refuse settings of a choice that was not made; until `filled`, a preset may still make it."""
        recipes = PRESETS.values() if self.preset == "auto" else [PRESETS[self.preset]]
        for name, part in PART_OF.items():
            preset = (recipe[part.setting] for recipe in recipes if part.setting in recipe)
            if not filled and part.setting not in self.model_fields_set and any(map(part.made, preset)):
                continue
            given = name in self.model_fields_set and getattr(self, name) is not None
            value = getattr(self, part.setting)
            if given and self._reads(name) and not part.made(value):
                raise UserError(
                    f'"{name}" belongs to {part.setting} {part.choice}, not {value}; change {part.setting} or leave '
                    "it out"
                )

    def record(self) -> dict[str, Any]:
        """Return the settings that this method reads, ready for JSON; `DrafterConfig` accepts them back."""
        left_out = {name for name in type(self).model_fields if not self._reads(name)}
        left_out |= {name for name, part in PART_OF.items() if not part.made(getattr(self, part.setting))}
        return {name: value for name, value in self.model_dump(mode="json").items() if name not in left_out}

    def with_preset(self, target_parameters: int) -> DrafterConfig:
        """Return a copy in which the preset fills all settings that were not set by hand.

        Args:
            target_parameters: the target's size, by which `auto` chooses.
        """
        by_size = "tiny" if target_parameters < 30e6 else "small" if target_parameters < 1e9 else "base"
        name = by_size if self.preset == "auto" else self.preset
        recipe = PRESETS[name] | dict(method_called(self.method).presets.get(name, {}))
        if "epochs" in self.model_fields_set:
            recipe.pop("max_steps", None)
        filled = {key: value for key, value in recipe.items() if key not in self.model_fields_set}
        found = self.with_decided(**filled, preset=name)
        found._check_parts(filled=True)
        return found

    def with_decided(self, **values: Any) -> DrafterConfig:
        """Return a copy with other values, which do not count as set by hand."""
        return DrafterConfig.model_construct(_fields_set=set(self.model_fields_set), **{**dict(self), **values})

    def draft_vocabulary_for(self, vocab_size: int) -> int | None:
        """Return the size of the draft vocabulary for a vocabulary of `vocab_size`; None is the whole."""
        if self.draft_vocab_size == "auto":
            return 32768 if vocab_size >= 100_000 else 16384 if vocab_size >= 32_000 else None
        return None if self.draft_vocab_size == "all" else self.draft_vocab_size

    def evaluation_for(self, total_steps: int) -> int:
        """Return the steps between measurements: at least ten measurements a run, except when set by hand."""
        if "eval_steps" in self.model_fields_set:
            return self.eval_steps
        return max(1, min(self.eval_steps, total_steps // 10))

    def warmup_for(self, total_steps: int) -> int:
        """Return the warm-up steps: at most a tenth of the run, except when set by hand or by the `paper` preset."""
        if "warmup_steps" in self.model_fields_set or self.preset == "paper":
            return self.warmup_steps
        return min(self.warmup_steps, total_steps // 10)


class Part(NamedTuple):
    """The choice in another setting without which a setting is not read."""

    setting: str
    choice: str
    """The choice in words, for messages."""
    made: Callable[[Any], bool]
    """A predicate that is True for values of `setting` that make the choice."""


PART_OF = {
    "hard_weight": Part("loss", "mixed", lambda loss: loss == "mixed"),
    "token_top_k": Part("token_loss", "top-k", lambda loss: loss == "top-k"),
    "token_top_k_weight": Part("token_loss", "top-k", lambda loss: loss == "top-k"),
    "w_reg_schedule": Part("w_reg", "above 0", lambda weight: weight > 0),
    "unroll_decay": Part("unroll_steps", "of 2 or more", lambda steps: steps > 1),
    "unroll_from": Part("unroll_steps", "of 2 or more", lambda steps: steps > 1),
    "feature_cache_gb": Part("features", "cached or auto", lambda features: features != "online"),
    "feature_cache_dir": Part("features", "cached or auto", lambda features: features != "online"),
}
"""The settings that are read only with a certain choice in another setting."""


def _one_line(problem: ValidationError) -> str:
    first = problem.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        said = (
            meant(key, DrafterConfig.model_fields, TRAINING_NAMES)
            or f"; known are {', '.join(DrafterConfig.model_fields)}"
        )
        return f'unknown training setting "{key}"{said}'
    if first["type"] == "missing":
        return f'training needs "{key}"; set it in the configuration or with {flag(key)}'
    return f'training setting "{key}" cannot be {first.get("input")!r}: {first["msg"]}'
