import subprocess
import sys
import time

import click
import pytest

from cluster.cli import cli
from tests.commands import Ended, frepa


def assert_one_line_error(result: Ended, code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("frepa: error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [(["--help"], "shards build"), (["status", "{tmp}"], "state        killed")],
    ids=["help", "status"],
)
def test_what_has_to_be_quick_imports_nothing_heavy(tmp_path, arguments, shown):
    (tmp_path / "config.yaml").touch()
    code = (
        "import sys, cluster.cli, cluster.train_cli\n"
        "try: cluster.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'deepspeed', 'ray', 'cv2', 'numpy', 'timm', 'matplotlib', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *(part.format(tmp=tmp_path) for part in arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert shown in result.stdout


def test_a_config_is_read_without_what_builds_networks():
    heavy = {"timm", "torchvision", "deepspeed"}
    code = f"import sys, frepa_dist.config; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("pretrain", "--config", "demo/retmea"), 2, ("no such config file", "demo/retmae.yaml")),
        (("pretrain", "--config", "demo/retmae", "--set", "train.step=3"), 2, ("train.step", "allowed here")),
        (("pretrain", "--config", "demo/retmae", "--set", "train.steps"), 2, ("--set dotted.key=value",)),
        (("pretrain", "--config", "demo/retmae", "--num-ranks", "3"), 2, ("32", "3", "16")),
        (("resume", "{tmp}/none"), 3, ("not a run folder",)),
        (("export", "{tmp}/none", "{tmp}/out"), 3, ("not a run folder",)),
        (("shards", "build", "{tmp}/none", "{tmp}/d", "--modality", "fundus"), 3, ("none",)),
        (("shards", "build", "{tmp}", "{tmp}/d", "--modality", "cat"), 2, ("cat", "fundus")),
        (("shards", "build", "{tmp}", "{tmp}/d", "--config", "shards/none"), 2, ("shards/none", "shards/ct")),
        (("shards", "stats", "{tmp}"), 3, ("frepa shards build",)),
        (("shards", "verify", "{tmp}"), 3, ("frepa shards build",)),
        (("shards", "merge", "{tmp}", "{tmp}/d"), 3, ("frepa shards build",)),
        (("shards", "merge", "{tmp}", "{tmp}/d", "--rename", "new"), 2, ("PLACE:MODALITY/OLD=NEW",)),
        (("shards", "rehf", "{tmp}", "--modality", "cat"), 2, ("cat", "fundus")),
        (("shards", "rehf", "{tmp}", "--modality", "ct", "--set", "hf.order=0"), 2, ("order",)),
        (("shards", "rehf", "{tmp}", "--modality", "ct", "--set", "hf=3"), 2, ("hf",)),
        (("shards", "rehf", "{tmp}", "--modality", "ct", "--set", "hff.order=2"), 2, ("unknown key hff",)),
        (("shards", "rehf", "{tmp}", "--modality", "ct", "--set", "modality=mri"), 2, ("mri, not ct",)),
        (("shards", "tune-hf", "{tmp}", "--modality", "ct", "--out", "{tmp}/t"), 3, ("labels.csv",)),
    ],
)
def test_bad_input_is_one_line_and_a_stable_code(tmp_path, arguments, code, words):
    result = frepa(*(part.format(tmp=tmp_path) for part in arguments))
    assert_one_line_error(result, code, *words)


def test_no_dataset_is_said_before_ranks_start(tmp_path):
    start = time.monotonic()
    result = frepa(
        "pretrain",
        "--config",
        "demo/retmae",
        "--set",
        f"data.root={tmp_path}",
        "--set",
        f"output={tmp_path / 'run'}",
    )
    assert_one_line_error(result, 3, str(tmp_path), "frepa shards build")
    assert time.monotonic() - start < 60


def test_usage_errors_have_code_2():
    assert frepa("pretrain").returncode == 2
    assert frepa("shards", "bild").returncode == 2


def all_commands(command, name="frepa"):
    yield name, command
    for part, child in getattr(command, "commands", {}).items():
        yield from all_commands(child, f"{name} {part}")


def test_help_keeps_the_lines_of_examples():
    for name, command in all_commands(cli):
        text = command.get_help(click.Context(command, info_name=name))
        assert "\\b" not in text, name
        examples = [
            line for line in (command.help or "").splitlines() if line.startswith(("frepa ", "srun "))
        ]
        shown = [line.strip() for line in text.splitlines()]
        assert set(examples) <= set(shown), name
