"""The command line: its speed, its lists, and one line and exit code 2 for every wrong use."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from processes import finished
from tiny_models import saved_model

from robbench.cli.app import main
from robbench.data.checksums import FILES

Arguments = list[str]


def invoked(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_one_line(result: Result, *parts: str) -> None:
    """Exit code 2, one line `Error: ...` on stderr with all `parts` in it, and no traceback."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr


# --------------------------------------------------------------------------------------------- cheap parts
HELP = """
import sys
sys.argv = ["robbench", "--help"]
import robbench.cli.app
try:
    robbench.cli.app.main()
except SystemExit as end:
    assert not end.code
heavy = {"torch", "pandas", "pydantic", "numpy", "pyarrow", "rich", "yaml"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_imports_nothing_heavy() -> None:
    """What keeps `--help` at about 0.1 s; the time itself would only measure how busy the machine is."""
    subprocess.run([sys.executable, "-c", HELP], check=True, capture_output=True)


@pytest.mark.parametrize(
    "name", ["run", "train", "report", "check", "bench", "fid", "samples", "list", "show", "doctor"]
)
def test_every_command_has_help(name: str) -> None:
    result = invoked(name, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_version() -> None:
    from robbench import __version__

    assert __version__ in invoked("--version").output


@pytest.mark.parametrize(
    ("kind", "some"),
    [
        (
            "attacks",
            ["pgd20\tclassifier\tlinf\timage\tlinf", "aa-l2\tclassifier\tl2", "nll-in\tflow\tlikelihood"],
        ),
        ("defenses", ["ijsat\tclassifier", "at\tclassifier", "at\tflow", "hybrid\tflow"]),
        ("datasets", ["digits\t1,437\t360\tCC BY 4.0\tembedded", "fashionmnist\t60,000\t10,000\tMIT"]),
        ("threat-models", ["linf\tclassifier\timage\tlinf\tfgsm, pgd10"]),
        ("models", ["tiny-a\tdigits\ttiny\tdigits-cnn"]),
    ],
)
def test_list(kind: str, some: list[str], tiny_zoo: Path) -> None:
    result = invoked("list", kind, "--zoo", tiny_zoo)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    for begin in some:
        assert any(line.startswith(begin) for line in lines), result.output


def test_a_narrow_terminal_breaks_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # which makes it a terminal
    monkeypatch.setenv("COLUMNS", "80")
    text = re.sub(r"\x1b\[[0-9;]*m", "", invoked("list", "attacks").output)
    named = [line.split()[0] for line in text.splitlines() if line[:1].strip()]
    assert {"pgd20", "corruptions-generated", "jsa50-paper-literal"} <= set(named)
    assert "pgd20  on a classifier, threat model linf, space image, norm linf" in text
    assert max(map(len, text.splitlines())) <= 80


def test_show_an_attack_with_its_numbers() -> None:
    lines = [line.split() for line in invoked("show", "pgd20").output.splitlines()]
    assert ["steps:", "20"] in lines
    assert ["mnist", "0.3", "-", "0.075"] in lines
    assert next(line for line in lines if line[:1] == ["digits"])[:4] == ["digits", "0.2", "-", "0.05"]


def test_show_everything_of_one_name() -> None:
    output = invoked("show", "r-la").output
    assert "== attack r-la ==" in output
    assert "== defense r-la ==" in output


@pytest.mark.parametrize(
    ("name", "part"),
    [("linf", "budgets:"), ("tiny-a", "sha256:"), ("digits", "embedded"), ("trades", "beta")],
)
def test_show_other_kinds(name: str, part: str, tiny_zoo: Path) -> None:
    result = invoked("show", name, "--zoo", tiny_zoo)
    assert result.exit_code == 0
    assert part in result.output


def test_doctor_finds_this_installation_healthy(tiny_zoo: Path, tmp_path: Path) -> None:
    for file in FILES["mnist"]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"x")
    (tmp_path / "cifar-10-batches-py").mkdir()  # what failed downloads leave
    (tmp_path / "svhn").mkdir()
    for file in FILES["svhn"]:
        (tmp_path / file).touch()
    result = invoked("doctor", "--zoo", tiny_zoo, "--data-dir", tmp_path)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert ["ok", "torch", torch.__version__.split("+")[0]] in lines
    states = {line[1]: line[0] for line in lines if len(line) > 1}
    assert (states["tiny-a"], states["mnist"], states["svhn"], states["digits"]) == (
        "ok",
        "ok",
        "missing",
        "ok",
    )


@pytest.mark.parametrize(
    ("what", "shown", "silent"),
    [
        ("python", ["python"], ["torch", "cores", "mnist"]),
        ("numpy", ["numpy"], ["torch", "pandas"]),
        ("data-sets", ["mnist", "imagenet"], ["numpy", "digits-at"]),
        ("tiny-a", ["tiny-a"], ["tiny-b", "mnist"]),
        ("FrEIA", ["FrEIA"], ["ray"]),
    ],
)
def test_doctor_about_one_thing(
    what: str, shown: list[str], silent: list[str], tiny_zoo: Path, tmp_path: Path
) -> None:
    result = invoked("doctor", what, "--zoo", tiny_zoo, "--data-dir", tmp_path)
    assert result.exit_code == 0, result.output
    found = {line.split()[1] for line in result.output.splitlines() if line.startswith("  ")}
    assert found >= {*shown}
    assert not found & {*silent}


def test_doctor_about_nothing_known() -> None:
    assert_one_line(invoked("doctor", "numpi"), "unknown thing to look at 'numpi'; did you mean 'numpy'?")


def test_doctor_about_the_machine_imports_no_torch() -> None:
    code = (
        "import sys; from robbench.cli.app import main; main(['doctor', 'python', 'mnist'], standalone_mode=False); "
        "assert not {'torch', 'pandas', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_partial_downloads_are_not_present(tmp_path: Path) -> None:
    first, *others = FILES["mnist"]
    (tmp_path / first).parent.mkdir(parents=True)
    (tmp_path / first).write_bytes(b"x")
    (tmp_path / "imagenet" / "val" / "n01440764").mkdir(parents=True)
    for name in ("mnist", "imagenet"):
        assert "missing" in invoked("doctor", name, "--data-dir", tmp_path).output
    listed = json.loads(invoked("list", "datasets", "--data-dir", tmp_path, "--json").output)
    assert {one["name"] for one in listed if one["path"]} == set()
    for file in others:
        (tmp_path / file).write_bytes(b"x")
    (tmp_path / "imagenet" / "val" / "n01440764" / "a.JPEG").write_bytes(b"x")
    for name in ("mnist", "imagenet"):
        assert "missing" not in invoked("doctor", name, "--data-dir", tmp_path).output


def test_doctor_reports_broken_weights(tiny_zoo: Path, tmp_path: Path) -> None:
    zoo = Path(shutil.copytree(tiny_zoo, tmp_path / "zoo"))
    (zoo / "tiny-a" / "weights.safetensors").write_bytes(b"garbage")
    result = invoked("doctor", "--zoo", zoo)
    assert result.exit_code == 1
    assert any(line.split()[:2] == ["broken", "tiny-a"] for line in result.output.splitlines())


def test_no_command_shows_the_help() -> None:
    result = invoked()
    assert "Usage:" in result.output
    assert len(result.output.splitlines()) > 10


@pytest.mark.parametrize("command", ["list", "run"])
def test_a_closed_pipe_is_no_failed_check(command: str, tiny_zoo: Path, tmp_path: Path) -> None:
    """`robbench list attacks | head -0`: quiet, and not exit code 1."""
    run = [
        "run",
        "--model",
        "tiny-a",
        "--attacks",
        "fgsm",
        "--n",
        "5",
        "--zoo",
        tiny_zoo,
        "--out",
        tmp_path / "o",
    ]
    arguments = run if command == "run" else ["list", "attacks"]
    code, _, errors = finished(*arguments, streams={"stdout": "closed pipe"})
    assert (code, errors) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line() -> None:
    code, _, errors = finished("list", "defenses", streams={"stdout": Path("/dev/full")})
    assert code == 2
    assert errors.splitlines()[0].startswith("Error: the system refused: No space left")
    assert "Traceback" not in errors


# ----------------------------------------------------------------------------------------------- main path
def test_run_report_check(tiny_zoo: Path, tmp_path: Path) -> None:
    """Comma lists and repeated flags; tables printed and written; check passes on itself, fails when off."""
    out = tmp_path / "run"
    result = invoked(
        "run", "--defense", "tiny", "--attacks", "fgsm,pgd10", "--attacks", "pgd10-l2", "--n", 40,
        "--zoo", tiny_zoo, "--out", out, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.output.count(": robust accuracy ") == 6
    for name in ("leaderboard.csv", "leaderboard.html"):
        assert str(out / name) in result.output
        assert (out / name).is_file()
    csv = (out / "leaderboard.csv").read_text()
    report = invoked("report", out)
    assert report.exit_code == 0
    assert (out / "leaderboard.csv").read_text() == csv
    reference = tmp_path / "reference.csv"
    reference.write_text(csv)
    assert invoked("check", out, "--against", reference).exit_code == 0
    lines = csv.splitlines()
    column, row = lines[0].split(",").index("value"), lines[1].split(",")
    row[column] = str(float(row[column]) - 5)
    reference.write_text("\n".join([lines[0], ",".join(row), *lines[2:]]) + "\n")
    failed = invoked("check", out, "--against", reference)
    assert failed.exit_code == 1
    assert "fail" in failed.output


def test_default_folder_is_named_after_data_set_and_seed(tiny_zoo: Path, in_tmp: Path) -> None:
    result = invoked(
        "run", "--model", "tiny-a", "--attacks", "fgsm", "--n", 5, "--seed", 3, "--zoo", tiny_zoo
    )
    assert result.exit_code == 0, result.output
    assert (in_tmp / "robbench-runs" / "digits-seed3" / "leaderboard.csv").is_file()


def test_close_budgets_are_two_cells(tiny_zoo: Path, tmp_path: Path) -> None:
    """Labels say budgets exactly: two that agree in six digits stay two, and 8/255 can be asked for again."""
    result = bad_run(tiny_zoo, tmp_path, attacks="pgd10", epsilon="0.1,0.10000001,8/255")
    assert result.exit_code == 0, result.output
    for label in ("pgd10@0.1:", "pgd10@0.10000001:", "pgd10@8/255:"):
        assert label in result.output
    assert "--epsilon 0.1,0.10000001,8/255" in (tmp_path / "out" / "leaderboard.html").read_text()


def test_the_shipped_folders_may_be_named(tiny_zoo: Path) -> None:
    from robbench.core.resources import data_root

    assert invoked("list", "attacks", "--threat-models", data_root() / "threat_models").exit_code == 0
    if any((data_root() / "zoo").glob("*/card.yaml")):
        assert invoked("list", "models", "--zoo", data_root() / "zoo").exit_code == 0


def test_failed_cells_give_exit_code_3(
    tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robbench.attacks.pgd import ProjectedGradientDescent

    def broken(*_: object) -> None:
        raise ValueError("no luck")

    monkeypatch.setattr(ProjectedGradientDescent, "search", broken)
    result = invoked(
        "run", "--model", "tiny-a", "--attacks", "fgsm", "--n", 20, "--zoo", tiny_zoo, "--out", tmp_path / "o"
    )
    assert result.exit_code == 3
    assert "ValueError: no luck" in result.output
    assert "failed" in (tmp_path / "o" / "leaderboard.md").read_text()


# ----------------------------------------------------------------------------------------------- bad input
RUN = {"--model": "tiny-a", "--attacks": "fgsm", "--n": "5", "--device": "cpu"}


def bad_run(tiny_zoo: Path, tmp_path: Path, **options: object) -> Result:
    """`robbench run` with some options changed (underscores for dashes; None removes one)."""
    changed = {"--" + name.replace("_", "-"): value for name, value in options.items()}
    arguments = {"--zoo": tiny_zoo, "--out": tmp_path / "out", **RUN, **changed}
    return invoked("run", *[part for pair in arguments.items() if pair[1] is not None for part in pair])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"attacks": "pgd2O"}, ["unknown attack 'pgd2O'", "did you mean 'pgd20'", "robbench list attacks"]),
        ({"attacks": ","}, ["--attacks", "pgd20"]),
        ({"attacks": None}, ["--attacks", "robbench run --help"]),
        ({"model": "tiny-q"}, ["unknown model 'tiny-q'", "did you mean 'tiny-"]),
        ({"model": None}, ["--defense or --model"]),
        ({"model": None, "defense": "ijsta"}, ["unknown defense 'ijsta'", "did you mean 'ijsat'"]),
        (
            {"model": None, "defense": "mart", "dataset": "svhn"},
            ["robbench train --defense mart --dataset svhn"],
        ),
        ({"dataset": "digitz"}, ["digitz", "did you mean 'digits'"]),
        ({"dataset": "mnist"}, ["tiny-a", "digits"]),
        ({"epsilon": "-0.1"}, ["--epsilon", "-0.1"]),
        ({"epsilon": "nan"}, ["--epsilon", "nan"]),
        ({"epsilon": "inf"}, ["--epsilon", "inf"]),
        ({"epsilon": "1/0"}, ["--epsilon", "1/0"]),
        ({"epsilon": "0.1,x"}, ["--epsilon", "x"]),
        ({"eta": "-1"}, ["--eta", "-1"]),
        ({"n": "361"}, ["--n 361", "360"]),
        ({"n": "0"}, ["--n 0"]),
        ({"n": "many"}, ["--n", "many"]),
        ({"seed": "-1"}, ["--seed"]),
        ({"batch_size": "0"}, ["--batch-size"]),
        ({"device": "gpu"}, ["--device 'gpu'", "cuda:N"]),
        ({"device": "cuda:x"}, ["--device 'cuda:x'"]),
        ({"keep_examples": "few"}, ["--keep-examples"]),
        ({"flow": "tiny-a"}, ["--flow", "classifier"]),
        ({"flow": "tiny-flow"}, ["unknown flow 'tiny-flow'"]),
        ({"flow": ""}, ["--flow", "empty"]),
        ({"epsilon": ""}, ["--epsilon", "without a value"]),
        ({"eta": "0.5"}, ["--eta", "none of these attacks"]),
        ({"attacks": "r-la", "epsilon": "0.5"}, ["--epsilon", "none of these attacks"]),
        ({"model": ""}, ["--model", "without a value"]),
        ({"model": "m" * 5000}, ["unknown model"]),
        ({"model": None, "defense": "clean"}, ["'clean'", "no classifier", "list defenses"]),
        ({"out": ""}, ["--out", "the path is empty"]),
        ({"zoo": ""}, ["--zoo", "the path is empty"]),
        ({"zoo": "."}, ["--zoo", "no model folder", "robbench train"]),
        ({"threat_models": "."}, ["--threat-models", "no .yaml file"]),
        ({"zoo": "absent"}, ["--zoo", "absent"]),
        ({"threat_models": "absent"}, ["--threat-models", "absent"]),
        ({"data_dir": "absent"}, ["--data-dir", "absent"]),
        ({"nonsense": "1"}, ["--nonsense"]),
    ],
)
def test_bad_options(
    options: dict[str, object], parts: list[str], tiny_zoo: Path, tmp_path: Path, in_tmp: Path
) -> None:
    assert_one_line(bad_run(tiny_zoo, tmp_path, **options), *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absent_cuda(tiny_zoo: Path, tmp_path: Path) -> None:
    assert_one_line(bad_run(tiny_zoo, tmp_path, device="cuda"), "--device 'cuda'", "--device cpu")


def test_latent_attack_without_a_flow(
    tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever robbench ships: here it ships no model at all."""
    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr("robbench.models.zoo.data_root", lambda: tmp_path / "shipped")
    assert_one_line(bad_run(tiny_zoo, tmp_path, attacks="jsa10"), "jsa10", "--flow", "robbench train")


def test_image_attack_without_a_flow(tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robbench.models.zoo.data_root", lambda: tmp_path)
    assert bad_run(tiny_zoo, tmp_path).exit_code == 0


def test_data_folder_without_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", refuse)
    zoo, empty = tmp_path / "zoo", tmp_path / "empty"
    empty.mkdir()
    saved_model(zoo, "m", _Linear(784), dataset="mnist")
    result = bad_run(zoo, tmp_path, model="m", dataset="mnist", data_dir=empty)
    assert_one_line(result, "mnist", str(empty), "--data-dir")


class _Linear(torch.nn.Module):
    """Logits by one linear map."""

    def __init__(self, inputs: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.nn.functional.adaptive_avg_pool1d(x.flatten(1), self.linear.in_features))


def _malformed_card(folder: Path) -> None:
    card = folder / "card.yaml"
    card.write_text(card.read_text() + "surprise: 1\n")


def _no_yaml(folder: Path) -> None:
    (folder / "card.yaml").write_text("name: [")


def _other_sha(folder: Path) -> None:
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")


def _pickle(folder: Path) -> None:
    from robbench.core.resources import sha256_file

    torch.save({"weight": torch.zeros(1)}, folder / "weights.pt")
    _point_card_to(folder, "weights.pt", sha256_file(folder / "weights.pt"))


def _renamed_pickle(folder: Path) -> None:
    from robbench.core.resources import sha256_file

    torch.save({"weight": torch.zeros(1)}, folder / "pickle.safetensors")
    _point_card_to(folder, "pickle.safetensors", sha256_file(folder / "pickle.safetensors"))


def _point_card_to(folder: Path, file: str, sha256: str) -> None:
    import yaml

    card = yaml.safe_load((folder / "card.yaml").read_text())
    card["weights"] = {"file": file, "sha256": sha256}
    (folder / "card.yaml").write_text(yaml.safe_dump(card))


def _changed_card(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        import yaml

        card = yaml.safe_load((folder / "card.yaml").read_text())
        (folder / "card.yaml").write_text(yaml.safe_dump(card | changes))

    return change


def _changed_golden(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        import yaml
        from safetensors.torch import load_file, save_file

        from robbench.core.resources import sha256_file

        path = folder / "golden.safetensors"
        tensors = {**load_file(path), **changes}
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
        card = yaml.safe_load((folder / "card.yaml").read_text())
        card["golden"]["sha256"] = sha256_file(path)
        (folder / "card.yaml").write_text(yaml.safe_dump(card))

    return change


def _key_twice(folder: Path) -> None:
    card = folder / "card.yaml"
    card.write_text(card.read_text() + "defense: other\n")


def _arguments(**arguments: object) -> Callable[[Path], None]:
    return _changed_card(architecture={"name": "digits-cnn", "arguments": arguments})


def _without_weights(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()


def _other_architecture(folder: Path) -> None:
    card = folder / "card.yaml"
    card.write_text(card.read_text().replace("width: 4", "width: 8"))


def _unknown_architecture(folder: Path) -> None:
    card = folder / "card.yaml"
    card.write_text(card.read_text().replace("digits-cnn", "digits-cn"))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (_malformed_card, ["card.yaml", "surprise"]),
        (_no_yaml, ["card.yaml", "not valid YAML"]),
        (_other_sha, ["sha256", "weights.safetensors"]),
        (_pickle, ["do not fit", "10 missing"]),
        (_renamed_pickle, ["pickle.safetensors", "not a safetensors file"]),
        (_without_weights, ["weights.safetensors", "missing"]),
        (_other_architecture, ["do not fit"]),
        (_unknown_architecture, ["did you mean 'digits-cnn'"]),
        (_key_twice, ["card.yaml", "'defense' is given twice"]),
        (_changed_card(name="../../evil"), ["card.yaml", "key name"]),
        (_changed_card(name=""), ["card.yaml", "key name"]),
        (_changed_card(input_shape=[-1, 8, 8]), ["card.yaml", "key input_shape"]),
        (_changed_card(classes=0), ["card.yaml", "key classes"]),
        (_arguments(width=-3), ["digits-cnn", "width=-3"]),
        (_arguments(width=0), ["digits-cnn", "width=0"]),
        (_arguments(width=10**7), ["digits-cnn", "width=10000000"]),
        (_changed_golden(outputs=None), ["golden.safetensors", "outputs"]),
        (_changed_golden(inputs=torch.zeros(4, 1, 3, 3)), ["golden.safetensors", "restore"]),
        (_changed_golden(outputs=torch.zeros(4, 3)), ["golden.safetensors", "(4, 3)"]),
        (_changed_golden(inputs=torch.zeros(0, 1, 8, 8), outputs=torch.zeros(0, 10)), ["golden.safetensors"]),
    ],
)
def test_damaged_model(
    damage: Callable[[Path], None], parts: list[str], tiny_zoo: Path, tmp_path: Path
) -> None:
    zoo = Path(shutil.copytree(tiny_zoo, tmp_path / "zoo"))
    damage(zoo / "tiny-a")
    assert_one_line(bad_run(zoo, tmp_path), *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("name: [", ["mine.yaml", "not valid YAML"]),
        ("name: mine\n", ["mine.yaml", "key space"]),
        (b"\xff\xfe", ["mine.yaml", "UTF-8"]),
        ("", ["mine.yaml", "empty"]),
        ("a: 2001-99-99", ["mine.yaml", "not valid YAML"]),
        ("[" * 3000, ["mine.yaml", "not valid YAML"]),
        ("name: one\nname: two\n", ["mine.yaml", "'name' is given twice"]),
        (
            "{name: mine, space: image, norm: linf, description: d, budgets: {digits: {epsilon: true}},"
            " attacks: {}}",
            ["mine.yaml", "budgets.digits.epsilon", "finite number"],
        ),
        (
            "{name: mine, space: image, norm: linf, description: d, budgets: {},"
            " attacks: {my: {algorithm: pgd}, my: {algorithm: pgd}}}",
            ["mine.yaml", "'my' is given twice"],
        ),
        (
            "{name: mine, space: image, norm: linf, description: d, budgets: {},"
            " attacks: {'a,b': {algorithm: pgd}}}",
            ["mine.yaml", "attacks.a,b"],
        ),
        (
            "{name: mine, space: image, norm: linf, description: d, budgets: {},"
            " attacks: {worst-case: {algorithm: pgd}}}",
            ["mine.yaml", "'worst-case'", "another name"],
        ),
        (
            "{name: mine, space: image, norm: linf, descripton: d, budgets: {}, attacks: {}}",
            ["mine.yaml", "key descripton", "did you mean 'description'"],
        ),
        (
            "{name: mine, space: image, norm: linf, description: d, budgets: {digits: {epsilon: -1}},"
            " attacks: {}}",
            ["mine.yaml", "budgets.digits.epsilon", "at least 0"],
        ),
        (
            "{name: mine, space: image, norm: linf, description: d, budgets: {},"
            " attacks: {pgd20: {algorithm: pgd}}}",
            ["pgd20", "rename"],
        ),
    ],
)
def test_malformed_threat_model(
    content: str | bytes, parts: list[str], tiny_zoo: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_one_line(bad_run(tiny_zoo, tmp_path, threat_models=folder), *parts)


def test_unknown_parameter_of_an_attack(tiny_zoo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "{name: mine, space: image, norm: linf, description: d, budgets: {digits: {epsilon: 0.1}},"
        " attacks: {my-pgd: {algorithm: pgd, parameters: {stepz: 3}}}}"
    )
    result = bad_run(tiny_zoo, tmp_path, threat_models=folder, attacks="my-pgd")
    assert_one_line(result, "my-pgd", "stepz")


class _NotANumber(_Linear):
    """NaN for some images: the golden tensors must not be among them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.where(x.flatten(1)[:, :1] == 0, torch.nan, 0.0)


class _Images(torch.nn.Module):
    """Returns images where logits are expected."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


@pytest.mark.parametrize(
    ("module", "parts"),
    [
        (_NotANumber(), ["model 'odd'", "NaN"]),
        (_Linear(classes=7), ["model 'odd'", "7 logits", "10 classes"]),
        (_Images(), ["model 'odd'", "(5, 1, 8, 8)"]),
    ],
)
def test_model_that_returns_nonsense(
    module: torch.nn.Module, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robbench.cards import Architecture
    from robbench.models.classifiers import ARCHITECTURES

    ARCHITECTURES.get("digits-cnn")
    monkeypatch.setitem(ARCHITECTURES._entries, "odd", lambda input_shape, classes: module)
    saved_model(tmp_path / "zoo", "odd", module, architecture=Architecture(name="odd"))
    assert_one_line(bad_run(tmp_path / "zoo", tmp_path, model="odd"), *parts)
    assert not (tmp_path / "out").exists()


def test_foreign_output_folder(tiny_zoo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    assert_one_line(bad_run(tiny_zoo, tmp_path), "thesis.tex", "--out")
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_output_folder_of_another_run(tiny_zoo: Path, tmp_path: Path) -> None:
    assert bad_run(tiny_zoo, tmp_path).exit_code == 0
    content = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert_one_line(bad_run(tiny_zoo, tmp_path, seed="1"), "seed 0, not 1", "--fresh")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == content


def test_output_folder_below_a_file(tiny_zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_one_line(bad_run(tiny_zoo, tmp_path, out=tmp_path / "file" / "out"), "--out", "Not a directory")
    assert_one_line(bad_run(tiny_zoo, tmp_path, out=tmp_path / "file"), "--out", "is a file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_folder_not_writable(tiny_zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    result = bad_run(tiny_zoo, tmp_path, out=tmp_path / "locked" / "out")
    assert_one_line(result, "--out", "cannot be written")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["report", "absent"], ["absent", "not a run folder"]),
        (["check", "absent", "--against", "x.csv"], ["absent", "not a run folder"]),
        (["show", "pgd2O"], ["did you mean 'pgd20'"]),
        (["list", "attak"], ["attacks"]),
        (["runn"], ["runn", "robbench --help"]),
        (["train", "--defense", "ijsta"], ["did you mean 'ijsat'"]),
        (["train", "--defense", "at", "--set", "beta"], ["--set 'beta'"]),
        (["train", "--defense", "at", "--dataset", "digitz"], ["did you mean 'digits'"]),
        (["train", "--defense", "at", "--device", "gpu"], ["--device", "gpu"]),
    ],
)
def test_bad_use_of_other_commands(arguments: list[str], parts: list[str], in_tmp: Path) -> None:
    assert_one_line(invoked(*arguments), *parts)
    assert list(in_tmp.iterdir()) == []
