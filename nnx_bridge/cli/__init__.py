"""The command `flaxlift`."""

from nnx_bridge.cli._app import main

__all__ = ["main"]
