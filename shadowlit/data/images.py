"""Images in conversations: where they lie, how many tokens they take, and the pixels that a model gets of them.

The Instruct's processor decides about everything. It is asked how many tokens an image of a size takes, by giving it a
blank one of that size, so that a data set is tokenised from the headers of its images alone; the images themselves are
opened when a batch is put together. A batch's images are handed to the processor together, for how they are padded
depends on one another.
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

from shadowlit.data.conversation import IGNORE_INDEX
from shadowlit.data.formats import Message
from shadowlit.data.sampler import FILLER_ROW
from shadowlit.errors import DataError, PairError

if TYPE_CHECKING:
    from PIL import Image as Pillow
    from transformers import ProcessorMixin

    from shadowlit.pair.pair import ModelPair

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Which tokens are of images, ``[B, T]``, by the names that models have for it."""

IMAGE_INPUTS = (
    "pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes", "image_position_ids", "batch_num_images",
    *TOKEN_TYPES,
)  # fmt: skip
"""What processors make of images beside the tokens, by the names of the models' arguments."""

Span = tuple[int, int]
_MOST_TEXTS = 1000  # kept, of thousands of characters each
_BLANK = (56, 56)  # width and height of the image in a batch that has none


@dataclass(frozen=True)
class Picture:
    """An image that a row names or holds, not yet opened.

    Attributes:
        path: its file; None where the row holds it.
        data: the encoded image (PNG, JPEG …); None where it lies in a file.
        size: width and height in pixels, upright, once they were looked up.
    """

    path: str | None = None
    data: bytes | None = None
    size: tuple[int, int] | None = None

    def __str__(self) -> str:
        """What messages call it."""
        return f"'{self.path}'" if self.path is not None else f"of {len(self.data or b''):,} bytes in the row"

    def pack(self) -> bytes:
        """All of it as bytes; the inverse of :meth:`unpack`."""
        width, height = self.size or (0, 0)
        content = self.path.encode() if self.path is not None else self.data or b""
        return b"%d %d %s %s" % (width, height, b"path" if self.path is not None else b"data", content)

    @classmethod
    def unpack(cls, packed: bytes) -> Picture:
        """What :meth:`pack` was called on."""
        width, height, kind, content = packed.split(b" ", 3)
        size = (int(width), int(height))
        return cls(path=content.decode(), size=size) if kind == b"path" else cls(data=content, size=size)

    def measured(self) -> Picture:
        """With its size, read from the header.

        Raises:
            DataError: There is no such file, or it holds no image.
        """
        with _opened(self) as image:
            width, height = image.size
            # As transformers turns images upright: these orientations exchange width and height.
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
            return replace(self, size=(height, width) if turned else (width, height))

    def load(self) -> Pillow.Image:
        """The pixels, upright, RGB.

        Raises:
            DataError: It can't be read, or has another size than when it was measured.
        """
        from PIL import ImageOps

        with _opened(self) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
        if self.size is not None and image.size != self.size:
            raise DataError(
                f"has the image {self} of {_shown(image.size)} pixels, which had {_shown(self.size)} when its tokens "
                "were counted. Start again, with data.cache=false or another data.cache_dir."
            )
        return image


@contextmanager
def _opened(picture: Picture) -> Iterator[Pillow.Image]:
    """The picture's file or bytes, opened; what goes wrong within becomes a DataError that names it."""
    from PIL import Image

    if picture.path is not None and not Path(picture.path).is_file():
        raise DataError(
            f"names the image {picture}, and there is no such file. Correct the path: a relative one begins in the "
            "folder of the data file."
        )
    try:
        with Image.open(BytesIO(picture.data) if picture.data is not None else str(picture.path)) as image:
            yield image
    except Exception as error:  # of Pillow's many readers: OSError, SyntaxError, struct.error …
        raise DataError(
            f"has the image {picture}, which can't be read ({type(error).__name__}: {error}). Expected a whole PNG, "
            "JPEG or other file that Pillow opens; replace the image or remove the row."
        ) from None


def picture_of(value: Any, folder: Path) -> Picture:
    """The picture that a value of a row stands for.

    Args:
        value: a path, bytes, a ``data:`` URL, ``{"bytes", "path"}`` as ``datasets`` has it, or a Pillow image.
        folder: where relative paths begin.

    Raises:
        DataError: it is something else, or an address in the net, which nothing is fetched from.
    """
    if isinstance(value, Picture):
        return value
    if isinstance(value, Mapping):
        inner = value.get("bytes") if value.get("bytes") is not None else value.get("path", value.get("url"))
        return picture_of(inner, folder)
    if isinstance(value, bytes):
        return Picture(data=value)
    if hasattr(value, "save") and hasattr(value, "size"):  # Pillow's, already decoded
        encoded = BytesIO()
        value.save(encoded, format="PNG")
        return Picture(data=encoded.getvalue())
    if not isinstance(value, str) or not value:
        raise DataError(
            f"has {value!r:.60} for an image; expected a path, bytes, or an object with 'path' or 'bytes'. Correct or "
            "remove the row."
        )
    if value.startswith("data:"):
        try:
            return Picture(data=base64.b64decode(value.partition(",")[2], validate=True))
        except binascii.Error as error:
            raise DataError(f"has an image as a data: URL that is no base64 ({error}). Correct it.") from None
    if re.match(r"[a-z]+://", value) and not value.startswith("file://"):
        raise DataError(
            f"names the image {value!r:.100}, an address in the net; expected a local file. Download it, and give its "
            "path."
        )
    path = Path(value.removeprefix("file://")).expanduser()
    return Picture(path=str(path if path.is_absolute() else (folder / path).absolute()))


def locate(messages: list[Message], folder: Path) -> list[Message]:
    """The messages with a :class:`Picture` in every part of type image; ``folder`` as for :func:`picture_of`.

    Raises:
        DataError: as there.
    """

    def located(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "image": picture_of(part["image"], folder)} if part["type"] == "image" else part

    return [
        message if isinstance(message["content"], str) else {**message, "content": [*map(located, message["content"])]}
        for message in messages
    ]


def pictures_in(messages: Sequence[Message]) -> list[Picture]:
    """The pictures of a conversation, in order."""
    contents = (message["content"] for message in messages if not isinstance(message["content"], str))
    return [part["image"] for parts in contents for part in parts if part["type"] == "image"]


class ImageProcessing:
    """The Instruct's processor, asked for tokens and for pixels. Picklable, so that workers can use it.

    Args:
        pair: a pair of vision-language models.

    Raises:
        PairError: its processor can't be loaded.
        DataError: the processor gives the model something that isn't known here.
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
        """Without the processor, which is loaded again: one of images alone has no importable class."""
        return {**self.__dict__, "_pair": replace(self._pair)}

    @property
    def processor(self) -> ProcessorMixin:
        """transformers' processor."""
        return self._pair.processor()

    @property
    def image_token(self) -> str:
        """What the chat template writes for an image."""
        token = getattr(self.processor, "image_token", None)
        if not isinstance(token, str):
            raise PairError(
                f"the processor {type(self.processor).__name__} names no image token, so images can't be placed in a "
                "text. Expected one like those of Qwen-VL, Gemma 3 or LLaVA; use such a pair."
            )
        return token

    def digest(self) -> str:
        """A hash of whatever decides how many tokens an image takes."""
        return hashlib.sha256(self.processor.to_json_string().encode()).hexdigest()

    def expand(
        self, text: str, spans: Sequence[Span], pictures: Sequence[Picture]
    ) -> tuple[str, list[Span], list[Span]]:
        """Put in place of each image token of a rendered conversation what stands for its image.

        Args:
            text: the conversation.
            spans: characters to be found again.
            pictures: the images, measured.

        Returns:
            The text, ``spans`` in it, and the characters of the images.

        Raises:
            DataError: there are more or fewer image tokens than images.
        """
        token = self.image_token
        places = [match.start() for match in re.finditer(re.escape(token), text)]
        if len(places) != len(pictures):
            raise DataError(
                f"has {_count(len(places), 'image token')} {token!r} in its rendered text, and "
                f"{_count(len(pictures), 'image')}; expected equally many. Give an image for each, remove the token "
                "from the text, or set data.chat_template to a template that writes images."
            )
        sizes = tuple(picture.size for picture in pictures)
        texts = self._texts_of(sizes)  # type: ignore[arg-type]
        parts, images, shifts, end, grown = [], [], [], 0, 0
        for place, put in zip(places, texts, strict=True):
            parts += [text[end:place], put]
            images.append((place + grown, place + grown + len(put)))
            end = place + len(token)
            grown += len(put) - len(token)
            shifts.append((end, grown))

        def moved(position: int) -> int:
            return position + next((by for at, by in reversed(shifts) if at <= position), 0)

        return "".join([*parts, text[end:]]), [(moved(a), moved(b)) for a, b in spans], images

    def find_tokens(self, input_ids: Sequence[int]) -> list[int]:
        """The places of image tokens."""
        return torch.isin(torch.tensor(input_ids), self._image_ids).nonzero().flatten().tolist()

    def inputs(self, input_ids: Tensor, pictures: Sequence[Sequence[Pillow.Image]]) -> dict[str, Tensor]:
        """What a model gets of a batch's images beside the tokens.

        Args:
            input_ids: ``[B, T]``.
            pictures: the images of each row that has some.
        """
        # Tensors of the images alone: some processors write a text for them, whose rows are of unequal lengths.
        given = [list(images) for images in pictures]
        made = self.processor(images=given, images_kwargs={"return_tensors": "pt"})
        inputs = {name: made[name] for name in IMAGE_INPUTS if name in made and name not in TOKEN_TYPES}
        if self._token_types is not None:
            inputs[self._token_types] = torch.isin(input_ids, self._image_ids).long()
        return inputs

    def filler(self) -> tuple[list[int], Pillow.Image]:
        """The tokens of a row that is nothing but an image, and the image."""
        (text,) = self._texts_of((_BLANK,))
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]), _blank(_BLANK)

    def _texts_of(self, sizes: tuple[tuple[int, int], ...]) -> list[str]:
        """What stands for the images of a conversation, by their sizes."""
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
    """Puts together batches of rows with images, and of rows without beside them.

    A batch without any image gets one more row, an image without loss: else a rank whose batch has none would not run
    the vision tower that the others run, and those that shard it would wait for each other for ever.

    Attributes:
        collate: for the tokens.
        images: the Instruct's processor.
    """

    collate: Any
    images: ImageProcessing

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """What ``collate`` returns, and what the processor makes of the images (:data:`IMAGE_INPUTS`)."""
        loaded = [list(_loaded(sample)) for sample in samples if sample.get("images")]
        if not loaded:
            tokens, blank = self.images.filler()
            samples = [*samples, {"input_ids": tokens, "labels": [IGNORE_INDEX] * len(tokens), "index": FILLER_ROW}]
            loaded = [[blank]]
        batch = self.collate(samples)
        return {**batch, **self.images.inputs(batch["input_ids"], loaded)}


def _loaded(sample: Mapping[str, Any]) -> Iterator[Pillow.Image]:
    try:
        for picture in sample["images"]:
            yield picture.load()
    except DataError as error:
        raise DataError(f"{sample['origin']} {error}") from None


def _blank(size: tuple[int, int]) -> Pillow.Image:
    from PIL import Image

    return Image.new("RGB", size)


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
