"""The settings of `frepa launch render`: what runs where, with which machines and storage.

Names that enter a line of `#SBATCH` or a manifest's metadata are held to what those take; free text has no
control characters, and templates quote it (cluster/render/quoting.py). Secrets have no place here: Kubernetes
gives them by reference, and on Slurm they come from the user's own files.
"""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from shards.support.settings import Settings

Text = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]+$", max_length=1000)]
"""One line of anything."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$")]
"""A DNS label, with room for what is put after it."""

Label = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
"""Name of an object of Kubernetes."""

SlurmWord = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.,:@%/&|+=*\[\]-]+$", max_length=200)]
"""What stands after `=` in a line of #SBATCH, which no quotes would protect."""

Image = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_./:@-]*$", max_length=300)]
Quantity = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]*(m|[KMGT]i?)?$")]
Key = Annotated[str, StringConstraints(pattern=r"^([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$")]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Override = Annotated[Text, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*=")]
"""A `--set` of another command: `dotted.key=value`."""

_SECRET = re.compile(r"SECRET|PASSWORD|PASSWD|TOKEN|CREDENTIAL|(ACCESS|API|PRIVATE)_KEY", re.IGNORECASE)


def _check_no_secret(name: str) -> str:
    if _SECRET.search(name):
        raise ValueError("looks like a secret: name it under kubernetes.secret_env")
    return name


PlainVariable = Annotated[Variable, AfterValidator(_check_no_secret)]
"""A variable whose value everybody may read."""


class SecretKey(Settings):
    """A key of a Secret of Kubernetes."""

    secret: Label
    key: Key


class PretrainJob(Settings):
    """What is trained.

    Attributes:
        config: run config: the name of a shipped one, or a file that all nodes see (Kubernetes: the file is
            put into a ConfigMap).
        output: run folder; a relative one is in `storage`.
        overrides: more `--set` of `frepa pretrain`.
        max_restarts: of `frepa pretrain`: restarts in a row without a new checkpoint.
        hang_seconds: of `frepa pretrain`: a rank that shows no progress for so long counts as dead.
    """

    config: Text = "retmae/vit_b"
    output: Text = "runs/pretrain"
    overrides: tuple[Override, ...] = ()
    max_restarts: int = Field(5, ge=0)
    hang_seconds: int = Field(600, ge=1)


class ShardsJob(Settings):
    """What is built.

    Attributes:
        sources: folders, listings, S3 prefixes.
        config: build config.
        state: private folder; a relative one is in `storage`.
        overrides: more `--set` of `frepa shards build`.
    """

    sources: tuple[Text, ...] = Field(("s3://hospital/retina",), min_length=1)
    config: Text = "shards/fundus"
    state: Text = "state/retina"
    overrides: tuple[Override, ...] = ()


class SweepJob(Settings):
    """What is searched.

    Attributes:
        config: of `frepa sweep`: a file here, the name of a shipped one, or a file in `storage`.
        output: folder of all trials; a relative one is in `storage`.
        overrides: more `--set` of `frepa sweep`.
    """

    config: Text = "sweep.yaml"
    output: Text = "runs/sweep"
    overrides: tuple[Override, ...] = ()


class EvaluateJob(Settings):
    """What becomes of a run.

    Attributes:
        labelled: folder of images with labels for the probe; a relative one is in `storage`.
        probe_arguments: more options of `frepa evaluate probe`.
        encoder: folder for the exported encoder; a relative one is in `storage`.
    """

    labelled: Text = "labelled/retina"
    probe_arguments: tuple[Text, ...] = ()
    encoder: Text = "encoders/pretrain"


class SlurmSettings(Settings):
    """How Slurm is asked.

    Attributes:
        partition, account, qos, constraint, gres: as of sbatch(1); None leaves the line out. With `gres` the
            GPUs are asked for by it (`gpu:h100:8`), else by --gpus-per-node.
        time_limit: of a job of training; training stops in time, and the job is queued again.
        requeue: let jobs that were stopped be queued again.
        log: file of what a job prints.
        environment: activated by every job: a virtual environment on storage that all nodes see.
        modules: loaded before it, by `module load`.
        set_memory: ask for `memory_gib`; clusters that do not count memory refuse it.
        metrics_address: on which ranks serve metrics; None serves none. Anyone who reaches it may read them.
    """

    partition: SlurmWord | None = None
    account: SlurmWord | None = None
    qos: SlurmWord | None = None
    constraint: SlurmWord | None = None
    gres: SlurmWord | None = None
    time_limit: Annotated[str, StringConstraints(pattern=r"^(\d+-)?\d+(:\d+){0,2}$")] = "24:00:00"
    requeue: bool = True
    log: SlurmWord = "%x-%j.log"
    environment: Text | None = "/shared/frepa/.venv"
    modules: tuple[Text, ...] = ()
    set_memory: bool = True
    metrics_address: Text | None = None


class KubernetesSettings(Settings):
    """How Kubernetes is asked.

    Attributes:
        namespace: where all of it is.
        image: what cluster/docker/Dockerfile built, pushed to where the nodes find it.
        pull_secrets: names of Secrets for the image.
        service_account: of the pods; its rights in S3 come from `role_arn` (IRSA) where that is set.
        role_arn: role of the service account.
        storage_claim: PersistentVolumeClaim, ReadWriteMany, mounted at `storage`.
        storage_class: of the claim; None takes the cluster's own.
        storage_size: of the claim.
        cache_size: node-local room for shards from S3.
        shm_size: of /dev/shm, which loaders and NCCL use; it counts as memory of the pod.
        gpu_resource: name by which the device plugin counts GPUs.
        extra_resources: more of these, such as `rdma/hca: 1`.
        node_selector: labels of the nodes.
        tolerates: taints of the nodes, by key.
        secret_env: variables from Secrets, such as AWS_SECRET_ACCESS_KEY where there is no `role_arn`.
        max_failures: pods' failures before a job is given up; stops and disruptions do not count.
        user_id: of the user in the image.
    """

    namespace: Name = "frepa"
    image: Image = "registry.example/frepa:0.1.0"
    pull_secrets: tuple[Label, ...] = ()
    service_account: Label = "frepa"
    role_arn: Text | None = None
    storage_claim: Label = "frepa-storage"
    storage_class: Label | None = None
    storage_size: Quantity = "1Ti"
    cache_size: Quantity = "200Gi"
    shm_size: Quantity = "32Gi"
    gpu_resource: Key = "nvidia.com/gpu"
    extra_resources: dict[Key, int] = Field(default_factory=dict)
    node_selector: dict[Key, Text] = Field(default_factory=dict)
    tolerates: tuple[Key, ...] = ("nvidia.com/gpu",)
    secret_env: dict[Variable, SecretKey] = Field(default_factory=dict)
    max_failures: int = Field(20, ge=0)
    user_id: int = Field(10001, ge=1)


class DockerSettings(Settings):
    """How the image is made.

    Attributes:
        base: with Python 3.11 or newer and Debian's apt-get.
        extras: of the package: formats to read, what KubeRay needs.
    """

    base: Image = "python:3.11-slim-bookworm"
    extras: tuple[Name, ...] = ("formats", "kuberay", "tune")


class LaunchConfig(Settings):
    """All of it.

    Attributes:
        name: of jobs: `NAME-pretrain`, `NAME-sweep`, ...
        nodes, gpus_per_node, cpus_per_node, memory_gib: the machines: how many, and of one.
        ranks_per_node: None: one per GPU, or one where there is none.
        stop_seconds: how long ranks may take to stop with a checkpoint, see `frepa pretrain --stop-seconds`.
        storage: folder that all nodes see, for run folders.
        data_root: dataset, to build and to train from; a relative folder is in `storage`.
        metrics_targets: folder in which ranks tell Prometheus where their metrics are (`file_sd_configs`); a
            relative one is in `storage`. None serves none.
        env: variables of all jobs; no secrets.
    """

    name: Name = "frepa"
    nodes: int = Field(2, ge=1)
    gpus_per_node: int = Field(4, ge=0)
    ranks_per_node: int | None = Field(None, ge=1)
    cpus_per_node: int = Field(48, ge=1)
    memory_gib: int = Field(384, ge=1)
    stop_seconds: int = Field(240, ge=1, le=65_000)
    storage: Annotated[Text, StringConstraints(pattern=r"^/")] = "/shared/frepa"
    data_root: Text = "s3://datasets/retina"
    metrics_targets: Text | None = "targets"
    env: dict[PlainVariable, Text] = Field(default_factory=dict)
    pretrain: PretrainJob = PretrainJob()
    shards: ShardsJob = ShardsJob()
    sweep: SweepJob = SweepJob()
    evaluate: EvaluateJob = EvaluateJob()
    slurm: SlurmSettings = SlurmSettings()
    kubernetes: KubernetesSettings = KubernetesSettings()
    docker: DockerSettings = DockerSettings()

    @model_validator(mode="after")
    def _has_cores_for_its_ranks(self) -> Self:
        if self.ranks > self.cpus_per_node:
            raise ValueError(f"{self.ranks} ranks on {self.cpus_per_node} CPUs: raise cpus_per_node")
        return self

    @property
    def ranks(self) -> int:
        """Ranks of one node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def grace_seconds(self) -> int:
        """How long before the end a job is told of it: to stop, and a minute to spare."""
        return self.stop_seconds + 60

    def place(self, name: str) -> str:
        """A place that all nodes see: in `storage` where it says no other."""
        return name if name.startswith("/") or "://" in name else f"{self.storage.rstrip('/')}/{name}"
