"""The published tables themselves: the schema, the transcription they come from, their arithmetic, list and show."""

import csv
import functools
import re
import statistics
import subprocess
import sys
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from robbench.cli.app import main
from robbench.cli.published_show import show_table
from robbench.core.errors import UserError
from robbench.experiments.arithmetic import arithmetic
from robbench.experiments.published import (
    Hyperparameter,
    PublishedRow,
    find_table,
    published_folder,
    published_index,
    read_published,
    read_rows,
    table_settings,
)
from robbench.experiments.published import table_rows as read_table
from robbench.models.zoo import zoo_entries

INDEX = published_index()
table_rows = functools.cache(read_table)
TABLES = {table.name: table for table in INDEX.tables}
NUMBERS = [table for table in INDEX.tables if table.has_numbers]
PREFIXES = {"flowlp": "flow-lp", "flowrob": "flow-robustness", "er_supp": "er", "ijsat": "ijsat"}
OWN = ("robustbench", "third_party")  # not of the papers


def name_of(source: Path) -> str:
    """The table a file of the transcription became: flowlp_table01.csv is flow-lp-table1."""
    prefix, _, rest = source.stem.rpartition("_table") if "_table" in source.stem else (source.stem, "", "")
    if not rest:
        return f"{PREFIXES[source.stem.removesuffix('_text_claims')]}-text"
    return f"{PREFIXES[prefix]}-table{int(rest)}"


@pytest.fixture(scope="module")
def transcription(shared: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of every transcribed table by the name of ours."""
    folder = shared / "published"
    if not folder.is_dir():
        pytest.skip("../shared/published with the transcription is absent")
    files = [*folder.glob("*_table*.csv"), *folder.glob("*_text_claims.csv")]
    return {name_of(path): lines_of(path) for path in files}


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def number(text: str) -> Decimal | None:
    return Decimal(text) if re.fullmatch(r"-?[\d.]+(e\d+)?", text) else None


# ------------------------------------------------------------------------------------------------ transcription
def test_every_transcribed_number_is_there_once_and_none_is_invented(
    transcription: dict[str, list[dict[str, str]]],
) -> None:
    assert {table.name for table in NUMBERS} == {*transcription, *OWN}
    for name, source in transcription.items():
        ours = [row for row in table_rows(TABLES[name]) if row.origin != "recomputed"]
        assert len(ours) == len(source)
        for row, printed in zip(ours, source, strict=True):  # the order of the print is kept
            assert row.value == number(printed["value"])
            if row.value is None:
                assert row.printed_as == printed["value"]
            else:  # with its digits: 48.80 is not 48.8
                assert row.value.as_tuple() == number(printed["value"]).as_tuple()  # type: ignore[union-attr]


def test_what_a_number_is_survives_the_conversion(transcription: dict[str, list[dict[str, str]]]) -> None:
    sets = {"CIFAR-10-C": "cifar10", "CIFAR-100": "cifar100", "CIFAR-10": "cifar10", "CIFAR10": "cifar10"}
    sets |= {"MNIST": "mnist", "SVHN": "svhn", "OM-ImageNet": "om-imagenet", "CelebA": "celeba"}
    compared = 0
    for name, source in transcription.items():
        ours = [row for row in table_rows(TABLES[name]) if row.origin != "recomputed"]
        kinds: dict[str, set[str]] = {}
        for row, printed in zip(ours, source, strict=True):
            kinds.setdefault(printed["metric"], set()).add(row.metric)
            assert row.better == printed["better"].replace("n/a", "")
            dataset = printed["dataset"].split(" (")[0]
            if dataset in sets:
                assert row.dataset == sets[dataset]
            if budget := re.search(r"eps=(\d+)/255", printed["attack"]):
                assert row.epsilon == pytest.approx(float(Fraction(int(budget[1]), 255)), rel=1e-12)
                compared += 1
            if "source" in printed:
                assert row.source.split(" (")[0] == printed["table"].split(" (")[0]
        assert all(len(names) <= 2 for names in kinds.values())
    assert compared > 100


def test_settings_of_the_papers_are_all_there(shared: Path) -> None:
    for name, ours in (("hyperparameters", "value"), ("architectures", "description")):
        source = shared / "published" / f"{name}.csv"
        if not source.is_file():
            pytest.skip("../shared/published with the transcription is absent")
        theirs = [row[ours] for row in lines_of(source)]
        assert [getattr(row, ours) for row in table_settings(TABLES[name])] == theirs


def test_leaderboard_values_are_those_of_the_list(shared: Path) -> None:
    text = (shared / "spec" / "peers.md").read_text(encoding="utf-8")
    lines = re.findall(
        r"^\| (.+?) \| [\d./]+ \| ([\d.]+) \| ([\d.]+) \|$", text.partition("Reference values")[2], re.M
    )
    listed = {(name.split()[-1], clean, robust) for name, clean, robust in lines if "MNIST" not in name}
    assert len(listed) == 15
    rows = table_rows(TABLES["robustbench"])
    pairs = zip(rows[::2], rows[1::2], strict=True)
    assert {(c.model.split("-")[-1], str(c.value), str(r.value)) for c, r in pairs} == listed
    assert {row.n for row in rows if row.dataset == "imagenet"} == {5000}
    assert {row.n for row in rows if row.dataset != "imagenet"} == {10_000}


def test_third_party_rows_name_zoo_models_and_agree_with_their_cards() -> None:
    entries = zoo_entries()
    rows = table_rows(TABLES["third_party"])
    values = {(row.model, row.column): row.value for row in rows}
    assert values["trades-mnist", "AA"] == Decimal("92.81")
    for row in rows:
        card = entries[row.model].card
        assert (card.dataset, card.defense, card.architecture.name) == (
            row.dataset,
            row.defense,
            row.architecture,
        )
        known = [m.value for m in card.measurements if m.note.startswith("published")]
        assert any(abs(float(row.value or 0) - value) <= row.rounding + 1e-9 for value in known), (row, known)


# --------------------------------------------------------------------------------------------------- arithmetic
def test_the_audit_of_printed_averages_is_reproduced(shared: Path) -> None:
    path = shared / "published" / "ARITHMETIC.csv"
    if not path.is_file():
        pytest.skip("../shared/published with the transcription is absent")
    audit = [row for row in lines_of(path) if row["table"] != "text"]
    ours = {name: arithmetic(table_rows(TABLES[name])) for name in TABLES if TABLES[name].has_numbers}
    found = [
        entry for name in dict.fromkeys(name_of(Path(row["table"])) for row in audit) for entry in ours[name]
    ]
    assert len(found) == len(audit) == sum(map(len, ours.values()))
    for entry, wanted in zip(found, audit, strict=True):
        recomputed = float(wanted["recomputed"].removeprefix("rel ").split()[0])
        digits = 3 if wanted["recomputed"].startswith("rel") else 4
        assert entry.row.value == Decimal(wanted["printed"]), wanted
        assert entry.recomputed == pytest.approx(recomputed, abs=0.6 * 10**-digits), wanted
        assert entry.agrees == (wanted["status"] == "match"), wanted


def cells(name: str) -> dict[tuple[str, str], float]:
    rows = [row for row in table_rows(TABLES[name]) if row.origin != "recomputed" and row.value is not None]
    return {(row.row, row.column): float(row.value) for row in rows}  # type: ignore[arg-type]


def test_the_audit_of_sentences_is_reproduced(shared: Path) -> None:
    path = shared / "published" / "ARITHMETIC.csv"
    if not path.is_file():
        pytest.skip("../shared/published with the transcription is absent")
    audit = [row for row in lines_of(path) if row["table"] == "text"]
    t4, t6 = cells("ijsat-table4"), cells("ijsat-table6")
    cifar100, low, svhn = cells("flow-lp-table2"), cells("flow-lp-table1"), cells("flow-lp-table3")
    jsa, gan, at = "AT [JSA10]", "AT [JSA10-GAN]", "AT [PGD10]"

    def gain(other: str, *columns: str) -> float:
        return statistics.fmean(t4[jsa, column] - t4[other, column] for column in columns)

    def relative(table: dict[tuple[str, str], float], start: str, base: str, column: str) -> float:
        values = [value for (row, name), value in table.items() if row.startswith(start) and name == column]
        return 100 * (max(values) / table[base, column] - 1)

    part = "low-data (5 %)"
    expected = [
        relative(cifar100, "Randomized", "Standard", "accuracy"),
        relative(cifar100, "Adversarial", "Standard", "accuracy"),
        relative(low, "Adversarial", "Standard + common DA", part),
        relative(low, "Randomized", "Standard + common DA", part),
        relative(svhn, "Adversarial", "Standard", "accuracy"),
        gain(gan, "Standard"),
        100 * (t4[jsa, "Standard"] / t4[gan, "Standard"] - 1),
        gain(gan, "PGD-20", "AA", "JSA-50"),
        100 * (t4[jsa, "PGD-20"] / t4[gan, "PGD-20"] - 1),
        gain(gan, "Elastic", "JPEG", "L2"),
        gain(at, "PGD-20", "AA"),
        gain(at, "Elastic", "JPEG", "L2"),
        gain("AT [PGD10], eps 16/255", "Standard"),
        t6["DMAT + JSA", "Standard"] - t6["DMAT", "Standard"],
        statistics.fmean(t6["Difference DMAT", column] for column in ("PGD-20", "AA")),
    ]
    assert [float(row["recomputed"]) for row in audit] == pytest.approx(expected, abs=6e-5)


def test_wrong_averages_are_marked_and_the_right_one_stands_beside() -> None:
    wrong = 0
    for table in NUMBERS:
        rows = table_rows(table)
        twins = {(row.row, row.column): row for row in rows if row.origin == "recomputed"}
        for entry in arithmetic(rows):
            twin = twins.pop((entry.row.row, entry.row.column))
            assert float(twin.value or 0) == pytest.approx(entry.recomputed, abs=6e-5)
            assert not entry.row.gate
            if not entry.agrees:
                wrong += 1
                assert re.search(r"\d", entry.row.doubt), entry.row  # the doubt names the right number
        assert not twins  # nothing recomputed that nothing printed
    assert wrong == 13


def test_nothing_doubted_gates() -> None:
    rows = [row for table in NUMBERS for row in table_rows(table)]
    assert not any(row.gate for row in rows if row.doubt or row.origin != "printed")
    unseen = {"elastic", "jpeg-linf", "jpeg-l1", "uar-l2", "fog", "snow", "gabor"}
    assert not any(row.gate for row in rows if row.attack in unseen or row.metric.startswith("average"))
    assert not any(row.gate for row in rows if row.source.startswith("ER") or " text" in row.source)
    conflicts = [
        ("ijsat-table1", "TRADES", "L2"),
        ("ijsat-table5", "TRADES", "L2"),
        ("ijsat-table1", "MART", "L2"),
    ]
    for name, label, column in conflicts:
        found = [r for r in table_rows(TABLES[name]) if (r.row, r.column) == (label, column)]
        assert [row.gate for row in found] == [False]
        assert "Table" in found[0].doubt


@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=9), st.integers(-30, 30))
def test_averages_agree_up_to_half_of_the_last_digit(hundredths: list[int], off: int) -> None:
    mean = Fraction(sum(hundredths), 100 * len(hundredths))
    printed = Decimal(round(mean * 100) + off).scaleb(-2)
    attacks = [f"a{i}" for i in range(len(hundredths))]
    rows = [
        row_of(attack=a, column=a, value=Decimal(h).scaleb(-2))
        for a, h in zip(attacks, hundredths, strict=True)
    ]
    average = row_of(
        attack="average",
        column="Avg",
        metric="average_accuracy",
        value=printed,
        combines=attacks,
    )
    (found,) = arithmetic([*rows, average])
    assert found.recomputed == pytest.approx(float(mean), abs=1e-9)
    assert found.agrees == (abs(Fraction(printed) - mean) <= Fraction(1, 200))


def row_of(**changes: object) -> PublishedRow:
    """A well-formed row with changes."""
    return PublishedRow.model_validate({**cells_of_a_row(), **changes})


def cells_of_a_row() -> dict[str, object]:
    row = table_rows(TABLES["third_party"])[0]
    return dict(row.model_dump())


# ------------------------------------------------------------------------------------------------------- schema
LINE = {
    **dict.fromkeys(PublishedRow.model_fields, ""),
    "source": "Paper Table 1",
    "row": "Ours",
    "column": "clean",
    "dataset": "mnist",
    "attack": "clean",
    "metric": "accuracy",
    "origin": "printed",
    "value": "98.10",
    "unit": "%",
    "better": "higher",
    "n": "10000",
    "gate": "true",
}


def written(path: Path, *lines: dict[str, str]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(PublishedRow.model_fields))
        writer.writeheader()
        writer.writerows(lines)
    return path


def test_a_good_line_reads_with_its_digits(tmp_path: Path) -> None:
    (row,) = read_published(written(tmp_path / "t.csv", LINE))
    assert (str(row.value), row.rounding, row.n, row.epsilon, row.gate) == (
        "98.10",
        0.005,
        10_000,
        None,
        True,
    )


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("value", "ninety"),
        ("value", "nan"),
        ("gate", "yes"),
        ("gate", ""),
        ("n", "0"),
        ("n", "many"),
        ("epsilon", "-0.1"),
        ("epsilon", "inf"),
        ("eta", "8/255"),
        ("dataset", "CIFAR 10"),
        ("metric", "Accuracy"),
        ("unit", "percent"),
        ("origin", "guessed"),
        ("better", "best"),
        ("source", ""),
        ("row", ""),
        ("train_samples", "2.5"),
    ],
)
def test_a_bad_cell_is_one_line_with_file_line_and_column(tmp_path: Path, column: str, text: str) -> None:
    path = written(tmp_path / "t.csv", LINE | {"row": "first"}, LINE | {column: text})
    with pytest.raises(UserError) as error:
        read_published(path)
    message = str(error.value)
    assert message.startswith(f"{path}, line 3, column {column}")
    assert "\n" not in message


@pytest.mark.parametrize(
    "change", [{"doubt": "odd"}, {"value": ""}, {"origin": "recomputed"}, {"gate": "false"}], ids=str
)
def test_a_gate_has_grounds(tmp_path: Path, change: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"line 2, column gate: gate is (true|false)"):
        read_published(written(tmp_path / "t.csv", LINE | change))


def test_a_table_whose_notes_alone_say_what_a_number_follows_from_is_refused(tmp_path: Path) -> None:
    old = [name for name in PublishedRow.model_fields if name not in TYPED]
    (tmp_path / "t.csv").write_text(",".join(old) + "\n", encoding="utf-8")
    with pytest.raises(
        UserError, match="'note' stands where 'combines' belongs; the columns are source,"
    ) as e:
        read_published(tmp_path / "t.csv")
    assert "\n" not in str(e.value)


TYPED = ("combines", "difference_of", "relative_to", "printed_as")


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"metric": "average_accuracy", "note": "over clean, pgd20"}, "combines is empty"),
        ({"difference_of": "AT"}, "difference_of names the two rows"),
        ({"value": "", "note": "printed 10-25"}, "value or printed_as is needed"),
        ({"printed_as": "98.1"}, "value or printed_as is needed"),
        ({"relative_to": "high"}, "column relative_to 'high'"),
    ],
    ids=str,
)
def test_what_a_number_follows_from_is_typed(tmp_path: Path, change: dict[str, str], column: str) -> None:
    row = LINE | {"gate": "false", "doubt": "follows from others"} | change
    with pytest.raises(UserError, match=re.escape(column)):
        read_published(written(tmp_path / "t.csv", row))


def test_lists_of_a_cell_and_the_row_of_a_difference(tmp_path: Path) -> None:
    row = LINE | {"gate": "false", "doubt": "d", "combines": "clean; pgd20", "note": "one; two"}
    (read,) = read_published(written(tmp_path / "t.csv", row))
    assert (read.combines, read.note, read.derived) == (("clean", "pgd20"), ("one", "two"), True)
    assert read.model_dump()["note"] == "one; two"


def test_two_numbers_in_one_place_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", LINE, LINE | {"value": "98.2"})
    with pytest.raises(
        UserError, match="line 3, column row: 'Ours' x 'clean' of Paper Table 1 stands in line 2"
    ):
        read_published(path)


def test_malformed_files_are_one_line(tmp_path: Path) -> None:
    header = ",".join(Hyperparameter.model_fields)
    texts = {
        "column 2": header.replace("name", "nom") + "\n",
        "column 6": header + ",more\n",
        "line 2: 2 cells for 5 columns": header + "\na,b\n",
        "line 1, column 1: ''": "",
        "not CSV text": header + '\na,"b',
    }
    for expected, text in texts.items():
        (tmp_path / "t.csv").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=re.escape(expected)) as error:
            read_rows(tmp_path / "t.csv", Hyperparameter)
        assert "\n" not in str(error.value)
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not CSV text"):
        read_rows(tmp_path / "t.csv", Hyperparameter)
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(tmp_path / "absent.csv", Hyperparameter)


def test_the_index_names_the_files_and_nothing_else() -> None:
    assert {path.stem for path in published_folder().glob("*.csv")} == {table.name for table in NUMBERS}
    settings = {path.stem for path in (published_folder() / "settings").iterdir()}
    assert settings == set(TABLES) - {table.name for table in NUMBERS}
    for table in NUMBERS:
        assert {row.source.split(" (")[0].split(" Figure")[0] for row in table_rows(table)} <= {
            table.source,
            table.source.removesuffix(" text"),
        }


def test_robbench_check_reads_every_table() -> None:
    reference = pytest.importorskip("robbench.compare.reference")
    for table in NUMBERS:
        rows = table_rows(table)
        found = reference.read_references(published_folder() / f"{table.name}.csv")
        assert [r.gate for r in found] == [row.gate for row in rows]
        assert [r.value for r in found] == [None if row.value is None else float(row.value) for row in rows]
        assert Counter(r.n for r in found) == Counter(row.n for row in rows)
    everything = reference.read_references(published_folder())
    assert len(everything) == sum(len(table_rows(table)) for table in NUMBERS)


# ---------------------------------------------------------------------------------------------------- list, show
def robbench(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_list_published_has_a_line_a_table() -> None:
    lines = [line.split("\t") for line in robbench("list", "published").splitlines()]
    assert [line[0] for line in lines] == [table.name for table in INDEX.tables]
    for line, table in zip(lines, INDEX.tables, strict=True):
        rows = table_rows(table)
        assert line[1] == table.source
        assert int(line[2]) == (len(rows) if rows else len(table_settings(table)))
        assert int(line[3]) == sum(row.gate for row in rows)


def test_show_prints_the_table_with_recomputed_averages_and_doubts() -> None:
    text = robbench("show", "IJSAT Table 5")
    line = next(line for line in text.splitlines() if line.startswith("AT + JSA "))
    assert line.split()[3:6] == ["82.75", "53.15", "47.47"]
    assert line.split()[-1] == "49.0867"
    mark = re.search(r"48\.80 (\[\d+\])", line)
    assert mark
    assert f"{mark[1]} the mean of the 6 printed columns is 49.0867" in text
    assert "* evaluation budget not stated separately from section 6.1" in text
    assert robbench("show", "ijsat-table5").splitlines()[-20:] == text.splitlines()[-20:]


def test_every_table_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for table in INDEX.tables:
        show_table(table.name)
        text = capsys.readouterr().out
        assert text.startswith(f"{table.source}: {table.what}\n")
        labels = {row.row for row in table_rows(table)} or {row.name for row in table_settings(table)}
        assert all(label in text for label in labels)


def test_an_unknown_table_suggests_the_nearest() -> None:
    result = CliRunner().invoke(main, ["show", "flow-lp-tabl12"])
    assert result.exit_code == 2
    assert "did you mean 'flow-lp-table12'" in result.output


@given(st.sampled_from(INDEX.tables), st.data())
def test_case_and_punctuation_of_names_do_not_count(table: object, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([table.name, table.source]))  # type: ignore[attr-defined]
    shown = "".join(
        data.draw(st.sampled_from([letter.upper(), letter.lower()]))
        if letter.isalnum()
        else data.draw(st.sampled_from("-_ "))
        for letter in name
    )
    assert find_table(shown, INDEX) == table


def test_reading_tables_needs_neither_torch_nor_pandas() -> None:
    code = "import sys, robbench.cli.published_show; sys.exit(sum(m in sys.modules for m in ('torch', 'pandas')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
