"""`robbench export`, `verify` and `merge`: a run as one file that others can check, checking it, and putting several
into one. Only click is imported before a command runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from robbench.cli.base import (
    FiniteNumber,
    FolderOrFile,
    WholeNumber,
    checkpoints_option,
    data_dir_option,
    data_option,
    device_option,
    echo_line,
    json_option,
    names,
    print_json,
    threat_models_option,
    zoo_option,
)
from robbench.cli.help import VERIFY, GroupedCommand
from robbench.core.counting import count_noun


@click.command()
@click.argument("run_folder", metavar="RUN", type=FolderOrFile())
@click.option(
    "-o", "--out", type=FolderOrFile(), required=True, help="The bundle to write, as in bundle.zip."
)
@click.option(
    "--examples",
    default="all",
    show_default=True,
    metavar="SHARE|N|all|none",
    help="Stored adversarial examples to include: a share (0.1), a number per cell (4), all or none.",
)
@click.option(
    "--seed", type=WholeNumber(0), default=0, show_default=True, help="Seed of the choice of examples."
)
@click.option(
    "--partial", is_flag=True, help="Export a run with failed or unfinished cells; the bundle says so."
)
@click.option("--overwrite", is_flag=True, help="Replace the bundle if it exists.")
@threat_models_option
def export(
    run_folder: Path,
    out: Path,
    examples: str,
    seed: int,
    partial: bool,
    overwrite: bool,
    threat_models: Path | None,
) -> None:
    """Write a run as a bundle: ledgers, cards, specs, adversarial examples with their witnesses, and hashes of all.

    The same run gives the same bytes. Anybody can check it: robbench verify bundle.zip --model CARD

    Example: robbench export robbench-runs/digits-seed0 -o digits.zip --examples 0.25
    """
    from robbench.bundle.examples import ExampleChoice
    from robbench.bundle.export import ExportRequest, export_run

    choice = ExampleChoice.parse(examples, seed)
    manifest = export_run(ExportRequest(run_folder, out, choice, partial, overwrite, threat_models))
    rows, unpacked = sum(cell.rows for cell in manifest.cells), sum(f.size for f in manifest.files.values())
    chosen, size = manifest.examples, out.stat().st_size
    echo_line(
        f"{count_noun(len(manifest.cells), 'cell')}, {count_noun(rows, 'row')}, {chosen.exported:,} of "
        f"{count_noun(chosen.stored, 'stored example')} "
        f"({chosen.witnesses:,} with a witness); {size:,} bytes, {unpacked:,} unpacked"
    )
    if manifest.partial:
        echo_line("Partial: failed or unfinished cells are in it as such")
    echo_line(f"ZIP  {out.absolute()}")


_VERIFY_OPTIONS = (
    click.option("--model", "models", multiple=True, help="Models of the bundle: zoo names, folders, cards."),
    click.option(
        "--share",
        type=FiniteNumber(),
        default=0.1,
        show_default=True,
        help="Share of the cells to attack again from their seeds; 0 for none.",
    ),
    click.option(
        "--rerun-samples",
        type=WholeNumber(1),
        metavar="N",
        help="Attack only N samples of each of those cells again.  [default: all]",
    ),
    click.option(
        "--seed", type=WholeNumber(0), help="Seed of the choice of cells.  [default: a fresh one, printed]"
    ),
    click.option(
        "--flip-tolerance",
        type=FiniteNumber(),
        default=0.005,
        show_default=True,
        help="Share of re-run verdicts that rounding may flip; more than a binomial at it allows fails.",
    ),
    click.option("--files-only", is_flag=True, help="Ask no model: hashes, rows, tables and balls only."),
    device_option,
    click.option("--batch-size", type=WholeNumber(1), default=256, show_default=True, help="Images at once."),
    threat_models_option,
    zoo_option,
    checkpoints_option,
    data_dir_option,
    data_option,
)


def _verify_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_VERIFY_OPTIONS):
        command = option(command)
    return command


def _say(text: str) -> None:
    echo_line(text, err=True)


@click.command(cls=GroupedCommand, groups=VERIFY)
@click.argument("bundle", metavar="BUNDLE", type=FolderOrFile())
@_verify_options
@json_option
@click.pass_context
def verify(context: click.Context, /, bundle: Path, as_json: bool, **options: Any) -> None:
    """Check a bundle against models of your own: hashes, rows, tables, balls, verdicts; and run a share of it again.

    Exit codes: 0 all agrees, 1 something does not, 2 the bundle is refused, 3 not everything could be checked.

    Example: robbench verify bundle.zip --model digits-at --share 0.1
    """
    from robbench.bundle.verify import VerifyRequest, verify_bundle
    from robbench.core.terminal import Terminal
    from robbench.report.verify_text import print_verification

    options["models"] = names("--model", options["models"])
    result = verify_bundle(VerifyRequest(bundle, **options), _say)
    if as_json:
        print_json(result.as_dict())
    else:
        print_verification(result, Terminal())
    context.exit(result.exit_code)


@click.command(cls=GroupedCommand, groups=VERIFY)
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=FolderOrFile())
@click.option("-o", "--out", type=FolderOrFile(), required=True, help="A new folder, or a new bundle (.zip).")
@click.option(
    "--accept-versions",
    is_flag=True,
    help="Merge what other engines or major versions measured; every table then says so.",
)
@_verify_options
@click.pass_context
def merge(
    context: click.Context, /, bundles: tuple[Path, ...], out: Path, accept_versions: bool, **options: Any
) -> None:
    """Verify bundles and put them into one run folder, or one bundle; refuses what is no one leaderboard.

    With --files-only nothing is re-scored, and every table of the result says so.

    Example: robbench merge a.zip b.zip -o leaderboard
    """
    from robbench.bundle.merge import MergeRequest, merge_bundles
    from robbench.bundle.verify import VerifyRequest
    from robbench.core.terminal import Terminal
    from robbench.report.verify_text import print_verification

    options["models"] = names("--model", options["models"])
    console = Terminal()
    request = MergeRequest(bundles, out, VerifyRequest(Path(), **options), accept_versions)
    written, path = merge_bundles(request, _say, lambda result: print_verification(result, console))
    if written:
        echo_line(f"{'ZIP ' if path.suffix == '.zip' else 'RUN '} {path.absolute()}")
    else:
        echo_line(
            "Not merged: a bundle does not verify (see above); leave it out, or name its models with --model"
        )
    context.exit(0 if written else 1)
