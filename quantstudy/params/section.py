"""What every part of the params has in common: immutable, no unknown keys, and the types of its values."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

GROUP_SIZES = (8, 16, 32, 64, 128, 256)

Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
Bits = Annotated[int, Field(ge=2, le=8)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Float16 = Literal["float16", "bfloat16"]
Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["cosine", "constant", "one_cycle"]
Augmentation = Literal["none", "shift", "flip", "crop_flip"]


class Section(BaseModel):
    """A part of the params: immutable, no unknown keys, no coercion of strings to numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
