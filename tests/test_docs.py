"""The documents: links lead somewhere, what is cited exists, commands and YAML are accepted, and the tutorials run.

``make docs`` builds the site. The blocks of docs/how-to/extend.md and of the README are run by tests/test_extending.py,
that of docs/reference/optimizers.md by tests/training/test_groups.py.
"""

import ast
import inspect
import re
import shutil
import unicodedata
from importlib import import_module

import pytest
import yaml
from jsonargparse import auto_parser, capture_parser

import shadowlit
from shadowlit.cli import functions
from shadowlit.cli.main import COMMANDS, LIGHTNING, main
from shadowlit.cli.sweep import run as sweep
from shadowlit.demo import DATA, PAIR
from shadowlit.lightning_cli import ShadowCLI
from shadowlit.lightning_cli import main as lightning
from tests.documents import BLOCK, DOCUMENTS, ROOT, blocks, commands, name_of

TUTORIALS = [ROOT / "docs/tutorials" / f"{name}.md" for name in ("first-graft", "reading-a-run", "sweep")]
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"def (test_\w+)\(", path.read_text(encoding="utf-8"))
}

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")  # sys.argv is pytest's own
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)


# --- what is cited ---


def prose(path):
    return BLOCK.sub("", path.read_text(encoding="utf-8"))


def slugs(path):
    """The anchors of a document's headings, as Markdown's table of contents makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    plain = (unicodedata.normalize("NFKD", re.sub(r"[`*]", "", title)).encode("ascii", "ignore") for title in titles)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title.decode()).strip().lower()) for title in plain}


@every_document
def test_what_is_cited_exists(path):
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"`(test_\w+)`", text)) - TESTS == set()
    files = re.findall(r"`((?:configs|tests|shadowlit|docs)/[\w./-]*)`", text)
    assert [name for name in files if not (ROOT / name).exists()] == []


@every_document
def test_every_link_leads_to_a_file_and_a_heading(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"\w+:", link):
            continue
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.is_file(), link
        assert not anchor or anchor in slugs(found), link


def test_every_test_is_cited_with_its_file():
    """In the hazards a file's name stands before its tests."""
    text = (ROOT / "docs/explanation/hazards.md").read_text(encoding="utf-8")
    found = re.findall(r"`((?:\w+/)?test_\w+\.py)`:((?: `test_\w+`,?)+)", text)
    assert len(found) > 20
    for file, names in found:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(test_\w+)`", names):
            assert f"def {name}(" in source, f"{name} is not in {file}"


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"[\w/.-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} - {*listed} == set()
    assert len(listed) == len({*listed})


@pytest.mark.parametrize("package", ["shadowlit", "shadowlit.analysis", "shadowlit.studies.sweep"])
def test_every_public_name_is_in_the_reference(package):
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference/api").glob("*.md")]
    documented = {line.split(".")[-1] for page in pages for line in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
    assert {*import_module(package).__all__} - documented == set()
    for path in {line for page in pages for line in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}:
        module, _, name = path.rpartition(".")
        assert inspect.getdoc(getattr(import_module(module), name)), path


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


# --- commands, YAML and Python ---


class AcceptedError(Exception):
    """The parser of a command accepts its words."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the files that commands name: those of the repository, and configurations of the user's own."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("configs", "experiments", "shadowlit"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("my.yaml", "run.yaml", "sft.yaml", "method.yaml"):
        (folder / name).write_text((ROOT / "configs/qwen3_0.6b_lora.yaml").read_text(encoding="utf-8"))
    for path in DOCUMENTS:
        for block in blocks(path, "yaml"):
            if block.title:
                (folder / block.title).write_text(block.text, encoding="utf-8")
    return folder


def pages_with_commands():
    """The first pages that a user reads and those without commands of LightningCLI always, the rest as slow tests."""
    for path in DOCUMENTS:
        names = {words[0] for block in blocks(path, "bash") for words in commands(block)}
        first = path.name == "README.md" or path.parent.name == "tutorials"
        heavy = not first and names & {name for name, (_, module) in COMMANDS.items() if module == LIGHTNING}
        if names:
            yield pytest.param(path, marks=[pytest.mark.slow] if heavy else [], id=name_of(path))


@pytest.mark.parametrize("path", [*pages_with_commands()])
def test_every_command_is_accepted(path, workplace, monkeypatch):
    """By the parser that the user meets, up to where the command would begin to work."""

    def accept(*_):
        raise AcceptedError

    def parse(components, args, parser_class, **_):
        auto_parser(components, as_positional=False, parser_class=parser_class).parse_args(args)
        accept()

    monkeypatch.chdir(workplace)
    monkeypatch.setattr(functions, "auto_cli", parse)
    monkeypatch.setattr(ShadowCLI, "before_instantiate_classes", accept)
    monkeypatch.setattr("shadowlit.demo.__main__.main", accept)
    for block in blocks(path, "bash"):
        for words in commands(block):
            with pytest.raises(AcceptedError):
                pytest.fail(f"{words} returned {main(words)}")


def keys_of(value, prefix=""):
    """Dotted keys of a mapping, each before those below it."""
    for name, below in value.items() if isinstance(value, dict) else ():
        yield f"{prefix}{name}"
        yield from keys_of(below, f"{prefix}{name}.")


def test_every_key_of_a_yaml_block_exists():
    parser = capture_parser(lightning, ["fit"])
    (fit,) = next(a._name_parser_map for a in parser._actions if hasattr(a, "_name_parser_map")).values()
    known = {action.dest for action in fit._actions} | {"model.factor"}  # that of the module in docs/how-to/extend.md
    parents = {key.rpartition(".")[0] for key in known} - {""}
    seen = 0
    for path in DOCUMENTS:
        for block in blocks(path, "yaml"):
            content = yaml.safe_load(block.text)
            if "task" in content:  # of lm-evaluation-harness
                continue
            if "fit" in content:
                assert content.keys() <= inspect.signature(sweep).parameters.keys()
                content = {key: 0 for key in [*content.get("grid", {}), *content.get("overrides", {})]}
            for key in keys_of(content):
                above = {key[:at] for at in [*(m.start() for m in re.finditer(r"\.", key)), len(key)]}
                assert key in parents or above & known, f"{key} in {path.name}"
                seen += 1
    assert seen > 100


@every_document
def test_every_python_block_compiles_and_its_imports_exist(path):
    for block in blocks(path, "python"):
        for node in ast.walk(ast.parse(block.text, path.name)):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == shadowlit.__name__:
                assert [a.name for a in node.names if not hasattr(import_module(str(node.module)), a.name)] == []


# --- the tutorials, one after the other in one folder ---

SHORT = [
    "--trainer.max_steps=2", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1",
    "--evaluation.evaluators.task.init_args.limit=4",
]  # fmt: skip


@pytest.mark.parametrize("is_whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["short", "whole"])
def test_the_tutorials_run(is_whole, tmp_path, monkeypatch, capsys):
    """As printed; the short form takes two steps and only plans the sweep."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PAIR, "pair")
    shutil.copytree(DATA, "data")
    scope: dict = {}
    for path in TUTORIALS:
        for block in blocks(path, "bash", "yaml", "python"):
            if block.language == "yaml":
                (tmp_path / block.title).write_text(block.text, encoding="utf-8")
            elif block.language == "bash":
                for words in commands(block):
                    run_of_tutorial(words, is_whole)
            elif is_whole or "sweep" not in block.text:
                exec(compile(block.text, path.name, "exec"), scope)
    shown = capsys.readouterr().out
    assert (tmp_path / "runs/first/export/model/shadowlit.json").is_file()
    assert (tmp_path / "figures/loss.pdf").is_file() and (tmp_path / "figures/gains.png").is_file()
    assert scope["run"].evaluators == ["task"] and scope["run"].sets == ["new", "old"]
    if is_whole:
        assert "spade" in shown and scope["run"].gain("new/loss")[-1][1] > 0
        assert (tmp_path / "runs/sweeps/lr-first/REPORT.md").is_file()
    else:
        assert "8 trials" in shown


def run_of_tutorial(words, is_whole):
    if words[0] == "demo" or (words[:2] == ["sweep", "report"] and not is_whole):
        return  # tests/demo runs the demonstration
    if words[0] == "fit":
        words = [*words, "--trainer.enable_progress_bar=false", *([] if is_whole else SHORT)]
    if words[0] == "sweep" and not is_whole:
        words = [*words, *(["--dry-run"] if "--dry-run" not in words else [])]
    assert main(words) == 0
