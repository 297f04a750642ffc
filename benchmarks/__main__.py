"""Runs the benchmarks: ``python -m benchmarks [NAME ...]``; exits with 1 where a claim fails."""

import importlib
import pkgutil
import sys

import benchmarks
from benchmarks._results import show_claims, write_claims


def main(names: list[str]) -> int:
    """Runs the named benchmarks, all of them by default, and writes their results."""
    known = [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name[0] != "_"]
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    tables = []
    for name in names or known:
        table = importlib.import_module(f"benchmarks.{name}").run()
        table.show()
        table.write()
        tables.append(table)
    show_claims(tables)
    write_claims()
    failed = [table.name for table in tables if not table.holds]
    if failed:
        print(f"claims that do not hold: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
