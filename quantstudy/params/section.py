"""The base of every part of the params: immutable, no unknown keys, and the types of its values.

Every number has bounds that a machine can bear. A number beyond them would be a slip, and cost hours or all memory.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

GROUP_SIZES = (8, 16, 32, 64, 128, 256)
NAME = r"^[a-z0-9_]+$"


def _is_text(value: str) -> str:
    if not value or min(value) < " ":
        raise ValueError("write one character or more, and none that controls a terminal")
    if len(value.encode()) > 4000 or max(len(part.encode()) for part in value.split("/")) > 255:
        raise ValueError("no file system takes a path of more than 4000 bytes, or a name of more than 255")
    return value


Name = Annotated[str, Field(pattern=NAME, max_length=64)]
Text = Annotated[str, AfterValidator(_is_text)]
Bits = Annotated[int, Field(ge=2, le=8)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Epochs = Annotated[int, Field(ge=1, le=10_000)]
Rate = Annotated[float, Field(gt=0, le=1e12)]
Images = Annotated[int, Field(ge=1, le=10**9)]
BatchSize = Annotated[int, Field(ge=1, le=16_384)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Float16 = Literal["float16", "bfloat16"]
Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["cosine", "constant", "one_cycle"]
CalibrationAugmentation = Literal["none", "flip", "crop_flip"]
Target = Literal["any_x86", "vnni"]
Augmentation = Literal["none", "shift", "flip", "crop_flip"]


class Section(BaseModel):
    """A part of the params: immutable, no unknown keys, no coercion of strings to numbers, finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
