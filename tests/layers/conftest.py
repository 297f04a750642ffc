"""Fixtures of the `layers` tests."""

from __future__ import annotations

from typing import get_args

import jax
import pytest

from layers._generators import Generator
from tests.helpers import KEY


@pytest.fixture
def key() -> jax.Array:
    return KEY


@pytest.fixture(params=get_args(Generator))
def generator(request: pytest.FixtureRequest) -> str:
    return request.param
