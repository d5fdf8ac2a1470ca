"""Images in conversations: their sources, the number of their tokens, and the pixels that a model gets.

The Instruct's processor decides all of this. To find out how many tokens an image of some size takes, it is given a
blank image of that size, so that a data set is tokenised from the headers of its images alone; the images are opened
when a batch is built. The processor gets the images of a batch together, since their padding depends on one another.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shadowlit.data.conversation import IGNORE_INDEX, located
from shadowlit.data.formats import Message
from shadowlit.data.sampler import FILLER_ROW
from shadowlit.errors import DataError, PairError, counted

if TYPE_CHECKING:
    from PIL import Image as Pillow
    from transformers import ProcessorMixin

    from shadowlit.pair.pair import ModelPair

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Names that models use for the mask of image tokens, ``[B, T]``."""

IMAGE_INPUTS = (
    "pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes", "image_position_ids", "batch_num_images",
    *TOKEN_TYPES,
)  # fmt: skip
"""What processors make of images apart from the tokens, by the names of the models' arguments."""

Span = tuple[int, int]
_MOST_TEXTS = 1000  # that are kept, of thousands of characters each
_BLANK = (56, 56)  # width and height of the image in a batch that has none


@dataclass(frozen=True)
class ImageSource:
    """An image that a row names or contains, not yet opened.

    Attributes:
        path: Path of its file; None where the row contains it.
        data: Encoded image (PNG, JPEG …); None where it is in a file.
        size: Width and height in pixels, upright; None before :meth:`measured`.
    """

    path: str | None = None
    data: bytes | None = None
    size: tuple[int, int] | None = None

    def __str__(self) -> str:
        """Its name in messages."""
        return f"'{self.path}'" if self.path is not None else f"of {len(self.data or b''):,} bytes in the row"

    def pack(self) -> bytes:
        """Encode all attributes as bytes; the inverse of :meth:`unpack`."""
        width, height = self.size or (0, 0)
        content = self.path.encode() if self.path is not None else self.data or b""
        return b"%d %d %s %s" % (width, height, b"path" if self.path is not None else b"data", content)

    @classmethod
    def unpack(cls, packed: bytes) -> ImageSource:
        """Decode what :meth:`pack` returned."""
        width, height, kind, content = packed.split(b" ", 3)
        size = (int(width), int(height))
        return cls(path=content.decode(), size=size) if kind == b"path" else cls(data=content, size=size)

    def measured(self) -> ImageSource:
        """Return the same image with its size, which is read from the header.

        Raises:
            DataError: There is no such file, or it contains no image.
        """
        with _opened(self) as image:
            width, height = image.size
            # transformers turns images upright; these orientations swap width and height.
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
            return replace(self, size=(height, width) if turned else (width, height))

    def load(self) -> Pillow.Image:
        """Return the pixels, upright, in RGB.

        Raises:
            DataError: It can't be read, or has another size than when it was measured.
        """
        from PIL import ImageOps

        with _opened(self) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
        if self.size is not None and image.size != self.size:
            raise DataError(
                f"has the image {self} of {image.width}×{image.height} pixels, which had "
                f"{self.size[0]}×{self.size[1]} when its tokens were counted. Start again, with data.cache=false or "
                "another data.cache_dir."
            )
        return image


@contextmanager
def _opened(source: ImageSource) -> Iterator[Pillow.Image]:
    """Open an image; errors in the block become DataErrors that name it."""
    from PIL import Image

    if source.path is not None and not Path(source.path).is_file():
        raise DataError(
            f"names the image {source}, and there is no such file. Correct the path: a relative one begins in the "
            "folder of the data file."
        )
    try:
        with Image.open(BytesIO(source.data) if source.data is not None else str(source.path)) as image:
            yield image
    except Exception as error:  # of Pillow's many readers: OSError, SyntaxError, struct.error …
        raise DataError(
            f"has the image {source}, which can't be read ({type(error).__name__}: {error}). Expected a whole PNG, "
            "JPEG or other file that Pillow opens; replace the image or remove the row."
        ) from None


def image_source(value: Any, folder: Path) -> ImageSource:
    """Return the image that a value in a row describes.

    Args:
        value: Path, bytes, ``data:`` URL, ``{"bytes", "path"}`` as in ``datasets``, or Pillow image.
        folder: Folder to which paths are relative.

    Raises:
        DataError: It is something else, or a URL, since nothing is downloaded.
    """
    if isinstance(value, ImageSource):
        return value
    if isinstance(value, Mapping):
        inner = value.get("bytes") if value.get("bytes") is not None else value.get("path", value.get("url"))
        return image_source(inner, folder)
    if isinstance(value, bytes):
        return ImageSource(data=value)
    if hasattr(value, "save") and hasattr(value, "size"):  # Pillow's, already decoded
        encoded = BytesIO()
        value.save(encoded, format="PNG")
        return ImageSource(data=encoded.getvalue())
    if not isinstance(value, str) or not value:
        raise DataError(
            f"has {value!r:.60} for an image; expected a path, bytes, or an object with 'path' or 'bytes'. Correct or "
            "remove the row."
        )
    if value.startswith("data:"):
        try:
            return ImageSource(data=base64.b64decode(value.partition(",")[2], validate=True))
        except binascii.Error as error:
            raise DataError(f"has an image as a data: URL that is not base64 ({error}). Correct it.") from None
    if re.match(r"[a-z]+://", value) and not value.startswith("file://"):
        raise DataError(
            f"names the image {value!r:.100}, an address in the net; expected a local file. Download it, and give its "
            "path."
        )
    path = Path(value.removeprefix("file://")).expanduser()
    return ImageSource(path=str(path if path.is_absolute() else (folder / path).absolute()))


def locate(messages: list[Message], folder: Path) -> list[Message]:
    """Return the messages with an :class:`ImageSource` in every part of type image; ``folder`` as for
    :func:`image_source`.

    Raises:
        DataError: As for :func:`image_source`.
    """

    def located(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "image": image_source(part["image"], folder)} if part["type"] == "image" else part

    return [
        {**message, "content": [*map(located, message["content"])]} if _has_parts(message) else message
        for message in messages
    ]


def _has_parts(message: Message) -> bool:
    return isinstance(message.get("content"), list)


def images_in(messages: Sequence[Message]) -> list[ImageSource]:
    """Return the images of a conversation, in order."""
    contents = (message["content"] for message in messages if _has_parts(message))
    return [part["image"] for parts in contents for part in parts if part["type"] == "image"]


class ImageProcessing:
    """The tokens and pixels that the processor of a pair makes of images. Picklable, so that workers can use it.

    Raises:
        PairError: Its processor can't be loaded.
        DataError: The processor gives the model an argument that isn't known here.
    """

    def __init__(self, pair: ModelPair) -> None:
        self._pair = pair
        self._texts: dict[tuple[tuple[int, int], ...], list[str]] = {}
        blank = self.processor(images=[[_blank(_BLANK)]], text=[self.image_token], return_tensors="pt")
        given = set(blank) - {"input_ids", "attention_mask"}
        unknown = sorted(given - set(IMAGE_INPUTS))
        if unknown:
            raise DataError(
                f"the processor {type(self.processor).__name__} makes {', '.join(unknown)} of an image, which is not "
                f"known here; known are {', '.join(IMAGE_INPUTS)}. Remove the images, or use another pair."
            )
        self._token_types = next((name for name in TOKEN_TYPES if name in given), None)
        self._image_ids = torch.tensor([i for i in self.processor.image_token_ids if i is not None])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the processor, which is loaded again: one without its video part has no importable class."""
        return {**self.__dict__, "_pair": replace(self._pair)}

    @property
    def processor(self) -> ProcessorMixin:
        """The processor of transformers."""
        return self._pair.processor()

    @property
    def image_token(self) -> str:
        """The text that the chat template writes for an image."""
        token = getattr(self.processor, "image_token", None)
        if not isinstance(token, str):
            raise PairError(
                f"the processor {type(self.processor).__name__} names no image token, so images can't be placed in a "
                "text. Expected one like those of Qwen-VL, Gemma 3 or LLaVA; use such a pair."
            )
        return token

    def digest(self) -> str:
        """Return a hash of everything that determines how many tokens an image takes."""
        return hashlib.sha256(self.processor.to_json_string().encode()).hexdigest()

    def expand(
        self, text: str, spans: Sequence[Span], images: Sequence[ImageSource]
    ) -> tuple[str, list[Span], list[Span]]:
        """Replace each image token of a rendered conversation by the text that the model reads for the image.

        Args:
            text: Rendered conversation.
            spans: Ranges of its characters that are to be located in the new text.
            images: Images of the conversation, measured.

        Returns:
            The new text, and the ranges in it of ``spans`` and of the images.

        Raises:
            DataError: There are more or fewer image tokens than images.
        """
        token = self.image_token
        expanded, *pieces = text.split(token)
        if len(pieces) != len(images):
            raise DataError(
                f"has {counted(len(pieces), 'image token')} {token!r} in its rendered text, and "
                f"{counted(len(images), 'image')}; expected equally many. Give an image for each, remove the token "
                "from the text, or set data.chat_template to a template that writes images."
            )
        texts = self._texts_of(tuple(image.size for image in images if image.size is not None))
        end, places, shifts = len(expanded), [], []
        for replacement, piece in zip(texts, pieces, strict=True):
            places.append((len(expanded), len(expanded) + len(replacement)))
            expanded += replacement
            end += len(token)
            shifts.append((end, len(expanded) - end))
            expanded += piece
            end += len(piece)

        def moved(position: int) -> int:
            return position + next((by for after, by in reversed(shifts) if after <= position), 0)

        return expanded, [(moved(a), moved(b)) for a, b in spans], places

    def find_tokens(self, input_ids: Sequence[int]) -> list[int]:
        """Return the positions of image tokens."""
        return torch.isin(torch.tensor(input_ids), self._image_ids).nonzero().flatten().tolist()

    def inputs(self, input_ids: Tensor, images: list[list[Pillow.Image]]) -> dict[str, Tensor]:
        """Return the arguments, apart from the tokens, by which a model gets the images of a batch.

        Args:
            input_ids: ``[B, T]``.
            images: Images of each row that has any.
        """
        # Tensors of the images alone: some processors also write texts for them, whose lengths are unequal.
        made = self.processor(images=images, images_kwargs={"return_tensors": "pt"})
        inputs = {name: made[name] for name in IMAGE_INPUTS if name in made and name not in TOKEN_TYPES}
        if self._token_types is not None:
            inputs[self._token_types] = torch.isin(input_ids, self._image_ids).long()
        return inputs

    def filler(self) -> tuple[list[int], Pillow.Image]:
        """Return the tokens of a row that consists of an image alone, and the image."""
        (text,) = self._texts_of((_BLANK,))
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]), _blank(_BLANK)

    def _texts_of(self, sizes: tuple[tuple[int, int], ...]) -> list[str]:
        """The text that the model reads for each image of a conversation, by the sizes of all."""
        if not sizes:
            return []
        if sizes not in self._texts:
            if len(self._texts) >= _MOST_TEXTS:
                self._texts.clear()
            made = self.processor(
                images=[[_blank(size) for size in sizes]],
                text=[self.image_token * len(sizes)],
                return_text_replacement_offsets=True,
            )
            self._texts[sizes] = [found["replacement"] for found in made["text_replacement_offsets"][0]]
        return self._texts[sizes]


@dataclass(frozen=True)
class ImageCollate:
    """Builds batches of rows of which some have images.

    A batch without any image gets one more row, an unsupervised image. Otherwise a rank whose batch has no image would
    not run the vision tower, and the ranks that share its shards would wait for each other for ever. ``collate`` builds
    the batch of tokens.
    """

    collate: Any
    images: ImageProcessing

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch of ``collate``, with what the processor makes of the images (:data:`IMAGE_INPUTS`)."""
        loaded = [_loaded(sample) for sample in samples if sample.get("images")]
        if not loaded:
            tokens, blank = self.images.filler()
            samples = [*samples, {"input_ids": tokens, "labels": [IGNORE_INDEX] * len(tokens), "index": FILLER_ROW}]
            loaded = [[blank]]
        batch = self.collate(samples)
        return {**batch, **self.images.inputs(batch["input_ids"], loaded)}


def _loaded(sample: Mapping[str, Any]) -> list[Pillow.Image]:
    with located(sample["origin"]):
        return [image.load() for image in sample["images"]]


def _blank(size: tuple[int, int]) -> Pillow.Image:
    from PIL import Image

    return Image.new("RGB", size)
