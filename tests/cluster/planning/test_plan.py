"""Whole plans: what fits, what is best, what it costs, and what the commands print."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from cluster.planning.estimate import estimate, make_layout
from cluster.planning.layouts import best_by_size, best_of, cheapest, fitting_layouts, machine_sizes
from cluster.planning.prices import Prices, count_money
from cluster.planning.run_facts import gather_facts
from cluster.planning.simulation import split_nodes
from cluster.planning.text import amount, duration
from shards.support.errors import ConfigError
from tests.cluster.planning.runs import assume, small_config
from tests.commands import frepa

NONE = Prices()


@pytest.fixture(scope="module")
def facts(planned_dataset):
    return gather_facts(small_config(planned_dataset, global_batch_size=16), assume())


def test_a_run_is_counted(facts):
    assert facts.access == "folder"
    assert facts.epoch_steps == 62 // 16
    assert (facts.steps, facts.images, facts.epochs) == (40, 640, 40 / 3)
    assert facts.kinds == {"student": "engine"}
    trained = facts.memory.cost.trained["student"]
    assert facts.networks(3)["student"].num_bytes == 2 * trained


def test_seconds_of_a_run_are_its_steps(facts):
    never = assume("gpu_mtbf_hours=null", "loader_images_per_second=1e9", "storage_gbit_per_second=1e6")
    found = estimate(facts, make_layout(facts, 1, 1, 1, 16), never, NONE)
    flops = facts.memory.cost.total_flops * facts.images
    assert found.seconds == pytest.approx(flops / (989e12 * 0.35))
    assert (found.expected_seconds, found.goodput) == (found.seconds, 1)
    assert found.checkpoints.interval_steps is None
    failing = estimate(facts, found.layout, assume("gpu_mtbf_hours=1"), NONE)
    assert failing.expected_seconds > failing.seconds


def test_what_fits_and_what_is_best(facts):
    limits = assume(f"gpu.memory_gb={facts.memory.total(1, 4, 2) / 0.9e9 + 1e-6}")
    found = fitting_layouts(facts, 1, 2, limits, NONE)
    assert [each.layout.stage for each in found if each.layout.micro_batch_size == 4][:1] == [1]
    assert all(each.memory_bytes <= limits.gpu.memory_bytes * 0.9 for each in found)
    assert all(each.layout.global_batch_size == 16 for each in found)
    # stages that are as fast as each other: the run's own one
    assert best_of(found, 2).layout.stage == 2
    slower = [replace(each, expected_seconds=each.expected_seconds * each.layout.stage) for each in found[1:]]
    assert best_of(slower, 3).layout.stage == slower[0].layout.stage
    with pytest.raises(ConfigError, match="not even one image"):
        best_of(fitting_layouts(facts, 1, 2, assume("gpu.memory_gb=0.001"), NONE), 1)


def test_the_cheapest_in_time(facts):
    slow = assume("mfu=1e-6", "gpu_mtbf_hours=null")  # so that it takes hours, all of them computing
    found = list(best_by_size(facts, 2, 8, slow, Prices(gpu_hour=3.0)))
    assert [each.layout.ranks for each in found] == [1, 2, 4, 8, 16]
    hours = {each.layout.ranks: each.expected_seconds / 3600 for each in found}
    assert cheapest(found, 1.001 * hours[1]).layout.ranks == 1
    assert cheapest(found, 1.001 * hours[4]).layout.ranks == 4
    assert cheapest(found, 0.9 * hours[16]) is None
    assert found[0].money == {"GPUs": pytest.approx(3 * hours[1])}


def test_machines_that_divide_the_batch():
    assert machine_sizes(3, 4, 8) == [(1, 1), (1, 2), (1, 4), (2, 4)]
    assert split_nodes(4, 8) == (1, 4)
    assert split_nodes(32, 8) == (4, 8)
    with pytest.raises(ConfigError, match="12 GPUs are no whole number of nodes"):
        split_nodes(12, 8)


def test_no_money_without_a_price():
    amounts = {"gpu_hours": 10, "stored_bytes": 2e9, "months": 0.5, "requests": 5000, "fetched_bytes": 3e9}
    assert count_money(NONE, **amounts) == {}
    assert count_money(Prices(gpu_hour=2, thousand_gets=0.1), **amounts) == {"GPUs": 20, "requests": 0.5}
    assert count_money(Prices(gb_month=1, gb_transfer=2), **amounts) == {"storage": 1, "transfer": 6}


def test_amounts_for_people():
    assert [duration(x) for x in (0.0021, 90, 150, 7200, 3e5, math.inf)] == [
        "2.1 ms",
        "90 s",
        "2.5 minutes",
        "2 hours",
        "3.47 days",
        "never",
    ]
    assert [amount(x) for x in (999, 2.5e6, 1.5e12)] == ["999 bytes", "2.5 MB", "1.5 TB"]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, planned_dataset):
    """A config as a file; JSON is YAML too."""
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(small_config(planned_dataset, global_batch_size=16).model_dump_json())
    return path


def test_the_command_says_it_all_and_writes_a_page(run_file, tmp_path):
    page = tmp_path / "plan.html"
    done = frepa("plan", run_file, "--gpus-per-node", 4, "--nodes", 2, "--json", "--out", page,
                 "--deadline-hours", 100, "--mfu", 0.2, "--price-gpu-hour", 2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["dataset"]["is_known"]
    assert plan["chosen"]["ranks"] == 8
    assert plan["chosen"]["money"] == {"GPUs": pytest.approx(2 * plan["chosen"]["gpu_hours"])}
    assert plan["largest_micro_batch"] == {"0": 2, "1": 2, "2": 2, "3": 2}
    assert plan["cheapest"]["ranks"] <= 8
    assert {row["stage"] for row in plan["memory"]} == {0, 1, 2, 3}
    (mfu,) = [item for item in plan["assumptions"] if item["name"] == "mfu"]
    assert (mfu["value"], mfu["basis"]) == (0.2, "given")
    html = page.read_text()
    assert html.count("<svg") == 4
    assert "<script" not in html
    for item in plan["assumptions"]:
        assert item["name"] in html


def test_the_command_without_a_dataset_or_a_price(run_file):
    done = frepa("plan", run_file, "--offline", "--set", "data.root=s3://bucket/prefix",
                 "--set", "data.modality_weights=uniform", "--assume", "num_images=1000")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in (
        "Computed from the config and the assumptions below, not measured.",
        "Data (assumed",
        "1,000 images, 1 shards",
        "ZeRO 3",
        "recommended: each",
        "num_images = 1,000",
        "[given]",
        "modality_weights are left out",
    ):
        assert words in done.stdout
    assert "cost at" not in done.stdout


def test_simulation_of_a_run(run_file, tmp_path):
    page = tmp_path / "simulation.html"
    done = frepa("simulate", run_file, "--gpus", "1,4,16", "--gpus-per-node", 4, "--days", 2, "--seeds", 4,
                 "--json", "--out", page, "--assume", "gpu_mtbf_hours=50", "--mfu", 0.001)  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert [size["gpus"] for size in made["sizes"]] == [1, 4, 16]
    for size in made["sizes"]:
        assert sum(size["shares"].values()) == pytest.approx(1)
        assert size["goodput"] == pytest.approx(size["shares"]["useful"], rel=0.02)
    assert [len(study["seconds"]) for study in made["intervals"]] == [11, 11]
    html = page.read_text()
    assert html.count("<svg") == 4
    assert "Simulated from the run" in html
    assert "Daly" in html


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "{run}", "--gpu", "h900"), ("h900", "a100-80")),
        (("plan", "{run}", "--gpu", "v100-32", "--set", "train.precision=bf16"), ("V100", "fp32")),
        (("plan", "{run}", "--nodes", "3"), ("24 ranks", "16 GPUs")),
        (("plan", "{run}", "--assume", "mfuu=1"), ("mfuu", "mfu")),
        (("plan", "{run}", "--calibration", "{tmp}/none"), ("bench_train.py",)),
        (("plan", "{run}", "--calibration", "{tmp}/none", "--mfu", "0.1"), ("twice",)),
        (("simulate", "{run}", "--gpus", "8,x"), ("8,x", "8,64,512")),
    ],
)
def test_wrong_input_is_one_line(run_file, tmp_path, arguments, words):
    done = frepa(*(part.format(run=run_file, tmp=tmp_path) for part in arguments))
    assert done.returncode in (2, 3)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("frepa: error: ")]
    for word in words:
        assert word in line
