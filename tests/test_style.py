"""Rules of the code that ruff doesn't know: small constructors, a name for each class, and where a name may appear."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_PARAMETERS = 8
RECORDS = {"dataclass", "NamedTuple", "BaseModel", "Section", "Record"}
"""Configuration and plain records: their fields are their parameters."""


def files() -> list[Path]:
    return [path for package in ("varscale", "sweeps", "analysis") for path in sorted((ROOT / package).rglob("*.py"))]


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    """Each class of the project with its place."""
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def is_record(node: ast.ClassDef) -> bool:
    marks = [*node.bases, *(mark.func if isinstance(mark, ast.Call) else mark for mark in node.decorator_list)]
    return bool(RECORDS & {ast.unparse(mark).rpartition(".")[2] for mark in marks})


def constructor_parameters(node: ast.ClassDef) -> int:
    """Of an explicit constructor, without `self`."""
    for function in node.body:
        if isinstance(function, ast.FunctionDef) and function.name == "__init__":
            given = function.args
            several = [extra for extra in (given.vararg, given.kwarg) if extra is not None]
            return len(given.posonlyargs + given.args + given.kwonlyargs) + len(several) - 1
    return 0


def test_constructors_are_small() -> None:
    counts = {place: constructor_parameters(node) for place, node in classes() if not is_record(node)}
    assert max(counts.values()) > 3  # they were found
    assert {place: count for place, count in counts.items() if count > MOST_PARAMETERS} == {}


def test_no_two_classes_share_a_name() -> None:
    """Private ones neither: a traceback names them alone."""
    names = Counter(node.name for _, node in classes())
    shared = {name for name, count in names.items() if count > 1}
    assert [place for place, node in classes() if node.name in shared] == []


def test_a_setting_of_the_model_is_named_in_few_places() -> None:
    """Where it is stated, built, and read from the reference's files: a new one needs no more."""
    naming = [path for path in files() if "normalise_queries_keys" in path.read_text()]
    named = [str(path.relative_to(ROOT)) for path in naming if path.is_relative_to(ROOT / "varscale")]
    assert 0 < len(named) <= 4, named


def test_the_size_of_a_model_is_named_in_few_places() -> None:
    """From the YAML to `laws.json`, by one family.

    Beside it are single runs, searches, advice, comparisons of experiments, reference files and MLflow; and
    `config/text.py`, where it is how deep a text is nested.
    """

    def names(node: ast.AST) -> set[object]:
        text = node.value if isinstance(node, ast.Constant) and node.value in ("depth", "depths") else None
        return {getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "arg", None), text}

    trees = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in files()}
    naming = [path for path, tree in trees.items() if any({"depth", "depths"} & names(node) for node in ast.walk(tree))]
    beside = ("varscale/official", "varscale/tracking", "varscale/cli/single_runs.py", "sweeps/single.py")
    beside += ("varscale/config/search.py", "sweeps/searches", "varscale/families/diffusion")
    beside += ("sweeps/further_cells.py", "sweeps/members.py", "varscale/config/text.py")
    assert 0 < len([path for path in naming if not path.startswith(beside)]) <= 17, naming


def test_documents_name_files_that_exist() -> None:
    """A path in a document, such as `sweeps/grid.py`, is where the reader finds what the sentence is about."""
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    folders = "varscale|sweeps|analysis|tests|experiments|benchmarks|docs"
    named = [
        (document.name, path)
        for document in documents
        for path in re.findall(rf"`((?:{folders})/[\w/.-]+)`", document.read_text())
    ]
    assert len(named) > 50  # they were found
    assert [(document, path) for document, path in named if not (ROOT / path).exists()] == []


def test_no_document_keeps_two_versions_of_a_merge() -> None:
    """Tools find such lines in code; in documents nothing else does."""
    documents = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    kept = [str(path.relative_to(ROOT)) for path in documents if re.search(r"^(<{7}|>{7}) ", path.read_text(), re.M)]
    assert len(documents) > 20
    assert kept == []
