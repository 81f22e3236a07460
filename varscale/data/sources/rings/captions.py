"""What an image of rings shows, in words, and back."""

from collections.abc import Sequence

from varscale.data.sources.rings.drawing import COLOUR_NAMES

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def caption(rings_K: Sequence[int], background: int = 0) -> str:
    """Words for so many rings of each colour of the palette: "two red rings and one green ring on blue".

    The background is 1 + the place of its colour; 0 is the dark one, which goes without saying.
    """
    parts = [
        f"{_NUMBERS[count] if count < len(_NUMBERS) else count} {name} ring{'s' * (count > 1)}"
        for count, name in zip(rings_K, COLOUR_NAMES, strict=False)
        if count
    ]
    rings = " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
    return f"{rings} on {COLOUR_NAMES[background - 1]}" if background else rings
