"""Whether a server can be reached at all, tried before work that needs it. Torch-free."""

import socket


def why_unreachable(host: str, port: int, timeout_s: float) -> str | None:
    """Why no TCP connection can be made to ``host``, in the system's words; None if one can (it is closed at once)."""
    if not 0 < port < 65_536:  # some systems take the lower 16 bits of it
        return f"{port} is no port, expected 1 to 65535"
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except (OSError, ValueError) as error:  # the second: a name that cannot be one
        return getattr(error, "strerror", None) or str(error)
    return None
