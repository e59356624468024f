"""The option of `robbench report` that sends a run to MLflow. Only click is imported here."""

import click

from robbench.cli.base import Text

mlflow_option = click.option(
    "--mlflow",
    "mlflow_uri",
    type=Text(),
    metavar="URI",
    help="Also write the runs to an MLflow store: sqlite:///mlflow.db, http://... (docs/living.md).",
)
