import json
import math

import pytest

from shadowlit.errors import DataError
from shadowlit.studies.comparison.records import Record, from_json, read_records, to_json, write_records

RECORDS = [
    Record("Instruct", metrics={"new/score": 0.25}, samples={"new": {0: 0.0, 7: 0.5}}),
    Record(
        "B2I", 2e-3, 1, 0.5, {"loss": 1.5}, {"old": {3: 1.0}}, {"train_s": 2.0}, {"sigma": 0.02}, {0.0: 1.0, 0.5: 2}
    ),
]


def test_written_records_are_read_as_they_were(tmp_path):
    write_records(RECORDS, tmp_path / "made/records.json")
    assert read_records(tmp_path / "made/records.json") == RECORDS
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["records.json"]


def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read():
    text = to_json([Record("I2I", 1e-4, 0, 1.0, {"loss": math.inf}, {"new": {0: math.nan}})])
    assert json.loads(text)[0]["metrics"] == {"loss": None}
    (found,) = from_json(text)
    assert math.isnan(found.metrics["loss"]) and math.isnan(found.samples["new"][0])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "are no JSON"),
        ('{"arm": "B2I"}', "no list of objects"),
        ('[{"arm": "Base", "rate": 1}]', "has the fields arm, rate"),
        ('[{"arm": "B3I"}]', "'B3I'; expected one of Base, Instruct, B2B"),
        ('[{"arm": "B2I", "lr": 1e-4, "scale": 1.0}]', "the arm B2I has no seed"),
        ('[{"arm": "Base", "metrics": {"loss": "low"}}]', "no number"),
        ('[{"arm": "Base", "samples": {"new": {"a": 1}}}]', "no number"),
        ('[{"arm": "Base", "samples": {"new": 3}}]', "no number"),
    ],
)
def test_a_broken_file_is_refused_with_the_reason(text, told):
    with pytest.raises(DataError, match=told):
        from_json(text)


def test_no_file_is_told(tmp_path):
    with pytest.raises(DataError, match=r"there is no .*records\.json"):
        read_records(tmp_path / "records.json")
