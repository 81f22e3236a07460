"""How the captions of images become embeddings, as an experiment describes it."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from varscale.config.section import Name, PathText, Section, Whole

WIDTHS = {"words": 256, "sentences": 384, "clip": 512}
"""Numbers of an embedding unless an experiment says otherwise: of `sentences` MiniLM's, of `clip` ViT-B's."""


class CaptionsSection(Section):
    """Captions of the images, each embedded once as one vector of length 1.

    Rings have captions of themselves. In folders `cat.txt` lies beside `cat.png`; Parquet files have a column.
    """

    encoder: Literal["words", "sentences", "clip", "vectors"] = "words"
    """`words`: the words and pairs of words, hashed; has no weights. `sentences`: a sentence encoder (MiniLM of the
    extra `text`, or the one in `folder`). `clip`: CLIP's text encoder in `folder`. `vectors`: a Parquet column has
    embeddings."""
    width: Annotated[Whole, Field(ge=8, le=2**14)] | None = None
    """Numbers of an embedding; None: the encoder's (`words`: 256)."""
    folder: PathText | None = None
    """Folder of the encoder's weights, as `transformers` saves them (`sentences`, `clip`)."""
    column: Name | None = None
    """Parquet column of the captions, or of vectors; None: of text, the one of a usual name, such as caption."""

    @property
    def embedding_width(self) -> int:
        """Numbers of an embedding."""
        return self.width or WIDTHS[self.encoder]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.encoder == "vectors" and (self.width is None or self.column is None):
            raise ValueError("width: encoder vectors needs column, the column of vectors, and width, their length")
        if self.encoder == "words" and self.embedding_width % 8:
            raise ValueError(f"width: {self.width} is no multiple of 8, which encoder words needs")
        if self.encoder == "clip" and self.folder is None:
            raise ValueError("folder: encoder clip needs the folder of its weights, as transformers saves them")
        if self.encoder in ("words", "vectors") and self.folder is not None:
            raise ValueError(f"folder: encoder {self.encoder} has no weights")
        return self
