"""The notebooks: no output in git, no logic of their own, and they run from the embedded pair."""

import ast
import base64
import json
import os
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from shadowlit.demo import runs
from tests.distributed import Forked
from tests.studies.sweep.test_notebook import small_sweep

HOME = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(HOME.glob("*.ipynb"))
# A cell calls functions of the package; whatever else it did would be tested by nothing.
LOGIC = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.If, ast.IfExp, ast.Try,
    ast.With, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.BinOp, ast.Compare, ast.BoolOp,
)  # fmt: skip
# Less than the defaults: what is computed is the same, and less often.
FEWER = {
    "first_graft": {"steps": 10},
    "delta_similarity": {"ranks": [2, 16], "densities": [0.1, 1.0], "layers": [0, 3]},
    "reading_a_run": {"rows": 1},
    "reading_a_sweep": {},
}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param


def read(path):
    found = nbformat.read(path, as_version=4)
    nbformat.validate(found)
    return found


def code_cells(found):
    return [cell for cell in found.cells if cell.cell_type == "code"]


def parameter_cells(found):
    return [cell for cell in code_cells(found) if "parameters" in cell.metadata.get("tags", [])]


def with_parameters(found, values):
    """As papermill does it: a cell behind the parameters, with the values to be used instead."""
    place = found.cells.index(parameter_cells(found)[0])
    source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    found.cells.insert(place + 1, nbformat.v4.new_code_cell(source))
    return found


def run_cells(path):
    """Run a notebook's cells in this process, and write it with what they display."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.core.pylabtools import select_figure_formats

    os.chdir(path.parent)
    shell = InteractiveShell.instance()
    select_figure_formats(shell, {"png"})
    found = nbformat.read(path, as_version=4)
    for cell in code_cells(found):
        result = shell.run_cell(cell.source)
        result.raise_error()
        shown, _ = shell.display_formatter.format(result.result)
        data = {kind: base64.b64encode(value).decode() if isinstance(value, bytes) else value
                for kind, value in shown.items()}  # fmt: skip
        cell.outputs = [nbformat.v4.new_output("display_data", data)]
    nbformat.write(found, path)
    return 0


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == ["delta_similarity", "first_graft", "reading_a_run", "reading_a_sweep"]


def test_stripped(notebook):
    found = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in found["cells"]:
        assert not cell.get("outputs"), f"{notebook.name} has outputs: run nbstripout on it"
        assert cell.get("execution_count") is None, f"{notebook.name} has execution counts: run nbstripout on it"
    assert found["metadata"]["kernelspec"]["name"] == "python3"


def test_one_cell_of_plain_parameters(notebook):
    (cell,) = parameter_cells(read(notebook))
    for line in ast.parse(cell.source).body:
        assert isinstance(line, ast.Assign)
        ast.literal_eval(line.value)
    for line in cell.source.splitlines():
        assert "  # " in line, f"{line!r} in {notebook.name} has no comment that says what it is"


def test_no_logic(notebook):
    for cell in code_cells(read(notebook)):
        odd = [type(node).__name__ for node in ast.walk(ast.parse(cell.source)) if isinstance(node, LOGIC)]
        assert not odd, f"{notebook.name} holds {', '.join(odd)}, which belong into the package:\n{cell.source}"


def test_every_figure_is_explained(notebook):
    """Text before the first figure of every section; formulas in it where something is measured."""
    cells = read(notebook).cells
    for before, cell in pairwise(cells):
        if cell.cell_type == "code" and "save_figure(" in cell.source and before.cell_type == "markdown":
            assert len(before.source.split()) > 15, before.source


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forked", "kernel"])
def test_runs_from_the_embedded_pair(notebook, kernel, tmp_path, monkeypatch):
    if notebook.stem == "delta_similarity":  # its six runs, shorter and made where everything is imported already
        monkeypatch.setattr(runs, "_STEPS", 4)
        runs.given_or_made(*[None] * 7, tmp_path)
    values = {"figures": str(tmp_path / "figures"), **FEWER[notebook.stem]}
    values |= {"sweep": str(small_sweep(tmp_path / "sweep"))} if "sweep" in notebook.stem else {"work": str(tmp_path)}
    found = with_parameters(read(notebook), values)
    if kernel:
        resources = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(found, timeout=300, kernel_name="python3", resources=resources).execute()
    else:
        nbformat.write(found, tmp_path / "made.ipynb")
        done = Forked(run_cells, tmp_path / "made.ipynb", out=tmp_path / "out.txt")
        assert done.wait(300) == 0, (tmp_path / "out.txt").read_text()
        found = nbformat.read(tmp_path / "made.ipynb", as_version=4)
    drawn = sorted(path.stem for path in (tmp_path / "figures").glob("*.png"))
    sources = [cell.source for cell in code_cells(found) if "save_figure(" in cell.source]
    assert drawn and len(drawn) == sum(source.count("save_figure(") for source in sources)
    assert drawn == sorted(path.stem for path in (tmp_path / "figures").glob("*.pdf"))
    for cell in code_cells(found):
        outputs = [output for output in cell.outputs if output.output_type in ("display_data", "execute_result")]
        assert "save_figure(" not in cell.source or any("image/png" in output.data for output in outputs), cell.source
    for path in (tmp_path / "figures").glob("*.pdf"):
        content = path.read_bytes()
        assert b"/FontFile2" in content and b"/Type3" not in content  # embedded TrueType
