"""What the README and the pages under docs/ and examples/ claim, held against the code."""

import itertools
import json
import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
import yaml

from bench.__main__ import main as bench
from bench.cases import CASES
from bench.combine import main as combine
from megatron_ds.cli.doctor import doctor
from megatron_ds.cli.main import _run
from megatron_ds.config import RunConfig, build_run, load_run
from megatron_ds.errors import ConfigError, MegatronDSError
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.hf.support_table import MODELS, PROOF, proof_json, with_table
from megatron_ds.training.launch import train
from megatron_ds.training.resolve import resolve_run
from tests.examples.test_examples import OWN_LOOP
from tests.proof import proofs
from tests.ranks import preload
from tests.training.tiny import run_mapping

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("**/*.md")])
NOT_THERE_IN_A_CLONE = (
    "out/moby_dick/hf",
    "out/t5/hf",
    "out/blend/hf",
    "out/moe/dense_hf",
    "out/moe/upcycled",
    "out/bert/hf",
    "out/long_context/short/hf",
)
"""Directories that examples make."""
CHAINED = [
    f"examples/{name}/README.md"
    for name in ("pretrain_blend", "finetune_chat", "finetune_lora", "pretrain_moe", "classify", "long_context")
]
"""Pages all of whose commands `tests/examples` runs, one after the other."""
CONVERTING = ("prepare", "inspect", "export", "import")
"""Commands that tests of examples run."""
OUTSIDE = ("examples/extend/README.md", "docs/add_a_family.md")
"""The same in `test_extend` and `test_add_a_family`, in processes of their own: what they register would stay here."""


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def a_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with the output of a run, out/run, and a Hugging Face directory, path/to/hf_dir."""
    place = tmp_path_factory.mktemp("place")
    mapping = run_mapping(corpus, place / "out" / "run")
    mapping["train"].update(steps=200, global_batch_size=2, eval_every=0, ema={})
    mapping["checkpoint"] = {"every": 100}
    mapping["export"] = {"path": str(place / "path" / "to" / "hf_dir")}
    preload()
    train(build_run(mapping))
    return place


def write_task(place: Path) -> None:
    """corpus.txt, and tasks/endings.yaml of docs/evaluate.md with its documents."""
    (place / "corpus.txt").write_text("w1 w2 w3 w4 w5 " * 20)
    documents = [{"question": f"w{number} w2", "ending": "w3"} for number in range(4)]
    (place / "docs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    (task,) = re.findall(r"  ```yaml\n(.*?)```", (ROOT / "docs/evaluate.md").read_text(encoding="utf-8"), re.DOTALL)
    fields = yaml.safe_load(textwrap.dedent(task))
    fields["dataset_kwargs"]["cache_dir"] = str(place / "cache")
    (place / "tasks").mkdir(exist_ok=True)
    (place / "tasks" / "endings.yaml").write_text(yaml.safe_dump(fields))


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line of a bash block."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.relative_to(ROOT).as_posix(), line.partition("  #")[0].strip()) for line in lines if line]
    return found


def run_of(words: list[str]) -> tuple[RunConfig, int | None]:
    """The run and the number of local ranks behind `train RUN.yaml [key.sub=value ...] [--nproc N]`."""
    assert words[0] == "train", words
    rest, ranks = words[1:], None
    for option in ("--nproc", "--max-restarts", "--min-nproc"):
        if option in rest:
            at = rest.index(option)
            ranks = int(rest[at + 1]) if option == "--nproc" else ranks
            rest = rest[:at] + rest[at + 2 :]
    assert not [word for word in rest if word.startswith("-")], words
    return load_run(rest[0], rest[1:]), ranks


def write_prompts(place: Path) -> None:
    """Write prompts.jsonl, and a chat template into the Hugging Face directory."""
    (place / "prompts.jsonl").write_text('{"prompt": "w1 w2"}\n{"messages": [{"role": "user", "content": "w3"}]}\n')
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (place / "path/to/hf_dir/chat_template.jinja").write_text(template)


def options_of(command: Callable[..., None]) -> set[str]:
    """The options of a function that is a command."""
    app = typer.Typer()
    app.command()(command)
    return {name for one in typer.main.get_command(app).params for name in (*one.opts, *one.secondary_opts)}


def check_fits(run: RunConfig, ranks: int) -> None:
    """The run can start on so many ranks; the weights that another example makes may be missing."""
    try:
        resolve_run(run, ranks, "cpu")
    except MegatronDSError as problem:
        if run.model.path not in NOT_THERE_IN_A_CLONE or not str(problem).startswith(
            f"model.path={run.model.path} does not"
        ):
            raise


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: value.replace("/", "-"))
def test_command_is_right(
    page: str, command: str, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    words = shlex.split(command)
    if page in OUTSIDE:
        assert words[:2] in [["megatron-ds", name] for name in ("train", "verify", "inspect", "families")]
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
        cases = [name for word in words if word.startswith("CASES=") for name in word[len("CASES=") :].split()]
        assert set(cases) <= set(CASES)
    elif words[:3] == ["python", "-m", "bench"]:
        assert {word for word in words[3:] if word[0].isalpha()} <= set(CASES)
        assert {word for word in words[3:] if word.startswith("--")} <= options_of(bench)
    elif words[:3] == ["python", "-m", "bench.combine"]:
        assert {word for word in words[3:] if word.startswith("--")} <= options_of(combine)
    elif words[:3] == ["python", "-m", "build"] or words[:2] == ["pip", "install"]:
        assert page in ("docs/install.md", "docs/remote.md")  # run by `tests/test_packages.py`
    elif words[0] == "docker":
        assert page == "docs/install.md"  # `tests/test_repository_files.py` reads the Dockerfile
    elif words[0] == "megatron-ds" and page.startswith("examples/") and words[1] in CONVERTING:
        assert page in CHAINED, f"{page}: {command}: no test runs this command"
    elif words[0] == "megatron-ds" and words[1] in ("inspect", "report", "export", "import"):
        request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("a_run"))
        assert _run(words[1:]) == 0, capsys.readouterr().err
    elif words[:2] == ["megatron-ds", "evaluate"]:
        if "--tasks" in words:
            pytest.importorskip("lm_eval", reason="`make test` installs it, `make quick` does not need it")
        place = request.getfixturevalue("a_run")
        request.getfixturevalue("monkeypatch").chdir(place)
        write_task(place)
        assert _run(words[1:]) == 0, capsys.readouterr().err
    elif words[:2] == ["megatron-ds", "generate"]:
        place = request.getfixturevalue("a_run")
        request.getfixturevalue("monkeypatch").chdir(place)
        write_prompts(place)
        assert _run([*words[1:], *([] if "--max-new-tokens" in words else ["--max-new-tokens", "4"])]) == 0
    elif words[:2] == ["megatron-ds", "verify"]:
        arguments = [word.replace("path/to/hf_dir", str(ROOT)) for word in words[1:]]
        assert _run(arguments) == 2  # parsed; and that there is no config.json here is its first word
        assert "no config.json here" in capsys.readouterr().err
    elif words[:2] == ["megatron-ds", "plan"]:
        place = request.getfixturevalue("tmp_path")  # searches write run files
        for folder in ("examples", "ds_configs"):
            (place / folder).symlink_to(ROOT / folder)
        request.getfixturevalue("monkeypatch").chdir(place)
        assert _run(words[1:]) in (0, 1), capsys.readouterr().err
    elif words[:2] in (["megatron-ds", "families"], ["megatron-ds", "examples"]):
        assert _run(words[1:]) == 0, capsys.readouterr().err
    elif words[:2] == ["megatron-ds", "init"]:
        assert _run([word.replace("path/to/hf_dir", "no/such") for word in words[1:]]) == 2
        assert "--model=no/such does not exist" in capsys.readouterr().err
    elif "doctor" in words:
        assert {word for word in words[words.index("doctor") :] if word.startswith("--")} <= options_of(doctor)
    elif words[0] == "megatron-ds":
        run, ranks = run_of(words[1:])
        check_fits(run, ranks or 1)
    elif words[0] == "torchrun" and page == "examples/own_loop/README.md":
        assert words[3] == OWN_LOOP  # run by `tests/examples`
    elif words[0] in ("torchrun", "deepspeed", "srun"):
        run, ranks = run_of(words[words.index("megatron_ds") + 1 :])
        assert ranks is None
        numbers = {word: int(count) for word, count in itertools.pairwise(words) if count.isdigit()}
        each = next(
            numbers[flag] for flag in ("--nproc-per-node", "--num_gpus", "--ntasks-per-node") if flag in numbers
        )
        check_fits(run, each * numbers.get("--nodes", 1))
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in ("git", "cd", "source", "export"), f"{page}: {command}: no test knows this command"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix().replace("/", "-"))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]*)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target


def test_table_of_families_is_the_registry() -> None:
    assert PROOF.read_text(encoding="utf-8") == proof_json(proofs()), "run `make tables`"
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert with_table(text) == text, "run `make tables`"
    assert text.count("| `llama` | `LlamaForCausalLM` |") == 1
    assert MODELS.keys() == set(FAMILIES)


def test_measured_rows_are_those_of_the_bench() -> None:
    rows = (ROOT / "docs" / "why.md").read_text(encoding="utf-8").partition("## Measured")[2].partition("## ")[0]
    results = set((ROOT / "bench" / "RESULTS.md").read_text(encoding="utf-8").splitlines())
    measured = [line for line in rows.splitlines() if line.startswith("|")]
    assert len(measured) > 3 and not set(measured) - results, "copy the rows of bench/RESULTS.md to docs/why.md"


def test_run_file_of_the_readme_is_a_run() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert build_run(yaml.safe_load(block)).train.steps > 0


def zero_table() -> list[tuple[int, int, int, bool, bool]]:
    """(tensor, pipeline, stage, fp32 runs, bf16 runs) by the table in docs/parallelism.md."""
    text = (ROOT / "docs/parallelism.md").read_text(encoding="utf-8")
    rows = [row.strip("| \n").split(" | ") for row in text.splitlines() if re.match(r"\| `pipeline", row)]
    assert len(rows) == 2, rows
    rows, layouts = [rows[0], *rows], [(1, 1), (2, 1), (1, 2)]
    return [
        (tensor, pipeline, stage, word != "refused", word == "yes")
        for (tensor, pipeline), row in zip(layouts, rows)
        for stage, word in enumerate(row[1:])
    ]


@pytest.mark.parametrize(("tensor", "pipeline", "stage", "fp32", "bf16"), zero_table())
def test_table_of_zero_stages(tensor: int, pipeline: int, stage: int, fp32: bool, bf16: bool) -> None:
    layout = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    for enabled, runs in ((False, fp32), (True, bf16)):
        deepspeed = f"deepspeed={{zero_optimization: {{stage: {stage}}}, bf16: {{enabled: {str(enabled).lower()}}}}}"
        run = load_run("examples/parallel_3d/run.yaml", [*layout, deepspeed])
        if runs:
            resolve_run(run, 2, "cpu")
        else:
            with pytest.raises(ConfigError):
                resolve_run(run, 2, "cpu")


def troubles() -> list[tuple[str, str]]:
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^`([^`\n]+)`\n\n```\nerror: (.*)\n```", text, re.MULTILINE)


@pytest.mark.parametrize(("override", "line"), troubles(), ids=lambda value: value[:30])
def test_trouble_is_told_in_this_line(override: str, line: str) -> None:
    ranks, overrides = (int(override.split()[1]), []) if override.startswith("--nproc") else (8, [override])
    with pytest.raises(MegatronDSError) as caught:
        resolve_run(load_run("examples/parallel_3d/run.yaml", overrides), ranks, "cpu")
    assert str(caught.value) == line


def test_every_error_block_is_tested() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    assert text.count("\nerror: ") == len(troubles()) > 5
