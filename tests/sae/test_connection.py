"""A trial connection, and what its two users make of it."""

import socket

import pytest

from autointerp.retries import why_silent
from sae.connection import why_unreachable
from sae.ray_jobs import _reach


def test_a_server_is_there_or_the_system_says_why() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert why_unreachable("127.0.0.1", port, 5.0) is None
        assert why_silent(f"http://127.0.0.1:{port}/v1") is None
        _reach(f"127.0.0.1:{port}")
        _reach("auto")  # no HOST:PORT: for Ray to understand
    assert why_unreachable("127.0.0.1", port, 5.0) == "Connection refused"
    assert "(Connection refused): start it" in str(why_silent(f"http://127.0.0.1:{port}/v1"))
    with pytest.raises(OSError, match="Connection refused"):
        _reach(f"127.0.0.1:{port}")


def test_what_no_host_and_no_port_can_be_is_said_too() -> None:
    assert why_unreachable("127.0.0.1", 70_000, 1.0) == "70000 is no port, expected 1 to 65535"
    assert why_unreachable("a" * 70, 80, 1.0)
    assert "(Port out of range 0-65535)" in str(why_silent("http://127.0.0.1:70000/v1"))
    with pytest.raises(OSError, match="70000 is no port"):
        _reach("127.0.0.1:70000")
