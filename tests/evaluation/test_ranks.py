"""Two processes with unequal shards find what one finds: whole replicas and FSDP2's shards."""

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from shadowlit.evaluation.generated import Generation
from shadowlit.evaluation.multiple_choice import MultipleChoice
from shadowlit.evaluation.sums import SampleSums
from shadowlit.training.parallel import parallelize
from tests.distributed import run_ranks
from tests.evaluation.contexts import DEMO_PAIR, demo_rows, evaluate, make_context, write_rows

LONG = "word " * 600  # more than the 512 tokens of the demonstration's models


def build(kind, data):
    if kind == "choice":
        return MultipleChoice(data, batch_size=2)
    sampling = {"temperature": 1.5, "top_p": 0.9, "seed": 3} if kind == "sampled" else {}
    return Generation(data, answer="answer", match="contains", max_new_tokens=9, batch_size=2, **sampling)


def rows_of(kind, count):
    rows = demo_rows("old", count)
    if kind == "choice":
        others = ["cat", "dog", "7", "8", "Oslo"]
        rows = [
            {**row, "choices": [row["answer"], *[o for o in others if o != row["answer"]][: 1 + i % 3]], "answer": 0}
            for i, row in enumerate(rows)
        ]
    return [{key: row[key] for key in ("question", "choices", "answer") if key in row} for row in rows]


def work(files, sharded):
    """Evaluate every file; return metrics and samples, by name."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    context = make_context(DEMO_PAIR, rank=rank, world_size=world_size)
    if sharded:
        parallelize(context.model, init_device_mesh("cpu", (world_size,)))
        assert all(isinstance(p, DTensor) for p in context.model.parameters())
    found = {}
    for name, (kind, data) in files.items():
        result = evaluate(build(kind, data), context)
        found[name] = (result.metrics, result.samples)
    return found


def files_of(tmp_path):
    """Seven rows of each kind with one too long, a single row, and a batch whose only row on a rank is too long."""
    files = {}
    for kind in ("choice", "greedy", "sampled"):
        rows = rows_of(kind, 7)
        rows[2] = {**rows[2], "question": LONG}
        files[kind] = (kind, write_rows(tmp_path / f"{kind}.jsonl", rows))
        files[f"{kind}, one row"] = (kind, write_rows(tmp_path / f"{kind}1.jsonl", rows[:1]))
        files[f"{kind}, too long"] = (kind, write_rows(tmp_path / f"{kind}2.jsonl", [rows[2], rows[2]]))
    return files


@pytest.mark.filterwarnings("ignore:.*and score 0")
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_are_one(tmp_path, sharded):
    """Metrics of all rows on both ranks; samples of each row on one of them, the same as one process finds."""
    files = files_of(tmp_path)
    expected = {}
    for name, (kind, data) in files.items():
        result = evaluate(build(kind, data), make_context(DEMO_PAIR))
        expected[name] = (result.metrics, result.samples)
    ranks = run_ranks(work, 2, files, sharded)
    for name, (metrics, samples) in expected.items():
        found = sorted((sample for rank in ranks for sample in rank[name][1]), key=lambda sample: sample["index"])
        assert [sample["index"] for sample in found] == [sample["index"] for sample in samples]
        for sample, other in zip(found, samples, strict=True):
            assert sample.pop("loglikelihoods", []) == pytest.approx(other.pop("loglikelihoods", []), abs=1e-4)
            assert sample == other
        for rank in ranks:
            assert rank[name][0] == pytest.approx(metrics, rel=1e-5, nan_ok=True)
    assert [len(rank["choice"][1]) for rank in ranks] == [4, 3]
    assert expected["choice"][0]["num_samples"] == 7 and expected["choice"][0]["num_too_long"] == 1
    assert 0 < expected["greedy"][0]["score"] < 1 and expected["greedy"][0]["num_unfinished"] > 0


def add(rows):
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sums = SampleSums("a", "b")
    sums.update(rows[rank::world_size])
    sums.update([])
    return sums.compute()


def test_sums_over_ranks():
    """Three samples on two ranks, and one on none."""
    rows = [{"a": 0.1}, {"a": 0.2, "b": 1}, {"a": 1e8}]
    for rank in run_ranks(add, 2, rows):
        assert rank == {"a": 1e8 + 0.1 + 0.2, "b": 1.0, "num_samples": 3.0}
    for rank in run_ranks(add, 2, rows[:1]):
        assert rank == {"a": 0.1, "b": 0.0, "num_samples": 1.0}
