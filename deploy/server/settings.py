"""What an operator decides about the HTTP front."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the front.

    Attributes:
        api_keys: Keys that clients must show; without any, everybody may ask.
        admin_keys: Keys that operators must show for what is below ``/admin``; without any, the
            API keys serve there too.
        max_request_bytes: Largest body of a request.
        host: The address that the server listens on.
    """

    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    max_request_bytes: int = 4 << 20
    host: str = "127.0.0.1"
