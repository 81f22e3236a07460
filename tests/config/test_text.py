"""YAML 1.2 as plain values: what it means, that it survives writing, and that no text does harm."""

import contextlib
import math
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from varscale.config.text import YAMLTextError, read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e12", 1e12),
        ("1E+3", 1e3),
        ("5.e-1", 0.5),
        (".5e1", 5.0),
        ("-.5e1", -5.0),
        ("384_000", 384_000),
        ("010", 10),
        ("0o10", 8),
        ("0x10", 16),
        (".inf", math.inf),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("2024-99-99", "2024-99-99"),
        ("=", "="),
        ("~", None),
        ("", None),
        ("\ufeffa: 1", {"a": 1}),
        ("{a: &x {b: 1}, c: {<<: *x, d: 2}}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
        ("16: {optim.lr: 1e-4}", {16: {"optim.lr": 1e-4}}),
    ],
)
def test_what_a_text_means(text: str, value: Any) -> None:
    assert read_yaml(text) == value
    assert type(read_yaml(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [unclosed", "line 1, column 13: while parsing a flow sequence, expected ',' or ']'"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: key 'a' is given twice"),
        ("{a: &x {b: 1}, c: {<<: *x, d: 2, d: 3}}", "key 'd' is given twice"),
        ("1: a\n0x1: b", 'found duplicate key "1"'),
        ("--- a\n--- b", "expected a single document in the stream, but found another document"),
        (
            "a: !!python/object/apply:os.system [touch x]",
            "line 1, column 4: the tag !!python/object/apply:os.system is",
        ),
        ("a: !mine 3", "the tag !mine is not allowed"),
        ("!!set {a, b}", "the tag !!set is not allowed"),
        ("!!binary aaaa", "the tag !!binary is not allowed"),
        ("!!int abc", "a value can't be read"),
        ("!!bool abc", "a value can't be read"),
        ("!!float ''", "a value can't be read"),
        ("+_", "a value can't be read"),
        ("%YAML 1.3\n--- a", "a value can't be read"),
        ("9" * 5000, "a whole number of more than 100 digits"),
        ("0x" + "f" * 5000, "a whole number of more than 100 digits"),
        ("a: \x00", "unacceptable character"),
        ("a: \ud800", "unacceptable character"),
        ("a: *nothing", "found undefined alias 'nothing'"),
        ("? {a: 1}\n: 2", "found unhashable key"),
    ],
)
def test_what_is_refused(text: str, expected: str) -> None:
    with pytest.raises(YAMLTextError) as caught:
        read_yaml(text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


LISTS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "\n".join(
    f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}" for level in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("[" * 3000 + "]" * 3000, "more than 32 levels deep", id="lists 3,000 deep"),
        pytest.param("{a: " * 3000, "more than 32 levels deep", id="sections 3,000 deep"),
        pytest.param("- " * 3000 + "a", "more than 32 levels deep", id="items 3,000 deep"),
        pytest.param("\n".join(" " * n + "a:" for n in range(300)), "more than 32 levels deep", id="lines 300 deep"),
        pytest.param("? " * 3000, "more than 32 levels deep", id="keys 3,000 deep"),
        pytest.param("a: " + "b" * 10**7, "10000003 characters; at most", id="a huge text"),
        pytest.param("&a [*a]", "more than 32 levels deep", id="a list of itself"),
        pytest.param("&a {<<: *a}", "more than 32 levels deep", id="a mapping merged with itself"),
        pytest.param(LISTS, "more than 20000 values, those that aliases repeat counted", id="a billion laughs"),
        pytest.param(MERGES, "more than 20000 values, those that aliases repeat counted", id="a billion merges"),
        pytest.param("[" + "0, " * 40_000 + "]", "more than 20000 values", id="too many values"),
        pytest.param("!" * 1000 + "a b", "!!!…", id="a long tag"),
    ],
)
def test_hostile_texts_are_refused_quickly(text: str, expected: str) -> None:
    start = time.process_time()
    with pytest.raises(YAMLTextError) as caught:
        read_yaml(text)
    assert time.process_time() - start < 8  # about two; the reader is written in Python
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 300


@given(
    st.text(st.characters(codec="utf-8") | st.sampled_from("[]{}:,-?&*!|>'\"%@`#\n \t_0123456789.eE+<~="), max_size=60)
)
@hypothesis_settings(max_examples=500)
@example("!!omap [a: 1, a: 2]")
@example("%TAG ! tag:yaml.org,2002:\n--- !set {a}")
@example("- |9\n a")
@example("!<tag:yaml.org,2002:float> x")
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(YAMLTextError):
        assert isinstance(read_yaml(text), dict | list | str | int | float | None)


SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Cn", "Co"]), max_size=200)
LOOKALIKES = st.sampled_from(
    [
        "1e5",
        "3e-4",
        ".5e1",
        "on",
        "null",
        "~",
        "007",
        "1_0",
        "2024-01-01",
        "=",
        "<<",
        "",
        " a",
        "- b",
        "a: b",
        "#",
        "\n",
        "a\nb",
    ]
)


@given(
    st.recursive(
        SCALARS | TEXTS | LOOKALIKES,
        lambda below: (
            st.lists(below, max_size=4) | st.dictionaries(LOOKALIKES | TEXTS.map(lambda t: t[:40]), below, max_size=4)
        ),
        max_leaves=12,
    )
)
@hypothesis_settings(max_examples=200)
@example({"?0": ["?0", "?", ": ", "a: ?"]})
def test_plain_values_survive_writing(values: Any) -> None:
    assert read_yaml(write_yaml(values)) == values


def test_equal_lists_are_written_twice() -> None:
    shared = [1, 2]
    assert "&" not in write_yaml({"a": shared, "b": shared})
