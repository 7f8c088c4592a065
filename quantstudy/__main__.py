"""`python -m quantstudy <command>`: check, repro, results, compare, quantize, tune, readme."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from quantstudy import layout
from quantstudy.errors import UserError, cut, run_stage, shown
from quantstudy.params import PARAMS_FILE, Params, load_params


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m quantstudy", description="Quantize a vision model and compare.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="check params.yaml, and that what its studies name is there; runs nothing")
    running = commands.add_parser("repro", help="run what changed of the studies in `run`, or of the targets")
    running.add_argument("--jobs", type=_positive, help="stages at once, by Ray; without it, or with 1, plain DVC")
    running.add_argument("--address", help="of a Ray cluster to run them on; auto: the one that runs here")
    running.add_argument("targets", nargs="*", help="stages; with what they need they are all that runs")
    commands.add_parser("results", help="print the tables of the studies in `run`")
    commands.add_parser("readme", help="put the reports' tables into README.md and the pages of docs/")
    comparing = commands.add_parser("compare", help="print which variants moved between two revisions, as Markdown")
    comparing.add_argument("before", nargs="?", help="a git revision or an experiment; without one, print results")
    comparing.add_argument("after", nargs="?", default="workspace", help="another one; the workspace by default")
    comparing.add_argument("--page", type=Path, help="write the HTML report of the second one too, with what moved")
    _add_quantize(commands.add_parser("quantize", help="quantize one model file, without a pipeline"))
    tuning = commands.add_parser("tune", help="rewrite an ONNX file of this project for ONNX Runtime")
    tuning.add_argument("model", type=Path, help="an .onnx file that the stage export or quantize wrote")
    tuning.add_argument("--runtime", required=True, choices=["onnxruntime"], help="the one that tuning is known for")
    tuning.add_argument(
        "--without-vnni", action="store_true", help="for x86 CPUs without VNNI, where it would saturate"
    )
    tuning.add_argument("--out", type=Path, required=True, help="the .onnx file to write")
    arguments = parser.parse_args(argv)
    if arguments.command == "check":
        check()
    elif arguments.command == "repro":
        reproduce(arguments)
    elif arguments.command == "readme":
        fill_pages()
    elif arguments.command == "quantize":
        from quantstudy.measure.quantize_file import quantize

        quantize(arguments)
    elif arguments.command == "tune":
        from quantstudy.runtimes.onnx_tuning import tune

        tune(arguments.model, arguments.out, saturates=arguments.without_vnni)
    elif arguments.command == "compare" and arguments.before:
        print_comparison(arguments.before, arguments.after, arguments.page)
    else:
        params = load_params()
        for study in params.run:
            print_results(params, study)
        if layout.REPORT.is_file():
            print(f"\nall of it on one page: {layout.REPORT}")


def reproduce(arguments: argparse.Namespace) -> NoReturn:
    """Check the params and run what changed, by DVC or `tools.jobs`; `exec` replaces this process."""
    command = ["tools.dvc", "repro"]
    if arguments.address or (arguments.jobs or 1) > 1:
        command = ["tools.jobs"]
        command += ["--jobs", str(arguments.jobs)] if arguments.jobs else []
        command += ["--address", arguments.address] if arguments.address else []
    script = '"$0" -m quantstudy check && "$0" -m stages diagnose > /dev/null && exec "$0" -m "$@"'
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    start = [sys.executable, "-m", "tools.warm", "sh", "-c", script]
    os.execv(sys.executable, [*start, sys.executable, *command, *arguments.targets])


def check() -> None:
    """Check the params, and that each network, data set and file that a study in `run` names exists.

    Raises:
        UserError: with one line for each mistake.
    """
    from quantstudy.params.checks import at, names_at
    from quantstudy.params.reading import read_params

    raw, lines, params = read_params(PARAMS_FILE), list[str](), None
    with _kept(lines):
        params = load_params()
    for study in names_at(raw, "run"):
        row, key = at(raw, dict, "studies", study), f"studies.{study}"
        if architecture := at(row, str, "model", "architecture"):
            from quantstudy.network.architectures import check_architecture

            with _kept(lines):
                check_architecture(architecture, at(row, str, "model", "code_sha256") or None, f"{key}.model")
        if dataset := at(row, str, "data", "dataset"):
            from quantstudy.data.torchvision_sets import check_dataset

            with _kept(lines):
                check_dataset(dataset, f"{key}.data.dataset")
        for place in (("model", "weights"), ("data", "path"), ("calibration", "path")):
            path = at(row, str, *place)
            with contextlib.suppress(OSError):  # no file can have this name; load_params reports it
                if path not in ("", "imagenet") and not Path(path).exists():
                    lines.append(f"{key}.{'.'.join(place)}: {shown(path)}: no such file; put or link it there")
    if params is None or lines:
        raise UserError(*lines)
    print(f"{PARAMS_FILE}: no mistake found; studies: {len(params.run)}, variants of each: {len(params.variants)}")


@contextlib.contextmanager
def _kept(lines: list[str]) -> Iterator[None]:
    """Add the lines of a `UserError` to `lines` instead of raising it; a line with a checksum is not cut."""
    try:
        yield
    except UserError as error:
        lines += [line if "SHA-256" in line else cut(line) for line in error.args]


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    whole = "of a state_dict; this project's fp32.pth says it itself"
    parser.add_argument("model", help="an fp32.pth of this project, or a state_dict")
    parser.add_argument("--method", required=True, help="a row of methods in params.yaml that needs no training")
    parser.add_argument("--images", required=True, help="a folder, .tar or .zip of images; no labels are needed")
    parser.add_argument("--out", required=True, help="the file to write, .onnx or .pth")
    parser.add_argument("--architecture", help=f"{whole}: a torchvision name, vgg11_small, or package.module:factory")
    parser.add_argument("--preprocessing", help=f"{whole}: torchvision, or the name of some weights of torchvision's")
    parser.add_argument(
        "--weights-key", help="of a file of several state_dicts: the name of one, state_dict_ema for one"
    )
    parser.add_argument("--image-size", type=int, help=f"{whole}: pixels a side (224)")
    for name in ("mean", "std"):
        parser.add_argument(f"--{name}", type=float, nargs=3, help=f"{whole}: of red, green, blue (ImageNet's)")
    parser.add_argument("--calibration-images", type=_positive, default=256, help="at most (%(default)s)")
    parser.add_argument("--batch-size", type=_positive, default=64, help="of calibration (%(default)s)")
    parser.add_argument("--seed", type=_seed, default=0, help="of the calibration draw (%(default)s)")


def _positive(text: str) -> int:
    return _whole(text, 1, 10**9)


def _seed(text: str) -> int:
    return _whole(text, 0, 2**32 - 1)


def _whole(text: str, least: int, most: int) -> int:
    if not text.isdecimal() or len(text) > 10 or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from {least} to {most}")
    return int(text)


def print_comparison(before: str, after: str, page: Path | None) -> None:
    """Print two revisions side by side, as Markdown; write the second one's HTML report to `page` if there is one."""
    from quantstudy.files import write_text
    from quantstudy.report.comparison import compare, to_markdown, to_record
    from quantstudy.report.revisions import Revision

    with contextlib.closing(Revision(before)) as old, contextlib.closing(Revision(after)) as new:
        rows = compare(old, new)
        print(to_markdown(old, new, rows), end="")
        if page is None:
            return
        from quantstudy.report.html import build_page

        studies = {study: new.page(study) for study in new.params["run"]}
        if missing := [str(layout.page(study)) for study, found in studies.items() if found is None]:
            raise UserError(f"{after!r}: has no {', '.join(missing)}; run `dvc repro` there first")
        write_text(page, build_page([found for found in studies.values() if found], to_record(old, new, rows)))


def print_results(params: Params, study: str) -> None:
    """Print a study's table and the paths of its plots."""
    from quantstudy.report.results import pictures

    folder = layout.report(study)
    path = folder / "results.md"
    if not path.is_file():
        raise UserError(f"{path}: no such file; run `dvc repro` first")
    print(f"\n## {study}\n\n{path.read_text(encoding='utf-8')}")
    current, older = pictures(params, study)
    print("plots:", *current, sep="\n  ")
    print(f"  {folder / 'outlier_quant_results'}/ (one histogram a layer)")
    if older:
        print("of an older fp32 model, or no stage of this run:", *older, sep="\n  ")


def fill_pages() -> None:
    """Put the reports' tables into README.md and the pages of docs/; write no page if a report is missing."""
    from quantstudy.files import write_text
    from quantstudy.report import documents

    texts = {page: documents.read_utf8(page) for page in documents.pages()}
    for page, text in {page: documents.filled(page, text) for page, text in texts.items()}.items():
        if text != texts[page]:
            write_text(page, text)
            print(page)


if __name__ == "__main__":
    run_stage(main)
