"""Laws that need columns of their own, from a table to the report."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from analysis.checks.questions import questions
from analysis.errors import TableError
from analysis.fitting.laws.registry import columns_taken
from analysis.options import FitOptions
from analysis.pipeline import fit_laws
from analysis.report.figures import draw_all
from analysis.report.html import render
from analysis.report.terminal import terminal_summary
from analysis.tables.cells import mixed_rows
from analysis.tables.table import prepare

QUICK = FitOptions(holdout=False, bootstrap_draws=50)


def repeated_data():
    """Runs of 4 sizes on unique tokens seen 1 to 40 times; what repetitions are worth falls off at R = 15."""
    grid = pd.MultiIndex.from_product([np.geomspace(1e8, 3e9, 4), np.geomspace(1e9, 3e10, 3), [1, 4, 12, 40]])
    table = grid.to_frame(index=False, name=["params", "unique_tokens", "epochs"])
    table["tokens"] = table["unique_tokens"] * table["epochs"]
    worth = table["unique_tokens"] * (1 + 15 * (1 - np.exp(-(table["epochs"] - 1) / 15)))
    noise = 1 + 0.002 * np.random.default_rng(0).standard_normal(len(table))
    table["loss"] = (1.8 + 400 * table["params"] ** -0.34 + 2000 * worth**-0.37) * noise
    return table


def test_unique_tokens_are_in_the_unit_of_tokens():
    table = repeated_data().drop(columns="epochs")
    table[["tokens", "unique_tokens"]] /= 1e9
    result = fit_laws(table, replace(QUICK, law=("data-constrained",), units=("tokens=B images",)))
    assert result.find("data-constrained").fitted.parameters["R"] == pytest.approx(15, rel=0.25)


@pytest.mark.parametrize(
    ("changed", "refusal"),
    [
        ({"epochs": lambda rows: rows["epochs"] - 1}, r"not so in row 1 \(0.0\), .*; the first pass over the data"),
        ({"epochs": lambda rows: rows["epochs"].where(rows.index > 1)}, r"not so in row 1 \(nan\), .*; --where"),
        ({"unique_tokens": lambda rows: 1e9 * rows["unique_tokens"]}, "more than once .*in another unit than tokens"),
    ],
)
def test_epochs_that_tell_nothing_of_repeated_data_are_refused(changed, refusal):
    table = repeated_data().assign(**changed)
    table = table if "epochs" in changed else table.drop(columns="epochs")
    with pytest.raises(TableError, match=refusal):
        fit_laws(table, replace(QUICK, law=("data-constrained",)))


def test_unique_tokens_have_a_unit_of_their_own_and_are_held_against_epochs():
    table = repeated_data()
    asked = questions(prepare(table.assign(epochs=2 * table["epochs"]), QUICK), QUICK)
    assert [code for code, text in asked if "is 2 times tokens over 'unique_tokens'" in text] == ["odd-epochs"]
    assert not [code for code, _ in questions(prepare(table, QUICK), QUICK) if code == "odd-epochs"]
    table = table.drop(columns="epochs").assign(tokens=table["tokens"] / 1e9)
    options = replace(QUICK, law=("data-constrained",), units=("tokens=B", "unique_tokens=1"))
    assert fit_laws(table, options).fits[0].fitted.parameters["R"] == pytest.approx(15, rel=0.25)


@pytest.mark.parametrize("column", ["epochs", "unique_tokens"])
def test_repeated_data(column):
    table = repeated_data()[["params", "tokens", "loss", column]]
    point = "params=1e9,tokens=1e11,epochs=10"
    options = replace(QUICK, law=("data-constrained", "chinchilla"), predict=(point,))
    result = fit_laws(table, options)
    fitted = result.find("data-constrained").fitted
    assert fitted.parameters["R"] == pytest.approx(15, rel=0.25)
    assert fitted.value < 0.3 * result.find("chinchilla").fitted.value
    worth = 1e10 * (1 + 15 * (1 - np.exp(-9 / 15)))
    exact = 1.8 + 400 * 1e9**-0.34 + 2000 * worth**-0.37
    (prediction,) = result.find("data-constrained").predictions
    assert prediction.prediction.value == pytest.approx(exact, rel=0.003)
    if column == "epochs":
        Console(file=None, quiet=True).print(terminal_summary(result))
        assert "data-constrained" in render(result, [])


def test_parameters_beyond_those_that_the_unique_tokens_call_for():
    """The published parameters for C4, of which the law without R_N is far off; a size of 1e11 is of little use."""
    grid = pd.MultiIndex.from_product([np.geomspace(1e8, 1e11, 5), np.geomspace(1e9, 3e10, 3), [1, 4, 12, 40]])
    table = grid.to_frame(index=False, name=["params", "unique_tokens", "epochs"])
    table["tokens"] = table["unique_tokens"] * table["epochs"]
    noise = 1 + 0.001 * np.random.default_rng(0).standard_normal(len(table))
    table["loss"] = published_data_constrained(table["params"], table["tokens"], table["epochs"]) * noise
    laws = ("data-constrained", "data-constrained-excess")
    options = replace(QUICK, law=laws, predict=("params=1e11,tokens=1e11,epochs=20",))
    result = fit_laws(table, options)
    entry = result.find("data-constrained-excess")
    assert entry.fitted.value < 0.2 * result.find("data-constrained").fitted.value
    assert entry.fitted.parameters["R"] == pytest.approx(15.4, rel=0.1)
    assert entry.fitted.parameters["R_N"] == pytest.approx(5.31, rel=0.2)
    (prediction,) = entry.predictions
    assert prediction.prediction.value == pytest.approx(published_data_constrained(1e11, 1e11, 20), rel=0.003)
    assert "R_N" in render(result, [])


def published_data_constrained(params, tokens, epochs):
    """Muennighoff et al. 2023, with the best size for U tokens where both exponents are the same: (A/B)^(1/α)·U."""
    a, b, alpha, unique = np.exp(6.255414), np.exp(7.3049974), 0.3526596, tokens / epochs
    called_for = np.minimum(params, (a / b) ** (1 / alpha) * unique)
    size = called_for * (1 + 5.309743 * (1 - np.exp(-(params / called_for - 1) / 5.309743)))
    data = unique * (1 + 15.387756 * (1 - np.exp(-(epochs - 1) / 15.387756)))
    return np.exp(0.6254804) + a * size**-alpha + b * data**-alpha


def test_data_that_were_seen_once_say_nothing_of_repetitions():
    table, options = repeated_data().query("epochs == 1"), replace(QUICK, law=("data-constrained",))
    with pytest.raises(TableError, match="all rows have the same epochs"):
        fit_laws(table, options)
    with pytest.raises(TableError, match="the table has no column for epochs"):
        fit_laws(table[["params", "tokens", "loss"]], options)


def sparse_mixtures():
    """Runs by the parameters that Abnar et al. 2025 publish (equation 6, table 3), where λ is -0.1666."""
    grid = pd.MultiIndex.from_product(
        [np.geomspace(1e7, 1e10, 5), [0.02, 0.05, 0.1, 0.25, 1.0], np.geomspace(1e9, 1e12, 4)],
        names=["params", "active_share", "tokens"],
    )
    table = grid.to_frame(index=False)
    return table.assign(loss=published_loss(table) * (1 + 0.002 * np.random.default_rng(0).standard_normal(len(table))))


def published_loss(rows):
    n, x, d = rows["params"], rows["active_share"], rows["tokens"]
    mixed = 17.26 / (x**0.1603 * n**0.1595)
    return 16612.50 / n**0.5962 + 5455.67 / d**0.3954 + 0.4598 / x**-0.1666 + mixed + 0.94


def test_sparse_mixtures():
    point = {"params": 3e10, "active_share": 0.03, "tokens": 1e12}
    at = ",".join(f"{name}={value:g}" for name, value in point.items())
    result = fit_laws(sparse_mixtures(), replace(QUICK, law=("sparse-mixture", "chinchilla"), predict=(at,)))
    entry = result.find("sparse-mixture")
    assert entry.fitted.value < 0.3 * result.find("chinchilla").fitted.value
    assert entry.fitted.parameters["beta"] == pytest.approx(0.3954, rel=0.03)
    assert entry.fitted.parameters["delta"] == pytest.approx(0.1603, rel=0.15)
    (prediction,) = entry.predictions
    assert prediction.prediction.value == pytest.approx(published_loss(point), rel=0.005)
    Console(file=None, quiet=True).print(terminal_summary(result))
    assert "sparse-mixture" in render(result, [])
    with pytest.raises(TableError, match="the table has no column for active_share"):
        fit_laws(sparse_mixtures().drop(columns="active_share"), replace(QUICK, law=("sparse-mixture",)))


def test_best_sizes_of_mixtures_are_those_of_their_best_shares():
    """Cells were means over the shares, which the law takes and a grid doesn't."""
    table = sparse_mixtures().drop(columns="tokens")
    flops = np.geomspace(1e19, 1e21, 3)
    table = pd.concat([table.assign(flops=each, tokens=each / 6 / table["params"]) for each in flops])
    table = table.drop_duplicates(["params", "active_share", "flops"]).assign(loss=published_loss)
    result = fit_laws(table, replace(QUICK, law=("sparse-mixture",)))
    lowest = table.groupby(["flops", "params"])["loss"].min()
    np.testing.assert_allclose(result.grids["loss"].cells["loss"], lowest)


def test_what_a_law_takes_is_no_setting_that_mixes_rows():
    table, of_mixtures = sparse_mixtures(), FitOptions(law=("sparse-mixture",))
    for law, differing in (("sparse-mixture",), None), (("sparse-mixture", "chinchilla"), ("active_share",)):
        options = FitOptions(law=law)
        found = mixed_rows(prepared := prepare(table, options), prepared.frame, options, columns_taken(options.law))
        assert (found and found.columns) == differing
    repeated = pd.concat([table.assign(lr=1e-3), table.assign(lr=3e-3, loss=1.1 * table["loss"])], ignore_index=True)
    taken = columns_taken(of_mixtures.law)
    found = mixed_rows(prepared := prepare(repeated, of_mixtures), prepared.frame, of_mixtures, taken)
    assert found is not None
    assert found.columns == ("lr",)


def losses():
    loss = np.linspace(1.8, 5.0, 24)
    noise = 1 + 0.003 * np.random.default_rng(1).standard_normal(len(loss))
    return pd.DataFrame(
        {
            "flops": np.geomspace(1e21, 1e18, len(loss)),
            "loss": loss,
            "error": 0.86 * (1 - np.exp(-0.7 * (loss - 1.3))) * noise,
            "wrong": (0.1 + 0.65 / (1 + np.exp(-2.0 * (loss - 3.4)))) * noise,
            "other_loss": (0.5 + 1.2 * (loss - 1.5) ** 0.6) * noise,
        }
    )


@pytest.mark.parametrize(
    ("law", "target", "parameters"),
    [
        ("loss-to-error", "error", {"A": 0.86, "k": 0.7, "x0": 1.3}),
        ("loss-to-error-sigmoid", "wrong", {"E": 0.1, "A": 0.65, "k": 2.0, "x0": 3.4}),
        ("loss-to-loss", "other_loss", {"E": 0.5, "A": 1.2, "alpha": 0.6, "x0": 1.5}),
    ],
)
def test_error_and_other_losses_by_loss(law, target, parameters):
    options = replace(
        QUICK, law=(law,), target=(target,), x=("loss",), predict=("loss=1.7",), holdout=law == "loss-to-error"
    )
    result = fit_laws(losses(), options)
    entry = result.find(law)
    for name, value in parameters.items():
        low, high = entry.uncertainty.ci95[name]
        assert low * 0.97 <= value <= high * 1.03, name
    assert [each.at for each in entry.predictions] == [{"loss": 1.7}]
    if entry.holdout:  # the best runs are held out, which have most compute
        assert entry.holdout[0].name == "largest budget"
    Console(file=None, quiet=True).print(terminal_summary(result))
    drawings = draw_all(result) if law in ("loss-to-error-sigmoid", "loss-to-error") else []
    assert law in render(result, drawings)
    assert [each.name for each in drawings] in ([], ["loss_vs_loss", "residuals", "clouds"])


def test_the_lowest_losses_and_most_epochs_are_held_out():
    options = replace(QUICK, law=("loss-to-error",), target=("error",), x=("loss",), holdout=True)
    first = fit_laws(losses().drop(columns="flops"), options).find("loss-to-error").holdout[0]
    assert (first.name, first.n_held, first.place) == ("lowest loss", 1, 5.0)
    table = repeated_data().drop(columns="unique_tokens")
    repeated = fit_laws(table, replace(QUICK, law=("data-constrained",), holdout=True)).find("data-constrained")
    assert [each.name for each in repeated.holdout[:2]] == ["largest epochs", "largest params"]


@pytest.mark.parametrize("law", ["loss-to-error", "loss-to-error-sigmoid"])
def test_what_falls_with_loss_is_no_error(law):
    table = losses().assign(error=lambda frame: 1 - frame["wrong"])
    options = replace(QUICK, law=(law,), target=("error",), x=("loss",))
    with pytest.raises(TableError, match="the target does not rise with x"):
        fit_laws(table, options)


def task_errors(seed=0, rows=15):
    """Errors by a law of the loss, and those of a task on which every model guesses."""
    loss, rng = np.linspace(2.0, 4.0, rows), np.random.default_rng(seed)
    error = 0.75 * (1 - np.exp(-(loss - 1.7))) * (1 + 0.005 * rng.standard_normal(rows))
    return pd.DataFrame({"loss": loss, "error": error, "guesses": 0.75 + 0.003 * rng.standard_normal(rows)})


def test_guesses_follow_no_law_of_losses():
    options = replace(QUICK, law=("loss-to-error",), x=("loss",), target=("error", "guesses"))
    result = fit_laws(task_errors(3), options)
    assert {each.target for each in result.fits} == {"error"}
    assert any("the target hardly follows loss" in each.message for each in result.warnings)
    with pytest.raises(TableError, match="take errors, such as 1 less an accuracy"):
        fit_laws(task_errors().assign(accuracy=lambda t: 1 - t["error"]), replace(options, target=("accuracy",)))


def test_nothing_is_predicted_below_the_loss_at_which_a_law_ends():
    options = replace(QUICK, law=("loss-to-error",), x=("loss",), target=("error",), predict=("loss=1.5", "loss=1.8"))
    result = fit_laws(task_errors(), options)
    (prediction,) = result.find("loss-to-error").predictions
    assert prediction.prediction.value == pytest.approx(0.75 * (1 - np.exp(-0.1)), rel=0.1)
    assert any("--predict loss=1.5: loss-to-error ends at 1.7" in each.message for each in result.warnings)


def test_points_and_columns_of_unique_tokens():
    """Epochs follow from unique tokens in points, too; a column spelled otherwise is named."""
    options = replace(QUICK, law=("data-constrained",), predict=("params=1e9,tokens=1e11,unique_tokens=1e10",))
    result = fit_laws(repeated_data(), options)
    assert result.find("data-constrained").predictions[0].at["epochs"] == pytest.approx(10)
    other = repeated_data().drop(columns="epochs").rename(columns={"unique_tokens": "Unique Tokens"})
    with pytest.raises(TableError, match="nor unique_tokens beside tokens; rename 'Unique Tokens' to unique_tokens"):
        fit_laws(other, options)
