"""The table of objectives: one class each, and an objective of our own trains from a recipe."""

from __future__ import annotations

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shown import shown
from tuning import history

from stepjax.errors import ConfigError, TrainingError
from stepjax.train.config.reader import read_settings
from stepjax.train.config.tune import TuneConfig
from stepjax.train.losses.logprobs import TokenScores
from stepjax.train.objectives.objective import LossSettings, Objective, TokenInputs, TokenLoss
from stepjax.train.objectives.table import OBJECTIVES, find_objective
from stepjax.train.tune.run import tune

TRAIN = Path(__file__).parents[1] / "train"

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
def test_the_objective_of_the_documentation_joins_the_table(tmp_path, monkeypatch):
    """The class that docs/extending.md shows, by its name: its loss is twice the negative log-likelihood."""
    monkeypatch.setitem(OBJECTIVES, "doubt", shown("Doubt")())
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


CONSTANT = """

class Surprise(Doubt):
    def token_loss(self, inputs, settings):
        return TokenLoss.of_all(-inputs.scores.entropy)


class Constant(Doubt):
    def token_loss(self, inputs, settings):
        return TokenLoss.of_all(inputs.mask.astype("float32"))
"""


@pytest.mark.slow
def test_an_own_objective_learns_from_the_entropy_and_a_constant_one_is_said_to_be_constant(tmp_path):
    (tmp_path / "my_loss.py").write_text(OWN + CONSTANT)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("rewarded_likelihood", "my_loss.py:Surprise"))
    tune(read_settings(TuneConfig, recipe), tmp_path / "surprise")
    assert all(record["gradient_norm"] > 0 for record in history(tmp_path / "surprise"))
    config = read_settings(TuneConfig, recipe, [f'loss.objective="{tmp_path}/my_loss.py:Constant"'])
    with pytest.raises(TrainingError, match=r"the loss .*Constant does not depend on what is trained"):
        tune(config, tmp_path / "constant")


def test_only_what_reads_the_entropy_pays_for_its_gradient(tmp_path):
    (tmp_path / "my_loss.py").write_text(OWN)
    assert find_objective(f"{tmp_path / 'my_loss.py'}:Doubt").uses_entropy(LossSettings())
    for name, objective in OBJECTIVES.items():
        bonus = LossSettings(objective=name, entropy_bonus=0.1)
        assert not objective.uses_entropy(LossSettings(objective=name))
        assert objective.uses_entropy(bonus) == ("entropy_bonus" in objective.settings)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ('loss.objective="my_loss.py:Doubts"', r"has no 'Doubts'; it defines Doubt, Nameless\. Did you mean Doubt\?"),
        ('loss.objective="my_loss.py:Nameless"', "has no name and no verbs"),
        ('loss.objective="my_loss.py:OBJECT"', "expected a subclass of"),
        ("loss.options.other=1", r"loss\.options\.other: is not an option of objective 'doubt'; there are factor"),
        ('loss.options.factor="much"', r"loss\.options\.factor: is 'much', expected float"),
        ("loss.options.factor=nan", r"loss\.options\.factor: is nan, expected a finite number"),
        ("loss.options.factor=-inf", r"loss\.options\.factor: is -inf, expected a finite number"),
        ("loss.options.factor=1" + 400 * "0", r"loss\.options\.factor: is 10+…, expected a finite number"),
    ],
)
def test_an_own_objective_that_cannot_train_is_refused(change, reason, tmp_path, monkeypatch):
    (tmp_path / "my_loss.py").write_text(OWN + "\nOBJECT = 3\n")
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("rewarded_likelihood", "my_loss.py:Doubt"))
    with pytest.raises(ConfigError, match=reason):
        read_settings(TuneConfig, recipe, [change])
    with pytest.raises(ConfigError, match=r"not an option of objective 'sft'; it has none"):
        read_settings(TuneConfig, recipe, ['loss.objective="sft"', "loss.options.factor=1.0"])


WRONG = """
from stepjax.train.objectives.objective import Objective, TokenLoss

class Wrong(Objective):
    name, verbs = "wrong", ("rl",)
    rewarded = on_policy = True

    def token_loss(self, inputs, settings):
        {loss}

    def advantages(self, rewards, groups, settings):
        {advantages}
"""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("return TokenLoss.of_all(inputs.logprob)", r"token_loss failed: AttributeError: .* \(my_loss\.py:9\)"),
        ("return 0 if inputs.mask else 1", r"token_loss failed: \w+: The truth .*\(my_loss\.py:9\)"),
        ("return inputs.scores.logprob", r"token_loss returned .*, expected TokenLoss, such as TokenLoss\.of_all"),
        ("pass", "token_loss returned NoneType, expected TokenLoss"),
        (
            "return TokenLoss.of_all(inputs.scores.logprob.sum())",
            r"token_loss returned loss of shape \(\), expected a value for each token, \(2, 8\)",
        ),
        ("return TokenLoss.of_all(inputs.segment_ids)", "returned a loss of int32, expected floating point"),
    ],
)
def test_a_wrong_loss_of_a_user_is_one_line(tmp_path, code, reason):
    """Also while it is traced for a compiled program."""
    (tmp_path / "my_loss.py").write_text(WRONG.format(loss=code, advantages="return rewards"))
    objective = find_objective(f"{tmp_path}/my_loss.py:Wrong")
    number, ids = jnp.zeros((2, 8)), jnp.ones((2, 8), jnp.int32)
    inputs = TokenInputs(TokenScores(*[number] * 4), number, number, number, ids > 0, ids, number)
    with pytest.raises(ConfigError, match=reason) as error:
        jax.jit(lambda inputs: objective.token_loss(inputs, LossSettings()).loss)(inputs)
    assert len(str(error.value).splitlines()) == 1
    assert str(error.value).startswith("loss.objective: my_loss.py:Wrong.token_loss ")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("return rewards / 0", None),
        ("return [1, 2, float('nan')]", None),
        ("return rewards[groups]", r"advantages failed: IndexError: .* \(my_loss\.py:12\)"),
        ("return rewards.mean()", r"advantages returned float64 of shape \(\), expected a number for each"),
        ("return None", "expected a number for each answer"),
        ("return ['a', 'b', 'c']", "expected a number for each answer"),
    ],
)
def test_wrong_advantages_of_a_user_are_one_line(tmp_path, code, reason):
    (tmp_path / "my_loss.py").write_text(WRONG.format(loss="pass", advantages=code))
    objective = find_objective(f"{tmp_path}/my_loss.py:Wrong")
    assert objective.uses_rewards
    rewards, groups = np.asarray([1.0, 2.0, 0.0]), np.asarray([0, 0, 9])
    if reason is None:
        with np.errstate(all="ignore"):
            assert objective.advantages(rewards, groups, LossSettings()).dtype == np.float32
        return
    with pytest.raises(ConfigError, match=reason):
        objective.advantages(rewards, groups, LossSettings())


def test_an_own_objective_that_cannot_be_made_is_one_line(tmp_path):
    made = "name, verbs = 'x', ('sft',)\n\n    def __init__(self):\n        1 / 0"
    (tmp_path / "my_loss.py").write_text(OWN.replace("pass", made))
    with pytest.raises(ConfigError, match=r"my_loss\.py:Nameless\(\) failed: ZeroDivisionError.*\(my_loss\.py:18\)"):
        find_objective(f"{tmp_path}/my_loss.py:Nameless")
