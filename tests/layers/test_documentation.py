"""Every public name is documented where a user looks."""

import inspect

import pytest

import layers

RESULTS = ("Prediction", "Replacement", "DropConnectSummary")  # shown where they are made
PUBLIC = {
    name: value
    for name, value in vars(layers).items()
    if not name.startswith("_") and not inspect.ismodule(value)
}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_documented_example(name):
    assert PUBLIC[name].__doc__
    assert name in RESULTS or ">>>" in inspect.getdoc(PUBLIC[name])


@pytest.mark.parametrize("name", layers.linen.__all__)
def test_every_linen_name_has_a_documented_example(name):
    assert ">>>" in inspect.getdoc(getattr(layers.linen, name))
