import json
import math

import pytest

from shadowlit.errors import DataError
from shadowlit.files import replace_text
from shadowlit.studies.comparison.records import from_json, read_records, to_json
from shadowlit.studies.rows import Row
from tests.studies.comparison.synthetic import trained

RECORDS = [
    Row("Instruct", metrics={"new/score": 0.25}, samples={"new": {0: 0.0, 7: 0.5}}),
    trained(
        "B2I", 2e-3, 1, 0.5, metrics={"loss": 1.5}, samples={"old": {3: 1.0}}, cost={"train_s": 2.0},
        facts={"sigma": 0.02}, line={0.0: 1.0, 0.5: 2},
    ),
    trained("I2I", 1e-4, 0, metrics={"loss": 1.25}),
]  # fmt: skip


def test_written_records_are_read_as_they_were(tmp_path):
    replace_text(tmp_path / "made/records.json", to_json(RECORDS))
    assert read_records(tmp_path / "made/records.json") == RECORDS
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["records.json"]


def test_files_of_earlier_versions_are_read():
    """As a comparison wrote it before its rows were those of a sweep; written again it is the same, bit for bit."""
    text = (
        '[{"arm": "Base", "lr": null, "seed": null, "scale": null, "metrics": {"loss": 2.5}, "samples": {}, "cost": '
        '{}, "facts": {}, "line": {}}, {"arm": "B2B", "lr": 0.002, "seed": 1, "scale": 1.0, "metrics": {"loss": 1.5}, '
        '"samples": {"new": {"0": 1.0}}, "cost": {}, "facts": {}, "line": {}}]\n'
    )
    base, tuned = from_json(text)
    assert (base.trial, base.lr, base.seed) == ("untouched", None, None)
    assert (tuned.trial, tuned.lr, tuned.seed, tuned.scale) == ("B_lr0.002_seed1", 0.002, 1, None)
    assert to_json([base, tuned]) == text


def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read():
    text = to_json([trained("I2I", 1e-4, 0, metrics={"loss": math.inf}, samples={"new": {0: math.nan}})])
    assert json.loads(text)[0]["metrics"] == {"loss": None}
    (found,) = from_json(text)
    assert math.isnan(found.metrics["loss"]) and math.isnan(found.samples["new"][0])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "are not JSON"),
        ('{"arm": "B2I"}', "not a list of objects"),
        ('[{"arm": "Base", "rate": 1}]', "has the fields arm, rate"),
        ('[{"arm": "B3I"}]', "'B3I'; expected one of Base, Instruct, B2B"),
        ('[{"arm": "B2I", "lr": 1e-4, "scale": 1.0}]', "the arm B2I has no seed"),
        ('[{"arm": "Base", "metrics": {"loss": "low"}}]', "not a number"),
        ('[{"arm": "Base", "samples": {"new": {"a": 1}}}]', "not a number"),
        ('[{"arm": "Base", "samples": {"new": 3}}]', "not a number"),
    ],
)
def test_a_broken_file_is_refused_with_the_reason(text, told):
    with pytest.raises(DataError, match=told):
        from_json(text)


def test_no_file_is_told(tmp_path):
    with pytest.raises(DataError, match=r"there is no .*records\.json"):
        read_records(tmp_path / "records.json")
