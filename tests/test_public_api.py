"""The public names: each has a docstring, and an example that holds."""

from __future__ import annotations

import doctest
import inspect

import pytest

import stepjax

ERRORS = [name for name in stepjax.__all__ if name.endswith("Error")]
OTHERS = [name for name in stepjax.__all__ if name not in ERRORS]
LONG = ("Engine", "Step3p5", "generate", "distill", "rl", "sft")  # test_engine, test_model and test_tune are quick


def test_the_names_are_those_that_the_reference_lists():
    expected = {"load", "generate", "Session", "Engine", "EngineConfig", "SamplingParams", "ModelConfig", "Step3p5"}
    assert expected | {"Tokenizer", "MeshSpec", "LoraConfig", "plan", "sft", "distill", "rl"} <= set(OTHERS)
    assert sorted(stepjax.__all__) == list(stepjax.__all__)


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_says_what_it_means(name):
    error = getattr(stepjax, name)
    assert issubclass(error, stepjax.StepjaxError)
    assert error.__doc__


def test_every_error_is_public():
    import stepjax.errors

    errors = {name for name, value in vars(stepjax.errors).items() if inspect.isclass(value)}
    assert errors == set(ERRORS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in OTHERS]
)
def test_an_example_holds(name):
    """The examples of a docstring run, each by itself as a reader would paste it."""
    thing = getattr(stepjax, name)
    parsed = doctest.DocTestParser().get_doctest(inspect.getdoc(thing) or "", {}, name, None, None)
    assert parsed.examples, f"{name} has no example"
    said: list[str] = []
    doctest.DocTestRunner().run(parsed, out=said.append)
    assert not said, "".join(said)
