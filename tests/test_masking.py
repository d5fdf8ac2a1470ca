"""Secrets are masked in every file and message; what only sounds like one is not."""

import ast
import json
import re

import pytest
import yaml
from jsonargparse.typing import SecretStr
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from shadowlit.cli.main import main
from shadowlit.errors import ShadowlitError
from shadowlit.grafting.manifest import read_manifest, write_json
from shadowlit.lightning_cli import check
from shadowlit.masking import MASK, is_secret, mask_text, masked, masks_in
from shadowlit.runs import SaveConfig
from shadowlit.studies.sweep.definition import Definition
from shadowlit.studies.sweep.storage import open_storage
from shadowlit.studies.trials.folder import changes
from shadowlit.studies.trials.recipe import Recipe
from tests.cli.test_errors import DEMO, configuration

SECRETS = """api_key apikey apiKey WANDB_API_KEY x.y.token hf_token HF_TOKEN accessToken password db_password passwd
    secret client_secret private_key aws_secret_access_key Authorization credentials api-key deploy_token private_token
    slack_token bot_token write_token jwt_token tokens passwords db_pass ssh_key user_token PERSONAL_ACCESS_TOKEN
    authToken x-api-key api_keys secrets basic_auth session_cookie apitoken botToken"""
OTHERS = """pad_token_id pad_token eos_token image_token max_tokens num_tokens max_new_tokens supervised_tokens
    nats_per_token token_id special_tokens author_id passes first_pass monkey tokens_per_s image_token_id token_ids
    tokenizer key keys cache_key sort_key password_file secretary author keyboard every_n_tokens"""


def test_the_names_of_secrets():
    assert [name for name in SECRETS.split() if not is_secret(name)] == []
    assert [name for name in OTHERS.split() if is_secret(name)] == []


@pytest.mark.parametrize(("text", "expected"), [
    ("storage is 'user:pw@host/name'; expected", "storage is 'user:*@host/name'; expected"),
    ("postgresql://u:p@ss:word@host/db", "postgresql://u:*@host/db"),
    ("https://ghp_x@github.com/x?token=abc&y=1", "https://*@github.com/x?token=*&y=1"),
    ("{'api_key': 'a\\'bc', 'x': 1}", "{'api_key': *, 'x': 1}"),
    ("init_args: {api_key: abc, project: p}", "init_args: {api_key: *, project: p}"),
    ("--a.api_key=abc --b=1 --password abc --c", "--a.api_key=* --b=1 --password * --c"),
    ("Authorization: Bearer abc", "Authorization: *"),
    ("host=x password=pw dbname=y", "host=x password=* dbname=y"),
    ("https://a.blob/c?sv=1&sig=abc%3D&x=2", "https://a.blob/c?sv=1&sig=*&x=2"),
    ("see https://s3/x?X-Amz-Date=1&X-Amz-Signature=ab12&key=k&max_tokens=7", "see https://s3/x?X-Amz-Date=1&X-Amz-"
     "Signature=*&key=*&max_tokens=7"),
    ("postgresql://u:a/b@h and x", "postgresql://u:*@h and x"),
    ("the header Bearer a1b2c3 is wrong", "the header Bearer * is wrong"),
    ("init_args.api_key is ['abc']; expected str", "init_args.api_key is *; expected str"),
    ("{'api_key': ['abc', 'd'], 'x': [1]} password=b'abc'", "{'api_key': *, 'x': [1]} password=*"),
    ("tokens=abc max_tokens=7, tokens: 512, slack_token: x", "tokens=* max_tokens=7, tokens: 512, slack_token: *"),
    ("credentials: {'user': {'a': 'b'}, 'c': 'd'}, e: f", "credentials: *, e: f"),
    ("a.password is wrong; expected a word", "a.password is wrong; expected a word"),
    ("the token: <pad> is unknown, pad_token: x, api_key=None", "the token: <pad> is unknown, pad_token: x, "
     "api_key=None"),
    ("12:30 mail me@x.org, https://host:8080/@me, org/name@main:train", "12:30 mail me@x.org, "
     "https://host:8080/@me, org/name@main:train"),
])  # fmt: skip
def test_what_is_masked_in_a_text(text, expected):
    found = mask_text(text)
    assert found == expected.replace("*", MASK) and mask_text(found) == found
    assert str(ShadowlitError(text)) == found


CONFIG = {
    "logger": [{"class_path": "W", "init_args": {"api_key": "abc", "password": 12345, "token": True, "url": "m://u:p@h/"}}],
    "as_text": '{"class_path": "W", "init_args": {"api_key": "abc"}}',
    "credentials": {"user": "me", "keys": ["a", ""]},
    "pad_token": "<pad>",
    "tokens": 5,
    "counts": {"tokens": [5, 6], "key": 3},
    "transforms": [{"name": "dare", "value": 0.5}],
    "system": "The token: x. Ask me:x@home for the password: no.",
    "lr": 1e-3,
    "max_tokens": 7,
    "token": None,
}  # fmt: skip


def test_what_is_masked_in_a_configuration():
    """And nothing else: what reproduces the numbers stays."""
    expected = {
        **CONFIG,
        "logger": [{"class_path": "W", "init_args": {"api_key": MASK, "password": MASK, "token": True,
                                                     "url": f"m://u:{MASK}@h/"}}],
        "as_text": f'{{"class_path": "W", "init_args": {{"api_key": {MASK}}}}}',
        "credentials": {"user": MASK, "keys": [MASK, ""]},
    }  # fmt: skip
    assert masked(CONFIG) == expected and masked(expected) == expected
    assert masks_in(masked(CONFIG))[:2] == ["logger[0].init_args.api_key", "logger[0].init_args.password"]
    assert masks_in(CONFIG) == []


@pytest.mark.parametrize(("value", "expected"), [
    ({"name": "api_key", "value": "abc"}, {"name": "api_key", "value": MASK}),
    ([{"key": "Authorization", "value": 7}], [{"key": "Authorization", "value": MASK}]),
    (["run", "--token", "abc", "--pad_token", "x"], ["run", "--token", MASK, "--pad_token", "x"]),
    ("Authorization: Bearer abc", f"Authorization: Bearer {MASK}"),
    ({"pin_password": 1.5, "secrets": (b"x", 3)}, {"pin_password": MASK, "secrets": (MASK, MASK)}),
    ({"tokens": ["abc"], "slack_token": "x"}, {"tokens": [MASK], "slack_token": MASK}),
])  # fmt: skip
def test_what_else_is_masked(value, expected):
    assert masked(value) == expected and masked(expected) == expected


def keys(value):
    if isinstance(value, dict):
        return {*map(str, value), *(key for each in value.values() for key in keys(each))}
    return {key for each in value for key in keys(each)} if isinstance(value, list) else set()


def test_no_key_of_our_own_is_taken_for_a_secret():
    """Of all configurations, commands, models' files and columns of metrics in the repository."""
    root = DEMO.parents[1]
    found = set()
    for file in [file for name in ("configs", "experiments", "shadowlit") for file in (root / name).rglob("*.yaml")]:
        for document in yaml.safe_load_all(re.sub(r"^\s*\$.*$", "", file.read_text(), flags=re.M)):
            found |= keys(document)
    for file in (root / "shadowlit/demo/pair").rglob("*.json"):
        found |= keys(json.loads(file.read_text())) if "tokenizer.json" not in file.name else set()
    for module in (root / "shadowlit").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(module.read_text())))
        found |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        found |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
                  and node.value.replace("/", "_").isidentifier()}  # fmt: skip
    found -= {"secret", "token", "tokens"}  # of masking.py, and words of texts
    assert len(found) > 500 and [name for name in sorted(found) if is_secret(name.rpartition("/")[2])] == []


def test_manifests_are_masked(tmp_path):
    write_json(tmp_path / "shadowlit.json", {"config": CONFIG})
    assert read_manifest(tmp_path)["config"] == masked(CONFIG)


class Service(CSVLogger):
    def __init__(self, api_key: str, options: dict, pin: SecretStr) -> None:
        super().__init__(".")


LOGGER = {
    "class_path": "tests.test_masking.Service",
    "init_args": {"api_key": "abc", "options": {"password": 123, "pad_token": "p"}, "pin": "p1n"},
}


def test_the_saved_configuration_is_masked_and_refused_when_it_is_given_back(tmp_path):
    """Of a real parser; the trainer's logger, a class in a union of classes, holds the secrets."""
    from shadowlit import lightning_cli

    kept = []

    class Keeping(lightning_cli._Parsing):
        def instantiate_classes(self):
            kept.append(SaveConfig(self._parser(self.subcommand), self.config[self.subcommand]))

    lightning_cli._of(Keeping, ["fit", "--config", configuration(tmp_path, "trainer.logger", LOGGER)])
    (callback,) = kept
    callback.setup(Trainer(logger=CSVLogger(tmp_path / "run", "", ""), enable_checkpointing=False), None, "fit")
    text = (tmp_path / "run/config.yaml").read_text()
    saved = yaml.safe_load(text)
    assert not any(secret in text for secret in ("abc", "123", "p1n")) and saved["model"]["lr"] == 2e-3
    assert saved["trainer"]["logger"]["init_args"] == {
        "api_key": MASK,
        "options": {"password": MASK, "pad_token": "p"},
        "pin": MASK,  # by its type
    }
    with pytest.raises(ShadowlitError, match=r"^trainer.logger.init_args.api_key, .*password, .*\.pin is \*+, wh"):
        check(["fit", "--config", str(tmp_path / "run/config.yaml")])


def test_studies_write_no_secrets(tmp_path):
    """The same secret is given again at every start: a study of an earlier version, or with another one, goes on."""
    overrides = {"trainer.logger": LOGGER, "x.api_key": "abc"}
    definition = Definition("s", str(DEMO), overrides, grid={"model.lr": [1e-3]})
    written = definition.to_json() + json.dumps(definition.identity())
    assert "abc" not in written and "123" not in written and '"pad_token": "p"' in written
    identity = Recipe(DEMO, overrides).identity()
    assert changes({**identity, "overrides": overrides}, identity) == ""
    arguments = definition.arguments(definition.planned()[0], tmp_path)
    assert "--x.api_key=abc" in arguments  # what runs has it


@pytest.mark.parametrize("address", ["me:S3CRET@host/db", "postgresql:/me:S3CRET@host/db", "x://me:S3CRET@host:port/db",
                                     "host=h password=S3CRET", "nosuch://h/db?password=S3CRET"])  # fmt: skip
def test_no_password_of_a_storage_is_shown(tmp_path, address):
    with pytest.raises(ShadowlitError, match="storage") as error:
        open_storage(address, tmp_path)
    assert "S3CRET" not in str(error.value)


@pytest.mark.parametrize("wrong", ["--trainer.logger.init_args.api_kye=S3CRET", "--trainer.logger={'class_path': "
                                   "'Nope', 'init_args': {'api_key': 'S3CRET'}}"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
def test_no_error_of_the_command_line_shows_a_secret(tmp_path, capsys, wrong):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", configuration(tmp_path, "trainer.logger", LOGGER), wrong])
    shown = capsys.readouterr().err
    assert "trainer.logger" in shown and "S3CRET" not in shown
