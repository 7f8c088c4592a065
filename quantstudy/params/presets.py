"""`preprocessing: torchvision` of a study's data, written out as what torchvision's weights want to be shown."""

from typing import Any

from quantstudy.errors import UserError, unknown


def torchvision_preset(architecture: str, weights: str = "torchvision", key: str = "preprocessing") -> dict[str, Any]:
    """Return the values of `Preprocessing` that are `weights.transforms()` of torchvision; nothing is downloaded.

    Args:
        architecture: a classifier of torchvision's.
        weights: the name of some weights of it, IMAGENET1K_V1 for one; `torchvision` for its default ones.
        key: the param that an error names.

    Raises:
        UserError: there is no such classifier, or it has no such weights.
    """
    from torchvision import models

    if architecture not in models.list_models(module=models):
        what = f"torchvision has no weights of {architecture!r}; write image_size, mean and std instead"
        raise UserError(f"{key}: {weights!r}: {what}")
    known = models.get_model_weights(architecture)
    if weights not in ("torchvision", *known.__members__):
        raise unknown(key, weights, ["torchvision", *known.__members__])
    shown = (known.DEFAULT if weights == "torchvision" else known[weights]).transforms()
    (resized,), (cut,) = shown.resize_size, shown.crop_size
    return {
        "image_size": cut,
        "crop_fraction": cut / resized,
        "interpolation": shown.interpolation.value,
        "antialias": shown.antialias,
        "mean": list(shown.mean),
        "std": list(shown.std),
    }


def with_presets(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a params.yaml with every `studies.<name>.data.preprocessing` written out.

    Raises:
        UserError: torchvision has no such weights, or a key beside it says the same.
    """
    studies = raw.get("studies")
    if not isinstance(studies, dict):
        return raw
    return raw | {"studies": {name: _written_out(row, f"studies.{name}.data") for name, row in studies.items()}}


def _written_out(row: Any, key: str) -> Any:
    data = row.get("data") if isinstance(row, dict) else None
    if not isinstance(data, dict) or "preprocessing" not in data:
        return row
    model = row.get("model")
    architecture = model.get("architecture") if isinstance(model, dict) else None
    preset = torchvision_preset(str(architecture), str(data["preprocessing"]), f"{key}.preprocessing")
    if twice := [name for name in preset if name in data]:
        raise UserError(f"{key}.{twice[0]}: {data[twice[0]]!r} is what preprocessing says too; remove one of them")
    return row | {"data": {name: value for name, value in data.items() if name != "preprocessing"} | preset}
