"""Token ids and loss masks next to TRL's and LLaMA-Factory's, row by row, over sets that people train on.

    python benchmarks/data_peers.py --data FOLDER --instruct FOLDER --trl ENV/bin/python --llamafactory ENV/bin/python
                                    [--templates FOLDER] [--only SET ...] [--out FILE] [--keep FOLDER]

Each set is read by ``ShadowData``, by TRL's ``SFTTrainer``, ``DPOTrainer`` or ``KTOTrainer``, and by LLaMA-Factory's
reader, converter and template. Each peer runs in an interpreter of its own, and returns tokens and labels as JSON.
Nothing is truncated. ``--data`` holds LLaMA-Factory's demonstration sets and GSM8K; a set whose file is missing is
left out. ``--instruct`` is a folder with the tokenizer and chat template of SmolLM2-135M-Instruct.

TRL reads conversations and preferences, but neither Alpaca's columns nor ShareGPT's roles nor LLaMA-Factory's parts:
:func:`trl_rows` writes what a user of TRL would. It wraps bare functions as OpenAI's tools, as LLaMA-Factory does. The
sets with tools need a chat template that renders tools. TRL ships the templates of Qwen2.5 and Qwen3; ``--templates``
is the folder ``trl/chat_templates`` of its environment, which is found without being named. All sides use the same
tokenizer.

LLaMA-Factory has two readers: its own (``v0`` here) and ``llamafactory.v1``, which alone reads contents in parts. Its
template is the one that comes nearest to the chat template; where its default system text is another, that of the chat
template is set. It imports torchaudio, for which an empty module is substituted.

The columns of the table count rows: those in the file, those that ShadowData reads (read), those of which every text,
tool and call occurs in its samples, answers with loss (whole), and for each peer those that it reads (rows), those
with the same tokens as ours (ids), among them those in which exactly the same tokens are supervised (masks), and those
in which they are apart from what the template writes around an answer: its header, and the line break after its end
(answers). The reasons for all differences follow, with the number of rows and the first of them. The second sequence
of KTO's samples is left out: each side pairs a prompt with another row's answer of its own choice.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

IGNORED = -100
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "system": "system"}
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

Sequence = tuple[list[int], list[int]]  # tokens and labels
Rows = dict[int, list[Sequence]]  # of each row of a file that became a sample


@dataclass(frozen=True)
class Set:
    """A set, and the settings with which each side reads it.

    Attributes:
        file: Name in the folder of the data.
        samples: conversations, pairs or labels.
        shadow: Further settings of ShadowData.
        template: Chat template among those that TRL ships; None for the Instruct's own.
        factory: Template of LLaMA-Factory; with the prefix ``v1:`` of its second reader.
        system: Default system text that LLaMA-Factory is given; None for that of its template.
        info: The set's entry in LLaMA-Factory's ``dataset_info.json``.
    """

    file: str
    samples: str = "conversations"
    shadow: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    factory: str = "smollm2"
    system: str | None = SMOLLM
    info: dict[str, Any] = field(default_factory=dict)


GSM8K: dict[str, Any] = {
    "shadow": {"columns": {"prompt": "question", "completion": "answer"}},
    "info": {"columns": {"prompt": "question", "response": "answer"}},
}
SETS = {
    "alpaca_en_demo": Set("alpaca_en_demo.json"),
    "identity": Set("identity.json"),
    "gsm8k_train": Set("gsm8k_train.jsonl", **GSM8K),
    "gsm8k_test": Set("gsm8k_test.jsonl", **GSM8K),
    "v1_sft_demo": Set("v1_sft_demo.jsonl", template="qwen3_instruct_2507", factory="v1:qwen3_nothink"),
    "glaive_toolcall_en_demo": Set(
        "glaive_toolcall_en_demo.json", template="qwen2_5", factory="qwen", system=None,
        info={"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}},
    ),
    "reason_tool_use_demo_50": Set("reason_tool_use_demo_50.jsonl", template="qwen3", factory="v1:qwen3"),
    "dpo_en_demo": Set(
        "dpo_en_demo.json", "pairs",
        info={
            "ranking": True, "formatting": "sharegpt",
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        },
    ),
    "kto_en_demo": Set(
        "kto_en_demo.json", "labels",
        info={
            "formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What a peer reads: a set, by the tokenizer of a folder."""

    name: str
    set: Set
    data: str
    instruct: str
    template: str | None  # the file

    def tokenizer(self) -> Any:
        """The tokenizer with the chat template of the set."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.instruct)
        if self.template is not None:
            tokenizer.chat_template = Path(self.template).read_text()
        return tokenizer

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the file."""
        text = Path(self.data).read_text()
        if self.data.endswith(".json"):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line]


# --- the three sides -------------------------------------------------------------------------------------------------


def read_ours(job: Job) -> Rows:
    """Tokens and labels of ShadowData."""
    from shadowlit.data.module import ShadowData
    from shadowlit.pair.pair import ModelPair

    data = ShadowData(
        ModelPair(job.instruct, job.instruct),
        train=job.data,
        samples=job.set.samples,
        chat_template=job.template,
        max_length=1_000_000,
        cache=False,
        **job.set.shadow,
    )
    data.setup("fit")
    dataset: Any = data.dataset("train")
    dataset = getattr(dataset, "sequences", dataset)
    rows: Rows = {}
    for i in range(0, len(dataset), 2 if job.set.samples == "labels" else 1):
        sample = dataset[i]
        # "sample 17 of train.jsonl (line 18)"
        rows.setdefault(int(dataset.origin(i).split()[1]), []).append((sample["input_ids"], sample["labels"]))
    return rows


def read_trl(job: Job) -> Rows:
    """Tokens and labels of TRL's trainers."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

    tokenizer, rows = job.tokenizer(), trl_rows(job)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    models = {"model": LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))}
    if job.set.samples != "conversations":
        models["ref_model"] = LlamaForCausalLM(models["model"].config)
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "max_length": None}
    kind, config = {
        "conversations": (SFTTrainer, SFTConfig), "pairs": (DPOTrainer, DPOConfig), "labels": (KTOTrainer, KTOConfig),
    }[job.set.samples]  # fmt: skip
    if job.set.samples == "conversations":
        options["assistant_only_loss"] = "messages" in rows[0]
    if job.set.samples == "labels":
        options["per_device_train_batch_size"] = 2
    with tempfile.TemporaryDirectory() as out:
        trainer = kind(
            **models, args=config(output_dir=out, **options), processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows, on_mixed_types="use_json"),
        )  # fmt: skip
    found: Rows = {}
    for number, sample in enumerate(trainer.train_dataset):
        if job.set.samples == "conversations":
            found[number] = [(sample["input_ids"], sample["labels"])]
        else:
            names = ("chosen_ids", "rejected_ids") if job.set.samples == "pairs" else ("completion_ids",)
            prompt = sample["prompt_ids"]
            found[number] = [(prompt + sample[n], [IGNORED] * len(prompt) + sample[n]) for n in names]
    if len(found) != len(rows):
        raise RuntimeError(f"TRL kept {len(found)} of {len(rows)} rows, and doesn't tell which")
    return found


def trl_rows(job: Job) -> list[dict[str, Any]]:
    """The rows in TRL's formats: messages where several turns are learned, prompt and completion otherwise."""
    rows = [_trl_row(row) for row in job.rows()]
    if any("messages" in row for row in rows):
        return [row if "messages" in row else {"messages": row["prompt"] + row["completion"]} for row in rows]
    return rows


def _trl_row(row: dict[str, Any]) -> dict[str, Any]:
    if "instruction" in row or "question" in row:
        texts = (row["instruction"], row["input"]) if "instruction" in row else (row["question"],)
        prompt = [{"role": "user", "content": "\n".join(text for text in texts if text)}]
        return {
            "prompt": prompt,
            "completion": [{"role": "assistant", "content": row.get("output", row.get("answer"))}],
        }
    turns = [_trl_turn(turn) for turn in row.get("conversations", row.get("messages"))]
    if "chosen" in row:
        return {"prompt": turns, **{name: [_trl_turn(row[name])] for name in ("chosen", "rejected")}}
    if "label" in row:
        return {"prompt": turns[:-1], "completion": turns[-1:], "label": row["label"]}
    if len(turns) == 2 and "tools" not in row:
        return {"prompt": turns[:1], "completion": turns[1:]}
    tools = [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in json.loads(row["tools"])
    ]
    return {"messages": turns, "tools": json.dumps(tools, ensure_ascii=False)}


def _trl_turn(turn: dict[str, Any]) -> dict[str, Any]:
    role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [_call(content)]}
    role = SHAREGPT_ROLES.get(role, role)
    if isinstance(content, str):
        return {"role": role, "content": content}
    texts = {kind: "".join(p["value"] for p in content if p["type"] == kind) for kind in ("text", "reasoning")}
    message: dict[str, Any] = {"role": role, "content": texts["text"]}
    if texts["reasoning"]:
        message["reasoning_content"] = texts["reasoning"]
    if calls := [_call(part["value"]) for part in content if part["type"] == "tool_call"]:
        message["tool_calls"] = calls
    return message


def _call(text: str) -> dict[str, Any]:
    return {"type": "function", "function": json.loads(text)}


def read_llamafactory(job: Job) -> Rows:
    """Tokens and labels of LLaMA-Factory."""
    if importlib.util.find_spec("torchaudio") is None:
        sys.modules["torchaudio"] = stub = types.ModuleType("torchaudio")
        stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    reader, _, template = job.set.factory.rpartition(":")
    return dict(_llamafactory_v1(job, template) if reader == "v1" else _llamafactory_v0(job, template))


def _llamafactory_v0(job: Job, name: str) -> Iterator[tuple[int, list[Sequence]]]:
    from llamafactory.data.loader import _get_dataset_processor, _load_single_dataset
    from llamafactory.data.parser import get_dataset_list
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, ModelArguments
    from transformers import Seq2SeqTrainingArguments

    tokenizer = job.tokenizer()
    stage = {"conversations": "sft", "pairs": "rm", "labels": "kto"}[job.set.samples]
    with tempfile.TemporaryDirectory() as folder:
        info = {job.name: {"file_name": job.data, **job.set.info}}
        Path(folder, "dataset_info.json").write_text(json.dumps(info))
        arguments = DataArguments(
            template=name, dataset=job.name, dataset_dir=folder, cutoff_len=1_000_000, default_system=job.set.system
        )
        training = Seq2SeqTrainingArguments(output_dir=folder, use_cpu=True, report_to="none")
        template = get_template_and_fix_tokenizer(tokenizer, arguments)
        (attributes,) = get_dataset_list([job.name], folder)
        aligned = _load_single_dataset(
            attributes, ModelArguments(model_name_or_path=job.instruct, cache_dir=folder), arguments, training
        )
        processor = _get_dataset_processor(arguments, stage, template, tokenizer, None)
        # One by one: it drops rows, and doesn't tell which.
        for number, row in enumerate(aligned):
            made = processor.preprocess_dataset({key: [value] for key, value in row.items()})
            prefixes = ("chosen_", "rejected_") if stage == "rm" else ("",)
            if made:
                yield number, [(made[f"{p}input_ids"][0], made[f"{p}labels"][0]) for p in prefixes]


def _llamafactory_v1(job: Job, name: str) -> Iterator[tuple[int, list[Sequence]]]:
    from llamafactory.v1.core.data_engine import DataEngine
    from llamafactory.v1.core.utils.rendering import Renderer

    renderer, engine = Renderer(name, job.tokenizer()), DataEngine(job.data)
    for number in range(len(engine)):
        (made,) = renderer.process_samples([engine[number]])
        yield number, [(made["input_ids"], made["labels"])]


SIDES = {"trl": read_trl, "llamafactory": read_llamafactory}
PACKAGES = ("trl", "llamafactory", "transformers", "datasets", "torch")


def serve(side: str, jobs: Path, out: Path) -> None:
    """Read every set in a peer's interpreter, and write what became of it."""
    results: dict[str, Any] = {}
    for job in json.loads(jobs.read_text()):
        try:
            rows = SIDES[side](Job(**{**job, "set": Set(**job["set"])}))
            results[job["name"]] = {"rows": [[number, sequences] for number, sequences in rows.items()]}
        except Exception as error:
            results[job["name"]] = {"error": f"{type(error).__name__}: {error}"}
    found = {name: version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    out.write_text(json.dumps({"versions": found, "results": results}))


# --- the comparison --------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """How the rows of a peer agree with ours."""

    rows: int = 0
    ids: int = 0
    masks: int = 0
    nearly: int = 0  # masks that are equal apart from what the template writes around an answer
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)

    def because(self, reason: str, row: int) -> None:
        """Count a reason for a difference."""
        self.reasons[reason] += 1
        self.first.setdefault(reason, row)


def compare(ours: Rows, theirs: Rows, tokenizer: Any) -> Comparison:
    """Compare rows that both sides have read."""
    found = Comparison(len(theirs))
    for row in sorted({*ours, *theirs}):
        if row not in ours or row not in theirs:
            found.because("only ours reads the row" if row in ours else "only the peer reads the row", row)
            continue
        if len(ours[row]) != len(theirs[row]):
            last = "has" if ours[row][-1][0] == theirs[row][-1][0] else "doesn't have"
            found.because(f"a sample for each turn in ours, the last of which {last} the peer's tokens", row)
            continue
        pairs = list(zip(ours[row], theirs[row], strict=True))
        if reasons := [difference(a[0], b[0], tokenizer) for a, b in pairs if a[0] != b[0]]:
            found.because(reasons[0], row)
            continue
        found.ids += 1
        masks = {reason for a, b in pairs for reason in mask_differences(*a, b[1], tokenizer)}
        found.masks += not masks
        found.nearly += masks <= AROUND
        for reason in sorted(masks):
            found.because(reason, row)
    return found


def difference(ours: list[int], theirs: list[int], tokenizer: Any) -> str:
    """Where two rows of tokens part."""
    left, right = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (ours, theirs))
    if left == right:
        return "the same text, other boundaries of tokens"
    at = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return f"text {left[at : at + 24]!r} is {right[at : at + 24]!r} in the peer's"


LINE_BREAK = "the peer trains the line break after the end of a turn"
HEADER = "the peer trains the header of an answer"
HEADER_END = "the peer trains the line break at the end of the header of an answer"
AROUND = {LINE_BREAK, HEADER, HEADER_END}


def mask_differences(ids: list[int], ours: list[int], theirs: list[int], tokenizer: Any) -> set[str]:
    """The kinds of tokens that only one of two masks includes."""
    found = set()
    header = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    starts = [i for i in range(len(ids)) if ids[i : i + len(header)] == header]
    place = {start + j: j for start in starts for j in range(len(header))}  # in a header
    only_theirs = {i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a == IGNORED != b}
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if (a == IGNORED) == (b == IGNORED):
            continue
        token = tokenizer.decode([ids[i]])
        if a != IGNORED:
            found.add(f"only ours trains {token!r}")
        elif i in place:
            found.add(HEADER if i - place[i] in only_theirs else HEADER_END)
        elif i and ids[i - 1] == tokenizer.eos_token_id and not token.strip():
            found.add(LINE_BREAK)
        else:
            found.add(f"only the peer trains {token!r}")
    return found


def is_whole(row: dict[str, Any], samples: list[Sequence], tokenizer: Any) -> bool:
    """Whether every text, tool and call of a row occurs in our samples, and those of its answers are supervised."""
    everything = " ".join(tokenizer.decode(ids) for ids, _ in samples)
    supervised = " ".join(tokenizer.decode([label for label in labels if label != IGNORED]) for _, labels in samples)
    turns = row.get("messages", row.get("prompt", []))
    answers = [turn for name in ("completion", "chosen", "rejected") for turn in row.get(name, [])]
    tools = [json.dumps(tool, ensure_ascii=False) for tool in json.loads(row.get("tools", "[]"))]
    learned = [turn for turn in row.get("messages", answers) if turn["role"] == "assistant"]
    needed = [text for turn in [*turns, *answers] for text in _texts(turn)] + tools
    return all(text in everything for text in needed) and all(
        text in supervised for turn in learned for text in _texts(turn)
    )


def _texts(turn: dict[str, Any]) -> list[str]:
    calls = [call["function"] for call in turn.get("tool_calls", [])]
    parts = [json.dumps(call["arguments"], ensure_ascii=False) for call in calls] + [call["name"] for call in calls]
    return [turn["content"].strip(), turn.get("reasoning_content", "").strip(), *parts]


# --- the report ------------------------------------------------------------------------------------------------------


def report(jobs: list[Job], ours: dict[str, Any], peers: dict[str, dict[str, Any]]) -> str:
    """The table, and what differs."""
    lines = ["| set | rows | read | whole | " + " | ".join(f"{p}: rows | ids | masks | answers" for p in peers) + " |"]
    lines.append("|---" * (4 + 4 * len(peers)) + "|")
    notes = []
    for job in jobs:
        mine = ours[job.name]
        rows, tokenizer = trl_rows(job), job.tokenizer()
        cells = [job.name, f"{len(rows):,}"]
        if isinstance(mine, dict):
            lost = [i for i, samples in mine.items() if not is_whole(rows[i], samples, tokenizer)]
            cells += [f"{len(mine):,}", f"{len(mine) - len(lost):,}"]
            notes += [f"- {job.name}: {len(lost):,} rows lose a text in ours (row {lost[0]})"] if lost else []
        else:
            cells += ["0", "–"]
            notes.append(f"- {job.name}: ours: {mine.splitlines()[0]}")
        for peer, answer in peers.items():
            result = answer["results"][job.name]
            if "error" in result:
                notes.append(f"- {job.name}, {peer}: {result['error']}")
                cells += ["0", "–", "–", "–"]
                continue
            theirs = {number: [tuple(s) for s in sequences] for number, sequences in result["rows"]}
            if isinstance(mine, str):
                cells += [f"{len(theirs):,}", "–", "–", "–"]
                continue
            found = compare(mine, theirs, tokenizer)
            cells += [f"{number:,}" for number in (found.rows, found.ids, found.masks, found.nearly)]
            common = found.reasons.most_common(6)
            notes += [f"- {job.name}, {peer}: {n:,} × {reason} (row {found.first[reason]})" for reason, n in common]
            if rest := len(found.reasons) - len(common):
                notes.append(f"- {job.name}, {peer}: and {rest:,} other differences")
        lines.append("| " + " | ".join(cells) + " |")
    versions = "; ".join(f"{p}: " + ", ".join(f"{n} {v}" for n, v in a["versions"].items()) for p, a in peers.items())
    return "\n".join([*lines, "", *notes, "", versions])


def main() -> None:
    """Run ours here and each peer in its interpreter, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the sets")
    parser.add_argument("--instruct", type=Path, help="folder of the tokenizer")
    parser.add_argument("--trl", help="the Python of an environment with TRL")
    parser.add_argument("--llamafactory", help="the Python of an environment with LLaMA-Factory")
    parser.add_argument("--templates", type=Path, help="folder of chat templates; TRL's by default")
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS), help="sets to compare")
    parser.add_argument("--out", type=Path, help="file for the report")
    parser.add_argument("--keep", type=Path, help="folder where the answers of the peers are kept, and taken from")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], Path(options.serve[1]), Path(options.serve[2]))
        return
    pythons = {name: python for name in SIDES if (python := getattr(options, name))}
    templates = options.templates
    if templates is None and options.trl:
        (templates,) = Path(options.trl).parents[1].glob("lib/python*/site-packages/trl/chat_templates")
    jobs = [
        Job(
            name, one, str((options.data / one.file).resolve()), str(options.instruct.resolve()),
            str(templates / f"{one.template}.jinja") if one.template else None,
        )
        for name, one in SETS.items() if name in options.only and (options.data / one.file).is_file()
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        peers = {name: ask(name, python, jobs, folder) for name, python in pythons.items()}
    ours: dict[str, Any] = {}
    for job in jobs:
        try:
            ours[job.name] = read_ours(job)
        except Exception as error:
            ours[job.name] = f"{type(error).__name__}: {error}"
    text = report(jobs, ours, peers)
    print(text)
    if options.out:
        options.out.write_text(f"{text}\n")


def ask(side: str, python: str, jobs: list[Job], folder: Path) -> dict[str, Any]:
    """A peer's answers to the jobs; those that lie in the folder are not computed again."""
    file, questions = folder / f"{side}.json", folder / f"{side}-jobs.json"
    answer: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"results": {}}
    missing = [asdict(job) for job in jobs if job.name not in answer["results"]]
    if missing:
        questions.write_text(json.dumps(missing))
        new = folder / f"{side}-new.json"
        quiet = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **quiet, "HF_DATASETS_CACHE": str(folder / f"{side}-cache")}
        environment.pop("PYTHONPATH", None)
        with (folder / f"{side}.log").open("w") as log:
            command = [python, __file__, "--serve", side, questions, new]
            subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
        found = json.loads(new.read_text())
        answer = {"versions": found["versions"], "results": {**answer["results"], **found["results"]}}
        file.write_text(json.dumps(answer))
    return answer


if __name__ == "__main__":
    main()
