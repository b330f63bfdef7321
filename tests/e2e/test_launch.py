# SPDX-License-Identifier: Apache-2.0
"""What starts a run on other people's machines: scripts that run here against stand-ins, files that are read as they
will be read there, compiler flags that the compiler is asked about."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from bucket_server import running_bucket
from paths import ROOT

from lionjax.planner import topologies

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
FLAG_FILE = (LAUNCH / "flags.sh").read_text().replace("\\\n", "")
FLAGS = dict(re.findall(r'^((?:TPU|GPU)_\w+)="([^"]*)"', FLAG_FILE, re.MULTILINE))
JOB = {
    "NAME": "nextchat",
    "IMAGE": "here/lionjax",
    "CONFIG": "configs/nextchat_7b.py",
    "FIELDS": "--mesh.tensor 4",
    "QUEUE": "tpus",
    "CLAIM": "runs",
    "RUNS": "/runs",
    "TPU": "tpu-v5-lite-podslice",
    "SHAPE": "8x8",
    "HOSTS": "16",
    "SLICES": "2",
    "FLAGS": "overlap",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_read_by_bash(name):
    said = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr


def stand_in(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


def project(tmp_path: Path) -> Path:
    """A folder with launch/ alone, so that no .venv comes before the stand-ins."""
    shutil.copytree(LAUNCH, tmp_path / "project" / "launch")
    return tmp_path / "project"


def run(script: Path, *words: str, bin: Path, **env: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}"} | env
    return subprocess.run(["bash", script, *words], env=env, capture_output=True, text=True, timeout=60)


# What every host runs


@pytest.mark.parametrize(
    ("begun", "ends", "code", "wanted"),
    [
        *((True, True, 0, 0), (True, False, 0, 75), (False, False, 2, 2), (True, False, 2, 2), (True, False, 75, 75)),
        *((True, False, code, code) for code in (1, 134, 137, 139, 143)),
    ],
)
def test_the_exit_code_says_whether_to_start_again(tmp_path, begun, ends, code, wanted):
    here = project(tmp_path)
    made = [f"mkdir -p {tmp_path}/run/base/{name}" for name, is_ in (("0_one", begun), ("3_final", ends)) if is_]
    stand_in(tmp_path / "bin", "lionjax", "\n".join([*made, f"exit {code}"]))
    said = run(here / "launch/run.sh", "configs/a.py", f"{tmp_path}/run", bin=tmp_path / "bin")
    assert said.returncode == wanted, said.stderr


def test_overrides_and_compiler_flags_reach_the_command(tmp_path):
    here = project(tmp_path)
    stand_in(tmp_path / "bin", "lionjax", 'echo "$LIBTPU_INIT_ARGS"; printf "<%s>" "$@"; exit 3')
    words = ("configs/a.py", f"{tmp_path}/run", "--name", "two words")
    said = run(here / "launch/run.sh", *words, bin=tmp_path / "bin", FLAGS="vmem checks")
    assert FLAGS["TPU_VMEM"] in said.stdout and FLAGS["TPU_CHECKS"] in said.stdout
    assert said.stdout.endswith(f"<train><configs/a.py><--workdir><{tmp_path}/run><--name><two words>")
    assert run(here / "launch/run.sh", *words, bin=tmp_path / "bin", FLAGS="fast").returncode == 2


@pytest.mark.slow
def test_a_repeated_failure_ends_a_run_unless_checkpoints_were_written_in_between(tmp_path):
    here, workdir = project(tmp_path), tmp_path / "run"

    def codes(program: str, count: int) -> list[int]:
        stand_in(tmp_path / "bin", "lionjax", program)
        command = (here / "launch/run.sh", "a.py", str(workdir))
        return [run(*command, bin=tmp_path / "bin").returncode for _ in range(count)]

    assert codes("exit 1", 2) == [1, 1]
    assert codes("exit 139", 1) == [2]
    (workdir / "checkpoints/100").mkdir(parents=True)
    assert codes("exit 139", 3) == [139, 139, 2]
    saves = f"n=$(ls {workdir}/checkpoints | wc -l); mkdir {workdir}/checkpoints/$((1000 + n)); exit 1"
    assert codes(saves, 5) == [1] * 5
    unfinished = f"mkdir {workdir}/checkpoints/7$RANDOM.orbax-checkpoint-tmp; exit 1"
    assert codes(unfinished, 3) == [1, 2, 1]  # counted afresh after a person was asked
    (workdir / "checkpoints/200").mkdir()
    for again in (75, 137, 143):
        assert codes(f"exit {again}", 4) == [again] * 4
    assert codes("exit 134", 9) == [134] * 8 + [2]


@pytest.mark.parametrize("code", [1, 134, 137, 75])
def test_every_host_ends_with_2_when_one_of_them_does(tmp_path, code):
    here, workdir = project(tmp_path), tmp_path / "run"
    other = f"mkdir -p {workdir}/launch; echo another host >>{workdir}/launch/mistakes; exit {code}"
    stand_in(tmp_path / "bin", "lionjax", other)
    said = run(here / "launch/run.sh", "a.py", str(workdir), bin=tmp_path / "bin")
    assert said.returncode == 2 and "another host" in said.stderr
    stand_in(tmp_path / "bin", "lionjax", f"exit {code}")  # the mark of an earlier start counts no more
    assert run(here / "launch/run.sh", "a.py", str(workdir), bin=tmp_path / "bin").returncode == code


@pytest.mark.slow
def test_the_marks_of_a_run_in_a_bucket_lie_in_the_bucket(tmp_path):
    here = project(tmp_path)
    stand_in(tmp_path / "bin", "python", f'PYTHONPATH={ROOT} exec {sys.executable} "$@"')
    command = (here / "launch/run.sh", "a.py", "gs://bucket/runs/a")
    with running_bucket() as (url, server):
        env = {"TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "FEW": "2"}

        def code(program: str) -> int:
            stand_in(tmp_path / "bin", "lionjax", program)
            return run(*command, bin=tmp_path / "bin", **env).returncode

        assert [code("exit 1"), code("exit 1")] == [1, 2] and b" " in server.objects["runs/a/launch/mistakes"][0]
        assert code("exit 1") == 1
        server.objects["runs/a/checkpoints/5/commit_success.txt"] = (b"", 1)
        assert code("exit 1") == 1  # there is a new checkpoint
        assert code("exit 0") == 75
        server.objects["runs/a/base/2_final/learned/a"] = (b"", 1)
        assert code("exit 0") == 75  # which is not complete
        server.objects["runs/a/base/2_final/commit_success.txt"] = (b"", 1)
        assert code("exit 0") == 0


def test_sigterm_reaches_the_program_which_may_save_before_it_ends(tmp_path):
    here = project(tmp_path)
    saves = f"trap 'sleep 0.5; touch {tmp_path}/saved; exit 0' TERM; touch {tmp_path}/on; while :; do sleep 0.1; done"
    stand_in(tmp_path / "bin", "lionjax", saves)
    env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    script = subprocess.Popen(["bash", here / "launch/run.sh", "a.py", f"{tmp_path}/run"], env=env)
    for _ in range(300):
        if (tmp_path / "on").exists():
            break
        time.sleep(0.1)
    script.send_signal(signal.SIGTERM)
    assert script.wait(60) == 75  # saved, but no stage is done
    assert (tmp_path / "saved").exists()


# A TPU VM's slice

GCLOUD = """
echo "$*" >>"{log}"
case "$*" in
    *"queued-resources describe"*)
        [ -f "{log}.there" ] || exit 1
        if [ -f "{log}.lost" ]; then echo SUSPENDED; else echo ACTIVE; fi ;;
    *"queued-resources create"*) touch "{log}.there" ;;
    *"tpu-vm scp"*) tar tzf "$5" >"{log}.pack" ;;
    *"queued-resources delete"*) rm -f "{log}.there" "{log}.lost" ;;
    *"run.sh"*)
        # Taken away in the middle of the first try.
        if [ ! -f "{log}.tried" ]; then touch "{log}.tried" "{log}.lost"; exit 255; fi
        {first}exit {code} ;;
esac
"""


@pytest.mark.parametrize("slices", [1, 2])
def test_a_preempted_slice_is_requested_again_until_the_run_is_done(tmp_path, slices):
    here, log = project(tmp_path), tmp_path / "log"
    stand_in(tmp_path / "bin", "gcloud", GCLOUD.format(log=log, code=0, first=""))
    slice_ = {"NAME": "lion", "ZONE": "here-a", "ACCELERATOR": "v5litepod-64", "NFS": "10.0.0.2:/runs"}
    more = {"PAUSE": "0", "SLICES": str(slices), "FLAGS": "overlap"}
    words = ("configs/a.py", "--name", "two words")
    said = run(here / "launch/queued_resource.sh", *words, bin=tmp_path / "bin", **slice_, **more)
    assert said.returncode == 0, said.stderr
    asked = log.read_text()
    assert asked.count("queued-resources create lion") == 2 and asked.count("--spot") == 2
    assert asked.count("queued-resources delete lion --force") == 2  # the lost one, and at the end
    nodes = ["lion"] if slices == 1 else ["lion-0", "lion-1"]
    for node in nodes:
        (command,) = {x for x in asked.splitlines() if f"ssh {node} --worker=all" in x and "run.sh" in x}
        assert r"FLAGS='overlap' launch/run.sh configs/a.py /mnt/runs/lion --name two\ words" in command
    assert ("--node-count=2 --node-prefix=lion" in asked) == (slices == 2)


def test_a_slice_trains_in_a_bucket_without_a_shared_disk(tmp_path):
    here, log = project(tmp_path), tmp_path / "log"
    (tmp_path / "log.tried").touch()
    stand_in(tmp_path / "bin", "gcloud", GCLOUD.format(log=log, code=0, first=""))
    slice_ = {"NAME": "lion", "ZONE": "here-a", "ACCELERATOR": "v5litepod-64", "BUCKET": "gs://mine/runs"}
    said = run(here / "launch/queued_resource.sh", "a.py", bin=tmp_path / "bin", PAUSE="0", **slice_)
    assert said.returncode == 0 and "gs://mine/runs holds lion" in said.stderr
    asked = log.read_text()
    assert "launch/run.sh a.py gs://mine/runs/lion" in asked and "mount -t nfs" not in asked


def test_a_mistake_in_the_config_is_not_tried_again(tmp_path):
    here, log = project(tmp_path), tmp_path / "log"
    stand_in(tmp_path / "bin", "gcloud", GCLOUD.format(log=log, code=2, first=""))
    slice_ = {"NAME": "lion", "ZONE": "here-a", "ACCELERATOR": "v5litepod-64", "NFS": "10.0.0.2:/runs"}
    said = run(here / "launch/queued_resource.sh", "a.py", bin=tmp_path / "bin", PAUSE="0", **slice_)
    assert said.returncode == 2 and "mistake" in said.stderr
    assert run(here / "launch/queued_resource.sh", "a.py", bin=tmp_path / "bin").returncode == 1
    assert log.read_text().count("run.sh") == 2


@pytest.mark.parametrize(("code", "tries", "ends"), [(75, 6, 1), (137, 6, 1), (143, 6, 1), (1, 3, 1), (139, 3, 139)])
def test_a_slice_is_tried_again_often_after_a_kill_and_a_few_times_after_a_failure(tmp_path, code, tries, ends):
    here, log = project(tmp_path), tmp_path / "log"
    (tmp_path / "log.tried").touch()
    stand_in(tmp_path / "bin", "gcloud", GCLOUD.format(log=log, code=code, first=""))
    slice_ = {"NAME": "lion", "ZONE": "here-a", "ACCELERATOR": "v5litepod-64", "NFS": "10.0.0.2:/runs"}
    more = {"PAUSE": "0", "TRIES": "6"}
    said = run(here / "launch/queued_resource.sh", "a.py", bin=tmp_path / "bin", **slice_, **more)
    assert said.returncode == ends, said.stderr
    assert log.read_text().count("run.sh") == tries


def test_a_mistake_on_one_of_two_slices_stops_both(tmp_path):
    here, log = project(tmp_path), tmp_path / "log"
    (tmp_path / "log.tried").touch()
    first = '[[ "$*" == *lion-0* ]] && exit 2; '
    stand_in(tmp_path / "bin", "gcloud", GCLOUD.format(log=log, code=134, first=first))
    slice_ = {"NAME": "lion", "ZONE": "here-a", "ACCELERATOR": "v5litepod-64", "NFS": "10.0.0.2:/runs", "SLICES": "2"}
    assert run(here / "launch/queued_resource.sh", "a.py", bin=tmp_path / "bin", PAUSE="0", **slice_).returncode == 2


def test_hosts_get_the_code_but_not_the_files_of_the_shared_disk(tmp_path):
    here, log = project(tmp_path), tmp_path / "log"
    sent, kept = ("lionjax/data/a.py", "launch/run.sh"), ("data/b", "weights/c", "runs/d", ".venv-prepare/e")
    for name in (*sent[:1], *kept):
        (here / name).parent.mkdir(parents=True)
        (here / name).touch()
    stand_in(tmp_path / "bin", "gcloud", GCLOUD.format(log=log, code=2, first=""))
    env = {"NAME": "a", "ZONE": "b", "ACCELERATOR": "v5litepod-64", "NFS": "c:/d", "PAUSE": "0"}
    run(here / "launch/queued_resource.sh", "a.py", bin=tmp_path / "bin", **env)
    packed = (tmp_path / "log.pack").read_text().split()
    assert {f"./{name}" for name in sent} <= set(packed)
    assert not any(name in path for name in kept for path in packed if "lionjax/data" not in path)


# SLURM


@pytest.mark.parametrize(("code", "again"), [(0, False), (2, False)] + [(n, True) for n in (1, 75, 134, 137, 139, 143)])
def test_slurm_requeues_an_unfinished_run(tmp_path, code, again):
    here = project(tmp_path)
    stand_in(tmp_path / "bin", "srun", f'echo "$@" >{tmp_path}/srun; exit {code}')
    stand_in(tmp_path / "bin", "scontrol", f'echo "$@" >{tmp_path}/scontrol')
    env = {"SLURM_SUBMIT_DIR": str(here), "SLURM_JOB_ID": "7"}
    said = run(here / "launch/slurm.sbatch", "configs/a.py", "runs/a", bin=tmp_path / "bin", **env)
    assert said.returncode == code
    assert (tmp_path / "srun").read_text().strip() == "--kill-on-bad-exit=1 launch/run.sh configs/a.py runs/a"
    assert (tmp_path / "scontrol").exists() == again


@pytest.mark.parametrize(("code", "ends", "queued"), [(1, 3, 2), (139, 3, 2), (75, 5, 5), (137, 5, 5), (143, 5, 5)])
def test_slurm_requeues_a_failing_run_a_few_times_only(tmp_path, code, ends, queued):
    here = project(tmp_path)
    stand_in(tmp_path / "bin", "srun", f"exit {code}")
    stand_in(tmp_path / "bin", "scontrol", f"echo $@ >>{tmp_path}/scontrol")
    env = {"SLURM_SUBMIT_DIR": str(here), "SLURM_JOB_ID": "7"}
    for count in range(ends):
        words = ("configs/a.py", "runs/a")
        run(here / "launch/slurm.sbatch", *words, bin=tmp_path / "bin", SLURM_RESTART_COUNT=str(count), **env)
    assert (tmp_path / "scontrol").read_text().count("requeue 7") == queued


def test_slurm_stops_at_a_mistake_of_one_task_though_srun_tells_the_highest_code(tmp_path):
    here = project(tmp_path)
    stand_in(tmp_path / "bin", "srun", "mkdir -p runs/a/launch; echo one >>runs/a/launch/mistakes; exit 143")
    stand_in(tmp_path / "bin", "scontrol", f"touch {tmp_path}/scontrol")
    env = {"SLURM_SUBMIT_DIR": str(here), "SLURM_JOB_ID": "7"}
    said = run(here / "launch/slurm.sbatch", "configs/a.py", "runs/a", bin=tmp_path / "bin", **env)
    assert said.returncode == 2 and not (tmp_path / "scontrol").exists()


def test_slurm_signals_tasks_before_the_time_limit_and_starts_one_per_gpu():
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] == "8"
    assert asked["signal"] == "TERM@300" and "requeue" in asked


# Kubernetes, SkyPilot, the image


def jobset(**changes: str) -> dict:
    """launch/jobset.yaml as envsubst renders it."""
    text, known = (LAUNCH / "jobset.yaml").read_text(), JOB | changes
    body = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    assert set(re.findall(r"\$\{(\w+)\}", body)) == JOB.keys()
    header = " ".join(line for line in text.splitlines() if line.startswith("#"))
    assert all(f"${name}" in header for name in JOB), "envsubst is told of every name"
    return yaml.safe_load(re.sub(r"\$\{(\w+)\}", lambda name: known[name[1]], text))


def test_the_jobset_has_a_pod_for_each_host_and_begins_again_but_for_mistakes():
    made = jobset()
    assert made["kind"] == "JobSet" and made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "tpus"
    policy = made["spec"]["failurePolicy"]
    assert policy["maxRestarts"] >= 10
    mistakes = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert policy["rules"] == [mistakes]  # without it the set would begin again after them too
    (replicated,) = made["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod, (container,) = job["template"]["spec"], job["template"]["spec"]["containers"]
    assert replicated["replicas"] == 2
    topology = topologies.parse_topology(f"v5e:{pod['nodeSelector']['cloud.google.com/gke-tpu-topology']}")
    assert job["parallelism"] == job["completions"] == topology.hosts
    assert container["resources"]["limits"]["google.com/tpu"] * topology.hosts == topology.chips
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [2],
    }
    (command,) = container["args"]
    assert command == "exec launch/run.sh configs/nextchat_7b.py /runs/nextchat --mesh.tensor 4"
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert {one["name"]: one["value"] for one in container["env"]}["FLAGS"] == "overlap"


def test_skypilot_runs_the_same_command_as_the_other_launchers():
    made = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    topologies.parse_topology(made["resources"]["accelerators"])
    assert (ROOT / made["envs"]["CONFIG"]).is_file()
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(made["envs"]["EXTRAS"].split(",")) <= known.keys() and '".[$EXTRAS]"' in made["setup"]
    for part in ("setup", "run"):
        said = subprocess.run(["bash", "-n", "-c", made[part]], capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
    assert "launch/run.sh $CONFIG $RUNS/$NAME $FIELDS" in made["run"] and made["envs"]["RUNS"] == "/runs"


def test_skypilot_stops_at_a_mistake_and_tries_everything_else_again():
    recovery = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["resources"]["job_recovery"]
    assert recovery["max_restarts_on_errors"] == 0  # of all codes that are not in the list
    codes = recovery["recover_on_exit_codes"]
    assert {1, 75, 134, 137, 139, 143} <= set(codes) and not {0, 2} & set(codes)


def test_local_launches_return_the_exit_code_without_retries(tmp_path):
    here = project(tmp_path)
    for code in (1, 2, 75, 139):
        stand_in(tmp_path / "bin", "lionjax", f"echo $1 >>{tmp_path}/asked_{code}; exit {code}")
        assert run(here / "launch/laptop.sh", str(tmp_path / "run"), bin=tmp_path / "bin").returncode == code
        assert (tmp_path / f"asked_{code}").read_text() == "train\n"


def test_skypilot_passes_the_coordinator_address_to_gpu_machines(tmp_path):
    here = project(tmp_path)
    command = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["run"]
    (here / "launch/run.sh").write_text("#!/usr/bin/env bash\nenv | grep ^JAX_ | sort\n")
    env = {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    env |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "CONFIG": "a", "NAME": "b", "FIELDS": ""}
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")} | env
    said = subprocess.run(["bash", "-c", command], cwd=here, env=env, capture_output=True, text=True)
    wanted = ["JAX_COORDINATOR_ADDRESS=10.0.0.1:8476", "JAX_NUM_PROCESSES=2", "JAX_PROCESS_ID=1"]
    assert said.stdout.split() == wanted, said.stderr


def test_dockerfile_copies_only_files_that_exist():
    lines = [line for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line and line[0] != "#"]
    for line in lines:
        if line.startswith("COPY "):
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line
    (extras,) = (line.split("=")[1] for line in lines if line.startswith("ARG EXTRAS"))
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= known.keys()
    python = re.search(r"FROM python:3\.(\d+)", lines[0])[1]
    assert f"lock/py3{python}.txt" in "".join(lines) and (ROOT / f"lock/py3{python}.txt").is_file()


# Compiler flags


def test_every_set_of_flags_has_a_name():
    names = dict(
        re.findall(r'^\s+(\w+)\) export \w+=".*\$((?:TPU|GPU)_\w+)"', (LAUNCH / "flags.sh").read_text(), re.MULTILINE)
    )
    assert set(names.values()) == FLAGS.keys()


@pytest.mark.parametrize("name", [name for name in FLAGS if name.startswith("TPU")])
@pytest.mark.skipif(not topologies.has_libtpu(), reason="libtpu, of the extra tpu, is not installed")
def test_the_compiler_knows_every_flag_for_tpus(name):
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    def compiled(kind, flags):
        devices = topologies.topology_devices(topologies.parse_topology(f"{kind}-8"))
        where = NamedSharding(Mesh(devices, "x"), PartitionSpec("x"))
        shape = jax.ShapeDtypeStruct((16, 128), jnp.float32, sharding=where)
        return jax.jit(lambda x: x @ x.T).lower(shape).compile(compiler_options=flags)

    flags = dict(flag.removeprefix("--").split("=") for flag in FLAGS[name].split())
    for kind in ("v5e", "v5p"):
        assert compiled(kind, flags)
    with pytest.raises(Exception, match="No such compile option"):
        compiled("v5e", flags | {"xla_tpu_enable_everything": "true"})


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FLAGS if name.startswith("GPU")])
def test_the_compiler_knows_every_flag_for_gpus(name):
    def starts(flags: str) -> subprocess.CompletedProcess:
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        code = "import jax; jax.devices()"
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    assert starts(FLAGS[name]).returncode == 0
    assert "Unknown flag" in starts(f"{FLAGS[name]} --xla_gpu_enable_everything=true").stderr
