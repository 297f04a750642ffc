"""Results as a table in the terminal, a Markdown file and a plot."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import matplotlib
import rich
from rich.table import Table as RichTable

from benchmarks._measure import Ratio, setting

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

_ON = jax.default_backend()
# Figures of accelerators stand beside those of CPUs, not in their place.
RESULTS = Path(__file__).parent / "results" / ("" if _ON == "cpu" else _ON)
_COLUMNS = ("what", "contestant", "baseline", "times the baseline", "baseline (ms)", "claim")


@dataclass
class _Row:
    what: str
    name: str
    baseline: str
    ratio: Ratio
    seconds: float | None
    claim: float | None

    @property
    def holds(self) -> bool:
        return self.claim is None or self.ratio.median <= self.claim

    def cells(self) -> tuple[str, ...]:
        claim = "" if self.claim is None else f"≤ {self.claim:.4g} {'✓' if self.holds else '✗'}"
        timed = self.seconds is not None and self.name == self.baseline
        milliseconds = f"{self.seconds * 1e3:.1f}" if timed else ""
        return (self.what, self.name, self.baseline, str(self.ratio), milliseconds, claim)


@dataclass
class Table:
    """The ratios of one benchmark.

    Attributes:
      name: of the files that are written.
      title: heading of table and plot.
    """

    name: str
    title: str
    rows: list[_Row] = field(default_factory=list)

    def add(
        self,
        what: str,
        name: str,
        baseline: str,
        ratio: Ratio,
        seconds: float | None = None,
        claim: float | None = None,
    ) -> None:
        """Adds a contestant.

        Args:
          what: the task; rows of one task stand together.
          name: of the contestant.
          baseline: of the ratio: the name of another contestant, or what the unit is.
          ratio: what was measured.
          seconds: time of the baseline; None where it is not time that is measured.
          claim: the largest ratio that we promise.
        """
        self.rows.append(_Row(what, name, baseline, ratio, seconds, claim))

    @property
    def holds(self) -> bool:
        """Whether every claim holds."""
        return all(row.holds for row in self.rows)

    def show(self) -> None:
        """Prints the table."""
        table = RichTable(*_COLUMNS, title=self.title, caption=setting())
        for row in self.rows:
            table.add_row(*row.cells(), style=None if row.holds else "red")
        rich.print(table)

    def write(self) -> None:
        """Writes ``results/<name>.md`` and ``results/<name>.png``."""
        RESULTS.mkdir(parents=True, exist_ok=True)
        lines = [f"# {self.title}", "", "Median over interleaved rounds (and quartiles).", ""]
        lines += [f"| {' | '.join(_COLUMNS)} |", f"|{' --- |' * len(_COLUMNS)}"]
        lines += [f"| {' | '.join(row.cells())} |" for row in self.rows]
        lines += ["", f"![{self.title}]({self.name}.png)", "", f"Measured with {setting()}.", ""]
        (RESULTS / f"{self.name}.md").write_text("\n".join(lines), encoding="utf-8")
        self._plot()

    def _plot(self) -> None:
        rows = [row for row in self.rows if row.name != row.baseline][::-1]
        figure, axes = plt.subplots(figsize=(8, 0.35 * len(rows) + 1.6), layout="constrained")
        labels = [f"{row.what}: {row.name}" for row in rows]
        medians = [row.ratio.median for row in rows]
        spread = [
            [row.ratio.median - row.ratio.low for row in rows],
            [row.ratio.high - row.ratio.median for row in rows],
        ]
        colors = ["tab:blue" if row.claim is not None else "tab:gray" for row in rows]
        axes.barh(labels, medians, xerr=spread, color=colors, height=0.6)
        for i, row in enumerate(rows):
            if row.claim is not None:
                axes.plot([row.claim] * 2, [i - 0.4, i + 0.4], color="tab:red")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlim(left=0.95 * min(0.95, *medians))
        axes.margins(y=0.5 / len(rows))
        axes.set_xlabel("times the baseline (red: what is claimed)")
        figure.suptitle(self.title, fontsize=10)
        figure.savefig(RESULTS / f"{self.name}.png", dpi=120)
        plt.close(figure)


def write_claims() -> None:
    """Writes ``results/claims.md``: every row with a claim of all tables that were ever written."""
    claims = RESULTS / "claims.md"
    head = ("benchmark", *_COLUMNS[:4], "claim")
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for file in sorted(set(RESULTS.glob("*.md")) - {claims}):
        for line in file.read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) == len(_COLUMNS) and cells[-1].startswith("≤"):
                lines.append(f"| {' | '.join((file.stem, *cells[:4], cells[-1]))} |")
    claims.write_text("\n".join([*lines, ""]), encoding="utf-8")


def show_claims(tables: Sequence[Table]) -> None:
    """Prints every claim of several benchmarks in one table."""
    shown = RichTable("benchmark", *_COLUMNS[:4], "claim", title="Claims", caption=setting())
    for table in tables:
        for row in table.rows:
            if row.claim is not None:
                *cells, _, claim = row.cells()
                shown.add_row(table.name, *cells, claim, style=None if row.holds else "red")
    rich.print(shown)
