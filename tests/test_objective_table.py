"""The table of objectives: one class each, and an objective of our own trains from a recipe."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tuning import history

from stepjax.errors import ConfigError
from stepjax.train.config.reader import read_settings
from stepjax.train.config.tune import TuneConfig
from stepjax.train.objectives.objective import LossSettings, Objective, TokenInputs, TokenLoss
from stepjax.train.objectives.table import OBJECTIVES
from stepjax.train.tune.run import tune

TRAIN = Path(__file__).parents[1] / "train"
EXTENDING = Path(__file__).parents[1] / "docs" / "extending.md"

RECIPE = """
verb = "sft"

[lora]
rank = 2
targets = ["q"]
experts = "none"

[data.tasks]
shares = { copy = 1.0 }

[rollout]
source = "data"
prompts = 4

[loss]
objective = "rewarded_likelihood"

[optim]
steps = 2
rows = 2
length = 96

[eval]
every = 0
"""


class RewardedLikelihood(Objective):
    """−(1 + advantage) · log π of the data's own completions, with advantages of 2."""

    name = "rewarded_likelihood"
    verbs = ("sft",)

    def advantages(self, rewards: np.ndarray, groups: np.ndarray, settings: LossSettings) -> np.ndarray:
        return np.full(len(rewards), 2.0, np.float32)

    def token_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        return TokenLoss.of_all(-(1 + inputs.advantage) * inputs.scores.logprob)


def test_a_new_objective_is_a_class_and_a_line(tmp_path, monkeypatch):
    """The loss is three times the negative log-likelihood, by the class's own formula."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    with pytest.raises(ConfigError, match=r"loss\.objective: is 'rewarded_likelihood', expected one of 'exact'"):
        read_settings(TuneConfig, recipe)
    monkeypatch.setitem(OBJECTIVES, RewardedLikelihood.name, RewardedLikelihood())
    tune(read_settings(TuneConfig, recipe), tmp_path / "run")
    records = history(tmp_path / "run")
    assert [record["objective"] for record in records] == ["rewarded_likelihood"] * 2
    for record in records:
        assert record["gradient_norm"] > 0
        np.testing.assert_allclose(record["loss"], 3 * record["nll"], rtol=1e-5)  # float32 sums


@pytest.mark.slow
def test_the_objective_of_the_documentation_trains(tmp_path, monkeypatch):
    """The class that docs/extending.md shows runs as it stands: its loss is twice the negative log-likelihood."""
    shown = re.search(r"```python\n(?P<code>(?:(?!```).)*class Doubt.*?)```", EXTENDING.read_text("utf-8"), re.DOTALL)
    assert shown
    names: dict[str, Any] = {}
    exec(textwrap.dedent("   " + shown["code"].lstrip()), names)
    monkeypatch.setitem(OBJECTIVES, "doubt", names["Doubt"]())
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("rewarded_likelihood", "doubt"))
    tune(read_settings(TuneConfig, recipe), tmp_path / "run")
    for record in history(tmp_path / "run"):
        np.testing.assert_allclose(record["loss"], 2 * record["nll"], rtol=1e-5)  # float32 sums


def test_objectives_are_compared_nowhere_else():
    """Outside of the table's folder no expression compares the name of an objective."""
    for path in sorted(TRAIN.rglob("*.py")):
        if path.parent.name == "objectives":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                compared = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
                names = compared & (OBJECTIVES.keys() - {"mtp", "sft", "top_k"})  # these name other settings as well
                assert not names, f"{path}:{node.lineno} compares {names}"


OWN = """
from stepjax.train.objectives.objective import Objective, TokenLoss


class Doubt(Objective):
    name = "doubt"
    verbs = ("sft",)
    options = {"factor": 2.0}

    def token_loss(self, inputs, settings):
        return TokenLoss.of_all(-self.option(settings, "factor") * inputs.scores.logprob)


class Nameless(Objective):
    pass
"""


@pytest.mark.slow
def test_an_objective_from_a_file_with_an_option_of_its_own(tmp_path):
    (tmp_path / "my_loss.py").write_text(OWN)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("rewarded_likelihood", "my_loss.py:Doubt") + "[loss.options]\nfactor = 4\n")
    config = read_settings(TuneConfig, recipe)
    tune(config, tmp_path / "run")
    for record in history(tmp_path / "run"):
        assert record["objective"] == "doubt"
        np.testing.assert_allclose(record["loss"], 4 * record["nll"], rtol=1e-5)  # float32 sums
    assert read_settings(TuneConfig, tmp_path / "run" / "config.toml") == config


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ('loss.objective="my_loss.py:Doubts"', r"has no 'Doubts'; it defines Doubt, Nameless\. Did you mean Doubt\?"),
        ('loss.objective="my_loss.py:Nameless"', "has no name and no verbs"),
        ('loss.objective="my_loss.py:OBJECT"', "expected a subclass of"),
        ("loss.options.other=1", r"loss\.options\.other: is no option of objective 'doubt'; there are factor"),
        ('loss.options.factor="much"', r"loss\.options\.factor: is 'much', expected float"),
    ],
)
def test_an_own_objective_that_cannot_train_is_refused(change, reason, tmp_path, monkeypatch):
    (tmp_path / "my_loss.py").write_text(OWN + "\nOBJECT = 3\n")
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("rewarded_likelihood", "my_loss.py:Doubt"))
    with pytest.raises(ConfigError, match=reason):
        read_settings(TuneConfig, recipe, [change])
    with pytest.raises(ConfigError, match=r"no option of objective 'sft'; it has none"):
        read_settings(TuneConfig, recipe, ['loss.objective="sft"', "loss.options.factor=1.0"])
