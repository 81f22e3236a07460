"""The family of docs/adding-a-family.md, as the page has it: its two files, in a folder that is found as others are."""

import atexit
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import varscale.families
from varscale.config import Experiment
from varscale.families.base import FAMILY_KINDS

_PAGE = Path(__file__).resolve().parents[1] / "docs" / "adding-a-family.md"
_FOLDER = Path(tempfile.mkdtemp(prefix="varscale-tiny-"))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
(_FOLDER / "tiny").mkdir()
(_FOLDER / "tiny" / "__init__.py").touch()
for _name, _code in re.findall(r"`(\w+\.py)` of the folder `tiny`.*?```python\n(.*?)```", _PAGE.read_text(), re.DOTALL):
    (_FOLDER / "tiny" / _name).write_text(_code)
varscale.families.__path__.append(str(_FOLDER))

from varscale.families.tiny.config import TinyDescription  # noqa: E402

varscale.families.__path__.remove(str(_FOLDER))  # other tests in this process know nothing of it

__all__ = ["TINY_CHANGES", "TinyDescription", "tiny_registered"]


@contextmanager
def tiny_registered() -> Iterator[None]:
    """Within it experiments may say `model: {family: tiny}`."""
    varscale.families.__path__.append(str(_FOLDER))
    vars(FAMILY_KINDS).pop("sections", None)  # they are looked for again
    Experiment.model_rebuild(force=True)
    try:
        yield
    finally:
        varscale.families.__path__.remove(str(_FOLDER))
        del FAMILY_KINDS.sections["tiny"]
        Experiment.model_rebuild(force=True)


TINY_CHANGES: dict[str, dict[str, Any]] = {"plain": {}, "deep": {"depth": 5}, "one scale": {"patch_nums": (3,)}}
