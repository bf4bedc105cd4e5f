"""How many threads the model gets beside the server's own work."""

from __future__ import annotations

import pytest

from outdraft.errors import UserError
from outdraft.serving import server
from outdraft.serving.settings import ServeSettings


@pytest.mark.parametrize(
    ("cores", "usual", "expected"), [(1, 1, 1), (2, 2, 1), (8, 8, 7), (16, 8, 8), (4, 1, 1)], ids=str
)
def test_cores_of_the_model(monkeypatch: pytest.MonkeyPatch, cores: int, usual: int, expected: int) -> None:
    for name in server.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(server, "usable_cores", lambda: cores)
    monkeypatch.setattr(server.torch, "get_num_threads", lambda: usual)
    assert server.threads_of(None) == expected
    assert server.threads_of(None, "native-int8") == min(cores, usual)
    assert server.threads_of(3) == server.threads_of(3, "native") == 3
    monkeypatch.setenv("OMP_NUM_THREADS", str(usual))
    assert server.threads_of(None) == usual


def test_there_is_a_core_to_count() -> None:
    assert (server.usable_cores() or 0) >= 1
    with pytest.raises(UserError, match="--threads must be at least 1"):
        ServeSettings(threads=0)
