"""Every network of the zoo, folded, quantized, equalized, exported, counted and trained, against itself untouched.

A refusal in one line that says what the entry expects passes too.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from quantstudy import params as P
from quantstudy.errors import UserError
from quantstudy.measure.coverage import not_quantized
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.equalization import absorb_high_biases, equalize
from quantstudy.methods.recipes import quantize, trained_recipe_of
from quantstudy.network import architectures
from quantstudy.network.checkpoint import load_checkpoint
from quantstudy.network.folding import fold_batchnorm
from quantstudy.network.fp32 import load_fp32, save_fp32
from quantstudy.quantization.layers import quantized_layers, quantized_operands
from quantstudy.quantization.sqnr import least_sqnr_db, sqnr_db
from quantstudy.quantization.variant import Variant, load_variant, save_variant
from quantstudy.runtimes.executables import unrounded
from quantstudy.runtimes.library import Model, load_model
from quantstudy.runtimes.sessions import PACKAGES, why_missing
from tests.families import FAMILIES
from tests.zoo import ZOO, Entry, settled

METHODS = P.load_methods()
LEAST_DB = {"int8_static": 25, "int8_dynamic": 25, "int8_equalized": 25, "int4_weight_only": 5, "int4_gptq": 15}
"""Bounds of each method, some decibels below what every network of the zoo has."""
ATTENDING = ("attention", "encoder", "vit_b_16")
"""Networks with an `nn.MultiheadAttention`."""
QUICK = ("assertion", "batchnorm_transposed", "same_pad", "shared_parameter", "attention", "relu6")
"""Networks that are quantized in the quick tests."""
EXPORTED = ("assertion", "batchnorm_transposed")
"""Those that are exported there: each takes a second or two."""
EDGED = [entry for entry in ZOO if entry.layers and not entry.left and not entry.either]
CPU = torch.device("cpu")


class Case:
    """A network with settled statistics, and what is made of it once."""

    def __init__(self, entry: Entry, folder: Path) -> None:
        self.entry, self.folder = entry, folder
        many, size = 4 if entry in ZOO else 32, (3, entry.size, entry.size)
        contrast, brightness = (
            torch.tensor([[0.3, 0.6, 1, 1.5], [-1, -0.3, 0.3, 1]]).repeat(1, many // 4).view(2, -1, 1, 1, 1)
        )
        self.settling = torch.randn(many, *size, generator=torch.Generator().manual_seed(0)) * contrast + brightness
        self.images = self.settling[:4].clone()

    @functools.cached_property
    def model(self) -> nn.Module:
        """The network untouched: BatchNorm not folded, eval mode."""
        torch.manual_seed(0)
        network = architectures.build(self.entry.architecture, self.entry.classes, self.entry.size)
        return settled(network, self.settling, is_deep=self.entry not in ZOO)

    @functools.cached_property
    def logits(self) -> Tensor:
        return run(self.model, self.images)

    @functools.cached_property
    def path(self) -> Path:
        """The file of the fp32 network."""
        path, half = self.folder / "fp32.pth", (0.5, 0.5, 0.5)
        preprocessing = P.Preprocessing(image_size=self.entry.size, mean=half, std=half)
        save_fp32(path, self.model, self.entry.architecture, self.entry.classes, preprocessing)
        return path

    @functools.cached_property
    def loaded(self) -> Model:
        """What the package makes of that file."""
        return load_model(self.path)

    @property
    def calibration(self) -> Calibration:
        return Calibration(self.loaded.network, [self.images.contiguous(memory_format=torch.channels_last)])

    @property
    def layers(self) -> set[str]:
        """The layers that are quantized."""
        if self.entry.layers is not None:
            return set(self.entry.layers)
        layers = {name for name, layer in self.model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
        return {name for name in layers if not re.search(self.entry.unquantized or "^$", name)}

    @property
    def folded_db(self) -> int:
        """What folding has to keep: 1e-4, less where the rounding of float32 grows from layer to layer."""
        return 80 if self.entry in ZOO else 70

    @contextlib.contextmanager
    def may_refuse(self, reason: str = "") -> Iterator[None]:
        """Let one line that matches `reason`, or that of the entry, be the answer."""
        try:
            yield
        except UserError as error:
            wanted = reason or self.entry.refused
            assert wanted and re.search(wanted, str(error)) and "\n" not in str(error), f"refused: {error}"

    def stored(self, variant: Variant) -> Variant:
        """Write a variant and read it again."""
        save_variant(self.folder / "variant.pth", variant, load_checkpoint(self.path), "method")
        return load_variant(self.folder / "variant.pth")


@pytest.fixture(scope="module", autouse=True)
def parsed_once() -> Iterator[None]:
    """Parse the zoo's code once, not for each of the files that keep its SHA-256."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architectures, "transitive_imports", functools.cache(architectures.transitive_imports))
        yield


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param.name))


def each(quick: Callable[[Entry], bool] = lambda entry: True, of: list[Entry] = ZOO + FAMILIES) -> Any:
    """Run a test on each network, slow where it is not `quick` or one of torchvision's."""
    marked = {True: (), False: pytest.mark.slow}
    rows = [pytest.param(entry, id=entry.name, marks=marked[entry in ZOO and quick(entry)]) for entry in of]
    return pytest.mark.parametrize("case", rows, indirect=True)


def is_special(entry: Entry) -> bool:
    """Whether more is known of a network than its layers."""
    return bool(entry.folds or entry.kept or entry.left or entry.either or entry.refused)


@torch.no_grad()
def run(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return model(images)


def decibels(reference: Tensor, found: Tensor) -> float:
    assert found.shape == reference.shape
    assert np.isfinite(found.numpy()).all(), "not finite"
    return sqnr_db(reference.numpy(), found.numpy())


@each()
def test_folding_keeps_the_function(case: Case) -> None:
    with case.may_refuse():
        identities = [name for name, module in case.model.named_modules() if isinstance(module, nn.Identity)]
        folded = fold_batchnorm(case.model)
        for images in (case.images, case.images[:1], case.images.contiguous(memory_format=torch.channels_last)):
            try:
                wanted = run(case.model, images)
            except RuntimeError:  # its own code cannot take that layout
                continue
            assert decibels(wanted, run(folded, images)) > case.folded_db
        if case.entry.folds is not None:
            kinds = [(_BatchNorm, case.entry.kept), (nn.Identity, case.entry.folds)]
            for kind, count in kinds:
                found = [name for name, module in folded.named_modules() if isinstance(module, kind)]
                assert len(found) == count, f"{kind.__name__}: {found}"
        after = [name for name, module in case.model.named_modules() if isinstance(module, nn.Identity)]
        assert after == identities, "the original changed"


@pytest.mark.parametrize("method", LEAST_DB)
@each(lambda entry: entry.name in QUICK)
def test_a_variant_is_near_the_network(case: Case, method: str) -> None:
    entry = case.entry
    with case.may_refuse():
        variant = quantize(case.loaded.network, case.calibration, METHODS[method])
        logits = run(variant, case.images)
        found = decibels(case.logits, logits)
        assert found > LEAST_DB[method] or entry in FAMILIES  # of these random ones rounding makes noise
        assert torch.equal(run(case.stored(variant), case.images), logits), "another after saving and loading"
        quantized, skipped = set(quantized_layers(variant.network)), variant.skipped.get("quantization", {})
        assert quantized - set(entry.either) == case.layers
        for name, reason in (entry.left | entry.either).items():
            assert name in quantized or re.search(reason, skipped.get(name, "")), f"{name}: {skipped.get(name)}"
        assert not quantized & set(skipped)


@pytest.mark.parametrize("method", ["int8_static", "int8_dynamic"])
@each(lambda entry: entry.name == "attention", of=[entry for entry in ZOO + FAMILIES if entry.name in ATTENDING])
def test_operands_of_attention_are_rounded(case: Case, method: str) -> None:
    row = METHODS[method].model_copy(update={"attention_products": True})
    plain = quantize(case.loaded.network, case.calibration, METHODS[method])
    variant = quantize(case.loaded.network, case.calibration, row)
    sides = quantized_operands(variant.network)
    assert len(sides) == 4 * not_quantized(plain)["attention"] and not not_quantized(variant)["attention"]
    logits = run(variant, case.images)
    assert decibels(case.logits, logits) > 20
    stored, codes, changes = case.stored(variant), [], []
    for side in quantized_operands(stored.network).values():
        side.register_forward_hook(lambda module, inputs, output: codes.append(output.unique().numel()))
        side.register_forward_hook(lambda module, inputs, output: changes.append(not torch.equal(inputs[0], output)))
    assert torch.equal(run(stored, case.images), logits), "another after saving and loading"
    assert len(codes) == len(sides) and max(codes) <= 256 and all(changes)
    model = Model(variant, case.loaded.facts, method)
    for runtime in ("onnxruntime", "openvino"):
        if why_missing(runtime) is None:
            found = model.executable(runtime, CPU).run(case.images)  # which is judged there
            assert decibels(logits, found) > 25


@each(lambda entry: "head" in entry.name or entry.name == "defined_backwards", of=EDGED)
def test_first_and_last_are_those_that_run(case: Case) -> None:
    with case.may_refuse():
        row = METHODS["int4_weight_only"].model_copy(update={"edge_bits": 8})
        variant = quantize(case.loaded.network, case.calibration, row)
        bits = {name: layer.scheme.weight.bits for name, layer in quantized_layers(variant.network).items()}
        assert case.entry.layers is not None
        assert {name for name in bits if bits[name] == 8} == {case.entry.layers[0], case.entry.layers[-1]}


@each(lambda entry: entry.name in (*QUICK, "defined_backwards", "projection_behind_head"))
def test_a_state_dict_gives_the_network(case: Case) -> None:
    path = case.folder / "state_dict.pth"
    torch.save(case.model.state_dict(), path)
    with case.may_refuse():
        loaded = load_model(path, case.entry.architecture, image_size=case.entry.size)
        assert loaded.facts["classes"] == case.entry.classes
        assert decibels(case.logits, run(loaded.network, case.images)) > case.folded_db


@each(lambda entry: entry.name in QUICK or "average" in entry.name or "channel" in entry.name)
def test_equalization_keeps_the_function(case: Case) -> None:
    with case.may_refuse():
        equalized = equalize(fold_batchnorm(case.model))
        assert decibels(case.logits, run(equalized, case.images)) > 60
        absorb_high_biases(equalized, [case.images])
        assert decibels(case.logits, run(equalized, case.images)) > 60, "absorption"


@pytest.mark.parametrize("runtime", PACKAGES)
@each(lambda entry: entry.name in EXPORTED)
def test_an_exported_file_computes_the_network(case: Case, runtime: str) -> None:
    if reason := why_missing(runtime):
        pytest.skip(reason)
    with case.may_refuse(case.entry.unexportable):
        for images in (case.images, case.images[:1]):
            found = case.loaded.executable(runtime, CPU).run(images)
            assert decibels(run(case.model, images), found) > 60


@pytest.mark.skipif(why_missing("onnxruntime") is not None, reason="no onnxruntime")
@pytest.mark.parametrize("method", ["int8_static", "int8_equalized"])
@each(lambda entry: entry.name in EXPORTED)
def test_an_exported_variant_computes_the_variant(case: Case, method: str) -> None:
    with case.may_refuse(case.entry.unexportable):
        variant = quantize(case.loaded.network, case.calibration, METHODS[method])
        model = Model(variant, case.loaded.facts, method)
        model.graph = case.loaded.graph
        found, eager = model.executable("onnxruntime", CPU).run(case.images), run(variant, case.images)
        rounding = decibels(run(unrounded(variant), case.images), eager)
        assert decibels(eager, found) > min(30, least_sqnr_db(rounding))


@each(of=[entry for entry in ZOO if entry.macs])
def test_multiply_accumulates_are_those_counted_by_hand(case: Case) -> None:
    from quantstudy.measure.operations import count_macs

    total, by_layer = count_macs(case.loaded.network, case.entry.size)
    assert total == case.entry.macs
    assert set(by_layer) >= set(case.entry.layers or ())


@each(lambda entry: entry.name in QUICK, of=[entry for entry in ZOO if is_special(entry)] + FAMILIES)
def test_a_step_of_training(case: Case) -> None:
    row = P.QatLsq(kind="qat_lsq", weight_bits=8, activation_bits=8)
    recipe = trained_recipe_of(row)
    with case.may_refuse():
        if case.entry.refused:
            architectures.check_logits(case.model, case.entry.classes, case.entry.size, "key", trains=True)
        model = load_fp32(case.path, fold=not recipe.keeps_batchnorm)
        calibration = Calibration(model, [case.images])
        variant = recipe.prepare(model, calibration, row)
        start = recipe.finish(recipe.prepare(model, calibration, row), model, row).eval()
        assert decibels(case.logits, run(start, case.images)) > 10 or case.entry in FAMILIES, "before the step"
        optimizer = torch.optim.SGD(variant.parameters(), 1e-3)
        logits = variant.train()(case.images)
        F.cross_entropy(logits, torch.arange(4) % case.entry.classes).backward()
        optimizer.step()
        trained = recipe.finish(variant.eval(), model, row)
        trained.requires_grad_(False)
        logits = run(trained, case.images)
        assert logits.isfinite().all() and set(quantized_layers(trained.network)) >= case.layers
        assert torch.equal(run(case.stored(trained), case.images), logits), "another after saving and loading"
