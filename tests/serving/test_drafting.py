"""What a server drafts: by the rows that run, or chosen by the machine."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from running import NAME, Served, tiny_model

from outdraft.api.draft_settings import DraftSettings
from outdraft.core.shape import BATCH, BATCH_CHAIN, GREEDY_CHAIN, TreeShape
from outdraft.drafting.base import Drafter
from outdraft.errors import UserError
from outdraft.methods.draft_model.drafter import DraftModel
from outdraft.serving.server import drafting

PROMPTS = ["red cat", "green dog", "blue sun", "one moon", "two", "three red dogs"]


def test_many_greedy_rows_draft_as_a_batch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftModel, "default_shape", Drafter.default_shape)
    model = tiny_model()
    drafts = drafting(model, DraftSettings())
    assert drafts.greedy(1) == drafts.greedy(BATCH - 1) == GREEDY_CHAIN
    assert drafts.greedy(BATCH) == drafts.greedy(16) == BATCH_CHAIN
    largest = max(model.drafter.slots(shape) for shape in (GREEDY_CHAIN, BATCH_CHAIN))
    assert drafts.sampling is None, "no text depends on what is drafted"
    assert drafting(model, DraftSettings(candidates="sampled")).sampling == TreeShape.chain(4, candidates="sampled")
    assert drafts.slots == largest + drafts.ngrams.most
    assert drafting(model, DraftSettings(prompt_lookup_min=0)).slots == largest
    named = drafting(model, DraftSettings(num_speculative_tokens=2))
    assert named.greedy(1) == named.greedy(16)
    with pytest.raises(UserError, match="exact=True is not for servers"):
        drafting(model, DraftSettings(exact=True))


@pytest.mark.parametrize("tree", [{}, {"tree_size": "auto"}], ids=["by rows", "by the machine"])
def test_answers_are_the_offline_ones(starting: Callable[..., Served], tree: dict[str, str]) -> None:
    served = starting(tree=tree)
    with served.client() as http, ThreadPoolExecutor(len(PROMPTS)) as pool:
        bodies = [{"prompt": prompt, "max_tokens": 24, "temperature": 0} for prompt in PROMPTS * 3]
        answers = list(pool.map(lambda body: http.post("/v1/completions", json=body).json(), bodies))
    texts = [answer["choices"][0]["text"] for answer in answers]
    offline = {prompt: served.model.generate(prompt, max_new_tokens=24).text for prompt in PROMPTS}
    assert texts == [offline[body["prompt"]] for body in bodies]
    assert served.figure("spec_decode_num_accepted_tokens_total") > 0


def test_many_clients_get_offline_texts_while_measured_costs_decide(starting: Callable[..., Served]) -> None:
    """The default controller: rows come and go, the tuner and the rows' controllers choose what is drafted."""
    openai = pytest.importorskip("openai", reason="OpenAI's client")
    served = starting(controller=None)
    asked: list[dict[str, Any]] = [
        {"prompt": f"cat {i}", "max_tokens": 6 + 5 * (i % 4), "seed": i, "temperature": (0.0, 0.9)[i % 3 == 0]}
        for i in range(24)
    ]
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda one: client.completions.create(model=NAME, **one).choices[0].text, asked))
    for one, text in zip(asked, found, strict=True):
        offline = served.model.generate(
            one["prompt"], max_new_tokens=one["max_tokens"], seed=one["seed"], temperature=one["temperature"]
        )
        assert text == offline.text
    assert served.figure("spec_decode_num_draft_tokens_total") > 0
