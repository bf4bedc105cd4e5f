"""A reduced draft vocabulary changes what is drafted and nothing of what is decided."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import test_losslessness as whole
from models import tiny
from outdraft.core.dice import Dice
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.core.tree import Tree
from outdraft.data.tokenization import Example, ExampleSet
from outdraft.drafting.base import RowContext
from outdraft.drafting.vocabulary import DraftVocabulary
from outdraft.errors import UserError
from outdraft.methods.checkpoint import save_drafter
from outdraft.methods.fspad.beginning import most_frequent
from outdraft.methods.fspad.drafter import FeatureDrafter
from outdraft.methods.fspad.folder import load_drafter
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from test_losslessness import NARROW, PLAIN, PROMPT, SHAPED, assert_same_law


def reduced(target: Target, kept: list[int], full: bool = True) -> FeatureDrafter:
    """A drafter of random weights that proposes these tokens only."""
    config = FeatureHeadConfig(target.hidden_size, 24, 2, 1, 8, target.vocab_size, full, full)
    config.draft_vocab_size = len(kept)
    torch.manual_seed(3)
    head = FeatureHead(config).to(target.dtype).eval()
    assert head.draft_tokens is not None
    head.draft_tokens.copy_(torch.tensor(kept))
    return FeatureDrafter(head, target)


@pytest.fixture(params=["fspad", "eagle"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name under which `test_losslessness` finds such a drafter: all tokens but the first and one more."""
    full = request.param == "fspad"
    monkeypatch.setitem(whole.DRAFTERS, "reduced", lambda target, _: reduced(target, [1, target.vocab_size - 1], full))
    return "reduced"


@pytest.mark.parametrize("shape", [whole.CHAIN, whole.TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("settings", [PLAIN, SHAPED, whole.GREEDY], ids=["plain", "shaped", "greedy"])
def test_candidates_chosen_by_rule_keep_the_law(kind, settings, shape):
    statistics = assert_same_law(kind, 3, PROMPT, settings, 3, shape, ())
    if settings is PLAIN:
        assert 0 < statistics.accepted < statistics.drafted


@pytest.mark.parametrize("settings", [NARROW, SHAPED], ids=["top-k", "shaped"])
@pytest.mark.parametrize("candidates", ["sampled", "sampled-with-replacement"])
def test_drawn_candidates_keep_the_law(kind, candidates, settings):
    statistics = assert_same_law(kind, 4, (0, 2, 1, 3), settings, 2, TreeShape(1, 2, 5, candidates))
    if settings is NARROW:
        assert 0 < statistics.accepted < statistics.drafted


def test_where_every_kept_token_is_banned_there_is_still_a_law(kind):
    banned = SamplingSettings(temperature=1, bad_words_ids=[[1], [3]])
    assert_same_law(kind, 4, (0, 2, 0), banned, 2, TreeShape(1, 2, 5, "sampled"))


def test_a_law_that_forgets_what_was_kept_would_be_seen(kind, monkeypatch):
    """Declare candidates drawn from the kept tokens with a law over all of them, and the text's law is off."""
    growing = DraftVocabulary.grow

    def forgetting(self, *args):
        tree = growing(self, *args)
        if tree.draft_probs is not None:
            tree.draft_probs = (tree.draft_probs + 1) / (tree.draft_probs + 1).sum(-1, keepdim=True)
        return tree

    monkeypatch.setattr(DraftVocabulary, "grow", forgetting)
    with pytest.raises(AssertionError):
        assert_same_law(kind, 4, (0, 2, 1, 3), NARROW, 2, TreeShape(1, 2, 5, "sampled"))


def proposed(drafter: FeatureDrafter, shape: TreeShape) -> Tree:
    """The first tree after a prompt, as greedy decoding asks for it."""
    recorded = whole.Recorded(drafter)
    rows = whole.rows_of(drafter.target, [[5, 9, 9, 3]], SamplingSettings(), 8, [Dice(0)])
    whole.finish(drafter.target, recorded, rows, shape)
    return recorded.proposed[0][1]


@pytest.mark.parametrize("backend", ["eager", "packed"])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-tied", "gemma2", "cohere", "gpt2"])
@torch.inference_mode()
def test_kept_logits_are_the_heads_own(family: str, backend: str) -> None:
    """Soft capping, scaling and biases as the family has them; everywhere else there is no probability."""
    target = Target(tiny(family, dtype=torch.float32), backend=backend)
    kept = torch.tensor([2, 3, 11, 29])
    vocabulary = DraftVocabulary(kept, target)
    p = torch.randn(2, 3, target.hidden_size, generator=torch.Generator().manual_seed(0))
    own = vocabulary.head(p)
    torch.testing.assert_close(own, target.head(p)[..., kept], atol=1e-5, rtol=1e-5)
    law = vocabulary.everywhere(own).softmax(-1)
    assert law.shape[-1] == target.vocab_size and (law[..., kept].sum(-1) - 1).abs().max() < 1e-6
    torch.testing.assert_close(law[..., kept], own.softmax(-1))
    others = [token for token in range(target.vocab_size) if token not in kept.tolist()]
    assert (law[..., others] == 0).all()


def test_only_kept_tokens_are_drafted_greedily_or_drawn() -> None:
    target = Target(tiny("llama-gqa"))
    kept = [7, 30, 31]
    drafter = reduced(target, kept)
    for shape, temperature in ((TreeShape(2, 4, 9), 0.0), (TreeShape(2, 2, 7, "sampled"), 1.0)):
        recorded = whole.Recorded(drafter)
        rows = whole.rows_of(target, [[5, 9, 9, 3]], SamplingSettings(temperature=temperature), 8, [Dice(0)])
        whole.finish(target, recorded, rows, shape)
        for prefix, tree in recorded.proposed:
            assert tree.tokens[0, 0] == prefix[-1], "the root is the target's, whatever is kept"
            assert set(tree.tokens[0, 1 : tree.counts[0]].tolist()) <= set(kept)
            assert not tree.children(0) or tree.counts[0] > 1


def test_a_vocabulary_kept_whole_drafts_the_same_tree() -> None:
    target = Target(tiny("llama-gqa"))
    everything = reduced(target, list(range(target.vocab_size)))
    plain = FeatureDrafter(everything.head, target)
    plain.vocabulary = None
    for shape in (TreeShape.chain(3), TreeShape(2, 4, 12)):
        assert torch.equal(proposed(everything, shape).tokens, proposed(plain, shape).tokens)


# --- checkpoints and training ----------------------------------------------------------------------------------------


def saved(folder: Path, kept: list[int]) -> Path:
    head = FeatureHead(FeatureHeadConfig(8, 12, 2, 1, 4, 16, draft_vocab_size=len(kept)))
    if head.draft_tokens is not None:
        head.draft_tokens.copy_(torch.tensor(kept))
    return save_drafter(folder, head.bfloat16(), target_id="none")


def test_the_kept_tokens_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    head = load_drafter(saved(tmp_path / "drafter", [3, 5, 15])).head
    assert head.draft_tokens is not None
    assert head.draft_tokens.tolist() == [3, 5, 15] and head.draft_tokens.dtype == torch.long
    assert head.config.draft_vocab_size == 3
    assert load_drafter(saved(tmp_path / "whole", [])).head.draft_tokens is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "lacks draft_tokens"),
        ([3, 3, 5], "3 different token ids below 16"),
        ([3, 3, 5, 7], "3 different"),
        ([3, 5, 16], "below 16"),
    ],
)
def test_damaged_kept_tokens_are_refused(tmp_path: Path, wrong: list[int] | None, message: str) -> None:
    file = saved(tmp_path / "drafter", [3, 5, 15]) / "model.safetensors"
    tensors = load_file(file)
    del tensors["draft_tokens"]
    save_file(tensors if wrong is None else {**tensors, "draft_tokens": torch.tensor(wrong)}, file)
    with pytest.raises(UserError, match=message):
        load_drafter(file.parent)


def test_more_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="at most the vocabulary's 16, not 17"):
        FeatureHeadConfig(8, 12, 2, 1, 4, 16, draft_vocab_size=17)


@pytest.mark.parametrize("method", ["eesd", "medusa"])
def test_methods_without_it_refuse_the_setting(method: str) -> None:
    with pytest.raises(UserError, match=f"is a setting of eagle3, fspad, eagle and fspad-1f, not of {method}"):
        DrafterConfig(data="x", output_dir="y", method=method, draft_vocab_size=8, exit_layer=None)


def test_the_most_frequent_tokens_of_the_responses_are_kept() -> None:
    prompt, response = [9] * 7 + [4, 4], [5, 5, 5, 2, 2, 8, 4, 1]
    ids = torch.tensor(prompt + response)
    mask = torch.tensor([False] * len(prompt) + [True] * len(response))
    examples = ExampleSet([Example(ids, mask)])
    # 5 and 2 are the most frequent; of those that came once, 4 stood in the prompt too; then the smaller id
    assert most_frequent(examples, 12, 2).tolist() == [2, 5]
    assert most_frequent(examples, 12, 3).tolist() == [2, 4, 5]
    assert most_frequent(examples, 12, 4).tolist() == [1, 2, 4, 5]
    assert most_frequent(examples, 12, 6).tolist() == [1, 2, 4, 5, 8, 9]


def test_a_warper_sees_ids_of_the_target() -> None:
    """A penalty on a kept token acts on that token, wherever it stands in the reduced vocabulary."""
    target = Target(tiny("llama-gqa", dtype=torch.float32))
    vocabulary = DraftVocabulary(torch.tensor([7, 30, 31]), target)
    warper = Warper(SamplingSettings(temperature=1, logit_bias={30: 60.0}), 1, target.vocab_size)
    context = RowContext([torch.tensor([7])], [warper], [Dice(0)])
    logits = torch.zeros(1, 3)
    tree = vocabulary.grow(
        torch.tensor([1]), logits, lambda *_: logits[:, None], TreeShape(0, 1, 2, "sampled"), context
    )
    assert tree.tokens.tolist() == [[1, 30]]
