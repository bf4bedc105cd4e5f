"""What is counted, and what the derived figures are called."""

from __future__ import annotations

import json
import math

from outdraft.core.statistics import Statistics


def two_rounds() -> Statistics:
    statistics = Statistics(prefill_seconds=1)
    statistics.add_round(drafted=5, depth=3, accepted=2, emitted=3)
    statistics.add_seconds(0.1, 0.2, 0.3)
    statistics.add_round(drafted=3, depth=2, accepted=0, emitted=1)
    statistics.add_seconds(0.1, 0.2, 0.3)
    return statistics


def test_tau_counts_the_bonus_token_and_the_acceptance_rate_does_not():
    statistics = two_rounds()
    assert statistics.tau == (3 + 1) / 2
    assert statistics.acceptance_rate == 2 / 8
    assert statistics.acceptance_by_position == [1 / 2, 1 / 2, 0 / 1]
    assert statistics.lengths == [2, 0]
    assert math.isclose(statistics.decode_seconds, 1.2)


def test_nothing_drafted_is_not_a_number_rather_than_an_error():
    assert math.isnan(Statistics().tau) and math.isnan(Statistics().acceptance_rate)
    plain = Statistics()
    plain.add_round(0, 0, 0, 1)
    assert plain.tau == 1 and plain.acceptance_by_position == []


def test_rows_add_up_and_share_the_seconds_of_their_batch():
    other = Statistics(prefill_seconds=0.5)
    other.add_round(drafted=1, depth=1, accepted=1, emitted=2)
    other.add_seconds(1, 1, 1)
    for parts in ([two_rounds(), other], [other, two_rounds()]):
        total = Statistics.sum(parts)
        assert (total.rounds, total.emitted, total.drafted, total.accepted) == (3, 6, 9, 3)
        assert total.reached == [3, 2, 1] and total.accepted_at == [2, 1, 0]
        assert sorted(total.lengths) == [0, 1, 2]
        assert math.isclose(total.decode_seconds, 4.2) and total.prefill_seconds == 1.5
        together = Statistics.sum(parts, together=True)
        assert math.isclose(together.draft_seconds, 1) and together.prefill_seconds == 1
    assert other.reached == [1], "the parts stay as they were"


def test_everything_can_be_written_as_json():
    written = json.loads(json.dumps(two_rounds().as_dict()))
    assert written["tau"] == 2 and written["drafted"] == 8 and written["seconds"]["prefill"] == 1
