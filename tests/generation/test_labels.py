import pytest

from varscale.errors import ExperimentError
from varscale.generation.labels import in_words, labels_of


def labels(text: str, *names: str, classes: int = 3) -> list[int]:
    return labels_of("--labels", text, classes, names)


def test_numbers_names_and_none() -> None:
    assert labels("2, 0,0") == [2, 0, 0]
    assert labels("dog,cat,2,none", "cat", "dog", "eel") == [1, 0, 2, 3]
    assert labels('"tench, Tinca tinca",eel', "eel", "tench, Tinca tinca", "x") == [1, 0]
    assert labels("Cafe\u0301", "Caf\u00e9", "b", "c") == [0]
    assert labels("none,0", "none", "b", "c") == [3, 0]


def test_a_name_of_several_classes_is_refused() -> None:
    with pytest.raises(ExperimentError, match=r"--labels crane: several classes have this name; say a label: 0, 2"):
        labels("ox,crane", "crane", "ox", "crane")
    assert labels("ox,2", "crane", "ox", "crane") == [1, 2]


def test_numbers_are_names_where_all_names_are_numbers() -> None:
    names = [str(number) for number in range(1, 13)]
    assert labels("12,1,2", *names, classes=12) == [11, 0, 1]
    assert labels("7,007", "005", "006", "007") == [2, 2]
    assert labels("0,1,2", "0", "1", "2") == [0, 1, 2]
    with pytest.raises(
        ExperimentError, match=r"--labels 0: no such class; .* 0 … 11, whose names are 1, 2, .* \(12 in all"
    ):
        labels("0", *names, classes=12)


@pytest.mark.parametrize("wrong", ["3", "-1", "bird", "", "1.5", "9" * 5000, "²"])
def test_others_are_refused_with_the_range_and_the_names(wrong: str) -> None:
    with pytest.raises(
        ExperimentError, match=r"no such class; .*none \(no class\).* 0 … 2, whose names are cat, dog, eel"
    ):
        labels(f"0,{wrong}", "cat", "dog", "eel")


def test_labels_in_words() -> None:
    assert in_words([0, 2, 3], ["cat", "dog", "eel"]) == "0 (cat), 2 (eel), 3 (no class)"
