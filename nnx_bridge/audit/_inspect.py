"""Looking at a Linen module, a class, a Python module or a whole package."""

from __future__ import annotations

import importlib.util
import inspect as python_inspect
import re
from collections.abc import Callable, Set
from pathlib import Path
from types import ModuleType
from typing import Any

from flax import linen as nn

from nnx_bridge.audit._definitions import Source
from nnx_bridge.audit._findings import Audit
from nnx_bridge.audit._source import audit_sources, linen_classes, names_used
from nnx_bridge.audit._trace import audit_case
from nnx_bridge.equivalence import Case, CaseError

Progress = Callable[[str, int, int], None]


def inspect(
    target: nn.Module | Case | type[nn.Module] | ModuleType | str | Path,
    *inputs: Any,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Audit:
    """Lists every use of Linen in a model or a package, and what each becomes in NNX.

    Use it before a migration, to see which modules are mechanical work and which are not. A module
    with inputs is traced, so the audit says what runs, with the settings it has; nothing is
    computed, and no memory for parameters is needed. Everything else is read as source text: the
    whole is seen, whether it runs or not, but settings are known only where they are constants.

    Args:
      target: A Linen module or an `nnx_bridge.Case`; a class of Linen modules; a Python module or
        package, also by its name (`my_project.models`) or as a path.
      *inputs: For a module, the arguments of the call: arrays, or `jax.ShapeDtypeStruct`.
      progress: Is called with the name of each file, its number and how many there are.
      **kwargs: For a module, keyword arguments of the call.

    Returns:
      The audit.

    Raises:
      CaseError: There is nothing to look at, or the module does not run.

    Example:
        >>> import jax
        >>> audit = inspect(nn.GRUCell(4), jax.ShapeDtypeStruct((1, 4), "float32"),
        ...                 jax.ShapeDtypeStruct((1, 3), "float32"))
        >>> [(finding.name, finding.use) for finding in audit.findings if finding.kind == "layer"]
        [('GRUCell', 'nnx_bridge.compat.GRUCell')]
    """
    if isinstance(target, nn.Module):
        target = Case(target, inputs, kwargs)
    elif inputs or kwargs:
        raise CaseError(
            f"inputs are for a Linen module; got a {type(target).__name__} together with inputs"
        )
    if isinstance(target, Case):
        try:
            return audit_case(target)
        except Exception as error:
            raise CaseError(
                f"{target.name} does not run: {type(error).__name__}: {error}"
            ) from error
    if isinstance(target, type):
        return _audit_class(target)
    name = target.__name__ if isinstance(target, ModuleType) else str(target)
    files = _files_of(target)
    sources, problems = _parsed(files, progress or (lambda *_: None))
    findings, classes = audit_sources(sources)
    return Audit(name, findings, classes, tuple(problems), len(files))


def _parsed(files: list[tuple[str, Path]], progress: Progress) -> tuple[list[Source], list[str]]:
    """The files that have to do with Linen, and why others cannot be read.

    Of a large package that is a small part: the files that name flax, and those that name a Linen
    class of another file.
    """
    sources, problems = [], []
    texts: dict[str, str] = {}
    for i, (shown, file) in enumerate(files):
        progress(shown, i, len(files))
        try:
            texts[shown] = file.read_text("utf-8")
        except UnicodeDecodeError as error:
            problems.append(f"{shown}: {type(error).__name__}: {error}")
    words = {shown: set(re.findall(r"\w+", text)) for shown, text in texts.items()}
    wanted: Set[str] = {"flax"}
    while chosen := [shown for shown, found in words.items() if not wanted.isdisjoint(found)]:
        for shown in chosen:
            del words[shown]
            try:
                sources.append(Source.parse(shown, texts[shown]))
            except SyntaxError as error:
                problems.append(f"{shown}: {type(error).__name__}: {error}")
        classes = {cls.node.name for cls in linen_classes(sources).values()}
        wanted = classes.union(*(source.names.meaning(classes) for source in sources))
    return sources, problems


def _audit_class(cls: type) -> Audit:
    """A class and the other classes of its file that it uses."""
    if not issubclass(cls, nn.Module):
        raise CaseError(f"{cls.__name__} is no class of Linen modules")
    try:
        file = Path(python_inspect.getsourcefile(cls) or "")
        source = Source.parse(file.name, file.read_text("utf-8"))
    except (OSError, TypeError) as error:
        raise CaseError(f"{cls.__name__}: there is no source file to read") from error
    findings, classes = audit_sources([source], only=names_used([source], cls.__name__))
    return Audit(cls.__name__, findings, classes, (), 1)


def _files_of(target: ModuleType | str | Path) -> list[tuple[str, Path]]:
    """The source files of a package, a module, a file or a folder, with the names to show."""
    if isinstance(target, ModuleType):
        found = target.__spec__
    else:
        path = Path(target)
        if path.is_file():
            return [(str(path), path)]
        if path.is_dir():
            return [(str(file), file) for file in sorted(path.rglob("*.py"))]
        try:
            found = importlib.util.find_spec(str(target))
        except (ImportError, ValueError) as error:
            raise CaseError(f"looking for {target}: {type(error).__name__}: {error}") from error
    if found is None:
        raise CaseError(f"{target} was found neither as a module nor as a file or a folder")
    if found.submodule_search_locations is None:
        file = Path(found.origin or "")
        return [(file.name, file)]
    folders = [Path(folder) for folder in found.submodule_search_locations]
    return [
        (str(file.relative_to(folder)), file)
        for folder in folders
        for file in sorted(folder.rglob("*.py"))
    ]
