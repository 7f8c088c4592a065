"""The row `goal` of a study: what a variant to ship may lose, and what to minimize."""

from typing import Annotated, Literal

from pydantic import Field

from quantstudy.params.section import Section

Minutes = Annotated[float, Field(gt=0, le=100_000)]
Measured = Annotated[float, Field(gt=0, le=1e9)]


class Goal(Section):
    """What the stage `search` looks for (`quantstudy.search`)."""

    max_drop: Annotated[float, Field(gt=0, lt=100)]
    """The most that top-1 may drop below fp32's, in percentage points."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """How sure that must be: if all variants drop by `max_drop`, a search accepts one with chance 1 - confidence."""
    minimize: Literal["size", "latency", "bit_operations"] = "size"
    """The bytes of the model file, the milliseconds of a batch, or the bit-operations of an image."""
    runtime: Literal["onnxruntime", "openvino"] = "onnxruntime"
    """The runtime that the shipped ONNX file is made for, judged on and timed on."""
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 1
    """Images of the batch that is timed."""
    max_size_mb: Measured | None = None
    """The largest model file, in millions of bytes."""
    max_latency_ms: Measured | None = None
    """The longest that a batch may take on this machine, in milliseconds."""
    max_tbops: Measured | None = None
    """The most bit-operations of an image, in 10^12."""
    may_train: bool = False
    """Whether methods that train are tried too."""
    minutes: Minutes = 60.0
    """After this many minutes no other candidate is started."""
