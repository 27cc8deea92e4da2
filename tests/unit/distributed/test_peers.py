"""What a process says when another one is gone."""

import pytest

from preftune.distributed import peers
from preftune.distributed.peers import lost_peer, meet_peers

CLOSED = (
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer "
    "[10.0.0.2]:40312. This is typically caused by a remote worker hanging. GLHF!"
)
TIMED_OUT = (
    "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for "
    "recv operation to complete"
)


@pytest.fixture(autouse=True)
def _four_ranks(monkeypatch):
    monkeypatch.setattr(peers, "_PEERS", [])
    monkeypatch.setenv("RANK", "1")
    meet_peers(lambda own: [("a", "10.0.0.1"), own, ("b", "10.0.0.2"), ("c", "10.0.0.3")])


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            RuntimeError(CLOSED),
            "rank 1 has lost rank 2 on b (10.0.0.2) (Connection closed by peer [10.0.0.2]:40312); ",
        ),
        (
            RuntimeError(TIMED_OUT),
            "rank 1 has lost one of rank 0 on a (10.0.0.1), rank 2 on b (10.0.0.2), rank 3 on c",
        ),
        (
            peers.dist.DistNetworkError("Failed to recv, got 0 bytes"),
            "rank 1 has lost one of rank 0 on",
        ),
    ],
)
def test_a_lost_peer_is_named(error, text):
    lost = lost_peer(error)
    assert lost is not None
    assert str(lost).startswith(text)
    assert "Run the same command again to go on from the last checkpoint" in str(lost)
    assert lost.exit_code == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2: timed out"), ValueError(CLOSED), RuntimeError("gloo?")]
)
def test_other_errors_keep_their_traceback(error):
    assert lost_peer(error) is None
