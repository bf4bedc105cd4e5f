"""The settings of `outdraft bench`, checked, and the contenders that they name, from methods and folders of drafters.

The docstrings of settings are the command line's help.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outdraft.api.draft_settings import DraftSettings, resolve
from outdraft.api.loading import load_drafter_for
from outdraft.control import CONTROLLERS
from outdraft.drafting.base import Drafter
from outdraft.errors import UserError, meant, refuse_below
from outdraft.evaluation.bench.baselines import peers as stock_peers
from outdraft.evaluation.bench.measure import PLAIN, Contender, speculative
from outdraft.methods.draft_model.drafter import DraftModel
from outdraft.methods.registry import NONE, names, without_model
from outdraft.target.named import named, shipped_drafters
from outdraft.target.target import Target

SUITES = ("spec-bench", "mt-bench", "eagle", "gsm8k", "prompts")

SHOWN = (
    *("limit", "on_bad_line", "temperatures", "repetitions", "max_new_tokens", "seed"),
    *("controllers", "peers", "peers_backend"),
)
"""Settings that a result shows as they are, beside those of what is compared."""


@dataclass
class BenchSettings:
    """Settings of `outdraft bench`."""

    model: str
    draft_models: list[str] = field(default_factory=list)
    """PATH or NAME=PATH of a drafter; may be repeated."""
    methods: list[str] | None = None
    data: Path | None = None
    """Questions or prompts: JSON lines, text, or a folder of EAGLE's sets; built-in ones if left out."""
    suite: str | None = None
    """spec-bench, mt-bench, eagle, gsm8k or prompts: what the data are; guessed from the file if left out."""
    limit: int | None = None
    """Questions to use at most, of every group (task)."""
    on_bad_line: str = "error"
    """error or skip: what becomes of lines that cannot be used and of questions too long for the model's context."""
    temperatures: list[float] = field(default_factory=lambda: [0.0])
    repetitions: int = 1
    """Times every prompt is decoded."""
    max_new_tokens: int = 128
    seed: int = 0
    tree: dict[str, Any] = field(default_factory=dict)
    controllers: list[str] = field(default_factory=lambda: ["default"])
    """How far to draft; every drafter runs with each. `default` is what `generate` takes by itself without a seed."""
    include_transformers: bool = False
    """Time the stock `generate` of transformers too; the same as --peers generate."""
    peers: list[str] = field(default_factory=list)
    """The stock library in the same run, with commas: generate, prompt-lookup[=N], assistant[=PATH], early-exit=N."""
    peers_backend: str = "eager"
    """eager or same: whether --peers run on the model as transformers loads it, which is loaded once more for that, or
    on the modules of the target's own backend."""
    output_dir: Path | None = None
    """Keep every answer here, in Spec-Bench's format too; an interrupted run goes on from it."""
    report: Path | None = None
    """Write a page with charts to this HTML file; needs plotly, the extra `report`."""
    dtype: str | None = None
    device: str | None = None
    backend: str | None = None
    tp_plan: str | None = None

    def __post_init__(self) -> None:
        refuse_below(self, limit=1, repetitions=1, max_new_tokens=1)
        for temperature in self.temperatures:
            if temperature < 0:
                raise UserError(f"temperature must be 0 (greedy) or more, not {temperature:g}")
        if len(set(self.temperatures)) < len(self.temperatures):
            raise UserError("--temperatures names a temperature twice; leave one of them out")
        if self.on_bad_line not in ("error", "skip"):
            raise UserError(f"--on-bad-line must be error or skip, not '{self.on_bad_line}'")
        if self.peers_backend not in ("eager", "same"):
            raise UserError(f"--peers-backend must be eager or same, not '{self.peers_backend}'")
        if self.suite is not None and self.suite not in SUITES:
            raise UserError(f"unknown suite '{self.suite}' in --suite; choose from {', '.join(SUITES)}")
        if self.suite is not None and self.data is None:
            raise UserError(f"--suite {self.suite} needs its questions; give the file with --data")

    def shown(self, suite: str, prompts: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "draft_models": self.draft_models,
            "methods": self.methods,
            "data": None if self.data is None else str(self.data),
            "suite": suite,
            "prompts": prompts,
            **{name: getattr(self, name) for name in SHOWN},
            **self.tree,
        }


LOOKUP = "prompt-lookup"
WITH_LOOKUP = "+lookup"
"""The suffix of a method's name with n-gram drafts in the drafter's place, as `generate` does by default."""
DEFAULT = "default"
"""The name of the controller that `generate` takes by default without a seed; a bench's seeds do not change it."""
STOCK_NAMES = "transformers "
"""The prefix of the baselines' names."""
NAMED = re.compile(r"([\w.+-]+)=(.+)")


def contenders(target: Target, settings: BenchSettings, stock: Target | None = None) -> list[Contender]:
    """Build plain decoding first, then the contenders that settings name.

    Args:
        settings: without `methods` these are prompt lookup and every given drafter, with n-gram drafts and without; a
            drafter that ships for the model stands for one that is not given.
        stock: the same model for the peers, with modules as `transformers` loads them; the target when None.

    Raises:
        UserError: an unknown method, one without a drafter, or a drafter of a method that is not asked for.
    """
    methods, backend, controllers = settings.methods, settings.backend, settings.controllers
    for method in methods or ():
        if _base(method) not in names() or (method != _base(method) and _base(method) in (NONE, *without_model())):
            known = ", ".join(names())
            near = meant(method.replace("_", "-"), names(), {})
            choice = near or f"; choose from {known}, and METHOD{WITH_LOOKUP}"
            raise UserError(f"unknown method '{method}' in --methods{choice}")
    for controller in controllers:
        if controller not in (DEFAULT, *CONTROLLERS):
            known = ", ".join((DEFAULT, *CONTROLLERS))
            raise UserError(f"unknown controller '{controller}' in --controllers; choose from {known}")
    drafters = loaded_drafters(target, settings.draft_models, backend)
    if methods is not None:
        present = {drafter.method for drafter in drafters.values()}
        for method in dict.fromkeys(map(_base, methods)):
            if named(settings.model) is not None and method in {*shipped_drafters(settings.model)} - present:
                drafters[method] = _loaded(target, settings.model, method, backend)
        _agree(methods, drafters)
    assistants = [drafter.model for drafter in drafters.values() if isinstance(drafter, DraftModel)]
    asked = ["generate", *settings.peers] if settings.include_transformers else settings.peers
    found = [speculative(PLAIN, target, None), *stock_peers(asked, stock or target, assistants, backend)]
    free = [method for method in without_model() if method in (methods or (LOOKUP,))]
    drafters = {method: _loaded(target, None, method, backend) for method in free} | drafters
    for name, drafter in drafters.items():
        shape = {} if drafter.method in without_model() else settings.tree
        for suffix in ("",) if drafter.limits.looks_back else ("", WITH_LOOKUP):
            if methods is not None and drafter.method + suffix not in methods:
                continue
            for controller in controllers:
                called = name + suffix if len(controllers) == 1 else f"{name}{suffix} {controller}"
                if controller == DEFAULT:
                    controller = resolve(DraftSettings(**shape), drafter, target.device).controller
                found.append(speculative(called, target, drafter, ngrams=bool(suffix), controller=controller, **shape))
    return found


def _base(method: str) -> str:
    """Return the method's name without the suffix for n-gram drafts."""
    return method.removesuffix(WITH_LOOKUP)


def _loaded(target: Target, source: str | None, method: str | None, backend: str | None) -> Drafter:
    drafter = load_drafter_for(target, source, method=method, backend=backend)
    assert drafter is not None  # a path or a method that drafts was given
    return drafter


def loaded_drafters(target: Target, draft_models: Sequence[str], backend: str | None) -> dict[str, Drafter]:
    """Load drafters by name: the given name, else the method where that is unique, else method and folder."""
    loaded: list[tuple[str | None, str, Drafter]] = []
    for text in draft_models:
        match = None if Path(text).exists() else NAMED.fullmatch(text)
        name, path = match.groups() if match else (None, text)
        loaded.append((name, path, _loaded(target, path, None, backend)))
    counts = Counter(drafter.method for _, _, drafter in loaded)
    found: dict[str, Drafter] = {}
    for name, path, drafter in loaded:
        chosen = name or (drafter.method if counts[drafter.method] == 1 else f"{drafter.method} {Path(path).name}")
        if chosen in found or chosen in (PLAIN, *without_model()) or chosen.startswith(STOCK_NAMES):
            raise UserError(f"two contenders are called '{chosen}'; give names with --draft-model NAME=PATH")
        found[chosen] = drafter
    return found


def _agree(methods: Sequence[str], drafters: dict[str, Drafter]) -> None:
    present = {drafter.method for drafter in drafters.values()}
    asked = set(map(_base, methods))
    for method in sorted(asked):
        if method not in (NONE, *without_model()) and method not in present:
            raise UserError(f"method '{method}' needs a drafter; give its folder with --draft-model")
    for name, drafter in drafters.items():
        if drafter.method not in asked:
            raise UserError(f"the drafter '{name}' is of method '{drafter.method}'; add it to --methods")
