"""`python -m launch.jobset --config FILE --nodes N --gpus-per-node G --image I`: a JobSet for Kubernetes.

It prints YAML for `kubectl apply -f -`: a ConfigMap with the resolved configuration, and a JobSet with one
pod a node. The image's working directory holds this checkout, and its `python` the environment. Runs and
caches are kept on the volume claim `--claim`, which all pods mount. When a pod fails all are started again
and go on from the newest checkpoint; a user's error (exit code 2) ends the job.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any

import yaml

from core.config import add_arguments, load, to_yaml
from core.errors import run_command
from launch.supervise import USER_ERROR, require_fit
from llm.config import Experiment

PORT = 61440
RESTARTS = 10
STOP_SECONDS = 300  # from SIGTERM to SIGKILL, to save
_RUNS, _CONFIG, _WORKER = "/runs", "/config", "worker"
_NAME_LENGTH = 45  # of the 63 of a host's name, which ends in the worker's name and number


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.jobset", description=__doc__.split("\n\n")[0])
    add_arguments(parser)
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, required=True, metavar="G")
    parser.add_argument("--image", required=True, metavar="I", help="of the container")
    parser.add_argument("--claim", default="runs", help="persistent volume claim for runs; default: runs")
    args = parser.parse_args(argv)
    experiment = load(Experiment, args.config, args.overrides)
    documents = render(experiment, args.nodes, args.gpus_per_node, args.image, args.claim)
    print(yaml.safe_dump_all(documents, sort_keys=False), end="")


def render(experiment: Experiment, nodes: int, gpus: int, image: str, claim: str) -> list[dict[str, Any]]:
    """The ConfigMap and the JobSet.

    Raises:
        UserError: when the mesh doesn't fit nodes x GPUs.
    """
    require_fit(experiment, experiment.mesh, nodes * gpus)
    name = kubernetes_name(experiment.run.name)
    experiment = dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, dir=_RUNS))
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {"config.yaml": to_yaml(experiment)},
    }
    job = {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": 0,  # one pod alone can't come back: the JobSet starts all of them again
        "podFailurePolicy": {
            "rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [USER_ERROR]}}]
        },
        "template": {"spec": _pod(name, nodes, gpus, image, claim)},
    }
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            # Pods find the first one by name before it is ready, since it is ready when all have come.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": name},
            "failurePolicy": {
                "maxRestarts": RESTARTS,
                "rules": [
                    {
                        "name": "userError",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": _WORKER, "replicas": 1, "template": {"spec": job}}],
        },
    }
    return [config, jobset]


def _pod(name: str, nodes: int, gpus: int, image: str, claim: str) -> dict[str, Any]:
    volumes = {
        "config": (_CONFIG, {"configMap": {"name": name}}),
        "runs": (_RUNS, {"persistentVolumeClaim": {"claimName": claim}}),
        "shm": ("/dev/shm", {"emptyDir": {"medium": "Memory"}}),  # of NCCL, for which 64 MiB are too few
    }
    environment = {"T2T_COORDINATOR": f"{name}-{_WORKER}-0-0.{name}:{PORT}", "T2T_PROCESSES": str(nodes)}
    container = {
        "name": "train",
        "image": image,
        "command": ["python", "-m", "llm.train", "--config", f"{_CONFIG}/config.yaml", "--resume"],
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "ports": [{"containerPort": PORT}],
        "resources": {"limits": {"nvidia.com/gpu": gpus}},
        "volumeMounts": [{"name": volume, "mountPath": path} for volume, (path, _) in volumes.items()],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": STOP_SECONDS,
        "containers": [container],
        "volumes": [{"name": volume, **source} for volume, (_, source) in volumes.items()],
    }


def kubernetes_name(name: str) -> str:
    """`name` as a DNS label: lower-case letters, digits and hyphens, a letter first."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    label = label if label[:1].isalpha() else f"run-{label}"
    return label[:_NAME_LENGTH].rstrip("-")


if __name__ == "__main__":
    run_command(main)
