"""The contenders of a benchmark, from names of methods and folders of drafters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outdraft.api.draft_settings import DraftSettings, resolve
from outdraft.api.loading import load_drafter_for
from outdraft.control import CONTROLLERS
from outdraft.drafting.base import Drafter
from outdraft.errors import UserError
from outdraft.evaluation.bench.baselines import peers as stock_peers
from outdraft.evaluation.bench.measure import PLAIN, Contender, speculative
from outdraft.methods.draft_model.drafter import DraftModel
from outdraft.methods.registry import NONE, names, without_model
from outdraft.target.named import shipped_drafters
from outdraft.target.target import Target

LOOKUP = "prompt-lookup"
WITH_LOOKUP = "+lookup"
"""The suffix of a method's name with n-gram drafts in the drafter's place, as `generate` does by default."""
DEFAULT = "default"
"""The name of the controller that `generate` takes by default without a seed; a bench's seeds do not change it."""
STOCK_NAMES = "transformers "
"""The prefix of the baselines' names."""
NAMED = re.compile(r"([\w.+-]+)=(.+)")


def contenders(
    target: Target,
    draft_models: Sequence[str] = (),
    methods: Sequence[str] | None = None,
    *,
    backend: str | None = None,
    tree: dict[str, Any] | None = None,
    controllers: Sequence[str] = (DEFAULT,),
    shipped: str | None = None,
    include_transformers: bool = False,
    peers: Sequence[str] = (),
    stock: Target | None = None,
) -> list[Contender]:
    """Build plain decoding first, then the requested contenders.

    Args:
        target: the same for all.
        draft_models: `PATH` or `NAME=PATH` each.
        methods: methods to compare, `METHOD+lookup` with n-gram drafts; None takes prompt lookup and every given
            drafter, with and without them.
        backend: backend of the drafters.
        tree: tree settings of all drafters that look ahead by a model; with another controller than `fixed`, the most.
        controllers: every drafter runs with each of them; `default` is `generate`'s own choice.
        shipped: name of the model whose shipped drafters stand for those that are not given.
        include_transformers: add the stock `generate`; the same as `generate` among the peers.
        peers: baselines of the stock library, as in `baselines.py`.
        stock: the same model for those, with modules as `transformers` loads them; the target when None.

    Raises:
        UserError: an unknown method, one without a drafter, or a drafter of a method that is not asked for.
    """
    for method in methods or ():
        if _base(method) not in names() or (method != _base(method) and _base(method) in (NONE, *without_model())):
            known = ", ".join(names())
            raise UserError(f"unknown method '{method}' in --methods; choose of {known}, and METHOD{WITH_LOOKUP}")
    for controller in controllers:
        if controller not in (DEFAULT, *CONTROLLERS):
            known = ", ".join((DEFAULT, *CONTROLLERS))
            raise UserError(f"unknown controller '{controller}' in --controllers; choose of {known}")
    drafters = loaded_drafters(target, draft_models, backend)
    if methods is not None:
        present = {drafter.method for drafter in drafters.values()}
        for method in dict.fromkeys(map(_base, methods)):
            if shipped is not None and method in shipped_drafters(shipped) and method not in present:
                drafters[method] = _loaded(target, shipped, method, backend)
        _agree(methods, drafters)
    assistants = [drafter.model for drafter in drafters.values() if isinstance(drafter, DraftModel)]
    asked = ["generate", *peers] if include_transformers else peers
    found = [speculative(PLAIN, target, None), *stock_peers(asked, stock or target, assistants, backend)]
    free = [method for method in without_model() if method in (methods or (LOOKUP,))]
    drafters = {method: _loaded(target, None, method, backend) for method in free} | drafters
    for name, drafter in drafters.items():
        shape = {} if drafter.method in without_model() else tree or {}
        for repeats in ("",) if drafter.limits.looks_back else ("", WITH_LOOKUP):
            if methods is not None and drafter.method + repeats not in methods:
                continue
            for controller in controllers:
                called = name + repeats if len(controllers) == 1 else f"{name}{repeats} {controller}"
                if controller == DEFAULT:
                    controller = resolve(DraftSettings(**shape), drafter, target.device).controller
                found.append(
                    speculative(called, target, drafter, repeats=bool(repeats), controller=controller, **shape)
                )
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
    named: list[tuple[str | None, str, Drafter]] = []
    for text in draft_models:
        match = None if Path(text).exists() else NAMED.fullmatch(text)
        name, path = match.groups() if match else (None, text)
        named.append((name, path, _loaded(target, path, None, backend)))
    counts = Counter(drafter.method for _, _, drafter in named)
    found: dict[str, Drafter] = {}
    for name, path, drafter in named:
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
