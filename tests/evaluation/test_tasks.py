"""`megatron-ds evaluate --tasks`: the scores of lm-eval's transformers backend, at every layout."""

import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import megatron_ds as mds
from megatron_ds.cli.evaluate import lines
from megatron_ds.config.yaml_text import format_yaml
from megatron_ds.errors import ConfigError
from megatron_ds.evaluation import Evaluation, Tasks
from tests.cli.conftest import Fork, fork, start  # noqa: F401
from tests.parity.cases import CONFIGS
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.reference import make_model
from tests.ranks import preload, run_alone

LENGTH = 48
COMMON = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}"}
CHOICE_METRICS = [
    {"metric": name, "aggregation": how} for name, how in (("acc", "mean"), ("brier_score", "brier_score"))
]
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "num_fewshot": 1,
        "fewshot_split": "test",
        "metric_list": CHOICE_METRICS,
    },
    "endings": {
        "output_type": "loglikelihood",
        "doc_to_target": " {{ending}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity"},
            {"metric": "acc", "aggregation": "mean"},
        ],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_target": "{{ending}}",
        "generation_kwargs": {"until": [">", "eiei"], "max_gen_toks": 9, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
}
Expected = tuple[dict[str, Any], dict[str, list[Any]]]
BOUND = 1e-5  # relative: fp32 log-likelihoods of up to 200 tokens


def write_tasks(folder: Path) -> None:
    """YAML files of tasks, and their documents."""
    chance = random.Random(1)

    def words(count: int) -> str:
        return " ".join("".join(chance.choices("abcdeü", k=chance.randrange(1, 6))) for _ in range(count))

    rows = []
    for _ in range(11):
        choices = [words(chance.randrange(1, 4)) for _ in range(3)]
        one = {"question": words(chance.randrange(2, 9)), "choices": choices, "answer": chance.randrange(3)}
        rows.append({**one, "ending": words(2), "text": words(chance.randrange(4, 40))})
    (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"data_files": {"test": str(folder / "docs.jsonl")}, "cache_dir": str(folder / "cache")}
    for name, fields in TASKS.items():
        task = {"task": name, **COMMON, "dataset_kwargs": source, **fields}
        (folder / f"{name}.yaml").write_text(format_yaml(task))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A directory with hf, a model and its tokenizer, and tasks."""
    place = tmp_path_factory.mktemp("tasks")
    preload()
    end = byte_tokenizer.convert_tokens_to_ids("7")
    decoder = {**CONFIGS["llama"], "max_position_embeddings": LENGTH, "eos_token_id": end}
    for name, config in (("hf", decoder), ("t5", ENCODER_CASES["t5-tied-relu"])):
        run_alone(_save, {**config, "vocab_size": 267}, place / name)
        byte_tokenizer.save_pretrained(str(place / name))
    (place / "tasks").mkdir()
    write_tasks(place / "tasks")
    return place


def _save(config: dict[str, Any], directory: Path) -> None:
    make_model(config).save_pretrained(directory)


def answers(samples: list[dict[str, Any]]) -> list[Any]:
    """What a model answered to the questions of a task, in their order."""
    return [one["resps"] for one in sorted(samples, key=lambda one: one["doc_id"])]


def by_transformers(place: Path, model_name: str) -> Expected:
    """The results and answers of lm-eval's own backend, in a process that is no rank."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
    model = HFLM(pretrained=str(place / model_name), device="cpu", batch_size=4)
    found = simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager, log_samples=True)
    results = {name: dict(one) for name, one in found["results"].items()}
    return results, {name: answers(one) for name, one in found["samples"].items()}


@pytest.fixture(scope="module")
def expected(place: Path) -> Expected:
    found: Expected = run_alone(by_transformers, place, "hf")
    return found


def evaluated(place: Path, names: Iterable[str] = TASKS, model_name: str = "hf", **options: Any) -> Evaluation:
    found = mds.evaluate(place / model_name, tasks=Tasks(tuple(names), place / "tasks", log_samples=True), **options)
    assert found is not None and found.tasks is not None
    return found


def numbers(results: dict[str, Any]) -> dict[str, float]:
    return {
        f"{name} {key}": value
        for name, found in results.items()
        for key, value in found.items()
        if isinstance(value, float)
    }


def assert_same(ours: Any, theirs: Any) -> None:
    """Compare lists in lists: numbers to rounding."""
    if isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs):
            assert_same(one, other)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=BOUND)
    else:
        assert ours == theirs


@pytest.mark.parametrize(
    "options",
    [
        {"tp": 2, "batch_size": 3, "overrides": ["parallel.sequence=true"]},
        {"pp": 2, "nproc": 4, "batch_size": 2},
        pytest.param({"batch_size": 1}, marks=pytest.mark.sweep),
        pytest.param(
            {"nproc": 2, "overrides": ["parallel.context=2"], "names": set(TASKS) - {"written"}},
            marks=pytest.mark.sweep,
        ),
    ],
    ids=["tp2", "pp2-dp2", "alone", "cp2"],
)
def test_equal_to_the_transformers_backend(options: dict[str, Any], place: Path, expected: Expected) -> None:
    found = evaluated(place, **options)
    results, samples = found.tasks["results"], found.tasks["samples"]
    ours, theirs = numbers(results), numbers({name: expected[0][name] for name in results})
    assert len(theirs) > 6 and ours.keys() == theirs.keys()
    assert ours == pytest.approx(theirs, rel=BOUND)
    for name, answered in samples.items():
        assert_same(answers(answered), expected[1][name])
    texts = {row[0][0] for row in answers(samples.get("written", []))}
    assert not texts or ("" in texts and len(texts) > 5), "some end at once, others do not"
    shown = list(lines(found))
    assert f"            bits per byte {theirs['texts bits_per_byte,none']:.4f}" in shown
    assert "task        choices, 1-shot" in shown


def test_the_command(place: Path, expected: Expected, tmp_path: Path, fork: Fork) -> None:  # noqa: F811
    words = ["--tasks", "endings,text*", "--tasks-dir", place / "tasks", "--limit", 11, "--json", "found.json"]
    command = fork("-m", "megatron_ds", "evaluate", place / "hf", *words)
    shown, errors = command.communicate()
    assert command.returncode == 0, errors
    written = json.loads((tmp_path / "found.json").read_text())["tasks"]
    assert written["results"].keys() == {"endings", "texts"} and written["n-samples"]["texts"]["effective"] == 11
    assert written["results"]["endings"]["perplexity,none"] == pytest.approx(
        expected[0]["endings"]["perplexity,none"], rel=BOUND
    )
    assert f"word perplexity {expected[0]['texts']['word_perplexity,none']:.4f}"[:20] in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param(  # it reads the names of all tasks of lm-eval
            {"tasks": ["chioces"]}, r"lm-eval has no task chioces; did you mean choices", marks=pytest.mark.sweep
        ),
        ({"tasks": ["choices"], "data": "corpus.txt"}, r"--data and --tasks are both given; choose one"),
        ({"tasks": Tasks(["choices"], Path("nowhere"))}, r"--tasks-dir=nowhere is not a directory"),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str, place: Path) -> None:
    tasks = options["tasks"]
    tasks = tasks if isinstance(tasks, Tasks) else Tasks(tasks, place / "tasks")
    with pytest.raises(ConfigError, match=said):
        mds.evaluate(place / "hf", **{**options, "tasks": tasks})


@pytest.mark.sweep
@pytest.mark.parametrize("options", [{"tp": 2}, {"pp": 2, "nproc": 4, "batch_size": 3}], ids=["tp2", "pp2-dp2"])
def test_an_encoder_decoder(options: dict[str, Any], place: Path) -> None:
    found, (_, samples) = evaluated(place, model_name="t5", **options), run_alone(by_transformers, place, "t5")
    for name in set(TASKS) - {"written"}:
        assert_same(answers(found.tasks["samples"][name]), samples[name])
    # the other backend adds the length of the longest context to the number of new tokens
    for (ours,), (theirs,) in zip(answers(found.tasks["samples"]["written"]), samples["written"]):
        assert theirs[0].startswith(ours[0])


@pytest.mark.sweep
def test_context_ranks_do_not_generate(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel.context divides sequences"):
        evaluated(place, ["written"], overrides=["parallel.context=2"])


def test_without_lm_eval_its_name_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--tasks needs the package lm-eval; try pip install 'megatron-ds\[eval\]'"):
        mds.evaluate(place / "hf", tasks=["choices"])
