"""The JobSet against its schema, what it asks of Kubernetes, and what its pods make of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import ROOT
from tiny import experiment

from core.config import load
from core.distributed import Place, find_place
from core.errors import UserError
from launch.jobset import kubernetes_name, render
from llm.config import Experiment

jsonschema = pytest.importorskip("jsonschema")
SCHEMA = yaml.safe_load((Path(__file__).parent / "jobset_schema.yaml").read_text())


def errors(document: dict) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(document)]


def test_the_command_prints_what_the_schema_allows():
    config = "configs/llm/llama3-70b.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "launch.jobset", "--config", config, "--nodes", "64", "--gpus-per-node", "8",
         "--image", "registry.example/t2t:1", "--set", "run.name=Llama 3_70B"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    settings, jobset = yaml.safe_load_all(done.stdout)
    assert errors(jobset) == []
    assert settings["kind"] == "ConfigMap" and settings["metadata"]["name"] == "llama-3-70b"
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 64
    assert job["template"]["spec"]["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_its_pods_find_their_configuration_and_each_other(tmp_path):
    given = experiment(tmp_path, tmp_path, mesh={"data": 4})
    config, jobset = render(given, 2, 2, "image", "claim")
    (tmp_path / "config.yaml").write_text(config["data"]["config.yaml"])
    seen = load(Experiment, tmp_path / "config.yaml")
    assert seen.model == given.model and str(seen.run.folder) == "/runs/run"
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert find_place(environment | {"JOB_COMPLETION_INDEX": "1"}) == Place(
        f"run-worker-0-0.{jobset['spec']['network']['subdomain']}:61440", 2, 1
    )
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert f"{mounts['config']}/config.yaml" in container["command"] and mounts["runs"] == "/runs"


def test_the_schema_finds_mistakes(tmp_path):
    for path, key, value in [
        ((), "spce", {}),
        (("spec", "failurePolicy"), "maxRestarts", "10"),
        (("spec", "replicatedJobs", 0, "template", "spec"), "completionMode", "indexed"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec"), "restartPolicy", "Sometimes"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0), "cmd", []),
    ]:
        _, document = render(experiment(tmp_path, tmp_path, mesh={"data": 4}), 2, 2, "image", "claim")
        place = document
        for step in path:
            place = place[step]
        place[key] = value
        assert errors(document), key


def test_a_mesh_of_another_size_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"mesh\.data=4 does not match the 8 planned"):
        render(experiment(tmp_path, tmp_path, mesh={"data": 4}), 2, 4, "image", "claim")


@pytest.mark.parametrize("name", ["Llama 3_70B", "7b", "é", "x" * 80, "a.b-", "--"])
def test_names_are_labels(name):
    label = kubernetes_name(name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", label) and len(f"{label}-worker-0-99999") <= 63
