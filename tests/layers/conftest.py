"""Settings of the `layers` tests."""

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("layers", max_examples=15, deadline=None, derandomize=True)
hypothesis.settings.load_profile("layers")

GENERATORS = ("default", "fast", "bernoulli")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(20130616)


@pytest.fixture(params=GENERATORS)
def generator(request: pytest.FixtureRequest) -> str:
    return request.param
