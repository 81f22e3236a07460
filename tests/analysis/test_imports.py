"""What importing costs: nothing for the package and its options, never torch."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "analysis"


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("statement", ["import analysis", "from analysis import FitOptions, TableError"])
def test_options_load_nothing_heavy(statement):
    assert not loaded_by(statement) & {"numpy", "pandas", "scipy", "matplotlib", "jinja2", "torch", "mlflow"}


def test_the_whole_package_never_loads_torch_varscale_or_mlflow():
    everything = "from analysis import fit_laws, write, terminal_summary, read_runs; import analysis.report.figures"
    assert not loaded_by(everything) & {"torch", "varscale", "sweeps", "mlflow", "lightning"}


def test_unknown_names_are_attribute_errors():
    import analysis

    with pytest.raises(AttributeError, match="no attribute 'fit_law'"):
        _ = analysis.fit_law
    assert all(hasattr(analysis, name) for name in analysis.__all__)


def test_no_modules_import_each_other_not_even_for_their_types():
    """Nor within a folder, where import-linter's layers don't look."""
    imports = {}
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {f"{node.module}.{each.name}" for node in nodes for each in node.names} | {n.module for n in nodes}
        imports[module] = {name for name in names if (PACKAGE.parent / (name.replace(".", "/") + ".py")).exists()}
    order = list(graphlib.TopologicalSorter(imports).static_order())
    assert len(order) > 40
    assert not [path for path in PACKAGE.rglob("*.py") if "TYPE_CHECKING" in path.read_text()]
