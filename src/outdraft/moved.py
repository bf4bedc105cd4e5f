"""Modules that users imported before they moved, for one release: the old name gives the new module, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "api.resolved_draft": "api.draft_settings",
    "api.text": "data.text",
    "cache": "target.cache",
    "console.advise": "cli",
    "console.chat": "console.generate",
    "console.demo": "cli",
    "console.export": "cli",
    "console.info": "cli",
    "console.regenerate": "cli",
    "console.serve": "cli",
    "console.streaming": "console.generate",
    "control.budget": "engine.plan",
    "control.evidence": "control.base",
    "control.pacer": "control.settings",
    "core.nucleus": "core.sampling",
    "coupling": "core.coupling",
    "data.int8_rows": "reference",
    "data.messages": "data.conversations",
    "data.text_file": "data.records",
    "decoding": "engine.round",
    "drafters": "drafting",
    "drafters.base": "drafting.base",
    "drafters.drawing": "drafting.sample",
    "drafters.feature_head": "methods.fspad.network",
    "drafters.growth": "drafting.expand",
    "drafting.intake": "drafting.draft_cache",
    "drafting.masks": "drafting.draft_cache",
    "drafting.repeats": "drafting.ngrams",
    "drafting.run_ahead": "drafting.draft_cache",
    "drafting.shared_vocabulary": "drafting.vocabulary",
    "engine.clock": "engine.plan",
    "engines": "export",
    "engines.vllm_plugin": "export.vllm_plugin",
    "evaluation.bench.settings": "evaluation.bench.methods",
    "evaluation.environment": "data.provenance",
    "evaluation.prompts": "api.prompts",
    "evaluation.spec_bench": "evaluation.bench.spec_bench",
    "evaluation.training_report": "training.held_out",
    "export.vllm_sampling": "export.vllm_plugin",
    "generation": "api.generation",
    "hugging_face": "api.hugging_face",
    "loading": "api.loading",
    "losses.features": "losses.objective",
    "losses.target_like": "losses.teacher",
    "losses.token_loss": "losses.cross_entropy",
    "methods.eagle3.network": "methods.eagle3.drafter",
    "methods.eesd.folder": "methods.eesd.network",
    "methods.fspad.draft_step": "methods.fspad.drafter",
    "methods.fspad.objective": "methods.fspad.loss",
    "methods.medusa.folder": "methods.medusa.drafter",
    "reference.prompts": "reference",
    "reference.quantize": "reference",
    "run": "target.runner",
    "sampling": "core.sampling",
    "serving.answer_text": "serving.jobs",
    "settings": "api.settings",
    "statistics": "core.statistics",
    "target.gguf_tokenizer": "target.gguf_file",
    "target.memory": "target.limits",
    "target.reach": "target.limits",
    "target.wrapped": "target.named",
    "text": "data.text",
    "training.conversations": "data.conversations",
    "training.head_config": "methods.fspad.beginning",
    "training.held_out_loss": "training.held_out",
    "training.memory": "training.plan",
    "training.model_card": "training.train",
    "training.objective": "training.preparation",
    "training.presets": "training.config",
    "training.tokenization": "data.tokenization",
    "tree": "core.tree",
    "user_cache": "output",
    "verify": "core.verify",
}


RENAMED = {
    "drafting.base": {"Pace": "Budget"},
    "drafting.ngrams": {"Repeats": "NgramSettings"},
    "losses.teacher": {"TargetLike": "Target"},
    "target.runner": {"TargetRun": "ModelRunner"},
}
"""Old names of what such modules hold, and the new ones."""


class _Moved(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        return ModuleSpec(name, self) if package == "outdraft" and rest in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"outdraft.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is {new} now; the old name goes with the next release", FutureWarning, stacklevel=2)
        module, held = ModuleType(spec.name), vars(importlib.import_module(new))
        renamed = {old: held[name] for old, name in RENAMED.get(new.removeprefix("outdraft."), {}).items()}
        module.__dict__.update(held, **renamed, __name__=spec.name, __path__=[])
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: the module is a view of the new one."""


def install(finders: Sequence[Any] = sys.meta_path) -> None:
    """Make the old names importable; asked only after every real module was looked for."""
    if not any(isinstance(finder, _Moved) for finder in finders):
        sys.meta_path.append(_Moved())
