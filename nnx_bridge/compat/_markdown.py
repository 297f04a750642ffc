"""The table of differences as text for the guide `docs/differences.md`.

`python -m nnx_bridge.compat._markdown` prints it; a test compares it with the guide.
"""

from __future__ import annotations

from collections.abc import Iterable

from nnx_bridge.compat._difference import Difference, Kind
from nnx_bridge.compat._differences import DIFFERENCES

_HEAD = "| Linen | NNX | verdict | what | route | ours |\n| --- | --- | --- | --- | --- | --- |"


def markdown(kind: Kind, rows: Iterable[Difference] = DIFFERENCES) -> str:
    """The rows of one kind as a Markdown table.

    Example:
        >>> row = Difference("Dense", "Linear", "equal", "takes the size first", "native")
        >>> print(markdown("layer", [row]).splitlines()[-1])
        | `Dense` | `Linear` | equal | takes the size first | native |  |
    """
    lines = [_HEAD]
    for row in rows:
        if row.kind == kind:
            nnx = f"`{row.nnx}`" if row.nnx else ""
            ours = f"`{row.compat}`" if row.compat else ""
            cells = [f"`{row.linen}`", nnx, row.verdict, _what(row), row.route, ours]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _what(row: Difference) -> str:
    versions = [f"from flax {row.since}"] if row.since else []
    versions += [f"before flax {row.until}"] if row.until else []
    text = f"{', '.join(versions)}: {row.what}" if versions else row.what
    if row.equal_where:
        settings = ", ".join(
            f"`{name}` {' or '.join(map(_value, values))}"
            for name, values in row.equal_where.items()
        )
        text += f". Equal where {settings}"
    return f"{text} ({row.source})" if row.source else text


def _value(value: object) -> str:
    return f"`{getattr(value, '__name__', value)}`"


if __name__ == "__main__":
    for chosen in ("layer", "transform", "api"):
        print(markdown(chosen), end="\n\n")
