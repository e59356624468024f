"""`robbench badge`: one number of a run for a README. Only click is imported before the command runs."""

import json
from pathlib import Path

import click

from robbench.cli.base import FolderOrFile, Text, print_paths


@click.command()
@click.argument("run_folder", metavar="RUN", type=FolderOrFile())
@click.option("--model", type=Text(), help="Which classifier.  [default: the only one of the run]")
@click.option(
    "--attack",
    type=Text(),
    default="worst-case",
    show_default=True,
    help="An attack of the run, worst-case, average or clean.",
)
@click.option(
    "-o", "--out", type=FolderOrFile(), metavar="FILE", help="Where to.  [default: standard output]"
)
@click.option("--json", "as_json", is_flag=True, help="For shields.io's endpoint badge, instead of SVG.")
def badge(run_folder: Path, model: str | None, attack: str, out: Path | None, as_json: bool) -> None:
    """Draw an accuracy of a run as a badge (SVG).

    Example: robbench badge RUN --model digits-ijsat --attack aa -o badge.svg
    """
    from robbench.core.places import check_output_file
    from robbench.core.resources import write_text_atomically
    from robbench.report.badge import badge_json, badge_of, badge_svg
    from robbench.store.ledger import load_run

    check_output_file(out, "--out")
    found = badge_of(load_run(run_folder), model, attack)
    text = json.dumps(badge_json(found), indent=2) + "\n" if as_json else badge_svg(found)
    if out is None:
        click.echo(text, nl=False)
        return
    write_text_atomically(out, text)
    print_paths([out])
