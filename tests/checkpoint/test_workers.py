"""Parts computed by forked processes: what threads compute, bit for bit, and nothing that outlives a failure."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shadowlit.analysis import sums
from shadowlit.analysis.similarity import compare
from shadowlit.checkpoint import streaming, workers
from shadowlit.checkpoint.folder import CheckpointReader
from shadowlit.checkpoint.workers import by_processes, in_order
from shadowlit.cli.main import main
from shadowlit.errors import CheckpointError, DataError, GraftError, ShadowlitError
from shadowlit.grafting.manifest import read_manifest
from tests.distributed import server_pid
from tests.tiny import save_model, save_pair

ROOT = Path(__file__).parents[2]
ALWAYS = "from shadowlit.checkpoint import workers; workers.WORTH_FORKING_BYTES = 0; workers.num_cores = lambda: 2\n"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


def always_fork(patch, count):
    """Torch is in the tests' process, which alone would prevent it; nothing here computes with it meanwhile."""
    patch.setattr(workers, "may_fork", lambda: True)
    patch.setattr(workers, "WORTH_FORKING_BYTES", 0)
    patch.setattr(workers, "num_cores", lambda: count)


@pytest.fixture
def processes(monkeypatch):
    always_fork(monkeypatch, 2)


def require_no_child():
    """But for the servers of multiprocessing, which other tests of this process may have started."""
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = {int(pid) for path in children for pid in path.read_text().split()} - {server_pid()}
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]
    assert [command for command in commands if "multiprocessing" not in command] == []


def square(item, room):
    room[:] = item % 256
    return os.getpid(), item**2


def by_number(bad):
    """A function that raises what ``bad`` has for an item."""

    def function(item, room):
        if item in bad:
            raise bad[item]
        return item

    return function


@pytest.mark.parametrize("count", [2, 3])
def test_results_come_in_order_each_with_its_room(monkeypatch, count):
    always_fork(monkeypatch, count)
    found = [(pid, result, room.tolist()) for (pid, result), room in in_order(square, range(1000), 5, 1)]
    assert [result for _, result, _ in found] == [i**2 for i in range(1000)]
    assert [room for *_, room in found] == [[i % 256] * 5 for i in range(1000)]
    pids = {pid for pid, *_ in found}
    assert os.getpid() not in pids and len(pids) <= count
    require_no_child()


def test_a_result_larger_than_a_pipe(processes):
    found = [result for result, _ in in_order(lambda item, _: bytes([item]) * 300_000, range(9), 0, 1)]
    assert found == [bytes([item]) * 300_000 for item in range(9)]


@pytest.mark.parametrize("way", ["processes", "threads"])
def test_the_first_error_by_the_order_of_items_is_raised(way, request):
    if way == "processes":
        request.getfixturevalue("processes")
    bad = {7: CheckpointError("tensor 'seven' is bad"), 8: GraftError("eight"), 9: KeyError("nine")}
    taken = []
    with pytest.raises(CheckpointError, match=r"^tensor 'seven' is bad$"):
        taken.extend(result for result, _ in in_order(by_number(bad), range(100), 0, 1))
    assert taken in ([], list(range(7)))
    require_no_child()


def test_an_unforeseen_error_tells_where_it_arose(processes):
    with pytest.raises(KeyError, match="nine") as told:
        list(in_order(by_number({9: KeyError("nine")}), range(100), 0, 1))
    assert "test_workers.py" in told.value.__notes__[0]

    class LocalError(Exception):
        """One that can't be pickled."""

    with pytest.raises(RuntimeError, match=r"(?s)LocalError: three.*test_workers\.py"):
        list(in_order(by_number({3: LocalError("three")}), range(100), 0, 1))


def test_a_killed_process_is_told(processes):
    def function(item, room):
        if item == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    with pytest.raises(ShadowlitError, match=r"was killed by SIGKILL; expected .* free some, and run this again"):
        list(in_order(function, range(100), 0, 1))
    require_no_child()


def test_a_process_that_ends_on_its_own_is_told(processes):
    with pytest.raises(ShadowlitError, match="ended with status 5"):
        list(in_order(lambda item, _: os._exit(5), range(100), 0, 1))
    require_no_child()


def test_an_iterator_that_is_given_up_leaves_no_process(processes):
    found = in_order(square, range(1000), 5, 1)
    next(found)
    before = len(os.listdir("/proc/self/fd"))
    found.close()
    require_no_child()
    assert len(os.listdir("/proc/self/fd")) == before - 4  # a pipe for the tasks, and an end for each one's replies


@pytest.mark.parametrize("after", [0, 1])
def test_threads_where_no_process_can_be_had(processes, monkeypatch, after):
    fork, forked = os.fork, []

    def refuse():
        if len(forked) == after:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        forked.append(None)
        return fork()

    monkeypatch.setattr(os, "fork", refuse)
    before = len(os.listdir("/proc/self/fd"))
    assert {pid for (pid, _), _ in in_order(square, range(50), 5, 1)} == {os.getpid()}
    assert len(forked) == after and len(os.listdir("/proc/self/fd")) == before
    require_no_child()


def test_processes_next_to_torch_and_other_threads():
    """Torch's threads and one of Python exist, and none of them does in the forked processes, which don't need them."""
    torch.ones(300, 300) @ torch.ones(300, 300)
    other = threading.Thread(target=(stop := threading.Event()).wait)
    other.start()
    found = list(by_processes(lambda item: (os.getpid(), item**2), range(200), 3))
    stop.set()
    other.join()
    assert [result for _, result in found] == [item**2 for item in range(200)]
    assert os.getpid() not in {pid for pid, _ in found} and len({pid for pid, _ in found}) <= 3
    assert list(by_processes(lambda item: os.getpid(), range(3), 1)) == [os.getpid()] * 3
    with pytest.raises(DataError, match="bad row"):  # the first of several
        list(by_processes(lambda item: by_number({7: DataError("bad row"), 9: KeyError()})(item, None), range(50), 2))
    require_no_child()


def test_no_fork_where_it_is_not_safe_or_does_not_pay(monkeypatch):
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    monkeypatch.setattr(workers, "num_cores", lambda: 2)
    assert "torch" in sys.modules and not workers.may_fork()
    monkeypatch.delitem(sys.modules, "torch")
    other = threading.Thread(target=(stop := threading.Event()).wait)
    other.start()
    assert not workers.may_fork()
    stop.set()
    other.join()
    monkeypatch.setattr(workers, "may_fork", lambda: True)
    for cores, num_bytes in ((2, workers.WORTH_FORKING_BYTES - 1), (1, 10**12)):
        monkeypatch.setattr(workers, "num_cores", lambda cores=cores: cores)
        assert len(list(in_order(square, range(50), 5, num_bytes))) == 50


def test_signals_are_handled_as_before(processes):
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    list(in_order(square, range(50), 5, 1))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_an_interruption_is_the_parents_affair(processes):
    """Ctrl-C reaches every process of a terminal; one that computes goes on until it is told otherwise."""

    def function(item, room):
        os.kill(os.getpid(), signal.SIGINT)
        return item

    assert [result for result, _ in in_order(function, range(20), 0, 1)] == list(range(20))


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base, _ = save_pair(root, "qwen3", dtype=torch.bfloat16)
    save_model(root / "tuned", "qwen3", near=base, seed=5, distance=0.02, dtype=torch.bfloat16)
    return root


def graft(models, out, *options, tuned="tuned"):
    given = {"base": "base", "tuned": tuned, "instruct": "instruct"}
    return ["graft", *(f"--{name}={models / folder}" for name, folder in given.items()), f"--out={out}", *options]


@pytest.mark.parametrize("options", [["--select=all"], ["--dtype=float32", "--scale=0.3"]])
def test_a_graft_is_the_same_whoever_computes(models, tmp_path, monkeypatch, options):
    """Files and reported sums, byte for byte: by one thread, by two, by two processes, by three."""
    monkeypatch.setattr(streaming, "PART_ELEMENTS", 100)
    monkeypatch.setattr(workers, "num_cores", lambda: 1)
    assert main(graft(models, tmp_path / "one", *options)) == 0
    monkeypatch.undo()
    monkeypatch.setattr(streaming, "PART_ELEMENTS", 100)
    assert main(graft(models, tmp_path / "threads", *options)) == 0
    for count in (2, 3):
        with monkeypatch.context() as patch:
            always_fork(patch, count)
            patch.setattr(workers, "_by_threads", lambda *_: pytest.fail("not by processes"))
            assert main(graft(models, tmp_path / str(count), *options)) == 0
    weights = (tmp_path / "one" / "model.safetensors").read_bytes()
    survival = read_manifest(tmp_path / "one")["survival"]
    for way in ("threads", "2", "3"):
        assert (tmp_path / way / "model.safetensors").read_bytes() == weights
        assert read_manifest(tmp_path / way)["survival"] == survival
    require_no_child()


@pytest.mark.parametrize("num_models", [2, 3])
def test_a_comparison_is_the_same_whoever_computes(models, monkeypatch, num_models):
    monkeypatch.setattr(sums, "_TASK_ELEMENTS", 3000)
    readers = [CheckpointReader(models / name) for name in ("base", "instruct", "tuned")[:num_models]]
    by_threads = compare(readers).to_json()
    for count in (2, 3):
        with monkeypatch.context() as patch:
            always_fork(patch, count)
            patch.setattr(workers, "_by_threads", lambda *_: pytest.fail("not by processes"))
            assert compare(readers).to_json() == by_threads
    require_no_child()


def test_bad_values_are_told_as_by_threads(models, tmp_path, processes, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    state = load_file(models / "tuned" / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    assert main(graft(models, tmp_path / "to" / "out", tuned=broken)) == 1
    assert "error: Tensor 'model.layers.1.mlp.up_proj.weight' has 1 of" in capsys.readouterr().err
    assert os.listdir(tmp_path / "to") == []
    with pytest.raises(CheckpointError, match=r"up_proj.weight' of \S*broken holds NaN or infinities"):
        compare([CheckpointReader(models / "base"), CheckpointReader(broken)])
    require_no_child()


def test_a_file_that_is_cut_meanwhile(models, tmp_path, processes):
    folder = tmp_path / "cut"
    folder.mkdir()
    file = folder / "model.safetensors"
    file.write_bytes((models / "tuned" / "model.safetensors").read_bytes())
    readers = [CheckpointReader(models / "base"), CheckpointReader(folder)]
    readers[1].read("model.norm.weight")  # which opens it
    os.truncate(file, 3000)
    with pytest.raises(CheckpointError, match=r"cut/model\.safetensors is not a valid safetensors file: it ends"):
        compare(readers)
    require_no_child()


def test_a_killed_process_leaves_nothing_of_a_graft(models, tmp_path, processes, monkeypatch, capsys):
    monkeypatch.setattr(streaming, "PART_ELEMENTS", 100)
    preadv, parent = os.preadv, os.getpid()

    def die(*arguments):
        if os.getpid() != parent and arguments[2] > 20_000:
            os.kill(os.getpid(), signal.SIGKILL)
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", die)
    assert main(graft(models, tmp_path / "to" / "out")) == 1
    assert "was killed by SIGKILL" in capsys.readouterr().err
    assert os.listdir(tmp_path / "to") == []
    require_no_child()


def start(models, target, folder, code=""):
    """The real command, which forks; in its output are the ids of its processes, once they compute."""
    told = (
        # Tests that run in the background ignore SIGINT, and so would the command.
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"{ALWAYS}import os, sys, time\nfork = os.fork\n"
        "def told():\n    pid = fork()\n    pid and print(pid, flush=True)\n    return pid\n"
        f"os.fork = told\n{code}"
    )
    (folder / "sitecustomize.py").write_text(told)
    paths = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "shadowlit", *graft(models, target)], env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


WAITS = """
from shadowlit.checkpoint.folder import CheckpointWriter
def wait(self, name, tensor):
    next(iter(tensor.parts))
    time.sleep(0.5)  # the others have done what they can, and wait
    print("writing", flush=True)
    time.sleep(60)
CheckpointWriter.add = wait
"""


@pytest.mark.parametrize("to", ["parent", "group"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_command_takes_its_processes_with_it(models, tmp_path, number, to):
    """Its output ends when the last process that holds it has gone."""
    process = start(models, tmp_path / "to" / "out", tmp_path, WAITS)
    while (line := process.stdout.readline()) != "writing\n":
        assert line, process.communicate()
    (os.kill if to == "parent" else os.killpg)(process.pid, number)
    _, err = process.communicate(timeout=30)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert [name[:13] for name in os.listdir(tmp_path / "to")] == [".out.partial-"]
    else:
        assert process.returncode == 128 + number and err == ""
        assert os.listdir(tmp_path / "to") == []


def test_the_real_command_forks_and_a_full_disk_is_told(models, tmp_path):
    done = start(models, tmp_path / "out", tmp_path)
    shown, err = done.communicate(timeout=60)
    assert done.returncode == 0, err
    assert len([line for line in shown.splitlines() if line.isdecimal()]) == 2
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (140_000, 140_000))\n"
    full = start(models, tmp_path / "to" / "out", tmp_path, limit)
    _, err = full.communicate(timeout=60)
    assert full.returncode == 1 and "File too large" in err and "Free some disk space" in err
    assert os.listdir(tmp_path / "to") == []
