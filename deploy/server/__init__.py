"""The HTTP front of a live node: OpenAI-compatible endpoints, operator commands, live page.

`create_app` makes it for anything that implements ``mmrl.deploy.protocol.Engine``.
"""

from mmrl.deploy.server.app import create_app, stop_streams
from mmrl.deploy.server.auth import read_keys
from mmrl.deploy.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app", "read_keys", "stop_streams"]
