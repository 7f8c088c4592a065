"""Write out `preprocessing: torchvision` of a study's data as the preprocessing of torchvision's weights."""

from typing import Any

from quantstudy.errors import UserError, shown, unknown
from quantstudy.params.checks import at


def torchvision_preset(architecture: str, weights: str = "torchvision", key: str = "preprocessing") -> dict[str, Any]:
    """Return the values of `Preprocessing` that equal torchvision's `weights.transforms()`; nothing is downloaded.

    Args:
        architecture: a classifier of torchvision's.
        weights: the name of its weights, IMAGENET1K_V1 for example; `torchvision` for the default ones.
        key: the param that an error names.

    Raises:
        UserError: there is no such classifier, or it has no such weights.
    """
    from torchvision import models

    if architecture not in models.list_models(module=models):
        what = f"torchvision has no weights of {shown(architecture)}; write image_size, mean and std instead"
        raise UserError(f"{key}: {shown(weights)}: {what}")
    known = models.get_model_weights(architecture)
    if weights not in ("torchvision", *known.__members__):
        raise unknown(key, weights, ["torchvision", *known.__members__])
    seen = (known.DEFAULT if weights == "torchvision" else known[weights]).transforms()
    (resized,), (cut,) = seen.resize_size, seen.crop_size
    return {
        "image_size": cut,
        "crop_fraction": cut / resized,
        "interpolation": seen.interpolation.value,
        "antialias": seen.antialias,
        "mean": list(seen.mean),
        "std": list(seen.std),
    }


def with_presets(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the content of a params.yaml with every `studies.<name>.data.preprocessing` written out.

    The second value has a line for each mistake: torchvision has no such weights, or another key says the same.
    """
    lines: list[str] = []
    studies = {name: _written_out(row, f"studies.{name}.data", lines) for name, row in at(raw, dict, "studies").items()}
    return (raw | {"studies": studies} if studies else raw), lines


def _written_out(row: Any, key: str, lines: list[str]) -> Any:
    data = at(row, dict, "data")
    if "preprocessing" not in data:
        return row
    own = {name: value for name, value in data.items() if name != "preprocessing"}
    try:
        architecture, weights = at(row, str, "model", "architecture"), data["preprocessing"]
        preset = torchvision_preset(architecture, weights, f"{key}.preprocessing")
    except UserError as error:
        lines.append(str(error))
        stand_in = {"image_size": 224, "mean": [0.5] * 3, "std": [0.5] * 3}  # to check the other keys too
        return row | {"data": stand_in | own}
    if twice := [name for name in preset if name in own]:
        others = f", and {', '.join(twice[1:])}" if twice[1:] else ""
        lines.append(f"{key}.{twice[0]}: {shown(own[twice[0]])} is what preprocessing says too{others}; remove one")
    return row | {"data": own | preset}
