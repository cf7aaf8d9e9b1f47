"""More than one machine: two network namespaces are two hosts, with addresses, local ranks and a network of their own.

    pytest tests/training/test_clusters.py -rs

Needs root and `ip` (Debian: apt install iproute2); skips itself where it may not make namespaces.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.ranks import run_ranks
from tests.test_readme import wikift_command
from tests.tiny import arguments, curve, logged, metrics, tiny_store, until
from wikift.base.folders import list_checkpoints
from wikift.settings import options as cli
from wikift.settings.fields import TrainSettings

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
SECONDS = 240  # for anything that takes some ten on two idle cores
STEPS = 300


@dataclass(frozen=True)
class Host:
    number: int
    namespace: str
    address: str
    interface: str

    def start(self, command: list[str], output: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Run `command` on this host, as root's shell there would."""
        words = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        words |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.interface, **environment}
        with output.open("wb") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *command], env=words, stdout=file, stderr=file, cwd=ROOT
            )

    def kill(self) -> None:
        """The power goes: SIGKILL to everything that runs here."""
        deadline = time.monotonic() + 20
        while (pids := ip("netns", "pids", self.namespace).stdout.split()) and time.monotonic() < deadline:
            for pid in map(int, pids):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        assert not pids


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two hosts joined by a cable. What still runs there at the end is killed, and nothing of them stays."""
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces: there is no `ip` (Debian: apt install iproute2)")
    both = [Host(n, f"wikift-{os.getpid()}-{n}", f"10.77.0.{n + 1}", f"cable{n}") for n in range(2)]
    made = []
    try:
        for host in both:
            if (done := ip("netns", "add", host.namespace)).returncode:
                pytest.skip(f"network namespaces may not be made here: {done.stderr.strip()}")
            made.append(host)
        a, b = both
        ends = ["name", a.interface, "netns", a.namespace, "type", "veth", "peer", "name", b.interface]
        if (done := ip("link", "add", *ends, "netns", b.namespace)).returncode:
            pytest.skip(f"network interfaces may not be made here: {done.stderr.strip()}")
        for host in both:
            for words in (
                ["addr", "add", f"{host.address}/24", "dev", host.interface],
                ["link", "set", "lo", "up"],
                ["link", "set", host.interface, "up"],
            ):
                done = ip("-n", host.namespace, *words)
                assert done.returncode == 0, done.stderr
        yield both
    finally:
        for host in made:
            try:
                host.kill()
            finally:
                ip("netns", "delete", host.namespace)


def torchrun(host: Host, line: list[str], nodes: str = "2", conf: str = "", *options: str) -> list[str]:
    where = ["--rdzv-backend=c10d", "--rdzv-id=run", "--rdzv-endpoint=10.77.0.1:29400"]
    # no host name leads to the address here, so that torchrun cannot find out which host it names
    who = [f"--rdzv-conf=is_host={int(host.number == 0)}{conf}", f"--local-addr={host.address}"]
    words = [f"--nnodes={nodes}", "--nproc-per-node=1", *where, *who, *options, TRAIN, *line]
    return [sys.executable, "-m", "torch.distributed.run", *words]


def deepspeed(host: Host, line: list[str]) -> list[str]:
    """DeepSpeed's launcher with a hostfile; started on each host, since there is no ssh between them."""
    hostfile = Path(line[line.index("--data") + 1]).with_name("hostfile")
    hostfile.write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    who = ["--no_ssh", f"--node_rank={host.number}", "--master_addr=10.77.0.1", "--master_port=29400"]
    return [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={hostfile}", *who, TRAIN, *line]


Launcher = Callable[[Host, list[str]], list[str]]


def start_on(hosts: list[Host], launcher: Launcher, line: list[str], logs: Path) -> list[subprocess.Popen[bytes]]:
    return [host.start(launcher(host, line), logs / f"host-{host.number}.log") for host in hosts]


def shown(logs: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in sorted(logs.glob("host-*.log")))


def on_one_host(line: list[str]) -> None:
    from wikift.commands.train import main

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # one thread for each of two ranks, as on the hosts
    assert main(line) == 0


@pytest.mark.parametrize(
    ("options", "killed", "launcher", "launcher_again"),
    [
        ({"engine": "ddp"}, 1, torchrun, torchrun),
        pytest.param({"deepspeed": "zero2"}, 0, torchrun, deepspeed, marks=pytest.mark.long),
    ],
    ids=["ddp", "zero2"],
)
def test_a_host_dies_and_the_run_goes_on(
    hosts: list[Host],
    tmp_path: Path,
    options: dict[str, object],
    killed: int,
    launcher: Launcher,
    launcher_again: Launcher,
) -> None:
    """On a shared folder: every step's loss and gradient norm is that of a run on one host that nobody stopped."""
    store, run, whole = tiny_store(tmp_path / "store"), tmp_path / "shared" / "run", tmp_path / "whole"
    words = {"max_steps": STEPS, "save_steps": 50, "eval_steps": 100, "quiet": False, **options}
    line = arguments(store, run, **words)
    processes = start_on(hosts, launcher, line, tmp_path)
    until(lambda: list_checkpoints(run), *processes, shown=lambda: shown(tmp_path))
    hosts[killed].kill()
    assert processes[killed].wait(SECONDS) == -signal.SIGKILL
    assert processes[1 - killed].wait(SECONDS) != 0
    assert "lost the connection to " in shown(tmp_path)
    done = metrics(run)[-1]["step"]
    assert 50 <= done < STEPS, "it was to be killed in the middle"

    processes = start_on(hosts, launcher_again, line, tmp_path)
    assert [process.wait(SECONDS) for process in processes] == [0, 0], shown(tmp_path)
    assert "resuming from" in shown(tmp_path)
    run_ranks(on_one_host, 2, arguments(store, whole, **{**words, "quiet": True}))
    assert len(curve(run)) == STEPS
    assert curve(run) == curve(whole)


@pytest.mark.long
def test_torchrun_goes_on_without_a_host_whose_cable_is_cut(hosts: list[Host], tmp_path: Path) -> None:
    """No connection breaks, nobody says a word: it is the signs of life that end. Then one rank does what two did."""
    store, run, whole = tiny_store(tmp_path / "store"), tmp_path / "shared" / "run", tmp_path / "whole"
    words = {"max_steps": STEPS, "save_steps": 50, "eval_steps": 100, "dropout": 0, "learning_rate": 1e-3}
    line = arguments(store, run, hang_timeout=6, **words)
    conf = ",keep_alive_interval=1,last_call_timeout=4"
    processes = [
        host.start(
            torchrun(host, line, "1:2", conf, "--max-restarts=3"), tmp_path / f"host-{host.number}.log",
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )
        for host in hosts
    ]  # fmt: skip
    until(lambda: list_checkpoints(run), *processes, shown=lambda: shown(tmp_path))
    assert ip("-n", hosts[1].namespace, "link", "set", hosts[1].interface, "down").returncode == 0
    hosts[1].kill()
    assert [process.wait(SECONDS) for process in processes] == [0, -signal.SIGKILL], shown(tmp_path)
    assert "rank 1 shows no sign of life" in shown(tmp_path)
    (event,) = [row for row in metrics(run) if row.get("event") == "restart"]
    assert event["message"] == f"restart 1 of 3, after step {event['after']}; processes: 1"
    run_ranks(on_one_host, 2, arguments(store, whole, **words))
    for ours, expected in zip(curve(run), curve(whole), strict=True):
        assert ours[1] == pytest.approx(expected[1], abs=1e-5), ours


def bare_srun(hosts: list[Host], line: list[str], logs: Path, before: list[str]) -> list[subprocess.Popen[bytes]]:
    """A rank on each host, as Slurm starts them; `before` is put before the second one's command."""
    place = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    place |= {"SLURM_STEP_NODELIST": "10.77.0.[1-2]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    processes = []
    for n, host in enumerate(hosts):
        own = {**place, "SLURM_PROCID": str(n), "SLURM_NODEID": str(n)}
        words = [*(before if n else []), sys.executable, TRAIN, *line]
        processes.append(host.start(words, logs / f"host-{n}.log", **own))
    return processes


def test_a_host_that_is_cut_off_is_named_after_the_hang_timeout(hosts: list[Host], tmp_path: Path) -> None:
    """Its cable is pulled and its power goes: no connection is closed, so that nothing but its silence tells."""
    run = tmp_path / "run"
    words = {"max_steps": 10**6, "save_steps": 20, "eval_steps": 10**6, "engine": "ddp", "hang_timeout": 6}
    processes = bare_srun(hosts, arguments(tiny_store(tmp_path / "store"), run, **words), tmp_path, [])
    until(lambda: list_checkpoints(run), *processes, shown=lambda: shown(tmp_path))
    assert ip("-n", hosts[1].namespace, "link", "set", hosts[1].interface, "down").returncode == 0
    hosts[1].kill()
    assert [process.wait(60) for process in processes] == [1, -signal.SIGKILL], shown(tmp_path)
    text = (tmp_path / "host-0.log").read_text()
    assert "no progress for 6 s (--hang-timeout): rank 1 shows no sign of life (stopped, or its host is gone)" in text
    assert "in _engine_run_backward" in (run / "stacks" / "rank-0.txt").read_text() or "in answer" in text
    assert "no sign of life" in (run / "stacks" / "rank-1.txt").read_text()


def test_a_host_without_the_store_ends_all(hosts: list[Host], tmp_path: Path) -> None:
    """By a bare srun: it says what it lacks; the others, which wait for it, end soon instead of in half an hour."""
    store = tiny_store(tmp_path / "store")
    lacking = ["sh", "-c", f'mount -t tmpfs none "{store}" && exec "$@"', "sh"]  # a mount of this host alone
    processes = bare_srun(hosts, arguments(store, tmp_path / "run"), tmp_path, lacking)
    assert [process.wait(60) for process in processes] == [1, 2], shown(tmp_path)
    assert (tmp_path / "host-1.log").read_text().startswith(f"wikift: one problem\n  --data {store}: ")
    assert "wikift: rank 0 stops, rank 1 failed" in (tmp_path / "host-0.log").read_text()
    assert not (tmp_path / "run").exists()


def test_the_job_for_kubernetes_is_whole() -> None:
    job = yaml.safe_load((ROOT / "docs/how-to/pytorchjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch", "the operator looks for this name"
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        words = dict(word.partition("=")[::2] for word in container["command"])
        assert int(words["--nnodes"]) == sum(one["replicas"] for one in replicas.values())
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert words["--nproc_per_node"] == job["spec"]["nprocPerNode"] == str(gpus)
        assert words["--output-dir"].startswith("/shared/")
        (seconds,) = (int(word["value"]) for word in container["env"])
        assert seconds < pod["terminationGracePeriodSeconds"]
        found = wikift_command(re.sub(r"\$\(\w+\)", "0", shlex.join(container["command"])))
        assert found is not None
        assert found[0] == "train"
        settings = cli.parse(TrainSettings, found[1])
        assert (ROOT / str(settings.deepspeed)).is_file()


SLURM = {
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; if [ "$1" = show ]; then printf "localhost\\nother\\n"; fi',
    "scancel": 'echo "scancel $*" >> "$CALLS"; kill "${1/--signal=/-}" "$(cat "$CALLS.step")"',
    "srun": 'echo $$ > "$CALLS.step"; shift; exec "$@"',
}


def test_the_sbatch_file_requeues_what_is_not_done_and_goes_on(tmp_path: Path) -> None:
    """Real bash, real torchrun with two processes; Slurm's three commands are stand-ins. Slurm itself is not here."""
    script, run, calls = ROOT / "docs/how-to/slurm.sbatch", tmp_path / "run", tmp_path / "calls"
    subprocess.run(["bash", "-n", script], check=True, timeout=20)
    (tmp_path / "bin").mkdir()
    for name, text in {**SLURM, "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    port = socket.create_server(("localhost", 0))
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls)}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "1"}
    environment |= {"SLURM_GPUS_ON_NODE": "2", "OMP_NUM_THREADS": "1"}
    # one job at a time can have the file's port on this host
    copy = tmp_path / "slurm.sbatch"
    copy.write_text(script.read_text().replace(":29400", f":{port.getsockname()[1]}"))
    port.close()

    def submit(steps: int) -> subprocess.Popen[bytes]:
        words = {"max_steps": steps, "save_steps": 10**6, "eval_steps": 10**6, "lr_scheduler_type": "constant"}
        line = arguments(tmp_path / "store", run, quiet=False, **words)
        with (tmp_path / "host-0.log").open("ab") as log:
            return subprocess.Popen(["bash", copy, *line], env=environment, stdout=log, stderr=log, cwd=ROOT)

    tiny_store(tmp_path / "store")
    job = submit(10**6)
    try:
        until(lambda: logged(run) >= 5, job, shown=lambda: shown(tmp_path))
        job.send_signal(signal.SIGUSR1)
        assert job.wait(SECONDS) != 0
        told = calls.read_text().splitlines()
        assert told == ["scontrol show hostnames n[1-2]", "scancel --signal=TERM 7", "scontrol requeue 7"]
        done = metrics(run)[-1]["step"]
        assert [path.name for path in list_checkpoints(run)] == [f"step-{done:08d}"]

        job = submit(done + 3)
        assert job.wait(SECONDS) == 0, shown(tmp_path)
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait(SECONDS)
    assert "resuming from" in shown(tmp_path)
    assert [values["step"] for values in metrics(run)] == list(range(1, done + 4))
    assert calls.read_text().count("requeue") == 1, "what is done is not queued again"
