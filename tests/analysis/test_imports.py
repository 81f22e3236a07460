"""What importing costs: nothing for the package and its options, never torch."""

import subprocess
import sys

import pytest


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("statement", ["import analysis", "from analysis import FitOptions, TableError"])
def test_options_load_nothing_heavy(statement):
    assert not loaded_by(statement) & {"numpy", "pandas", "scipy", "matplotlib", "jinja2", "torch", "mlflow"}


def test_the_whole_package_never_loads_torch_varscale_or_mlflow():
    everything = "from analysis import fit_laws, write, terminal_summary, read_runs; import analysis.figures"
    assert not loaded_by(everything) & {"torch", "varscale", "sweeps", "mlflow", "lightning"}


def test_unknown_names_are_attribute_errors():
    import analysis

    with pytest.raises(AttributeError, match="no attribute 'fit_law'"):
        _ = analysis.fit_law
    assert all(hasattr(analysis, name) for name in analysis.__all__)
