"""What an operator decides about the HTTP front."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the front.

    Attributes:
        api_keys: Keys that clients and operators must show; without any, everybody may do
            everything.
        max_request_bytes: Largest body of a request.
        host: The address that the server listens on.
    """

    api_keys: tuple[str, ...] = ()
    max_request_bytes: int = 4 << 20
    host: str = "127.0.0.1"
