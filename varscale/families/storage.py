"""Finished models of any family as safetensors files that carry their description."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from varscale.errors import CheckpointError
from varscale.families.base import FAMILY_KINDS, ModelDescription
from varscale.families.models import FamilyModel
from varscale.store.weights import fill, load_tensors, save_tensors, stored_metadata

KIND = "model"


def save_model(path: Path, model: FamilyModel, fingerprint: str) -> None:
    """Write a model's weights with the description that rebuilds it and its run's fingerprint; atomically.

    Raises:
        OSError: It can't be written; the error names the file.
    """
    metadata = {"kind": KIND, "description": model.config.model_dump_json(), "fingerprint": fingerprint}
    save_tensors(path, model.state_dict(), metadata)


def load_model(path: Path, expected_fingerprint: str | None = None) -> FamilyModel:
    """Rebuild a saved model, in evaluation mode.

    Raises:
        CheckpointError: The file is missing, damaged or foreign, or was made by a run of another fingerprint.
    """
    tensors, metadata = load_tensors(path, KIND, expected_fingerprint)
    description = _description(path, metadata)
    with torch.device("meta"):
        model = description.implementation().build(description)
    fill(model, tensors, path)
    return model.eval()


def stored_description(path: Path) -> ModelDescription:
    """What a saved model is, without its weights, which may take minutes to read.

    Raises:
        CheckpointError: The file is missing or no model.
    """
    return _description(path, stored_metadata(path, KIND))


def _description(path: Path, metadata: Mapping[str, str]) -> ModelDescription:
    try:
        text = metadata.get("description", "")
        return FAMILY_KINDS.sections[json.loads(text)["family"]].description.model_validate_json(text)
    except (KeyError, RecursionError, TypeError, ValueError) as error:  # pydantic's error is a ValueError
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: not a model that this version of varscale can build: {reason}") from None
