"""`robbench bench`: comparisons with other implementations. Only click is imported before a command runs."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from robbench.cli.base import (
    FolderOrFile,
    WholeNumber,
    budgets,
    checkpoints_option,
    data_dir_option,
    data_option,
    device_option,
    echo_line,
    echo_text,
    names,
    precision_option,
    print_paths,
    seeds,
    zoo_option,
)
from robbench.cli.completion import model_completion
from robbench.cli.help import BENCH, GroupedCommand
from robbench.core.errors import UserError

threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="CPU threads; with 1, times are those spent computing.",
)
out_option = click.option("--out", type=FolderOrFile(), default=Path("robbench-bench"), show_default=True)
epsilon_option = click.option(
    "--epsilon", "epsilons", multiple=True, help="One budget instead of the data set's: 0.1 or 8/255."
)


@click.group()
def bench() -> None:
    """Compare with other implementations: verdicts first, then times, in one process."""


@bench.command("aa", cls=GroupedCommand, groups=BENCH)
@click.option(
    "--model",
    "models",
    multiple=True,
    required=True,
    help="Zoo classifiers of one data set.",
    shell_complete=model_completion,
)
@click.option("--attack", default="aa", show_default=True, help="aa, aa-l2 or aa-l1.")
@click.option("--n", type=WholeNumber(1), default=1000, show_default=True, help="Test images, drawn by seed.")
@epsilon_option
@click.option(
    "--seeds",
    "seed_texts",
    multiple=True,
    default=("0,1,2",),
    show_default=True,
    help="Seeds of the attacks.",
)
@click.option("--batch-size", type=WholeNumber(1), default=256, show_default=True)
@precision_option
@threads_option
@out_option
@device_option
@zoo_option
@checkpoints_option
@data_option
@data_dir_option
def autoattack(
    models: tuple[str, ...],
    attack: str,
    n: int,
    epsilons: tuple[str, ...],
    seed_texts: tuple[str, ...],
    batch_size: int,
    threads: int,
    out: Path,
    **options: Any,
) -> None:
    """AutoAttack against the reference package: parity of verdicts, times, distance to the floor.

    Example: robbench bench aa --model digits-at,digits-trades --n 360
    """
    from robbench.benchmarks import autoattack as contest_of
    from robbench.benchmarks.models import load_classifiers
    from robbench.specs import attack_among

    _prepare(out, threads)
    epsilon = _one_budget(epsilons)
    attack = attack_among(attack, ("aa", "aa-l2", "aa-l1"), "attack of bench aa")
    contest = contest_of.Contest(
        attack, n, seeds("--seeds", seed_texts), batch_size=batch_size, epsilon=epsilon
    )
    entries = load_classifiers(names("--model", models), **options)
    found = [contest_of.compare(model, data, contest, device, echo_line) for model, data, device in entries]
    stem = f"{attack}-{'-'.join(dict.fromkeys(data.name for _, data, _ in entries))}"
    stem += f"-epsilon{epsilon:g}" if epsilon is not None else ""
    _write(out / f"{stem}.json", contest_of, found, contest)


@bench.command("pgd", cls=GroupedCommand, groups=BENCH)
@click.option(
    "--model",
    "models",
    multiple=True,
    help="Zoo classifiers; digits-at by default.",
    shell_complete=model_completion,
)
@click.option("--architecture", "architectures", multiple=True, help="Random networks on 3x32x32: resnet18.")
@click.option("--steps", type=WholeNumber(1), default=40, show_default=True)
@click.option("--n", type=WholeNumber(1), default=256, show_default=True, help="Images of each model.")
@click.option("--batch-size", type=WholeNumber(1), default=256, show_default=True)
@click.option("--rounds", type=WholeNumber(1), default=9, show_default=True)
@epsilon_option
@threads_option
@out_option
@device_option
@zoo_option
@checkpoints_option
@data_option
@data_dir_option
def pgd(
    models: tuple[str, ...],
    architectures: tuple[str, ...],
    n: int,
    steps: int,
    batch_size: int,
    rounds: int,
    epsilons: tuple[str, ...],
    threads: int,
    out: Path,
    **places: Any,
) -> None:
    """PGD against foolbox, torchattacks and ART: equal images first, then times.

    Without --model and --architecture: digits-at, with --data-dir fashionmnist-at as well.

    Example: robbench bench pgd --model digits-at,digits-trades --rounds 21
    """
    from robbench.benchmarks import pgd as contest_of

    _prepare(out, threads)
    contest, epsilon = contest_of.Contest(steps, batch_size, rounds), _one_budget(epsilons)
    chosen = names("--model", models) if models else ()
    built = names("--architecture", architectures) if architectures else ()
    if not chosen and not built:
        chosen = ("digits-at", "fashionmnist-at") if places["data_dir"] else ("digits-at",)
    subjects = contest_of.zoo_subjects(chosen, n, epsilon, **places) if chosen else []
    subjects += contest_of.random_subjects(built, n, epsilon, places["device"])
    found = [contest_of.compare(subject, contest, _tell(subject.name)) for subject in subjects]
    stem = f"pgd{contest.steps}-{'-'.join(subject.name.split()[0] for subject in subjects)}"
    stem += f"-epsilon{epsilon:g}" if epsilon is not None else ""
    _write(out / f"{stem}.json", contest_of, found, contest)


@bench.command("minimal", cls=GroupedCommand, groups=BENCH)
@click.option(
    "--model",
    "models",
    multiple=True,
    default=("digits-at",),
    show_default=True,
    help="Zoo classifiers.",
    shell_complete=model_completion,
)
@click.option("--attack", "attacks", multiple=True, help="Minimal-norm attacks; all by default.")
@click.option("--steps", type=WholeNumber(1), default=100, show_default=True)
@click.option("--n", type=WholeNumber(1), default=100, show_default=True, help="Images of each model.")
@click.option("--rounds", type=WholeNumber(1), default=5, show_default=True)
@threads_option
@out_option
@device_option
@zoo_option
@checkpoints_option
@data_option
@data_dir_option
def minimal(
    models: tuple[str, ...],
    attacks: tuple[str, ...],
    steps: int,
    n: int,
    rounds: int,
    threads: int,
    out: Path,
    **places: Any,
) -> None:
    """Minimal-norm attacks against foolbox, torchattacks and ART: median distances and times.

    Example: robbench bench minimal --model digits-at --attack fmn-l2,ddn-l2
    """
    from robbench.benchmarks import minimal as contest_of
    from robbench.benchmarks.pgd import zoo_subjects

    _prepare(out, threads)
    contest = contest_of.Contest(names("--attack", attacks) or contest_of.Contest.attacks, steps, rounds)
    for name in contest.attacks:
        contest.attack(name)
    subjects = zoo_subjects(names("--model", models), n, **places)
    found = [
        contest_of.compare(subject, name, contest, _tell(f"{subject.name}, {name}"))
        for subject in subjects
        for name in contest.attacks
    ]
    stem = f"minimal{contest.steps}-{'-'.join(subject.name for subject in subjects)}"
    _write(out / f"{stem}.json", contest_of, found, contest)


@bench.command("latent")
@click.option(
    "--case", "cases", multiple=True, default=("small",), show_default=True, help="Glows: small, paper."
)
@click.option("--attack", "attacks", multiple=True, default=("jsa50,a-la",), show_default=True)
@click.option("--steps", type=WholeNumber(1), help="Instead of the attacks' own.")
@click.option("--rounds", type=WholeNumber(1), default=5, show_default=True)
@threads_option
@out_option
def latent(
    cases: tuple[str, ...],
    attacks: tuple[str, ...],
    steps: int | None,
    rounds: int,
    threads: int,
    out: Path,
) -> None:
    """JSA and A-LA through a Glow against a plain loop over FrEIA, normflows and nflows; memory. On the CPU.

    Example: robbench bench latent --case small --rounds 9
    """
    from robbench.benchmarks import latent as contest_of

    _prepare(out, threads)
    contest = contest_of.Contest(names("--attack", attacks), steps, rounds)
    chosen = names("--case", cases)
    found = [contest_of.compare(contest_of.glow_case(case), contest, _tell(case)) for case in chosen]
    _write(out / f"latent-{'-'.join(chosen)}.json", contest_of, found, contest)


@bench.command("unforeseen")
@click.option("--attack", "attacks", multiple=True, default=("elastic,jpeg-linf",), show_default=True)
@click.option("--architecture", default="digits-cnn", show_default=True, help="With random weights.")
@click.option("--n", type=WholeNumber(1), default=64, show_default=True, help="Random images.")
@click.option("--side", type=WholeNumber(16), default=32, show_default=True, help="A multiple of 16.")
@click.option("--steps", type=WholeNumber(1), default=40, show_default=True)
@click.option("--rounds", type=WholeNumber(1), default=5, show_default=True)
@threads_option
@out_option
def unforeseen(
    attacks: tuple[str, ...],
    architecture: str,
    n: int,
    side: int,
    steps: int,
    rounds: int,
    threads: int,
    out: Path,
) -> None:
    """Elastic and JPEG against a plain loop in the style of the public code, at equal work. On the CPU.

    Example: robbench bench unforeseen --side 224 --n 4
    """
    from robbench.benchmarks import unforeseen as contest_of
    from robbench.benchmarks.unforeseen_peers import PEERS
    from robbench.core.errors import known_name

    chosen = [known_name("attack", name, PEERS) for name in names("--attack", attacks)]
    contest = contest_of.Contest(architecture, n, side, steps, rounds)
    _prepare(out, threads)
    found = [contest_of.compare(name, contest, _tell(name)) for name in chosen]
    _write(out / f"unforeseen-{architecture}-{side}.json", contest_of, found, contest)


@bench.command("flows")
@click.option("--case", "cases", multiple=True, help="small, mlp, paper; all by default.")
@click.option("--rounds", type=WholeNumber(1), help="Instead of each case's own number.")
@threads_option
@out_option
@click.option("--profile", is_flag=True, help="Also print where robbench's time goes.")
def flows(cases: tuple[str, ...], rounds: int | None, threads: int, out: Path, profile: bool) -> None:
    """Decode and backward to the latents against FrEIA, normflows and nflows at the same weights. On the CPU.

    Example: robbench bench flows --case small --rounds 10 --profile
    """
    from robbench.benchmarks import flows as contest_of
    from robbench.benchmarks.flow_report import markdown

    _prepare(out)
    chosen = names("--case", cases) if cases else tuple(contest_of.CASES)
    known = [contest_of.case_named(name) for name in chosen]
    found = contest_of.report(chosen, rounds, threads, _command(), lambda line: echo_line(line, err=True))
    if profile:
        echo_text(contest_of.profile_reference(known[0], threads))
    _write_report(out / "flows.json", found, markdown(found))


def _one_budget(texts: tuple[str, ...]) -> float | None:
    """What --epsilon says; None without it, `UserError` for several."""
    requested = budgets("--epsilon", texts)
    if len(requested) > 1:
        raise UserError(f"--epsilon {','.join(map(str, requested))}: bench compares at one budget; give one")
    return requested[0] if requested else None


def _prepare(out: Path, threads: int | None = None) -> None:
    """Refuse a place that cannot be written to; tune malloc and set the threads of this process, where it computes."""
    from robbench.core.places import check_output_folder

    check_output_folder(out)
    if threads is None:
        return
    import torch

    from robbench.core.allocator import tune_allocator

    tune_allocator()
    torch.set_num_threads(threads)


def _tell(name: str) -> Callable[[str], None]:
    return lambda line: echo_line(f"{name}: {line}", err=True)


def _command() -> str:
    return shlex.join(["robbench", *sys.argv[1:]])


def _write(path: Path, benchmark: Any, found: Any, contest: Any) -> None:
    """Write the report of a benchmark's module on what it `found`."""
    command = _command()
    report, text = (make(found, contest, command) for make in (benchmark.report, benchmark.markdown))
    _write_report(path, report, text)


def _write_report(path: Path, report: dict[str, Any], text: str) -> None:
    """JSON and, beside it, Markdown, which is printed too."""
    from robbench.core.resources import write_text_atomically

    paths = [path, path.with_suffix(".md")]
    write_text_atomically(paths[0], json.dumps(report, indent=1) + "\n")
    write_text_atomically(paths[1], text)
    echo_text(text)
    print_paths(paths)
