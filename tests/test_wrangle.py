"""Data wrangling: published layouts, prompts, what they show, answers that are read, and what they are worth."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flexgen_hf import PolicyError, StoreError
from flexgen_hf.apps import batch, wrangle
from flexgen_hf.apps.wrangle import choosing
from flexgen_hf.apps.wrangle.examples import apportioned
from flexgen_hf.cli import app

from .comparison import load_plain
from .trained import TINY_OPT

# The tiny model makes speeches: behind a question it begins a new line, behind this it goes on.
SPOKEN = "The {column} of the"
CITIES = ("Bergen", "Oslo", "Turku", "Narva", "Vilnius", "Riga")


def write_csv(path: Path, header: str, *rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def labels(examples: Sequence[wrangle.Example]) -> list[str | None]:
    return [example.label for example in examples]


def product(name: str, maker: str) -> str:
    return f"COL title VAL {name} COL manufacturer VAL {maker} COL price VAL 5.0 "


def pairs_folder(folder: Path) -> Path:
    """Pairs in DeepMatcher's lines; two of the test rows are in the train split as well."""
    folder.mkdir(parents=True)
    lines = [
        (product("disk", "acme"), product("disc", ""), 1),
        (product("lamp", "acme"), product("chair", "zeta"), 0),
        (product("lamp", "acme"), product("lamp 2", "zeta"), 0),
    ]
    for split, chosen in (("test", lines[:2]), ("valid", lines[1:2]), ("train", lines[1:])):
        text = "".join(f"{left}\t{right}\t{label}\n" for left, right, label in chosen)
        (folder / f"{split}.txt").write_text(text)
    return folder


def towns(path: Path, rows: int = 12, known: int | None = None) -> Path:
    """A table of towns, of which the first ones have their city."""
    known = rows if known is None else known
    lines = [(n, f"café {n}", f"{n} main st.", CITIES[n % 6] if n < known else "") for n in range(rows)]
    return write_csv(path, "id,name,address,city", *lines)


def decisions(count: int, task: str = "schema_matching") -> wrangle.Data:
    examples = [
        wrangle.Example(str(n), ({"name": f"left {n}"}, {"name": f"right {n * n}"}), label=("No", "No", "Yes")[n % 3])
        for n in range(count)
    ]
    return apportioned("made", task, examples, 0)


# ------------------------------------------------------------------------------------------------------------- layouts
def test_pairs_of_lines(tmp_path: Path) -> None:
    data = wrangle.read("entity_matching", pairs_folder(tmp_path / "Amazon-Google"))
    assert (len(data.train), len(data.valid), len(data.test)) == (2, 1, 2)
    assert labels(data.test) == ["Yes", "No"]
    left, right = data.test[0].rows
    assert left == {"title": "disk", "manufacturer": "acme", "price": "5.0"}
    assert right == {"title": "disc", "manufacturer": "", "price": "5.0"}


def test_pairs_of_two_tables(tmp_path: Path) -> None:
    folder = tmp_path / "Beer"
    write_csv(folder / "tableA.csv", "id,Beer_Name,Style", (7, "Red Ale", "ale"), (8, "Stout", "stout"))
    write_csv(folder / "tableB.csv", "id,Beer_Name,Style", (7, "Stout!", "stout"), (9, "Ale, red", "ale"))
    write_csv(folder / "test.csv", "ltable_id,rtable_id,label", (7, 9, 1), (8, 9, 0), (8, 7, 1))
    data = wrangle.read("entity_matching", folder)
    assert labels(data.test) == ["Yes", "No", "Yes"]
    assert not data.train
    assert not data.valid
    assert data.test[0].rows[1]["Beer_Name"] == "Ale, red"
    asked = wrangle.Wording.of(data.task, data.name).asked(data.test[0])
    assert asked == "Product A is name: Red Ale. Product B is name: Ale, red. Are Product A and Product B the same?"


def test_own_tables_and_their_pairs(tmp_path: Path) -> None:
    left = write_csv(tmp_path / "a.csv", "key,name", ("x", "Anna"), ("y", "Ben"))
    right = write_csv(tmp_path / "b.csv", "name,id,born", ("Annie", 1, 1990), ("Bert", 2, ""))
    pairs = write_csv(tmp_path / "p.csv", "a,b,label", ("x", 1, 1), ("y", 2, ""), ("x", 2, "no"), ("y", 1, None))
    data = wrangle.read_pair(left, right, pairs)
    assert [example.id for example in data.test] == ["y,2", "y,1"]
    assert labels(data.test) == [None, None]
    assert sorted(map(str, labels([*data.train, *data.valid]))) == ["No", "Yes"]
    assert data.test[0].rows == ({"name": "Ben"}, {"name": "Bert", "born": ""})
    with pytest.raises(StoreError, match="'z', which is no id of the left table"):
        wrangle.read_pair(left, right, write_csv(tmp_path / "q.csv", "a,b", ("z", 1)))
    with pytest.raises(PolicyError, match="'maybe' is neither 1 nor 0"):
        wrangle.read_pair(left, right, write_csv(tmp_path / "r.csv", "a,b,label", ("x", 1, "maybe")))


def test_imputation_of_the_published_layout(tmp_path: Path) -> None:
    folder = tmp_path / "Buy"
    header = "name,description,manufacturer,price"
    write_csv(folder / "train.csv", header, ("Lens 50", "a lens", "Canon", ""), ("TV 3", "", "Sony", 9))
    write_csv(folder / "test.csv", header, ("Lens 85", "a long lens", "Canon", "1,200"))
    data = wrangle.read("imputation", folder)
    (example,) = data.test
    assert (example.label, example.column) == ("Canon", "manufacturer")
    wording = wrangle.Wording.of(data.task, data.name)
    assert wording.asked(example) == (
        "name: Lens 85. description: a long lens. price: 1,200. What is the manufacturer?"
    )
    assert labels(data.train) == ["Canon", "Sony"]
    with pytest.raises(PolicyError, match="no column 'city', but 'name'"):
        wrangle.read("imputation", folder, column="city")


def test_imputation_from_pairs_asks_for_each_row_once_and_shows_none_of_them(tmp_path: Path) -> None:
    data = wrangle.read("imputation", pairs_folder(tmp_path / "pairs"), column="manufacturer")
    titles = [[example.rows[0]["title"] for example in split] for split in (data.test, data.valid, data.train)]
    assert titles == [["disk", "disc", "lamp", "chair"], [], ["lamp 2"]]
    assert labels(data.test) == ["acme", None, "acme", "zeta"]
    assert all("manufacturer" not in example.rows[0] for example in data.test)


def test_holes_of_a_table(tmp_path: Path) -> None:
    data = wrangle.read("imputation", towns(tmp_path / "t.csv", rows=8, known=6), column="city")
    assert [example.id for example in data.test] == ["6", "7"]
    assert {example.label for example in [*data.train, *data.valid]} == set(CITIES)
    assert list(data.test[0].rows[0]) == ["name", "address"]
    filled = wrangle.with_answers(wrangle.read_table(tmp_path / "t.csv"), "city", {"6": "Rome", "0": "Rome"})
    assert [row["city"] for row in filled] == [*CITIES, "Rome", ""]
    with pytest.raises(PolicyError, match="which column"):
        wrangle.read("imputation", tmp_path / "t.csv")


def test_a_table_without_holes_is_parted_by_the_seed(tmp_path: Path) -> None:
    table = towns(tmp_path / "t.csv", rows=40)
    parts = [wrangle.read("imputation", table, column="city", seed=seed) for seed in (1, 1, 2)]
    ids = [[[example.id for example in split] for split in (p.train, p.valid, p.test)] for p in parts]
    assert [len(split) for split in ids[0]] == [4, 4, 32]
    assert sorted(itertools.chain(*ids[0]), key=int) == [str(n) for n in range(40)]
    assert ids[0] == ids[1] != ids[2]


def test_errors_beside_a_clean_table(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "hospital.csv", "City,State", ("birmingxam", "al"), ("dothan", "xl"))
    write_csv(
        tmp_path / "hospital_clean.csv", "tid,attribute,correct_val",
        (0, "City", "birmingham"), (0, "State", "al"), (1, "City", "dothan"), (1, "State", "al"),
    )  # fmt: skip
    data = wrangle.read("error_detection", table)
    cells = {example.id: example.label for example in [*data.train, *data.valid, *data.test]}
    assert cells == {"0:City": "Yes", "0:State": "No", "1:City": "No", "1:State": "Yes"}
    wording = wrangle.Wording.of(data.task, data.name)
    assert wording.asked(data.test[0]) == "Is there a spelling error in City: birmingxam?"
    same_shape = write_csv(tmp_path / "right.csv", "City,State", ("birmingham", "al"), ("dothan", "al"))
    again = wrangle.read("error_detection", table, clean=same_shape)
    assert labels(again.test) == labels(data.test)
    with pytest.raises(StoreError, match="has 1 rows, the table 2"):
        wrangle.read("error_detection", table, clean=write_csv(tmp_path / "short.csv", "City,State", ("dothan", "al")))


def test_errors_of_the_published_layouts(tmp_path: Path) -> None:
    folder = tmp_path / "Hospital"
    write_csv(folder / "table.csv", ",City,State", (0, "birmingxam", "al"), (1, "dothan", "xl"))
    write_csv(folder / "test.csv", "row_id,col_name,is_clean", (1, "State", 0), (0, "State", 1))
    data = wrangle.read("error_detection", folder)
    assert [(example.column, example.label) for example in data.test] == [("State", "Yes"), ("State", "No")]
    assert data.test[0].rows == ({"City": "dothan", "State": "xl"},)
    flat = tmp_path / "Adult"
    write_csv(
        flat / "test.csv", ",age,sex,col_name,is_clean", (0, "31-50", "Male", "age", 1), (1, "22", "Mxle", "sex", 0)
    )
    data = wrangle.read("error_detection", flat)
    assert labels(data.test) == ["No", "Yes"]
    asked = wrangle.Wording.of(data.task, data.name).asked(data.test[1])
    assert asked == "age: 22. sex: Mxle. Is there an error in sex: Mxle?"
    write_csv(folder / "test.csv", "row_id,col_name,is_clean", (2, "State", 0))
    with pytest.raises(StoreError, match="names row '2', but the table has rows 0 to 1"):
        wrangle.read("error_detection", folder)


def test_errors_that_are_made(tmp_path: Path) -> None:
    table = towns(tmp_path / "t.csv", rows=30)
    data = wrangle.read("error_detection", table, made_errors=0.25, seed=3)
    cells = [*data.train, *data.valid, *data.test]
    right = read_csv(table)
    assert len(cells) == 120
    assert labels(cells).count("Yes") == 30
    for example in cells:
        row = int(example.id.split(":")[0])
        assert (example.rows[0][example.column] != right[row][example.column]) == (example.label == "Yes")
    parts = [{example.group for example in split} for split in (data.train, data.valid, data.test)]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert labels(wrangle.read("error_detection", table).test) == [None] * 120


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("left,right,label", ("person-birth", "patients-birthdate", 1)),
        ("omop,table,label,d1,d2,d3,d4", ("person-birth", "patients-birthdate", 1, "people", "when born", "", "day")),
    ],
)
def test_schema_matching_of_the_published_layout(tmp_path: Path, header: str, row: tuple[Any, ...]) -> None:
    write_csv(
        tmp_path / "Synthea" / "test.csv", header, row, ("a-b", "c-d", *([0] if len(row) == 3 else [0, "", "", "", ""]))
    )
    data = wrangle.read("schema_matching", tmp_path / "Synthea")
    assert labels(data.test) == ["Yes", "No"]
    asked = [wrangle.Wording.of(data.task, data.name).asked(example) for example in data.test]
    told = ("", "") if len(row) == 3 else ("; people. when born", "; day")
    assert asked[0] == f"A is person-birth{told[0]}. B is patients-birthdate{told[1]}. Do A and B mean the same?"
    assert asked[1] == "A is a-b. B is c-d. Do A and B mean the same?"


def test_files_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no data at"):
        wrangle.read("imputation", tmp_path / "absent")
    with pytest.raises(PolicyError, match="task 'joining' is unknown"):
        wrangle.read("joining", tmp_path)
    with pytest.raises(StoreError, match=r"no test.txt in .* entity_matching"):
        wrangle.read("entity_matching", tmp_path)
    (tmp_path / "test.txt").write_text("COL a VAL 1\tCOL a VAL 2\n")
    with pytest.raises(StoreError, match=r"line 1 of .* is no pair"):
        wrangle.read("entity_matching", tmp_path)
    with pytest.raises(StoreError, match=r"row 3 of .* has 3 cells for 2 columns"):
        wrangle.read_table(write_csv(tmp_path / "wide.csv", "a,b", (1, 2), (1, 2, 3)))
    with pytest.raises(StoreError, match="several columns 'a'"):
        wrangle.read_table(write_csv(tmp_path / "twice.csv", "a,a", (1, 2)))
    with pytest.raises(StoreError, match="no header"):
        wrangle.read_table(write_csv(tmp_path / "empty.csv", ""))
    assert wrangle.read_table(write_csv(tmp_path / "narrow.csv", "a,b", (1,))) == [{"a": "1", "b": ""}]


# ------------------------------------------------------------------------------------------------------------- wording
def test_rows_are_one_line_without_the_quotes_of_the_published_tables() -> None:
    wording = wrangle.Wording("imputation", dropped=("class",), renamed={"addr": "address"})
    row = {
        "name": "` arnie morton \\ 's '",
        "addr": "435  s. la\ncienega",
        "phone": "",
        "class": "0",
        "by": "o'neill '",
    }
    asked = wording.asked(wrangle.Example("0", (row,), "city"))
    assert asked == "name: arnie morton \\ 's. address: 435 s. la cienega. phone: . by: o'neill '. What is the city?"


@pytest.mark.parametrize(
    ("text", "answer"),
    [(" Yes", "Yes"), ("no.", "No"), (" The answer is NO, yes", "No"), ("Yesterday", None), ("", None),
     ("\nYes", "Yes"), ("None of them\nYes", None)],
)  # fmt: skip
def test_decisions_that_are_read(text: str, answer: str | None) -> None:
    assert wrangle.Wording("entity_matching").read(text) == answer


def test_values_that_are_read_and_compared() -> None:
    wording = wrangle.Wording("imputation")
    assert wording.read(" New  York \nname: other") == "New York"
    assert wording.read(" \n") is None
    assert wording.compared("New York.") == wording.compared("` new york '")
    assert wording.compared("New York") != wording.compared("York")


def test_questions_of_ones_own() -> None:
    pair = wrangle.Example("0", ({"a": "{x}"}, {"a": "2"}))
    wording = wrangle.Wording("entity_matching", question="One {thing}?", instruction="On {thing}s.", thing="Song")
    data = wrangle.Data("made", "entity_matching", [], [], [pair])
    assert wrangle.prompts(data, wording, [("Q?", "A\nB")]) == [
        "On Songs.\n\nQ? A B\n\nSong A is a: {x}. Song B is a: 2. One Song?"
    ]
    with pytest.raises(PolicyError, match=r"'\{rest\}\?' cannot be filled in"):
        wrangle.Wording("entity_matching", question="{rest}?")


# ------------------------------------------------------------------------------------------------------------- metrics
def test_scores_by_hand() -> None:
    answers = [("Yes", "Yes"), ("Yes", "No"), ("No", "Yes"), (None, "Yes"), (None, "No"), ("No", "No"), ("Yes", "Yes")]
    scores = wrangle.Scores.of_decisions(answers, "Yes")
    assert (scores.precision, scores.recall) == (2 / 3, 2 / 4)
    assert scores.f1 == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert scores.accuracy == 3 / 7


def test_f1_where_precision_and_recall_are_less_than_one_together() -> None:
    scores = wrangle.Scores.of_decisions([("Yes", "Yes"), *[("Yes", "No")] * 3, *[("No", "Yes")] * 3], "Yes")
    assert (scores.precision, scores.recall, scores.f1) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("answers", [[], [("No", "No")], [("No", "Yes")], [("Yes", "No")]])
def test_scores_of_nothing_found(answers: list[tuple[str | None, str]]) -> None:
    scores = wrangle.Scores.of_decisions(answers, "Yes")
    assert (scores.precision, scores.recall, scores.f1) == (0, 0, 0)


def test_scores_of_values() -> None:
    scores = wrangle.Scores.of_values([("oslo", "oslo"), ("riga", "oslo"), (None, "turku"), ("narva", "narva")])
    assert (scores.precision, scores.recall, scores.accuracy) == (2 / 3, 0.5, 0.5)
    assert scores.f1 == pytest.approx(4 / 7)


# ------------------------------------------------------------------------------------------------ examples to be shown
def test_random_examples_are_of_both_classes_and_follow_from_the_seed() -> None:
    data = decisions(300)
    chosen = choosing.at_random(data, 8, 5)
    assert sorted(map(str, labels(chosen))) == ["No"] * 4 + ["Yes"] * 4
    assert set(chosen) <= set(data.train)
    assert choosing.at_random(data, 8, 5) == chosen != choosing.at_random(data, 8, 6)
    assert len(choosing.at_random(data, 1000, 5)) == len(data.train)


def test_clusters_are_of_likes() -> None:
    kinds = ("blue whale in the sea", "steam locomotive 1847", "quick sorting of lists")
    texts = [f"{kind} {n}" for n in range(8) for kind in kinds]
    for seed in range(3):
        chosen = choosing.by_clusters(texts, 3, seed)
        assert {place % 3 for place in chosen} == {0, 1, 2}
    assert choosing.by_clusters(texts, 3, 0) == choosing.by_clusters(texts, 3, 0)
    assert choosing.by_clusters(["one"] * 5, 3, 0) == [0]
    assert choosing.by_clusters(texts[:2], 3, 0) == [0, 1]
    assert choosing.by_clusters(texts, 0, 0) == []


def test_examples_by_hand(tmp_path: Path) -> None:
    data, wording = decisions(30), wrangle.Wording("schema_matching")
    example = data.train[0]
    file = tmp_path / "shown.jsonl"
    file.write_text(f'{{"text": "A is x. B is y. Same?", "label": "No"}}\n\n{{"id": "{example.id}"}}\n')
    shown = choosing.read_shown(file, data, wording)
    assert shown == [("A is x. B is y. Same?", "No"), (wording.asked(example), example.label)]
    file.write_text('{"id": "99"}')
    with pytest.raises(PolicyError, match="'99' is no labelled example"):
        choosing.read_shown(file, data, wording)
    file.write_text('{"text": "alone"}')
    with pytest.raises(PolicyError, match=r"line 1 of .* should be"):
        choosing.read_shown(file, data, wording)


def test_ways_of_choosing_that_cannot_be_meant() -> None:
    with pytest.raises(PolicyError, match="by 'hand'"):
        wrangle.Shots(how="hand")
    with pytest.raises(PolicyError, match="give both or neither"):
        wrangle.Shots(how="manual")
    with pytest.raises(PolicyError, match="0 at least"):
        wrangle.Shots(-1)


# ---------------------------------------------------------------------------------------------------------- whole jobs
def test_a_row_for_each_example_with_what_transformers_writes(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    data = wrangle.read("imputation", towns(tmp_path / "t.csv", rows=14, known=6), column="city")
    wording = wrangle.Wording("imputation", question=SPOKEN)
    shots, output = wrangle.Shots(3), tmp_path / "out.jsonl"
    outcome = wrangle.run(data, model, tokenizer, wording=wording, shots=shots, output=output)
    shown = [(wording.asked(example), example.label or "") for example in choosing.at_random(data, 3, 0)]
    plain = load_plain(TINY_OPT, dtype=torch.float32)
    for prompt, prediction in zip(wrangle.prompts(data, wording, shown), outcome.predictions, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        made = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, stop_strings=["\n"],
            tokenizer=tokenizer, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert prediction.text == text.split("\n")[0]
        assert prediction.tokens == made.shape[1] - ids.shape[1]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [str(n) for n in range(6, 14)]
    assert [line["answer"] for line in lines] == [prediction.answer for prediction in outcome.predictions]
    assert len({prediction.text for prediction in outcome.predictions}) > 3
    assert outcome.scores is None
    assert "no labels" in str(outcome)


def test_right_answers_are_counted_as_right(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    data = wrangle.read("imputation", towns(tmp_path / "t.csv", rows=9, known=4), column="city")
    wording = wrangle.Wording("imputation", question=SPOKEN)
    first = wrangle.run(data, model, tokenizer, wording=wording, shots=wrangle.Shots(2))
    # what the model says is declared right for all but one
    said = [prediction.answer or "nothing" for prediction in first.predictions]
    told = ["elsewhere", *(answer.upper() for answer in said[1:])]
    labelled = [
        wrangle.Example(example.id, example.rows, example.column, label)
        for example, label in zip(data.test, told, strict=True)
    ]
    known = wrangle.Data(data.name, data.task, data.train, data.valid, labelled)
    second = wrangle.run(known, model, tokenizer, wording=wording, shots=wrangle.Shots(2))
    assert second.scores is not None
    assert first.unreadable == second.unreadable == 0
    assert [prediction.correct for prediction in second.predictions] == [False, True, True, True, True]
    assert second.scores.accuracy == second.scores.f1 == 0.8


def test_nonsense_and_rows_that_are_too_long_are_counted(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    data = decisions(9)
    huge = wrangle.Example("huge", ({"name": "states " * 600}, {"name": "b"}), label="Yes")
    data = wrangle.Data("made", data.task, data.train, data.valid, [*data.test[:3], huge, *data.test[3:]])
    outcome = wrangle.run(data, model, tokenizer, shots=wrangle.Shots(0), output=tmp_path / "out.csv")
    rows = read_csv(tmp_path / "out.csv")
    assert [row["id"] for row in rows] == [example.id for example in data.test]
    assert "the model's context 512" in rows[3]["error"]
    assert (outcome.errors, outcome.unreadable) == (1, len(data.test) - 1)  # it makes speeches, not decisions
    assert outcome.scores is not None
    assert outcome.scores.labelled == len(data.test)
    assert outcome.scores.accuracy == 0
    assert all(prediction.tokens <= 4 for prediction in outcome.predictions)


def test_the_stop_text_stops(model: Any, tokenizer: Any) -> None:
    job = batch.Job(options={"stop": ["e"], "max_new_tokens": 24})
    outcome = wrangle.run(decisions(9), model, tokenizer, shots=wrangle.Shots(0), job=job)
    assert all(prediction.text and "e" not in prediction.text for prediction in outcome.predictions)
    assert max(prediction.tokens for prediction in outcome.predictions) < 24
    line = wrangle.run(decisions(9), model, tokenizer, shots=wrangle.Shots(0))
    assert all("\n" not in prediction.text for prediction in line.predictions)


def test_a_job_goes_on_where_it_was(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    data, output = decisions(40), tmp_path / "out.jsonl"
    first = wrangle.run(data, model, tokenizer, shots=wrangle.Shots(2), output=output)
    written = output.read_text()
    answers = tmp_path / "out.jsonl.answers.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[:10]) + lines[10][:7])  # killed in the middle of a line
    output.unlink()
    second = wrangle.run(data, model, tokenizer, shots=wrangle.Shots(2), output=output)
    assert (first.job.computed, second.job.computed) == (len(data.test), len(data.test) - 10)
    assert output.read_text() == written

    def load() -> Any:
        raise AssertionError("all answers are there")

    named = batch.Job(name=model.config.name_or_path)
    third = wrangle.run(data, load, shots=wrangle.Shots(2), output=output, job=named)
    assert third.job.computed == 0
    assert output.read_text() == written
    with pytest.raises(StoreError, match="is not the one that"):
        wrangle.run(data, model, tokenizer, shots=wrangle.Shots(3), output=output)
    wrangle.run(data, model, tokenizer, shots=wrangle.Shots(3), output=output, overwrite=True)


def test_only_line_feeds_part_the_lines_of_files(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    """Others, such as U+2028, are part of what a model writes and of examples by hand."""
    data, shown = decisions(20), tmp_path / "shown.jsonl"
    shown.write_text('{"text": "Is a\u2028b?", "label": "No"}\n', "utf-8")
    assert choosing.read_shown(shown, data, wrangle.Wording("schema_matching")) == [("Is a\u2028b?", "No")]
    shots = wrangle.Shots(how="manual", file=shown)
    output = tmp_path / "out.jsonl"
    first = wrangle.run(data, model, tokenizer, shots=shots, output=output)
    answers = tmp_path / "out.jsonl.answers.jsonl"
    lines = [{**json.loads(line), "text": "No\u2028\x85"} for line in answers.read_text("utf-8").split("\n") if line]
    answers.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    again = wrangle.run(data, model, tokenizer, shots=shots, output=output)
    assert again.job.computed == 0
    assert [prediction.text for prediction in again.predictions] == ["No\u2028\x85"] * len(first.predictions)


def test_a_model_that_is_loaded_late_is_loaded_once(model: Any, tokenizer: Any) -> None:
    loaded = []

    def load() -> Any:
        loaded.append(model)
        return model, tokenizer

    data, shots = decisions(40), wrangle.Shots(2, "clusters")
    late = wrangle.run(data, load, shots=shots)
    assert loaded == [model]
    assert late.predictions == wrangle.run(data, model, tokenizer, shots=shots).predictions


def test_examples_by_clusters_are_of_what_goes_wrong(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = decisions(60)
    seen: list[str] = []
    real = batch.run

    def spied(asked: Path, *arguments: Any, **options: Any) -> batch.JobReport:
        seen.extend(json.loads(line)["prompt"] for line in asked.read_text().splitlines())
        return real(asked, *arguments, **options)

    monkeypatch.setattr(batch, "run", spied)
    wrangle.run(data, model, tokenizer, shots=wrangle.Shots(3, "clusters"))
    wording = wrangle.Wording(data.task)
    shown = seen[0].split("\n\n")[1:-1]
    of_validation = {f"{wording.asked(example)} {example.label}" for example in data.valid}
    assert len(shown) == 3
    assert set(shown) <= of_validation  # nothing that the tiny model says is a decision, so all of them go wrong
    assert {prompt.split("\n\n")[1] for prompt in seen} == {shown[0]}
    alone = wrangle.Data("made", data.task, data.train, [], data.test)
    with pytest.raises(PolicyError, match="no labelled validation examples"):
        wrangle.run(alone, model, tokenizer, shots=wrangle.Shots(3, "clusters"))


def test_jobs_that_cannot_be_meant(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    data = decisions(20)
    with pytest.raises(PolicyError, match="test split is empty"):
        wrangle.run(wrangle.Data("made", data.task, data.train, [], []), model, tokenizer)
    with pytest.raises(PolicyError, match="no labelled examples to show"):
        wrangle.run(wrangle.Data("made", data.task, [], [], data.test), model, tokenizer)
    with pytest.raises(PolicyError, match="the wording is of imputation"):
        wrangle.run(data, model, tokenizer, wording=wrangle.Wording("imputation"))
    with pytest.raises(PolicyError, match=r"as .jsonl or .csv, not 'out.xlsx'"):
        wrangle.run(data, model, tokenizer, output=tmp_path / "out.xlsx")


# ---------------------------------------------------------------------------------------------------- the command line
def command(*arguments: Any) -> Any:
    given = ["wrangle", "--model", str(TINY_OPT), "--batch-size", "4", *map(str, arguments)]
    return CliRunner().invoke(app, given)


def test_the_command_fills_a_table(tmp_path: Path) -> None:
    table = towns(tmp_path / "t.csv", rows=10, known=7)
    result = command(
        *("--task", "imputation", "--data", table, "--column", "city", "--shots", 2, "--max-new-tokens", 3),
        *("--question", SPOKEN),
        *("-o", tmp_path / "out.csv", "--filled", tmp_path / "filled.csv", "--json", tmp_path / "scores.json"),
    )
    assert result.exit_code == 0, result.output
    assert "imputation t: 3 rows" in result.output
    answers = [row["answer"] for row in read_csv(tmp_path / "out.csv")]
    assert all(answers)
    assert [row["city"] for row in read_csv(tmp_path / "filled.csv")] == [*CITIES, CITIES[0], *answers]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["samples"], scores["f1"]) == (3, None)
    assert scores["tokens_per_s"] > 0


def test_the_command_matches_pairs(tmp_path: Path) -> None:
    left = write_csv(tmp_path / "a.csv", "id,name", *((n, f"Anna {n}") for n in range(6)))
    right = write_csv(tmp_path / "b.csv", "id,name", *((n, f"Annie {n}") for n in range(6)))
    pairs = write_csv(tmp_path / "p.csv", "l,r,label", *((n, m, int(n == m)) for n in range(6) for m in range(6)))
    three = ("--task", "entity_matching", "--left", left, "--right", right, "--pairs", pairs)
    result = command(*three, "--shots", 2, "--max-samples", 5, "--thing", "Person")
    assert result.exit_code == 0, result.output
    assert "entity_matching p: 5 rows" in result.output
    assert isinstance(command(*three[:-2]).exception, PolicyError)
    wrong = command("--task", "error_detection", "--data", left, "--made-errors", 0.2, "--filled", tmp_path / "f.csv")
    assert "only an imputation in a CSV file" in str(wrong.exception)
