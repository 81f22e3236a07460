"""The image sources that an experiment's `data` section describes.

All of it raises `DataError` where data are missing or malformed.
"""

from collections.abc import Sequence

from varscale.config import DataSection
from varscale.config.captions import CaptionsSection
from varscale.data.captions import open_encoder
from varscale.data.sources.base import ImageSource, SubsetSource, digest
from varscale.store.fingerprint import DataIdentity


def training_source(data: DataSection, images: int) -> ImageSource:
    """Training images: of a procedural source at least `images`, so that none repeats; of any other, all."""
    return data.open("train", images)


def validation_source(data: DataSection) -> ImageSource:
    """Validation images, `data.validation_images` of them; it is an error where there are fewer."""
    source = data.open("validation", data.validation_images)
    if data.procedural or data.validation_images is None:
        return source
    return SubsetSource(source, data.validation_images)


def data_identity(data: DataSection) -> DataIdentity:
    """What the images depend on; opens stored data, so that what is wrong shows before anything is trained.

    The number of procedural training images is left out: image i is the same however many there are. It is an error
    where validation images are among the training images.
    """
    # nor does it change training images how often each is seen, or how many others are left out
    apart = {"validation_images", "max_undecodable", "views", "captions", *data.places, *data.apart}
    settings: dict[str, object] = data.model_dump(mode="json", exclude=apart)
    validation: dict[str, object] = {"images": data.validation_images}
    if data.procedural:
        captions = captions_identity(data.captions, [validation_source(data)]) if data.captions else {}
        return DataIdentity(settings, validation, captions=captions)
    train, held_out = training_source(data, 1), validation_source(data)
    held_out.check_apart_from(train)
    captions = captions_identity(data.captions, [train, held_out]) if data.captions else {}
    validation["content"] = held_out.fingerprint  # fingerprints are of the images and their crops
    lines = [*train.summary(), *held_out.summary()]
    if shared := held_out.shared_with(train):
        more = ", …" if len(shared) > 3 else ""
        lines.append(
            f"validation pictures that are training pictures, too: {len(shared)}: {', '.join(shared[:3])}{more}"
        )
    return DataIdentity(
        {**settings, "content": train.fingerprint}, validation, data.views, len(train), tuple(lines), captions
    )


def captions_identity(settings: CaptionsSection, sources: Sequence[ImageSource]) -> dict[str, object]:
    """What the embeddings of captions depend on: the encoder with its weights, and all captions of some sources."""
    encoder = open_encoder(settings)
    if settings.encoder == "vectors":
        parts = [source.caption_vectors().tobytes() for source in sources]
    else:
        parts = [caption.encode() for source in sources for caption in source.captions()]
    return {"encoder": encoder.identity, "width": encoder.width, "content": digest(parts)}
