"""Examples for several hosts: what Slurm and Kubernetes are asked for, and one report out of all results."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from string import Template

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(list(command), capture_output=True, text=True, env=kept | environment)


# -- Slurm -------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """sbatch and engines that note what they are asked for; jobs are numbered."""
    note = f'printf "%s " "$(basename "$0")" "$@" >>{tmp_path}/asked; echo >>{tmp_path}/asked'
    program(tmp_path, "sbatch", f"{note}\nwc -l <{tmp_path}/asked")
    for name in ("podman", "docker"):
        program(tmp_path, name, note)
    return tmp_path


def asked(cluster: Path) -> list[str]:
    return (cluster / "asked").read_text().splitlines()


def test_slurm_gets_a_job_for_each_node_and_a_report_after_all(cluster: Path) -> None:
    script = str(ROOT / "deploy" / "slurm.sh")
    done = run(cluster, script, "node-a", "node-b", DATA="/shared")
    assert done.returncode == 0, done.stderr
    first, second, last = asked(cluster)
    assert first.split() == ["sbatch", "--parsable", "--nodelist=node-a", script, "run"]
    assert second.split() == ["sbatch", "--parsable", "--nodelist=node-b", script, "run"]
    assert last.split() == ["sbatch", "--dependency=afterany:1:2", "--nodelist=node-a", script, "report"]


@pytest.mark.parametrize(("engine", "gpus"), [("podman", "--device nvidia.com/gpu=all"), ("docker", "--gpus all")])
def test_a_slurm_job_runs_the_matrix_as_the_image_is_tested(cluster: Path, engine: str, gpus: str) -> None:
    environment = {"DATA": "/shared", "ENGINE": engine, "SLURM_JOB_ID": "7", "IMAGE": "image:1", "PROFILE": "paper"}
    done = run(cluster, str(ROOT / "deploy" / "slurm.sh"), "run", **environment)
    assert done.returncode == 0, done.stderr
    calls = asked(cluster)
    for call in calls:
        assert call.startswith(f"{engine} run --rm --read-only ")
        assert gpus in call
        assert "--volume /shared:/data" in call
        assert "--env PROFILE=paper" in call
    assert [call.partition(" image:1 ")[2].strip() for call in calls] == ["make doctor", "make all FLAGS=--quiet"]


def test_slurm_without_a_shared_folder_or_nodes_is_an_error(cluster: Path) -> None:
    script = str(ROOT / "deploy" / "slurm.sh")
    for words, environment, said in (
        (["node"], {}, "DATA: a folder that all hosts share"),
        ([], {"DATA": "/shared"}, "1: names of nodes"),
        (["rnu"], {"DATA": "/shared", "SLURM_JOB_ID": "7"}, "rnu: run or report"),
    ):
        done = run(cluster, script, *words, **environment)
        assert done.returncode != 0
        assert said in done.stderr
    assert not (cluster / "asked").exists()


# -- one report --------------------------------------------------------------------------------------


def test_the_report_sets_every_other_machine_beside_this_one(tmp_path: Path) -> None:
    for tag in ("A100", "H200", "GB10"):
        (tmp_path / "reports" / tag).mkdir(parents=True)
        (tmp_path / "reports" / tag / "status.json").write_text("{}")
    (tmp_path / "reports" / "archive").mkdir()
    own = tmp_path / "reports" / "H200"
    program(tmp_path, "make", f'printf "[%s]" "$@" >>{tmp_path}/asked; echo \'{{"report": "{own}/report.md"}}\'')
    done = run(tmp_path, str(ROOT / "deploy" / "collect.sh"), DATA=str(tmp_path))
    assert done.returncode == 0, done.stderr
    others = " ".join(f"--other {tmp_path}/reports/{tag}" for tag in ("A100", "GB10"))
    assert (tmp_path / "asked").read_text() == f"[-s][report][FLAGS=--json][-s][report][ARGS={others}]"


def test_no_report_where_this_machine_has_no_results(tmp_path: Path) -> None:
    program(tmp_path, "make", "echo 'error: no records there yet' >&2; exit 1")
    done = run(tmp_path, str(ROOT / "deploy" / "collect.sh"), DATA=str(tmp_path))
    assert done.returncode != 0
    assert "no records" in done.stderr


# -- Kubernetes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["make doctor && make all FLAGS=--quiet", "deploy/collect.sh"])
def test_a_kubernetes_job_of_each_kind_has_its_own_name_node_and_image(command: str) -> None:
    text = (ROOT / "deploy" / "kubernetes.yaml").read_text()
    assert f"COMMAND={command}" in text.replace("'", "")
    jobs = []
    for name, gpu, cpu in (("h200", "NVIDIA-H200", "x86_64"), ("gb200", "NVIDIA-GB200", "aarch64")):
        filled = Template(text.partition("\napiVersion")[1] + text.partition("\napiVersion")[2]).substitute(
            NAME=name, GPU=gpu, CPU=cpu, COMMAND=command, PROFILE="bitnet-2b"
        )
        claim, job = yaml.safe_load_all(filled)
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["args"] == ["bash", "-c", command]
        assert container["image"] == f"slidesparse:{cpu}"
        assert pod["nodeSelector"] == {"nvidia.com/gpu.product": gpu}
        claims = [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if volume["name"] == "data"]
        assert claims == [claim["metadata"]["name"]]
        jobs.append(job["metadata"]["name"])
    assert len(set(jobs)) == 2
