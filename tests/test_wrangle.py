"""Data wrangling: tables to questions, questions to answers, answers to scores; and no row that gets lost."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GenerationConfig
from typer.testing import CliRunner

from flexgen_hf import FlexGenError, Policy, PolicyError, StoreError, demo
from flexgen_hf.apps import batch, wrangle
from flexgen_hf.apps.wrangle.choosing import at_random, by_clusters, read_shown
from flexgen_hf.apps.wrangle.examples import apportioned
from flexgen_hf.apps.wrangle.predictions import Prediction, scored
from flexgen_hf.apps.wrangle.serialising import cell_text, row_text, same_value
from flexgen_hf.apps.wrangle.tables import read_pair_lines
from flexgen_hf.cli import app
from flexgen_hf.continuous.texts import TextRequest, Written
from flexgen_hf.text import load_tokenizer

from .comparison import load_ours, load_plain

TINY_OPT = Path(demo.__file__).parent / "assets" / "tiny-opt"

BEERS = [("Red Ale", "Oak Brewery"), ("Old Stout", "Hill House"), ("Pale Lager", "Sea Cellar"), ("Dark Bock", "Abbey")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(TINY_OPT))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("offload")
    with load_ours(TINY_OPT, Policy(batch_size=3, num_batches=2), dtype=torch.float32, offload_folder=folder) as loaded:
        yield loaded


class Oracle:
    """What a batch job needs of a model; it answers each prompt by a function."""

    def __init__(self, tokenizer: Any, answer: Callable[[str], str]) -> None:
        self.config: Any = AutoConfig.from_pretrained(TINY_OPT)
        self.generation_config: Any = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
        self.asked: list[str] = []
        self.options: list[dict[str, Any]] = []
        self._tokenizer, self._answer = tokenizer, answer

    def generate_each(self, requests: Iterable[TextRequest], **_: Any) -> Iterator[Written]:
        for request in requests:
            if not request.ids:
                yield Written(request)
                continue
            self.asked.append(self._tokenizer.decode(request.ids, skip_special_tokens=True))
            self.options.append(dict(request.options))
            ids = self._tokenizer(self._answer(self.asked[-1]), add_special_tokens=False)["input_ids"]
            yield Written(request, torch.tensor([[*request.ids, *ids]]))


def write_csv(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def write_matching(folder: Path) -> Path:
    """A data set of entity matching in the layout of tables: beers that are the same, and neighbours that are not."""
    header = ("id", "Beer_Name", "Brew_Factory_Name", "Style", "ABV")
    write_csv(folder / "tableA.csv", [header, *((n, *beer, "Ale", "5 %") for n, beer in enumerate(BEERS))])
    others = ((n, name, f"{by} Ltd", "", "-") for n, (name, by) in enumerate(BEERS))
    write_csv(folder / "tableB.csv", [header, *others])
    pairs = [(left, right, int(left == right)) for left in range(4) for right in range(4)]
    for split, part in (("train", pairs[::3]), ("valid", pairs[1::3]), ("test", pairs[2::3])):
        write_csv(folder / f"{split}.csv", [("ltable_id", "rtable_id", "label"), *part])
    return folder


def same_beer(prompt: str) -> str:
    left, right = re.findall(r"name: ([^.]*)\.", prompt)[-2:]
    return " Yes" if left == right else " No"


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------- the metrics
def scores(pairs: Sequence[tuple[str | None, str]]) -> wrangle.Scores:
    return wrangle.Scores.of_decisions(pairs, "Yes")


def test_scores_by_hand() -> None:
    found = scores([("Yes", "Yes"), ("Yes", "No"), ("No", "Yes"), ("No", "Yes"), ("No", "No"), (None, "No")])
    assert (found.precision, found.recall) == (1 / 2, 1 / 3)  # P + R < 1
    assert found.f1 == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert found.f1 == pytest.approx(0.4)
    assert found.accuracy == 2 / 6


def test_scores_where_nothing_is_found_or_there() -> None:
    nothing_found = scores([("No", "Yes"), ("Yes", "No")])
    assert (nothing_found.precision, nothing_found.recall, nothing_found.f1, nothing_found.accuracy) == (0, 0, 0, 0)
    nothing_there = scores([("No", "No"), (None, "No")])
    assert (nothing_there.precision, nothing_there.recall, nothing_there.f1, nothing_there.accuracy) == (0, 0, 0, 0.5)
    assert (scores([]).f1, scores([]).accuracy) == (0, 0)
    everything = scores([("Yes", "Yes"), ("No", "No")])
    assert (everything.precision, everything.recall, everything.f1, everything.accuracy) == (1, 1, 1, 1)


def test_scores_of_values() -> None:
    found = wrangle.Scores.of_values([("a", "a"), ("b", "a"), (None, "a"), ("a", "a")])
    assert (found.precision, found.recall, found.accuracy) == (2 / 3, 2 / 4, 2 / 4)
    assert found.f1 == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))


def test_no_answer_and_no_text_count_as_wrong() -> None:
    wording = wrangle.Wording("entity_matching")
    examples = [wrangle.Example(str(n), ({}, {}), label="Yes") for n in range(3)]
    lines: list[dict[str, Any]] = [
        {"text": " Yes", "prompt_tokens": 5, "completion_tokens": 2},
        {"text": "Beer"},
        {"error": {"type": "PolicyError", "message": "too long"}},
    ]
    made = [Prediction.of(example, line, wording) for example, line in zip(examples, lines, strict=True)]
    assert [(p.answer, p.correct, p.error) for p in made] == [
        ("Yes", True, None), (None, False, None), (None, False, "too long"),
    ]  # fmt: skip
    assert scored(made, wording) == wrangle.Scores(labelled=3, relevant=3, claimed=1, found=1, correct=1)


# ------------------------------------------------------------------------------------------------------- rows and words
def test_rows_as_text() -> None:
    row = {"name": "Red  Ale", "factory": "", "city": "` new york '", "note": "two\nlines"}
    assert row_text(row) == "name: Red Ale. factory:. city: new york. note: two lines"
    assert (
        row_text(row, dropped=["note", "city"], renamed={"name": "beer"}, blank="nan") == "beer: Red Ale. factory: nan"
    )
    assert cell_text("' 8284 melrose ave. '") == "8284 melrose ave."
    assert same_value(" New York. ") == same_value("` new york '") == "new york"


def test_questions_of_each_task() -> None:
    beer = {"Beer_Name": "Red Ale", "Brew_Factory_Name": "Oak", "Style": "Ale"}
    asked = wrangle.Wording.of("entity_matching", "Beer").asked(wrangle.Example("0", (beer, beer)))
    assert asked == (
        "Product A is name: Red Ale. factory: Oak. Product B is name: Red Ale. factory: Oak. "
        "Are Product A and Product B the same?"
    )
    song = {"Song_Name": "Fire", "CopyRight": "2013"}
    asked = wrangle.Wording.of("entity_matching", "iTunes-Amazon").asked(wrangle.Example("0", (song, song)))
    assert asked == "Song A is name: Fire. Song B is name: Fire. Are Song A and Song B the same?"
    shop = wrangle.Example("0", ({"name": "tv", "description": ""},), "manufacturer")
    assert wrangle.Wording.of("imputation", "Buy").asked(shop) == "name: tv. description:. What is the manufacturer?"
    cell = wrangle.Example("0", ({"City": "birminghxm", "State": "al"},), "City")
    hospital = wrangle.Wording.of("error_detection", "hospital")
    assert hospital.asked(cell) == "Is there a spelling error in City: birminghxm?"
    adult = wrangle.Wording.of("error_detection", "Adult500")
    assert adult.asked(cell) == "City: birminghxm. State: al. Is there an error in City: birminghxm?"
    schema = wrangle.Example("0", ({"name": "person-birth", "description": "day of birth"}, {"name": "patients-dob"}))
    assert wrangle.Wording.of("schema_matching", "Synthea").asked(schema) == (
        "A is person-birth; day of birth. B is patients-dob. Do A and B mean the same?"
    )


def test_every_published_set_has_an_instruction() -> None:
    names = {
        "entity_matching": ["Amazon-Google", "Beer", "DBLP-ACM", "DBLP-GoogleScholar", "Fodors-Zagats", "iTunes-Amazon",
                            "Walmart-Amazon"],
        "imputation": ["Restaurant", "Buy"], "error_detection": ["Hospital", "Adult"], "schema_matching": ["Synthea"],
    }  # fmt: skip
    example = wrangle.Example("0", ({"name": "a"}, {"name": "b"}), "name")
    said = {(task, name): wrangle.Wording.of(task, name).instructed(example) for task in names for name in names[task]}
    assert len(said) == 12
    assert all(text and "{" not in text for text in said.values())
    assert (
        said["entity_matching", "iTunes-Amazon"] == "Decide whether Song A and Song B are the same. Answer Yes or No."
    )
    assert said["imputation", "Restaurant"] != said["imputation", "Buy"]
    assert said["error_detection", "Hospital"] != said["error_detection", "Adult"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [(" Yes", "Yes"), ("no.", "No"), (" \n Yes", "Yes"), ("Yes\nNo", "Yes"), (": yes, because", "Yes"),
     ("there is no way", None), ("Nothing", None), ("", None), ("Product A", None)],
)  # fmt: skip
def test_what_is_read_as_a_decision(text: str, answer: str | None) -> None:
    assert wrangle.Wording("entity_matching").read(text) == answer


def test_what_is_read_as_a_value() -> None:
    wording = wrangle.Wording("imputation", column="city")
    assert wording.read(" New York\nWhat is") == "New York"
    assert wording.read(" \n") is None


def test_wordings_that_cannot_be_meant() -> None:
    with pytest.raises(PolicyError, match="task 'cleaning' is unknown"):
        wrangle.Wording("cleaning")
    with pytest.raises(PolicyError, match=r"cannot be filled in .* may have \{thing\}"):
        wrangle.Wording("imputation", question="What is {value}?")


# ---------------------------------------------------------------------------------------------------------- the layouts
def test_matching_in_tables_and_in_lines(tmp_path: Path) -> None:
    data = wrangle.read("entity_matching", write_matching(tmp_path / "Beer"))
    assert [len(split) for split in (data.train, data.valid, data.test)] == [6, 5, 5]
    assert (data.test[0].id, data.test[0].label) == ("0,2", "No")
    assert data.test[0].rows[1]["Beer_Name"] == "Pale Lager"
    assert "id" not in data.test[0].rows[0]
    folder = tmp_path / "lines"
    folder.mkdir()
    (folder / "test.txt").write_text(
        "COL name VAL red ale COL by VAL  COL abv VAL 5 % \tCOL name VAL ale ( red ) COL by VAL oak COL abv VAL - \t1\n"
        "COL name VAL stout\x85old COL by VAL hill\tCOL name VAL bock COL by VAL abbey\t0\n",
        "utf-8",
    )
    lines = wrangle.read("entity_matching", folder)
    assert not lines.train
    assert [example.label for example in lines.test] == ["Yes", "No"]
    assert lines.test[0].rows[0] == {"name": "red ale", "by": "", "abv": "5 %"}
    assert lines.test[1].rows[0] == {"name": "stout\x85old", "by": "hill"}


def test_broken_pairs_are_named(tmp_path: Path) -> None:
    file = tmp_path / "test.txt"
    for text in ("COL a VAL b\t1\n", "a\tb\t0\n", "x COL a VAL b\tCOL a VAL b\t0\n"):
        file.write_text(text)
        with pytest.raises(StoreError, match=r"line 1 of .* is no pair"):
            read_pair_lines(file)
    file.write_text("COL a VAL b\tCOL a VAL b\tmaybe\n")
    with pytest.raises(PolicyError, match="the label 'maybe' is neither 1 nor 0"):
        wrangle.read("entity_matching", tmp_path)


def test_imputation_in_the_published_layout(tmp_path: Path) -> None:
    for split, rows in (
        ("train", [("tv one", "big", "sony")]),
        ("test", [("phone", "small", "apple"), ("tv", "", "lg")]),
    ):
        write_csv(tmp_path / "Buy" / f"{split}.csv", [("name", "description", "manufacturer"), *rows])
    data = wrangle.read("imputation", tmp_path / "Buy")
    assert [(e.rows[0], e.column, e.label) for e in data.test] == [
        ({"name": "phone", "description": "small"}, "manufacturer", "apple"),
        ({"name": "tv", "description": ""}, "manufacturer", "lg"),
    ]
    assert (len(data.train), len(data.valid)) == (1, 0)
    with pytest.raises(PolicyError, match="no column 'city', but 'name', 'description', 'manufacturer'"):
        wrangle.read("imputation", tmp_path / "Buy", column="city")


def test_restaurants_follow_from_pairs_of_them(tmp_path: Path) -> None:
    """A row that is to be answered is not shown, and each is asked about once."""

    def row(name: str, city: str) -> str:
        return f"COL name VAL {name} COL city VAL {city} COL class VAL 7"

    a, b, c = row("a", "` new york '"), row("b", "atlanta"), row("c", "` las vegas '")
    (tmp_path / "train.txt").write_text(f"{a}\t{c}\t0\n")
    (tmp_path / "test.txt").write_text(f"{a}\t{b}\t0\n{b}\t{a}\t0\n")
    data = wrangle.read("imputation", tmp_path, column="city")
    assert [(e.rows[0]["name"], e.label) for e in data.test] == [("a", "new york"), ("b", "atlanta")]
    assert [(e.rows[0]["name"], e.label) for e in data.train] == [("c", "las vegas")]
    assert "city" not in data.test[0].rows[0]


def test_errors_in_the_published_layout(tmp_path: Path) -> None:
    write_csv(tmp_path / "table.csv", [("City", "State"), ("birminghxm", "al"), ("dothan", "xl")])
    write_csv(
        tmp_path / "test.csv", [("row_id", "col_name", "is_clean"), (0, "City", 0), (1, "City", 1), (1, "State", 0)]
    )
    data = wrangle.read("error_detection", tmp_path)
    assert [(e.id, e.label, e.rows[0][e.column]) for e in data.test] == [
        ("0:City", "Yes", "birminghxm"), ("1:City", "No", "dothan"), ("1:State", "Yes", "xl"),
    ]  # fmt: skip
    write_csv(tmp_path / "test.csv", [("City", "State", "col_name", "is_clean"), ("mobxle", "al", "City", 0)])
    (alone,) = wrangle.read("error_detection", tmp_path).test
    assert (alone.rows, alone.column, alone.label) == (({"City": "mobxle", "State": "al"},), "City", "Yes")
    for wrong, message in (
        ((5, "City", 1), "row '5', but the table has rows 0 to 1"), ((0, "Zip", 1), "the column 'Zip', but"),
    ):  # fmt: skip
        write_csv(tmp_path / "test.csv", [("row_id", "col_name", "is_clean"), wrong])
        with pytest.raises(StoreError, match=message):
            wrangle.read("error_detection", tmp_path)


@pytest.mark.parametrize("cells", [True, False], ids=["tid, attribute, correct_val", "a clean table"])
def test_errors_of_a_table_beside_a_clean_one(tmp_path: Path, cells: bool) -> None:
    clean = [(f"city {n}", "al") for n in range(20)]
    dirty = [(city.replace("i", "x") if n % 4 == 0 else city, state) for n, (city, state) in enumerate(clean)]
    write_csv(tmp_path / "hospital.csv", [("City", "State"), *dirty])
    right: list[Any] = [("City", "State"), *clean]
    if cells:
        listed = ((n, name, value) for n, row in enumerate(clean) for name, value in zip(right[0], row, strict=True))
        right = [("tid", "attribute", "correct_val"), *listed]
    write_csv(tmp_path / "hospital_clean.csv", right)
    data = wrangle.read("error_detection", tmp_path / "hospital.csv", seed=3)
    every = [*data.train, *data.valid, *data.test]
    assert {e.id for e in every if e.label == "Yes"} == {f"{n}:City" for n in range(0, 20, 4)}
    assert len({e.id for e in every}) == len(every) == 40
    assert [len(split) for split in (data.train, data.valid, data.test)] == [4, 4, 32]
    rows = [{e.group for e in split} for split in (data.train, data.valid, data.test)]
    assert not (rows[0] & rows[1] | rows[0] & rows[2] | rows[1] & rows[2])  # cells of one row stay together


def test_errors_that_are_made(tmp_path: Path) -> None:
    rows = [(f"private {n % 3}", "Male") for n in range(100)]
    table = write_csv(tmp_path / "Adult.csv", [("Workclass", "Sex"), *rows])
    data = wrangle.read("error_detection", table, made_errors=0.2, seed=1)
    again = wrangle.read("error_detection", table, made_errors=0.2, seed=1)
    every = {e.id: e for e in [*data.train, *data.valid, *data.test]}
    wrong = {key for key, e in every.items() if e.label == "Yes"}
    assert len(wrong) == 40
    right = {
        f"{n}:{name}": value
        for n, row in enumerate(rows)
        for name, value in zip(("Workclass", "Sex"), row, strict=True)
    }
    assert {key for key, e in every.items() if e.rows[0][e.column] != right[key]} == wrong
    assert any("x" in every[key].rows[0][every[key].column] for key in wrong)
    assert any(every[key].rows[0][every[key].column] in {"private 0", "private 1", "private 2"} for key in wrong)
    assert [(e.id, e.rows, e.label) for e in again.test] == [(e.id, e.rows, e.label) for e in data.test]


def test_schema_pairs_in_both_layouts(tmp_path: Path) -> None:
    write_csv(tmp_path / "test.csv", [("left", "right", "label"), ("person birth", "patients dob", 1), ("a", "b", 0)])
    data = wrangle.read("schema_matching", tmp_path)
    assert [(e.rows[0]["name"], e.rows[1]["name"], e.label) for e in data.test] == [
        ("person birth", "patients dob", "Yes"), ("a", "b", "No"),
    ]  # fmt: skip
    described = [("omop", "table", "label", "d1", "d2", "d3", "d4"),
                 ("person-year", "patients-birth", 1, "persons", "year of birth", "patients", "")]  # fmt: skip
    (pair,) = wrangle.read("schema_matching", write_csv(tmp_path / "Synthea.csv", [*described])).test
    assert pair.rows == (
        {"name": "person-year", "description": "persons. year of birth"},
        {"name": "patients-birth", "description": "patients"},
    )
    with pytest.raises(StoreError, match="need columns left and right"):
        wrangle.read("schema_matching", write_csv(tmp_path / "other.csv", [("a", "b"), (1, 2)]))


def test_tables_of_ones_own(tmp_path: Path) -> None:
    left = write_csv(tmp_path / "a.csv", [("key", "name"), ("x", "Red Ale"), ("y", "Old Stout")])
    right = write_csv(tmp_path / "b.csv", [("title", "id"), ("red ale", "7"), ("bock", "8")])
    pairs = write_csv(
        tmp_path / "p.csv", [("a", "b", "label"), ("x", 7, ""), ("y", 8, "0"), ("x", 8, "no"), ("y", 7, "")]
    )
    data = wrangle.read_pair(left, right, pairs)
    assert [e.id for e in data.test] == ["x,7", "y,7"]  # what is not known is asked, what is known is shown
    assert {e.label for e in [*data.train, *data.valid]} == {"No"}
    assert data.test[0].rows == ({"name": "Red Ale"}, {"title": "red ale"})
    with pytest.raises(StoreError, match="names 'z', which is no id of the left table"):
        wrangle.read_pair(left, right, write_csv(tmp_path / "p.csv", [("a", "b"), ("z", 7)]))


def test_files_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no data at"):
        wrangle.read("entity_matching", tmp_path / "missing")
    with pytest.raises(StoreError, match=r"no test\.txt in"):
        wrangle.read("entity_matching", tmp_path)
    (tmp_path / "wide.csv").write_text("a,b\n1,2,3\n")
    with pytest.raises(StoreError, match=r"row 2 of .* has 3 cells for 2 columns"):
        wrangle.read("imputation", tmp_path / "wide.csv", column="a")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    with pytest.raises(StoreError, match="several columns 'a'"):
        wrangle.read("imputation", tmp_path / "twice.csv", column="a")
    (tmp_path / "none.csv").write_text("")
    with pytest.raises(StoreError, match="no header"):
        wrangle.read("imputation", tmp_path / "none.csv", column="a")
    write_csv(tmp_path / "one.csv", [("a",), (1,)])
    with pytest.raises(PolicyError, match="which column is to be filled in"):
        wrangle.read("imputation", tmp_path / "one.csv")


# ------------------------------------------------------------------------------------------------------- the examples
def labelled(count: int, positive: int) -> list[wrangle.Example]:
    return [
        wrangle.Example(str(n), ({"name": f"beer {n}"}, {"name": f"ale {n}"}), label="Yes" if n < positive else "No")
        for n in range(count)
    ]


def test_random_examples_are_of_both_answers() -> None:
    data = wrangle.Data("d", "entity_matching", labelled(40, 5), [], labelled(3, 1))
    chosen = at_random(data, 8, seed=4)
    assert sorted(e.label or "" for e in chosen) == ["No"] * 4 + ["Yes"] * 4
    assert [e.id for e in chosen] == [e.id for e in at_random(data, 8, seed=4)]
    assert [e.id for e in chosen] != [e.id for e in at_random(data, 8, seed=5)]
    assert sum(e.label == "Yes" for e in at_random(data, 20, seed=4)) == 5  # all that there are
    none = wrangle.Data("d", "entity_matching", [], [], labelled(3, 1))
    assert at_random(none, 0, seed=0) == []
    with pytest.raises(PolicyError, match="no labelled examples to show"):
        at_random(none, 2, seed=0)


def test_clusters_take_one_of_each_kind() -> None:
    kinds = ("imperial stout oak aged", "sigmod conference database", "sony memory card 16gb")
    texts = [f"{kind} {n}" for n in range(5) for kind in kinds]
    for seed in range(3):
        assert {place % 3 for place in by_clusters(texts, 3, seed)} == {0, 1, 2}
    assert by_clusters(texts, 20, 0) == list(range(15))
    assert by_clusters(texts, 0, 0) == []
    assert by_clusters(["same"] * 6, 2, 0) == by_clusters(["same"] * 6, 2, 0)
    assert len(set(by_clusters(["same"] * 6, 2, 0))) == 2


def test_examples_by_hand(tmp_path: Path) -> None:
    data = wrangle.Data("d", "entity_matching", labelled(4, 1), [], labelled(2, 1))
    wording = wrangle.Wording("entity_matching", thing="Beer")
    file = tmp_path / "shown.jsonl"
    file.write_text('{"text": "Is ale ale?\u2028", "label": "Yes"}\n\n{"id": "2"}\n', "utf-8")
    assert read_shown(file, data, wording) == [
        ("Is ale ale?\u2028", "Yes"),
        ("Beer A is name: beer 2. Beer B is name: ale 2. Are Beer A and Beer B the same?", "No"),
    ]
    for line, message in (
        ('{"id": "9"}', "'9' is no labelled example"),
        ("{", "not JSON"),
        ('{"text": "a"}', "should be"),
    ):
        file.write_text(line)
        with pytest.raises(PolicyError, match=message):
            read_shown(file, data, wording)
    with pytest.raises(StoreError, match="cannot read the examples"):
        read_shown(tmp_path / "missing", data, wording)
    for wrong in ({"how": "manual"}, {"file": "f"}, {"how": "best"}, {"count": -1}):
        with pytest.raises(PolicyError):
            wrangle.Shots(**wrong)


def test_a_data_set_in_one_piece_is_apportioned() -> None:
    data = apportioned("d", "entity_matching", labelled(50, 10), seed=2)
    splits = [{e.id for e in split} for split in (data.train, data.valid, data.test)]
    assert [len(split) for split in splits] == [5, 5, 40]
    assert len(set.union(*splits)) == 50
    few = data.limited(7, seed=1)
    assert len(few.test) == 7
    assert {e.id for e in few.test} <= splits[2]
    assert [e.id for e in few.test] == sorted((e.id for e in few.test), key=int)


# ------------------------------------------------------------------------------------------------------------- the runs
def test_a_run_with_an_oracle_is_right_and_leaves_no_row_out(tmp_path: Path, tokenizer: Any) -> None:
    data = wrangle.read("entity_matching", write_matching(tmp_path / "Beer"))
    oracle = Oracle(tokenizer, same_beer)
    outcome = wrangle.run(data, oracle, tokenizer, shots=wrangle.Shots(3), output=tmp_path / "out.jsonl")
    assert outcome.scores == wrangle.Scores(labelled=5, relevant=1, claimed=1, found=1, correct=5)
    assert (outcome.unreadable, outcome.errors) == (0, 0)
    lines = read_lines(tmp_path / "out.jsonl")
    assert [(line["id"], line["answer"], line["label"]) for line in lines] == [
        (e.id, e.label, e.label) for e in data.test
    ]
    assert "F1 1.000" in str(outcome)
    first = oracle.asked[0]
    assert first == wrangle.first_prompt(data, shots=wrangle.Shots(3))
    assert first.startswith(
        "Decide whether Product A and Product B are the same. Answer Yes or No.\n\nProduct A is name: "
    )
    assert first.count("the same? Yes\n\n") + first.count("the same? No\n\n") == 3
    assert first.endswith("Are Product A and Product B the same?")
    assert len({prompt[: prompt.rindex("\n\n")] for prompt in oracle.asked}) == 1  # all begin alike
    assert all(o["stop_strings"] == ["\n"] and o["max_new_tokens"] == 4 for o in oracle.options)


def test_rows_that_are_too_long_and_nonsense_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    examples = [*labelled(3, 2), wrangle.Example("long", ({"name": "people " * 600}, {"name": "b"}), label="Yes")]
    data = wrangle.Data("d", "entity_matching", [], [], examples)
    answers = iter([" Yes", " the people", " No"])
    outcome = wrangle.run(
        data, Oracle(tokenizer, lambda _: next(answers)), tokenizer, shots=wrangle.Shots(0), output=tmp_path / "o.csv"
    )
    assert (len(outcome.predictions), outcome.unreadable, outcome.errors) == (4, 1, 1)
    assert outcome.scores == wrangle.Scores(labelled=4, relevant=3, claimed=1, found=1, correct=2)
    with (tmp_path / "o.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["answer"], row["correct"]) for row in rows] == [
        ("0", "Yes", "True"), ("1", "", "False"), ("2", "No", "True"), ("long", "", "False"),
    ]  # fmt: skip
    assert "context" in rows[3]["error"]


def test_texts_are_those_of_transformers_until_the_line_ends(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    data = wrangle.read("entity_matching", write_matching(tmp_path / "Beer"))
    job = batch.Job(options={"max_new_tokens": 12, "stop": [" of", "\n"]})
    outcome = wrangle.run(data, model, tokenizer, shots=wrangle.Shots(2), job=job, output=tmp_path / "out.jsonl")
    plain = load_plain(TINY_OPT, dtype=torch.float32)
    shots = wrangle.Shots(2)
    for number, prediction in enumerate(outcome.predictions):
        only = wrangle.Data(data.name, data.task, data.train, data.valid, [data.test[number]])
        ids = torch.tensor([tokenizer(wrangle.first_prompt(only, shots=shots))["input_ids"]])
        made = plain.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
            stop_strings=[" of", "\n"], tokenizer=tokenizer,
        )  # fmt: skip
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert prediction.text == re.split(r" of|\n", text)[0]
        assert (prediction.prompt_tokens, prediction.tokens) == (ids.shape[1], made.shape[1] - ids.shape[1])
    assert any(prediction.tokens < 12 for prediction in outcome.predictions)  # the stop text stops
    assert outcome.tokens_per_s is not None
    assert outcome.to_dict()["samples"] == 5
    again = wrangle.run(data, model, tokenizer, shots=wrangle.Shots(2), job=job, output=tmp_path / "out.jsonl")
    assert (again.job.computed, again.predictions, again.tokens_per_s) == (0, outcome.predictions, None)
    with pytest.raises(FlexGenError, match="--overwrite"):
        wrangle.run(data, model, tokenizer, shots=wrangle.Shots(1), job=job, output=tmp_path / "out.jsonl")


def test_clusters_show_what_the_model_gets_wrong(tmp_path: Path, tokenizer: Any) -> None:
    data = wrangle.read("entity_matching", write_matching(tmp_path / "Beer"))
    oracle = Oracle(tokenizer, lambda _: " No")  # wrong on what is the same
    outcome = wrangle.run(data, oracle, tokenizer, shots=wrangle.Shots(2, "clusters"))
    missed = [e for e in data.valid if e.label == "Yes"]
    assert missed
    wording = wrangle.Wording.of("entity_matching", "Beer")
    for example in missed[:2]:
        assert f"{wording.asked(example)} Yes\n\n" in oracle.asked[-1]
    assert len(oracle.asked) == len(data.valid) + len(data.test)
    assert len(outcome.predictions) == len(data.test)
    with pytest.raises(PolicyError, match="look at random ones"):
        wrangle.first_prompt(data, shots=wrangle.Shots(2, "clusters"))
    blind = wrangle.Data("d", data.task, data.train, [], data.test)
    with pytest.raises(PolicyError, match="no labelled validation examples"):
        wrangle.run(blind, oracle, tokenizer, shots=wrangle.Shots(2, "clusters"))


def test_what_a_run_refuses(tmp_path: Path, tokenizer: Any) -> None:
    def load() -> Any:
        raise AssertionError("loaded, though the data are not in order")

    data = wrangle.Data("d", "entity_matching", [], [], labelled(2, 1))
    with pytest.raises(PolicyError, match="no labelled examples to show"):
        wrangle.run(data, load)
    with pytest.raises(PolicyError, match="the wording is of imputation"):
        wrangle.run(data, load, wording=wrangle.Wording("imputation"))
    with pytest.raises(PolicyError, match="no examples to be answered"):
        wrangle.run(wrangle.Data("d", "entity_matching", labelled(2, 1), [], []), load)
    with pytest.raises(PolicyError, match=r"written as \.jsonl or \.csv"):
        wrangle.run(data, load, shots=wrangle.Shots(0), output=tmp_path / "out.txt")
    with pytest.raises(StoreError, match="cannot write the output"):
        wrangle.run(data, load, shots=wrangle.Shots(0), output=tmp_path / "missing" / "out.jsonl")


# ---------------------------------------------------------------------------------------------------------- the command
def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["wrangle", *map(str, arguments)])


def test_the_command_fills_a_column_of_any_table(tmp_path: Path) -> None:
    rows = [(n, f"inn, {n}", "atlanta" if n % 2 else "") for n in range(6)]
    table = write_csv(tmp_path / "inns.csv", [("id", "name", "city"), *rows])
    result = invoke(
        "--task", "imputation", "--data", table, "--column", "city", "--model", TINY_OPT, "--shots", 2,
        "-o", tmp_path / "out.jsonl", "--filled", tmp_path / "filled.csv", "--json", tmp_path / "sum.json",
        "--offload-folder", tmp_path / "offload", "--max-new-tokens", 3, "--batch-size", 2,
        "--policy", "0 50 0 100 0 100",
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    assert "imputation inns: 3 rows" in result.output
    assert "no labels" in result.output
    lines = read_lines(tmp_path / "out.jsonl")
    assert [(line["id"], line["label"], line["correct"]) for line in lines] == [(n, None, None) for n in "024"]
    with (tmp_path / "filled.csv").open(newline="") as file:
        filled = list(csv.DictReader(file))
    assert [row["name"] for row in filled] == [f"inn, {n}" for n in range(6)]
    assert [row["city"] for row in filled[1::2]] == ["atlanta"] * 3
    assert [row["city"] for row in filled[::2]] == [line["answer"] or "" for line in lines]
    assert json.loads((tmp_path / "sum.json").read_text())["samples"] == 3


def test_the_command_shows_a_prompt_of_tables_of_ones_own(tmp_path: Path) -> None:
    left = write_csv(tmp_path / "a.csv", [("id", "name", "note"), (1, "Red Ale", "x")])
    right = write_csv(tmp_path / "b.csv", [("id", "title"), (1, "red ale")])
    pairs = write_csv(tmp_path / "p.csv", [("ltable_id", "rtable_id"), (1, 1)])
    result = invoke(
        "--left", left, "--right", right, "--pairs", pairs, "--shots", 0, "--show-prompt", "--thing", "Beer",
        "--drop", "note", "--instruction", "Compare.",
    )  # fmt: skip
    assert result.output == (
        "Compare.\n\nBeer A is name: Red Ale. Beer B is title: red ale. Are Beer A and Beer B the same?\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which data"),
        (["--left", "a.csv"], "go together"),
        (["--data", "{}", "--filled", "f.csv"], "only a CSV file"),
        (["--data", "{}"], "which model"),
        (["--data", "{}", "--task", "imputation"], "which column"),
        (["--data", "{}", "--clean", "c.csv"], "of error detection"),
        (["--data", "{}", "--choose", "manual"], "give both or neither"),
        (["--data", "{}", "--choose", "clusters", "--examples", "e.jsonl"], "give both or neither"),
        (["--data", "{}", "--model", "./nowhere"], "no folder './nowhere'"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    folder = write_matching(tmp_path / "Beer")
    result = invoke(*(argument.format(folder) if argument == "{}" else argument for argument in arguments))
    assert isinstance(result.exception, FlexGenError)
    assert message in str(result.exception)
