"""What can be checked, and how it is named on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from nnx_bridge import Case, CaseError, load_case

X = np.ones((2, 3), np.float32)
FACTORIES = """
import numpy as np
from flax import linen as nn, nnx
from nnx_bridge import Case

x = np.ones((2, 3), np.float32)
case = Case(nn.Dense(4), (x,), name="A case")
number = 3
def pair(): return nn.Dense(4), (x,)
def single_array(): return nn.Dense(4), x
def triple(): return nn.Dropout(0.5), (x,), {"deterministic": True}
def a_case(): return case
def module_alone(): return nn.Dense(4)
def a_number(): return 3
def four(): return nn.Dense(4), (x,), {}, {}
def broken(): raise RuntimeError("out of cheese")
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with factories of all kinds."""
    (tmp_path / "factories_of_cases.py").write_text(FACTORIES)
    (tmp_path / "fails_to_import.py").write_text("import no_such_module_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    return "factories_of_cases"


@pytest.mark.parametrize("name", ["pair", "single_array", "triple", "a_case", "case"])
def test_all_documented_forms_are_taken(factories: str, name: str) -> None:
    case = load_case(f"{factories}:{name}")
    assert isinstance(case, Case)
    np.testing.assert_array_equal(case.args[0], X)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_colon", "'no_colon' is no import path; expected package.module:factory"),
        ("no_such_package:f", "importing 'no_such_package'.*was not found"),
        ("flax.no_such_module:f", "importing 'flax.no_such_module'.*was not found"),
        ("fails_to_import:f", "raised ModuleNotFoundError.*no_such_module_anywhere"),
        ("factories_of_cases:tripel", "did you mean factories_of_cases:triple?"),
        ("factories_of_cases:number", "number is no function, but of type int"),
        ("factories_of_cases:module_alone", "a module without inputs; expected a Case"),
        ("factories_of_cases:a_number", r"a_number\(\) returned int; expected a Case"),
        ("factories_of_cases:four", r"four\(\) returned a tuple of 4; expected a Case"),
        ("factories_of_cases:broken", r"broken\(\) raised RuntimeError: out of cheese"),
    ],
)
def test_what_cannot_be_loaded_says_why(factories: str, target: str, message: str) -> None:
    with pytest.raises(CaseError, match=message):
        load_case(target)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Dense, r"got the class Dense; write Dense\(\.\.\.\)"),
        (nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "got Linear, which is an NNX module"),
        (lambda x: x, "got function, which is no Linen module"),
    ],
    ids=["class", "NNX module", "function"],
)
def test_what_is_no_linen_module_is_an_error(module: Any, message: str) -> None:
    with pytest.raises(CaseError, match=message):
        Case(module, (X,))


def test_arguments_that_are_no_tuple_are_an_error() -> None:
    with pytest.raises(CaseError, match=r"must be a tuple, got dict; one argument x is written"):
        Case(nn.Dense(4), {"x": X})  # type: ignore[arg-type]


def test_keys_come_from_the_seed_unless_they_are_given() -> None:
    assert Case(nn.Dense(4)).keys(0).keys() == {"params", "dropout"}
    keys = {"noise": jax.random.key(3)}
    assert Case(nn.Dense(4), rngs=keys).keys(0) == keys


class Encoder(nn.Module):
    def encode(self, x: jax.Array) -> jax.Array:
        return x


def test_a_method_that_is_not_there_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(CaseError, match="Encoder has no method 'encod'; did you mean 'encode'"):
        Case(Encoder(), (X,), method="encod")
    model = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    with pytest.raises(CaseError, match="Linear has no method 'encode'"):
        Case(Encoder(), (X,), model=model, method="encode")
