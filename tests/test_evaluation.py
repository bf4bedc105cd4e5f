"""Measuring: turns are taken fairly, figures are what their names say, texts are judged rightly."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from cli_fixtures import write_lines
from outdraft.api.generation import SpeculativeModel
from outdraft.console.streaming import stream
from outdraft.core.statistics import Statistics
from outdraft.core.tree import Tree
from outdraft.errors import UserError
from outdraft.evaluation.audit.stock import Noise, stock_logits
from outdraft.evaluation.bench import divergences as judging
from outdraft.evaluation.bench.divergences import Difference, Divergence, divergences, divergences_by_method, last_place
from outdraft.evaluation.bench.measure import PLAIN, Answer, Contender, Run, compare, speculative
from outdraft.evaluation.bench.methods import contenders
from outdraft.evaluation.bench.summary import interval, summarise
from outdraft.evaluation.prompts import encode, read_prompts
from outdraft.evaluation.training_report import beginnings, hold_out, tau_meter
from outdraft.methods.draft_model import DraftModel
from outdraft.methods.fspad.drafter import FeatureDrafter
from outdraft.methods.fspad.head_config import feature_head_config
from outdraft.methods.fspad.network import FeatureHead
from outdraft.methods.prompt_lookup import PromptLookup
from outdraft.target.runner import Output, TargetRun
from outdraft.target.target import Target
from training.tiny import tiny_target, write_chats

PROMPTS = [[10, 20, 30], [40, 50, 60, 70]]


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(torch.float64)


def new_head(target: Target) -> FeatureHead:
    torch.manual_seed(3)
    return FeatureHead(feature_head_config(target))


# --- taking turns ------------------------------------------------------------------------------------------------


def test_every_contender_decodes_every_prompt_and_each_goes_first_in_turn() -> None:
    order: list[tuple[str, int, int]] = []

    def contender(name: str) -> Contender:
        def decode(prompt: list[int], settings: dict[str, Any]) -> Answer:
            order.append((name, prompt[0], settings["seed"]))
            return Answer([1], 1.0, Statistics())

        return Contender(name, decode, "none")

    rivals = [contender(name) for name in "abc"]
    runs = compare(rivals, PROMPTS, repetitions=3, seed=5)
    warm_up, counted = order[:3], order[3:]
    assert [name for name, *_ in warm_up] == ["a", "b", "c"]
    assert [name for name, *_ in counted[::3]] == ["a", "b", "c", "a", "b", "c"]
    for turn in range(6):
        together = counted[3 * turn : 3 * turn + 3]
        assert {name for name, *_ in together} == {"a", "b", "c"}
        assert len({(prompt, seed) for _, prompt, seed in together}) == 1
    for own in runs.values():
        assert [(run.prompt, run.repetition) for run in own] == [(p, r) for p in range(2) for r in range(3)]


def test_all_greedy_contenders_say_the_same(target: Target) -> None:
    rivals = [
        *contenders(target, include_transformers=True),
        speculative("head", target, FeatureDrafter(new_head(target).double(), target)),
    ]
    runs = compare(rivals, PROMPTS, max_new_tokens=12)
    texts = {name: [run.answer.tokens for run in own] for name, own in runs.items()}
    assert list(texts) == [PLAIN, "transformers generate", "prompt-lookup", "head"]
    for name, own in texts.items():
        assert own == texts[PLAIN], name
    assert runs["head"][0].answer.statistics.drafted > 0


# --- figures -----------------------------------------------------------------------------------------------------


def fake_runs(seconds: list[float], tokens: int = 11) -> list[Run]:
    counts = Statistics(rounds=5, emitted=tokens - 1, drafted=20, accepted=5, prefill_seconds=0.5, verify_seconds=2.0)
    return [Run(i, 0, Answer([1] * tokens, s, counts)) for i, s in enumerate(seconds)]


def test_speedup_is_the_median_of_paired_ratios() -> None:
    plain, own = fake_runs([10.0, 20.0, 30.0]), fake_runs([5.0, 5.0, 20.0])
    found = summarise("x", "fspad", 7, own, plain, [])
    assert found.speedup == 2.0
    low, high = found.speedup_interval
    assert 1.5 <= low <= 2.0 <= high <= 4.0
    assert found.tokens_per_second == 33 / 30
    assert found.decode_tokens_per_second == 30 / 6
    assert found.first_token_seconds == 0.5
    assert found.statistics.tau == 2.0
    assert found.identical is True
    assert set(found.headline()) == {"tau", "tokens_per_second", "speedup", "identical"}
    assert summarise("x", "fspad", 7, own, plain, None).identical is None


def test_intervals_draw_the_repetitions_of_a_prompt_together() -> None:
    ratios = np.array([1.0, 1.0, 1.0, 3.0, 3.0, 3.0])
    assert interval(ratios, [0, 0, 0, 1, 1, 1]) == (1.0, 3.0)
    assert interval(np.full(6, 2.0), range(6)) == (2.0, 2.0)


def test_streamed_figures_equal_those_of_generate(target: Target) -> None:
    for drafter in (
        None,
        PromptLookup(),
        DraftModel(target, target),
        FeatureDrafter(new_head(target).double(), target),
    ):
        for count in (1, 2, 9, 14):
            model = SpeculativeModel(target, drafter)
            expected = model.generate(PROMPTS[0], max_new_tokens=count)
            streamed = stream(model.stream(PROMPTS[0], max_new_tokens=count), Console(file=io.StringIO()))
            assert streamed.accepted == expected.accepted[0]
            assert streamed.finish_reason == expected.finish_reasons[0]
            assert streamed.tau == pytest.approx(expected.tau, nan_ok=True)


# --- judging texts -------------------------------------------------------------------------------------------------


def judged(target: Target, plain: list[list[int]], others: list[list[int]]) -> list[Divergence]:
    """Of texts after `PROMPTS`, by the way the benchmark goes."""

    def runs(texts: list[list[int]]) -> list[Run]:
        return [Run(place, 0, Answer(tokens, 1.0, Statistics())) for place, tokens in enumerate(texts)]

    return divergences_by_method(target, PROMPTS, runs(plain), {"other": runs(others)})["other"]


def test_equal_texts_have_no_divergence(target: Target) -> None:
    assert judged(target, [[1, 2], [3]], [[1, 2], [3]]) == []


def test_a_divergence_names_place_gap_and_noise(target: Target) -> None:
    plain = SpeculativeModel(target).generate(PROMPTS, max_new_tokens=14).tokens
    other = [list(tokens) for tokens in plain]
    place = min(11, len(plain[1]) - 1)
    other[1][place] = (plain[1][place] + 1) % target.vocab_size
    (found,) = judged(target, plain, other)
    ids = torch.tensor([[*PROMPTS[1], *plain[1][:place]]])
    logits = target.model(ids).logits[0, -1].detach()
    assert (found.prompt, found.position, found.turn) == (1, place, 0)
    assert found.gap == pytest.approx(float(logits[plain[1][place]] - logits[other[1][place]]), rel=1e-4)
    assert 0 <= found.noise < 1e-6 < found.gap and not found.tie


def test_a_text_that_just_ends_diverges_without_a_gap(target: Target) -> None:
    for plain, other in (([1, 2, 3], [1, 2]), ([1, 2], [1, 2, 3])):
        (found,) = judged(target, [plain], [other])
        assert found.position == 2 and math.isnan(found.gap) and not found.tie


def test_contenders_that_leave_one_text_are_judged_alike(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SpeculativeModel(target).generate(PROMPTS[0], max_new_tokens=9).tokens[0]
    others = [[*plain[:place], (plain[place] + 1) % target.vocab_size] for place in (7, 2, 0)]
    alone = [divergences(target, [Difference(0, PROMPTS[0], plain, other)])[0] for other in others]
    measured = []
    monkeypatch.setattr(judging, "measured_noise", lambda laws, ids, texts, advance: measured.append(texts) or Noise())
    together = divergences(target, [Difference(0, PROMPTS[0], plain, other) for other in others])
    assert [(one.position, one.gap) for one in together] == [(one.position, one.gap) for one in alone]
    assert [one.position for one in together] == [7, 2, 0]
    assert measured == [[plain]], "the noise of a text that several leave is measured once"


def test_low_precision_ties_are_told_from_defects() -> None:
    target = tiny_target(torch.bfloat16)
    plain = SpeculativeModel(target).generate(PROMPTS[0], max_new_tokens=30).tokens[0]
    single = torch.cat(list(stock_logits(target, PROMPTS[0], [plain[:-1]])))
    assert [int(best) for best in single.argmax(-1)] == plain
    worst = int(single[-1].argmin())
    (found,) = judged(target, [plain], [[*plain[:-1], worst]])
    assert found.gap > found.noise > 0 and not found.tie


def test_one_unit_in_the_last_place_is_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that parts early leaves few positions to measure noise on, and they can all happen to round alike."""
    monkeypatch.setattr(judging, "measured_noise", lambda *given: Noise(positions=2))
    target = tiny_target(torch.bfloat16)
    for start in range(200):
        prompt = [start % 90 + 1, start // 7 + 2, 3]
        (logits,) = next(stock_logits(target, prompt, [[0]]))
        (first, second), (one, other) = logits.topk(2)
        if 0 < float(first - second) <= last_place(float(first), logits.dtype):
            break
    else:
        pytest.fail("no two logits one unit apart")
    third = int(logits.argmin())
    tie, far = divergences(target, [Difference(0, prompt, [int(one)], [token]) for token in (int(other), third)])
    assert tie.gap == tie.noise > 0 and tie.tie
    assert not far.tie
    (reversed_,) = divergences(target, [Difference(0, prompt, [third], [int(one)])])
    assert reversed_.gap < 0 and not reversed_.tie, "plain decoding far from the stock model's choice is a defect too"

    # In single precision the same two tokens are well apart, however little noise was measured.
    (exact,) = divergences(tiny_target(torch.float32), [Difference(0, prompt, [int(one)], [int(other)])])
    assert abs(exact.gap) > 100 * exact.noise > 0 and not exact.tie


@pytest.mark.parametrize(
    ("magnitude", "dtype", "expected"),
    [
        (8.0, torch.bfloat16, 0.0625),
        (15.9, torch.bfloat16, 0.0625),
        (7.9, torch.bfloat16, 0.03125),
        (1.0, torch.float32, 2**-23),
        (0.75, torch.float16, 2**-11),
    ],
)
def test_the_last_place(magnitude: float, dtype: torch.dtype, expected: float) -> None:
    assert last_place(magnitude, dtype) == expected
    number = torch.tensor(magnitude, dtype=dtype)
    assert float(torch.nextafter(number, number + 100) - number) == expected


def test_a_broken_tree_cannot_pass_for_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise is measured without the code that is under suspicion."""
    target = tiny_target(torch.float32)
    plain = SpeculativeModel(target).generate(PROMPTS, max_new_tokens=14).tokens
    whole = TargetRun.tree

    def broken(self: TargetRun, tree: Tree) -> Output:
        output = whole(self, tree)
        return output if tree.nodes == 1 else Output(output.features.roll(1, dims=-1), output.taps)

    monkeypatch.setattr(TargetRun, "tree", broken)
    wrong = SpeculativeModel(target, DraftModel(tiny_target(torch.float32), target)).generate(
        PROMPTS, max_new_tokens=14
    )
    found = judged(target, plain, wrong.tokens)
    assert found and not any(one.tie for one in found)


# --- prompts -----------------------------------------------------------------------------------------------------


def test_prompts_of_every_shape(tmp_path: Path) -> None:
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    path = write_lines(
        tmp_path / "p.jsonl",
        {"messages": [question, answer, question, answer]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"turns": ["first", "second"]},
        "",
        {"prompt": "p"},
        {"text": "t"},
    )
    first = [{"role": "user", "content": "first"}]
    assert read_prompts(path) == [[question, answer, question], [question], first, "p", "t"]
    assert read_prompts(path, 2) == [[question, answer, question], [question]]
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    assert read_prompts(tmp_path / "p.txt") == ["one", "two"]


@pytest.mark.parametrize(
    "record",
    ["{", "3", {}, {"prompt": ""}, {"text": 1}, {"turns": []}, {"messages": []}, {"messages": [{"role": "x"}]}],
    ids=json.dumps,
)
def test_lines_without_a_prompt_are_named(tmp_path: Path, record: Any) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "fine"}, record)
    with pytest.raises(UserError, match=r"p\.jsonl:2"):
        read_prompts(path)


def test_questions_become_plain_text_without_a_chat_template() -> None:
    bare = tiny_target(chat_template=None)
    assert bare.tokenizer is not None
    assert encode([[{"role": "user", "content": "hi"}]], bare) == [list(bare.tokenizer("hi").input_ids)]


# --- holding out -------------------------------------------------------------------------------------------------


def test_the_last_conversations_are_held_out(tmp_path: Path) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 30)
    split = hold_out(data, 2)
    lines = data.read_text().splitlines()
    written = split.write(tmp_path / "split")
    assert [json.loads(line) for line in written.read_text().splitlines()] == [json.loads(line) for line in lines[:-2]]
    assert split.prompts == [json.loads(line)["messages"][:1] for line in lines[-2:]]
    before = written.read_bytes()
    assert hold_out(data, 2).write(tmp_path / "split").read_bytes() == before


def test_answers_to_one_prompt_are_not_divided(tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    turns = [[{"role": "user", "content": str(i // 3)}, {"role": "assistant", "content": str(i)}] for i in range(30)]
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    split = hold_out(data, 2)
    assert [one.messages[1]["content"] for one in split.held_out] == ["27", "28", "29"]
    assert len(split.trained) == 27


def test_small_data_are_not_divided(tmp_path: Path) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 5)
    split = hold_out(data)
    assert split.write(tmp_path / "split") == data and len(split.prompts) == 5
    assert not (tmp_path / "split").exists()


def test_texts_are_measured_from_their_beginning() -> None:
    target = tiny_target()
    short, long = beginnings(["a" * 100, "b" * 1000], target)
    assert (len(short), len(long)) == (25, 64)


def test_measuring_tau_leaves_the_drafter_alone() -> None:
    target = tiny_target(torch.bfloat16)
    head = new_head(target).train()
    before = {name: weight.clone() for name, weight in head.state_dict().items()}
    found = tau_meter(target, PROMPTS, 16)(head)
    assert found["tau"] >= 1 and 0 <= found["acceptance_rate"] <= 1
    assert head.training and all(weight.requires_grad for weight in head.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in head.state_dict().items())
    bound = SpeculativeModel(target, FeatureDrafter(new_head(target).bfloat16().eval(), target))
    assert found["tau"] == bound.generate(PROMPTS, max_new_tokens=16).tau
