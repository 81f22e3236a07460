"""Captions beside a token store: every caption once with its embedding, and which of them each image has.

Letters: N images, U different captions, D numbers of an embedding, B batch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from varscale.config.captions import CaptionsSection
from varscale.data.captions import open_encoder, tidy, unit_vectors
from varscale.data.sources.base import ImageSource
from varscale.errors import CheckpointError, TokenStoreError
from varscale.store.weights import load_tensors, save_tensors

FILE = "captions.safetensors"
_KIND = "captions"


@dataclass(frozen=True)
class StoredCaptions:
    """Captions of images."""

    texts: tuple[str, ...]
    """Different captions; empty texts where vectors were given without."""
    embeddings_UD: Tensor
    """float32, of length 1."""
    index_N: Tensor
    """int64: of each image its caption."""

    @classmethod
    def of(cls, source: ImageSource, settings: CaptionsSection) -> Self:
        """Embed a source's captions, each once.

        Raises:
            DataError: Images have none, or they can't be embedded.
        """
        if settings.encoder == "vectors":
            vectors_ND = unit_vectors(source.caption_vectors(), settings.embedding_width)
            embeddings_UD, index_N = np.unique(vectors_ND, axis=0, return_inverse=True)
            return cls(("",) * len(embeddings_UD), torch.from_numpy(embeddings_UD), torch.from_numpy(index_N.ravel()))
        places: dict[str, int] = {}
        index = [places.setdefault(tidy(caption), len(places)) for caption in source.captions()]
        embeddings = torch.from_numpy(open_encoder(settings).embed([*places]))
        return cls(tuple(places), embeddings, torch.tensor(index))

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Those of a token store; None where it has none.

        Raises:
            TokenStoreError: The file is damaged.
        """
        path = folder / FILE
        if not path.exists():
            return None
        try:
            tensors, metadata = load_tensors(path, _KIND)
            texts = tuple(json.loads(metadata["texts"]))
            return cls(texts, tensors["embeddings"], tensors["index"])
        except (CheckpointError, KeyError) as error:
            raise TokenStoreError(f"{error}; encode the store again") from None

    @classmethod
    def read_required(cls, folder: Path) -> Self:
        """Those of a token store.

        Raises:
            TokenStoreError: It has none, or the file is damaged.
        """
        captions = cls.read(folder)
        if captions is None:
            raise TokenStoreError(f"{folder}: no captions; encode the store again")
        return captions

    def write(self, folder: Path) -> None:
        """Write them beside a token store's shards; atomically."""
        tensors = {"embeddings": self.embeddings_UD, "index": self.index_N}
        save_tensors(folder / FILE, tensors, {"kind": _KIND, "texts": json.dumps(self.texts)})

    def of_images(self, image_B: Tensor) -> Tensor:
        """The embeddings (B, D) of images' captions."""
        return self.embeddings_UD[self.index_N[image_B]]

    def texts_of(self, image_B: Tensor) -> list[str]:
        """Images' captions."""
        return [self.texts[place] for place in self.index_N[image_B].tolist()]

    def different(self, count: int) -> Tensor:
        """The first images, at most so many, of which no two have the same caption."""
        firsts = np.unique(self.index_N.numpy(), return_index=True)[1]
        return torch.from_numpy(np.sort(firsts)[:count])


def write_captions(folder: Path, source: ImageSource, settings: CaptionsSection) -> None:
    """Embed the captions of a token store's images, unless it has those of so many."""
    try:
        stored = StoredCaptions.read(folder)
    except TokenStoreError:
        stored = None
    if stored is None or len(stored.index_N) < len(source):
        StoredCaptions.of(source, settings).write(folder)
