"""Who a process is among those that run the same command: from flags, or from what launchers set."""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from devices import with_devices
from ports import two_free_ports

from stepjax.cli import SEVERAL_HOSTS, VERBS, main
from stepjax.errors import ClusterError
from stepjax.sharding.cluster import ClusterSpec, detect, first_host
from stepjax.sharding.watchdog import EXIT_CODE

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "sharding" / "launch"

SLURM = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[003-006,010]",
    "SLURM_STEP_NUM_TASKS": "32",
    "SLURM_STEP_TASKS_PER_NODE": "8(x4)",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
MPI_5 = {name: value for name, value in MPI.items() if name != "OMPI_MCA_orte_hnp_uri"}
MPI_5 |= {"PMIX_RANK": "3", "PMIX_NAMESPACE": "prterun-gpu-07.cluster-4247@1"}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4", "PMI_FD": "9"}
SPREAD = HYDRA | {"MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}  # over two hosts
POD = {"STEPJAX_COORDINATOR": "stepjax-0.stepjax:61440", "STEPJAX_PROCESSES": "4", "JOB_COMPLETION_INDEX": "2"}


def without(environ: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environ.items() if key != name}


FOUND: list[tuple[dict[str, str], tuple[str, int, int, Any] | None]] = [
    ({}, None),
    ({"PATH": "/bin", "HOME": "/root"}, None),
    (SLURM, ("gpu003:61590", 32, 9, (1,))),
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, ("gpu003:61590", 32, 9, None)),
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1"}, ("gpu003:61590", 32, 9, None)),
    (SLURM | {"SLURM_STEP_NODELIST": "login1"}, ("login1:61590", 32, 9, (1,))),
    (SLURM | {"STEPJAX_COORDINATOR": "other:9000"}, ("other:9000", 32, 9, (1,))),
    (without(SLURM, "SLURM_STEP_NUM_TASKS") | {"SLURM_NTASKS": "16"}, ("gpu003:61590", 16, 9, (1,))),
    (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    # sbatch's own shell, and salloc's: no step
    ({"SLURM_JOB_ID": "12345", "SLURM_NTASKS": "32", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "gpu[1-4]"}, None),
    (MPI, ("10.96.0.1:61750", 4, 3, (1,))),
    (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, ("10.96.0.1:61750", 4, 3, None)),
    (MPI | {"OMPI_MCA_orte_hnp_uri": "7;tcp6://[fe80::1]:34911"}, ("[fe80::1]:61454", 4, 3, (1,))),
    (without(MPI, "OMPI_MCA_orte_hnp_uri") | {"STEPJAX_COORDINATOR": "h:1234"}, ("h:1234", 4, 3, (1,))),
    (MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
    (POD, ("stepjax-0.stepjax:61440", 4, 2, None)),
    (POD | {"STEPJAX_PROCESS_ID": "3"}, ("stepjax-0.stepjax:61440", 4, 3, None)),
    (POD | SLURM, ("stepjax-0.stepjax:61440", 4, 2, None)),  # what the user set goes first
    (POD | {"STEPJAX_PROCESSES": "1", "JOB_COMPLETION_INDEX": "0"}, None),
    # mpirun in an allocation: srun started its daemons, one a node, and in salloc's shell there is a step of one task
    (SLURM | MPI | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ("10.96.0.1:61750", 4, 3, (1,))),
    (SLURM | MPI | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, ("10.96.0.1:61750", 4, 3, (1,))),
    (SLURM | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    (SLURM | {"SLURM_STEP_ID": "1"}, ("gpu003:61592", 32, 9, (1,))),  # beside step 0
    (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, ("gpu003:61590", 32, 9, None)),  # --gpus-per-task: it sees its own only
    (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, ("gpu003:61590", 32, 9, (1,))),
    (MPI | {"CUDA_VISIBLE_DEVICES": "3"}, ("10.96.0.1:61750", 4, 3, None)),
    ({"JOB_COMPLETION_INDEX": "2"}, None),  # an indexed job of independent pods
    # MPICH and Intel MPI on one host, in a SLURM allocation (their daemons were started by srun), under LSF and PBS
    (HYDRA, ("localhost:61440", 4, 3, (3,))),
    (HYDRA | {"STEPJAX_COORDINATOR": "h:1234"}, ("h:1234", 4, 3, (3,))),
    (HYDRA | {"CUDA_VISIBLE_DEVICES": "3"}, ("localhost:61440", 4, 3, None)),
    (HYDRA | {"PMI_SIZE": "1", "PMI_RANK": "0"}, None),
    (SPREAD | {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "rack[2-3]n[01-04]"}, ("rack2n01:61590", 4, 3, (1,))),
    (SPREAD | SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, ("gpu003:61590", 4, 3, (1,))),
    (SPREAD | {"LSB_JOBID": "12345", "LSB_MCPU_HOSTS": "h7 2 h8 2"}, ("h7:61590", 4, 3, (1,))),
    (HYDRA | {"PBS_JOBID": "12345.server"}, ("localhost:61590", 4, 3, (3,))),
    (SPREAD | {"MPI_LOCALNRANKS": "1", "STEPJAX_COORDINATOR": "h:1234"}, ("h:1234", 4, 3, None)),
    # srun --mpi=pmi2 sets PMI's variables too, and they are SLURM's numbers
    (SLURM | {"PMI_RANK": "9", "PMI_SIZE": "32"}, ("gpu003:61590", 32, 9, (1,))),
    # another launcher with PMI
    (
        {"PMI_RANK": "1", "PMI_SIZE": "2", "PALS_LOCAL_RANKID": "1", "STEPJAX_COORDINATOR": "h:1"},
        ("h:1", 2, 1, (1,)),
    ),
    # Open MPI 5: its namespace has mpirun's host
    (MPI_5, ("gpu-07.cluster:61754", 4, 3, (1,))),
    (MPI_5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, ("localhost:61754", 4, 3, (1,))),
]

REFUSED: list[tuple[dict[str, str], str]] = [
    (without(POD, "STEPJAX_COORDINATOR"), "STEPJAX_COORDINATOR: is not set, expected HOST:PORT"),
    (without(POD, "STEPJAX_PROCESSES"), "STEPJAX_PROCESSES: is not set, expected an integer"),
    ({"STEPJAX_PROCESS_ID": "1"}, "STEPJAX_COORDINATOR: is not set"),
    ({"STEPJAX_COORDINATOR": "h:1"}, "nothing says how many processes"),
    (without(POD, "JOB_COMPLETION_INDEX"), "JOB_COMPLETION_INDEX: is not set, expected an integer"),
    (POD | {"STEPJAX_PROCESSES": "four"}, "STEPJAX_PROCESSES: is 'four', expected an integer"),
    (POD | {"STEPJAX_PROCESSES": ""}, "STEPJAX_PROCESSES: is not set"),
    (POD | {"STEPJAX_PROCESSES": "-4"}, "STEPJAX_PROCESSES: is '-4'"),
    (POD | {"STEPJAX_PROCESSES": "0"}, "0 processes, expected at least 1"),
    (POD | {"JOB_COMPLETION_INDEX": "4"}, "this is process 4, expected one of 0 to 3"),
    (POD | {"STEPJAX_COORDINATOR": "host"}, "the coordinator is 'host', expected HOST:PORT"),
    (POD | {"STEPJAX_COORDINATOR": "host:"}, "expected HOST:PORT"),
    (POD | {"STEPJAX_COORDINATOR": "host:70000"}, "expected HOST:PORT"),
    (SLURM | {"SLURM_PROCID": "32"}, "SLURM (SLURM_STEP_NUM_TASKS, SLURM_PROCID): this is process 32"),
    (without(SLURM, "SLURM_PROCID"), "SLURM_PROCID: is not set"),
    (without(SLURM, "SLURM_JOB_ID"), "SLURM_JOB_ID: is not set"),
    (SLURM | {"SLURM_STEP_NODELIST": "[]"}, "SLURM_STEP_NODELIST: is '[]', expected host names"),
    (without(MPI, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK: is not set"),
    (without(MPI, "OMPI_MCA_orte_hnp_uri"), "set STEPJAX_COORDINATOR=HOST:PORT"),
    (SPREAD, "MPI: its variables do not tell where process 0 runs; set STEPJAX_COORDINATOR=HOST:PORT"),
    (HYDRA | {"PMI_RANK": "4"}, "MPI (PMI_SIZE, PMI_RANK): this is process 4, expected one of 0 to 3"),
    (HYDRA | {"PMI_SIZE": "four"}, "PMI_SIZE: is 'four', expected an integer"),
    (SPREAD | {"SLURM_JOB_NODELIST": "a[1"}, "SLURM_JOB_NODELIST: is 'a[1', expected host names"),
]


@pytest.mark.parametrize(("environ", "expected"), FOUND)
def test_a_launcher_s_variables_are_understood(environ, expected):
    spec = detect(environ)
    found = spec and (spec.coordinator, spec.num_processes, spec.process_id, spec.local_device_ids)
    assert found == expected


@pytest.mark.parametrize(("environ", "message"), REFUSED)
def test_half_a_cluster_is_refused_by_the_variable_s_name(environ, message):
    with pytest.raises(ClusterError, match=re.escape(message)):
        detect(environ)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("gpu[003-006,010],login1", "gpu003"),
        ("gpu[7]", "gpu7"),
        ("rack1-n[10-20]-ib", "rack1-n10-ib"),
        ("rack[0-1]blade[2-3]", "rack0blade2"),
        ("a[01-03,7],b", "a01"),
        ("x[3,1-2]y[009-010]z[5]-ib0.site,other", "x3y009z5-ib0.site"),
        ("[7-9]", "7"),
        ("[1-2]n[3-4]", "1n3"),
        (" a[1-2], b", "a1"),
        ("a b", "a"),
        ("bgl[123x456]", "bgl123"),
        ("tux[0-1][2-3]", "tux02"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


@pytest.mark.parametrize(
    "nodelist", ["", "a[", "a[]", "a[1", "a]1[", "a[1-]", "a[-1]", "a[1,]", "a[1]]", "a[b]", "a[[1]]", "a;b", "[]", ","]
)
def test_what_is_no_node_list_is_refused(nodelist):
    with pytest.raises(ClusterError, match="expected host names"):
        first_host(nodelist)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator", "h:1"], "--processes and --process-id missing"),
        (["--processes", "2", "--process-id", "0"], "--coordinator missing"),
        (
            ["--coordinator", "h:1", "--processes", "2", "--process-id", "2"],
            "this is process 2, expected one of 0 to 1",
        ),
        (["--coordinator", "h", "--processes", "2", "--process-id", "0"], "the coordinator is 'h'"),
    ],
)
def test_flags_go_together(capsys, flags, message):
    assert main(["generate", "--prompt", "x", *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_conversation_has_one_process(capsys, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert main(["chat"]) == 1
    assert "chat: runs in one process, found 32 (SLURM" in capsys.readouterr().err


@pytest.mark.parametrize("launcher", [SLURM, MPI, HYDRA, MPI_5, POD])
def test_commands_of_one_process_are_refused_in_several(capsys, monkeypatch, launcher):
    """Else each process would write the same folder, or train a model of its own."""
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    for verb in sorted(set(VERBS) - set(SEVERAL_HOSTS)):
        with pytest.raises(SystemExit) as wrong:  # its arguments are read first
            main([verb, "--no-such-flag"])
        assert wrong.value.code == 2
    capsys.readouterr()
    commands = [
        ["pretrain", "x.toml", "--out", "run"],
        ["teach", "x.toml", "--out", "scores"],
        ["convert", "a", "b", "--experts", "int8"],
        ["release", "run", "--out", "folder"],
        ["info", "step-tiny"],
        ["report", "run"],
        ["export-adapter", "a", "b", "--model", "step-tiny"],
        ["import-adapter", "a", "b", "--model", "step-tiny"],
        ["cache"],
    ]
    for command in commands:
        assert main(command) == 1
        said = capsys.readouterr().err
        assert f"{command[0]}: runs in one process, found " in said
        assert said.count("\n") == 1
        assert "start it without srun or mpirun, or as one task" in said


def test_half_a_description_stops_no_command_of_one_process(capsys, monkeypatch):
    monkeypatch.setenv("STEPJAX_COORDINATOR", "h:1")
    assert main(["info", "step-tiny", "--json"]) == 0
    assert main(["chat"]) == 1


def test_keys_of_clusters():
    """From a secret that all have; else from the job, as the launcher names it."""

    def key(environ: dict[str, str]) -> bytes:
        spec = detect(environ)
        assert spec
        return spec.key(environ)

    jobs = [
        SLURM,
        SLURM | {"SLURM_JOB_ID": "6"},
        SLURM | {"SLURM_STEP_ID": "1"},
        MPI,
        MPI_5,
        HYDRA | {"PBS_JOBID": "5"},
    ]
    assert len({key(job) for job in jobs}) == len(jobs)
    assert key(SLURM) == key(SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    secret = {"STEPJAX_KEY": "s3cret"}
    assert key(SLURM | secret) == key(MPI | secret) != key(SLURM)
    assert key(SLURM | secret) != key(SLURM | {"STEPJAX_KEY": "other"})


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1])
def test_a_port_that_is_taken_is_named(after):
    """jax's, or that of the watchdog."""
    port = two_free_ports()
    flags = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process-id"]
    script = "import sys; from stepjax.sharding import cluster; cluster.JOIN_S = 4; from stepjax.cli import main; "
    with socket.create_server(("", port + after)):
        both = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    script + "sys.exit(main(sys.argv[1:]))",
                    "generate",
                    "--prompt",
                    "x",
                    *flags,
                    me,
                ],
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                text=True,
            )
            for me in "01"
        ]
        errors = [each.communicate(timeout=60)[1] for each in both]
    assert both[0].returncode == 1
    assert errors[0].startswith(
        f"stepjax: error: port {port + after}: process 0 cannot listen there (Address already in"
    )
    assert both[1].returncode == (1 if after else EXIT_CODE)
    assert (
        "did not find each other" in errors[1] if after else f"process 0 failed: ClusterError: port {port}" in errors[1]
    )


def test_an_address_of_six_goes_without_its_brackets_to_sockets():
    assert ClusterSpec("[fe80::1]:100", 2, 0).watch_address == ("fe80::1", 101)


# The files to start from


def test_the_slurm_script_is_clean():
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert checker, "install the test extra, which brings shellcheck"
    done = subprocess.run([checker, str(LAUNCH / "slurm.sh")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_slurm_script_runs_on_two_local_processes(tmp_path):
    """With an srun that sets what SLURM would."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    job = random.SystemRandom().randrange(10**6)
    srun.write_text(
        f"""#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
export SLURM_JOB_ID={job} SLURM_STEP_ID=0 SLURM_STEP_NODELIST=localhost
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first && wait $second
"""
    )
    (tmp_path / "bin" / "stepjax").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m stepjax "$@"\n')
    for file in srun.parent.iterdir():
        file.chmod(0o755)
    (tmp_path / "tokens.json").write_text("[[0, 5, 9]]")
    environment = {
        **with_devices(2),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{srun.parent}:{os.environ['PATH']}",
        "MODEL": "step-tiny",
        "MESH": "expert=4",
        "SHARED": str(tmp_path / "shared"),
    }
    done = subprocess.run(
        [str(LAUNCH / "slurm.sh")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "logits.npz: 1 sequences, 3 tokens\n"
    with np.load(tmp_path / "logits.npz") as found:
        assert found["p0_logits"].shape[0] == 3


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (124, 0, False), (75, 0, True), (137, 2, True), (75, 3, False)],
)
def test_the_slurm_script_goes_back_to_the_queue_when_another_try_may_help(tmp_path, code, restarts, again):
    (tmp_path / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" > "$(dirname "$0")/asked"\n')
    for file in tmp_path.iterdir():
        file.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SHARED": str(tmp_path / "shared"),
        "SLURM_JOB_ID": "17",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    done = subprocess.run(
        [str(LAUNCH / "slurm.sh")], cwd=tmp_path, env={**environment, "HOME": str(tmp_path)}, check=False
    )
    assert done.returncode == code
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else None) == ("requeue 17\n" if again else None)


def test_the_kubernetes_manifest_says_what_the_code_reads():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8"))
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    environ = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    (secret,) = [each for each in container["env"] if "value" not in each]
    assert secret["name"] == "STEPJAX_KEY"
    name, key = (secret["valueFrom"]["secretKeyRef"][part] for part in ("name", "key"))
    assert f"kubectl create secret generic {name} --from-literal={key}=" in (LAUNCH / "kubernetes.yaml").read_text()
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(environ["STEPJAX_PROCESSES"])
    found = detect(environ | {"JOB_COMPLETION_INDEX": "3"})
    assert found is not None
    host, port = found.coordinator.split(":")
    # A pod of an indexed job is called JOB-INDEX, and SUBDOMAIN is the headless service that gives it a name.
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert [each["port"] for each in service["spec"]["ports"]] == [int(port), found.watch_address[1]]
    mesh = container["args"][container["args"].index("--mesh") + 1]
    devices = int(np.prod([int(size) for size in re.findall(r"=(\d+)", mesh)]))
    assert devices == spec["completions"] * container["resources"]["limits"]["nvidia.com/gpu"]
