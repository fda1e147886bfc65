"""A job on an existing Ray cluster: what is decided without one; manifests against the schemas of who reads them."""

from __future__ import annotations

import base64
import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import click
import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts

from cluster.__main__ import main
from cluster.ray import jobs, package
from cluster.ray.submission import JobError, JobRecord, Submission, describe, next_step, read_submission
from cluster.ray.token import TokenError, has_token
from lbp_ray.config import load_config
from lbp_ray.study import StudyConfig

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "cluster"
SCHEMA = yaml.safe_load((ROOT / "tests/data/schemas/kuberay.yaml").read_text())
STUDY = ("python", "-m", "lbp_ray.tune", "--config", "configs/demo.yaml")
SECRET = "5" * 64


@pytest.mark.parametrize(
    "change",
    [{"command": (*STUDY, "seeds=[1]")}, {"config_hash": "b"}, {"code_hash": "b"}, {"root": "/other"}],
    ids=lambda change: next(iter(change)),
)
def test_another_submission_has_another_name(change):
    first = {"command": STUDY, "config_hash": "a", "code_hash": "a", "root": "/data"}
    assert Submission(**first).identity == Submission(**first).identity
    assert Submission(**first).identity != Submission(**first | change).identity


@pytest.mark.parametrize("option", [["--config", "study.yaml"], ["--config=study.yaml"]], ids=["word", "equals"])
def test_content_of_the_configuration_counts(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = set()
    for content in ("name: a", "name: b"):
        (tmp_path / "study.yaml").write_text(content)
        names.add(read_submission(["python", "-m", "lbp_ray.tune", *option], "code", None).identity)
    assert len(names) == 2


@pytest.mark.parametrize(
    ("jobs", "name", "runs"),
    [
        ([], "lbp-a-1", False),
        ([("lbp-a-1", "RUNNING")], "lbp-a-1", True),
        ([("lbp-a-1", "PENDING"), ("lbp-b-7", "FAILED")], "lbp-a-1", True),
        ([("lbp-a-1", "FAILED")], "lbp-a-2", False),
        ([("lbp-a-10", "STOPPED"), ("lbp-a-9", "FAILED")], "lbp-a-11", False),
        ([("lbp-a-1", "FAILED"), ("lbp-a-2", "RUNNING")], "lbp-a-2", True),
        ([("lbp-a-1", "SUCCEEDED"), ("lbp-a-x", "RUNNING"), ("", "RUNNING")], "lbp-a-2", False),
    ],
)
def test_what_runs_is_followed_and_what_ended_is_started_again(jobs, name, runs):
    step = next_step("lbp-a", [JobRecord(*job) for job in jobs])
    assert (step.name, step.runs) == (name, runs)


@pytest.mark.parametrize(
    ("state", "code", "status"),
    [("SUCCEEDED", 0, 0), ("FAILED", 75, 75), ("FAILED", -9, 137), ("FAILED", None, 1), ("STOPPED", None, 143)],
)
def test_exit_status_is_the_commands(state, code, status):
    assert JobRecord("lbp-a-1", state, code).status == status


def test_a_failure_of_the_upload_says_what_to_do():
    message = "runtime_env setup failed: Failed to download runtime_env file package gcs://_ray_pkg_0.zip"
    said = describe(JobRecord("lbp-a-1", "FAILED", None, message, "RUNTIME_ENV_SETUP_FAILURE"))
    assert "changed while it was sent" in said
    assert "exit status 1" in said


class Server:
    """A job server whose connections break: each tells the log from its beginning."""

    def __init__(self, *connections):
        self.connections = iter(connections)

    def get_job_info(self, name):
        return SimpleNamespace(submission_id=name, status=self.state, driver_exit_code=3, message=None, error_type=None)

    async def tail_job_logs(self, name):
        texts, self.state = next(self.connections)
        for text in texts:
            yield text
        if self.state == "RUNNING":
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    state = "RUNNING"


def test_log_goes_on_where_a_lost_connection_left_it(monkeypatch, capsys):
    monkeypatch.setattr(jobs.time, "sleep", lambda _: None)
    server = Server((["one\n", "two\n"], "RUNNING"), ([], "RUNNING"), (["one\ntwo\nth", "ree\n"], "FAILED"))
    assert jobs.follow(server, "lbp-a-1").status == 3
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_a_server_that_stays_away_is_said(monkeypatch):
    monkeypatch.setattr(jobs.time, "sleep", lambda _: None)
    server = Server(*[([], "RUNNING")] * (jobs.PATIENCE + 1))
    with pytest.raises(JobError, match="closed unexpectedly"):
        jobs.follow(server, "lbp-a-1")


def test_of_two_that_submit_at_once_one_follows_the_other(tmp_path):
    submission = read_submission(["python", "-c", "1"], "code", None)
    server, name = Server(), f"{submission.identity}-1"
    answers = iter([[], [server.get_job_info(name)]])
    server.list_jobs = lambda: next(answers)
    server.submit_job = Mock(side_effect=RuntimeError(f"Job with submission_id {name} already exists."))
    step = jobs.submit(server, submission, tmp_path)
    assert (step.name, step.runs) == (name, True)
    server.submit_job.assert_called_once()


def token_home(tmp_path, content=SECRET, mode=0o600):
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text(content)
    file.chmod(mode)
    return {"HOME": str(tmp_path)}


def test_a_private_token_may_be_used(tmp_path):
    assert has_token(token_home(tmp_path, f"{SECRET}\n"))
    assert not has_token({"HOME": str(tmp_path / "elsewhere")})


@pytest.mark.parametrize(
    ("file", "variables", "words"),
    [
        ({"mode": 0o644}, {}, "has mode 0644, 0600"),
        ({"mode": 0o640}, {"RAY_AUTH_MODE": "token"}, "chmod 600"),
        ({"content": f"{SECRET}\nsecond"}, {}, "one word"),
        ({"content": ""}, {}, "one word"),
        ({}, {"RAY_AUTH_TOKEN": SECRET}, "unset RAY_AUTH_TOKEN"),
        ({}, {"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "/nowhere/token is not there"),
    ],
    ids=["others", "group", "lines", "empty", "environment", "missing"],
)
def test_an_unsafe_token_is_refused_and_not_shown(file, variables, words, tmp_path):
    with pytest.raises(TokenError, match=words) as refused:
        has_token(token_home(tmp_path, **file) | variables)
    assert SECRET not in str(refused.value)


class Listener(BaseHTTPRequestHandler):
    """Keeps what it is asked, with which token, and which processes have that token among their arguments."""

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        self.server.told.append(body + b"".join(arguments_with(SECRET)))
        answer = self.server.answers.get(self.path)
        self.send_response(self.server.status if answer is None else 200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_POST = do_GET

    def log_message(self, *_):
        pass


def arguments_with(secret):
    """Return the arguments of every process of this machine that was given a secret."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if secret.encode() in (arguments := file.read_bytes()):
                yield arguments


@contextmanager
def listening(status, answers=None):
    """Serve on this machine, with one status but where an answer is given; yield the address and what was seen."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        server.status, server.answers, server.seen, server.told = status, answers or {}, [], []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield SimpleNamespace(address=f"127.0.0.1:{server.server_port}", seen=server.seen, told=server.told)
        server.shutdown()


def job(tmp_path, *words, **variables):
    """Run ``python -m cluster job`` in a shell without a proxy but what is given; return its status and its error."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    own = {name: value for name, value in kept.items() if not name.startswith("RAY_")} | token_home(tmp_path)
    command = [sys.executable, "-m", "cluster", "job", *words]
    done = subprocess.run(command, cwd=tmp_path, env=own | variables, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("spared", [{}, {"NO_PROXY": "elsewhere"}], ids=["unset", "others"])
def test_no_proxy_gets_the_token_of_a_cluster_that_is_here_or_behind_a_tunnel(spared, tmp_path):
    with listening(403) as proxy, listening(401) as cluster:
        given = {"http_proxy": f"http://{proxy.address}", "RAY_API_SERVER_ADDRESS": f"http://{cluster.address}"}
        status, said = job(tmp_path, "--follow", "lbp-1", **given, **spared)
    assert (status, cluster.seen[0][1]) == (2, f"Bearer {SECRET}")
    assert proxy.seen == []
    assert said.startswith("error: the cluster refused the token")


def test_proxy_that_answers_for_the_cluster_is_named(tmp_path):
    with listening(403) as proxy:
        given = {"http_proxy": f"http://{proxy.address}", "RAY_API_SERVER_ADDRESS": "http://cluster.invalid:8265"}
        status, said = job(tmp_path, "--follow", "lbp-1", **given)
    assert status == 2
    assert [path for path, _ in proxy.seen] == ["http://cluster.invalid:8265/api/version"]
    assert said.startswith("error: http_proxy is set: a proxy gets what is meant for cluster.invalid")
    assert "export no_proxy=cluster.invalid" in said
    assert SECRET not in said


def test_too_large_an_upload_is_refused_with_its_cause(tmp_path, monkeypatch):
    (tmp_path / ".rayignore").write_text("left\n")
    for name in ("left", "volume.bin"):
        (tmp_path / name).write_bytes(bytes(range(256)) * 8)
    monkeypatch.setattr("cluster.ray.upload.LIMIT_BYTES", 100)
    with pytest.raises(package.PackageError, match=r"the largest: volume.bin .* shared storage, or name them in"):
        package.require_sendable(tmp_path)


def test_hash_sees_what_is_sent_and_nothing_else(tmp_path):
    (tmp_path / ".rayignore").write_text("runs\n")
    (tmp_path / "runs").mkdir()
    (tmp_path / "trial.py").write_text("1")
    first = package.code_hash(tmp_path)
    (tmp_path / "runs" / "log").write_text("1")
    assert package.code_hash(tmp_path) == first
    (tmp_path / "trial.py").write_text("2")
    assert package.code_hash(tmp_path) != first


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], "after --, the command is required"),
        (["python", "-m", "lbp_ray.tune", "--config", "configs/no.yaml"], "configuration file not found"),
    ],
    ids=["none", "configuration"],
)
def test_a_command_that_cannot_work_is_refused_here(command, words):
    with pytest.raises(JobError, match=words):
        read_submission(command, "code", None)


def test_another_folder_than_the_clone_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.environ", token_home(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["job", "--", "python", "-c", "1"]) == 2
    assert "submit from the root of the clone" in capsys.readouterr().err


def manifests():
    """Every YAML document that Kubernetes is given, also those in the documentation."""
    texts = {name: (CONFIGS / name).read_text() for name in ("raycluster.yaml", "rayjob.yaml")}
    page = (ROOT / "docs/howto-kubernetes.md").read_text()
    texts |= {"claims": "".join(re.findall(r"^```yaml\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL))}
    return {
        f"{name}-{place}": doc for name, text in texts.items() for place, doc in enumerate(yaml.safe_load_all(text))
    }


def cluster_of(document):
    return document["spec"]["rayClusterSpec"] if document["kind"] == "RayJob" else document["spec"]


CLUSTERS = [cluster_of(document) for document in manifests().values() if document["kind"].startswith("Ray")]


@pytest.mark.parametrize("document", manifests().values(), ids=manifests())
def test_manifest_has_the_fields_that_kubernetes_knows(document):
    jsonschema.validate(document, SCHEMA)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "headGroupSpec", "servicetype"), "ClusterIP"),
        (("spec", "headGroupSpec", "serviceType"), "Public"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "workerGroupSpecs", 0, "replicas"), "two"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "volumeMount"), []),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "volumes", 0, "persistentVolumeClaim"), {}),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "cpu"), "8 cores"),
    ],
)
def test_a_wrong_field_is_seen(path, value):
    document = copy.deepcopy(yaml.safe_load((CONFIGS / "raycluster.yaml").read_text()))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


def pods(document):
    cluster = cluster_of(document)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [document["spec"][key]["spec"] for key in ("submitterPodTemplate",) if key in document["spec"]] + [
        group["template"]["spec"] for group in groups
    ]


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_pods_are_confined(name):
    for pod in pods(yaml.safe_load((CONFIGS / name).read_text())):
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["automountServiceAccountToken"]
        for container in pod["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
            variables = {variable["name"]: variable["value"] for variable in container["env"]}
            assert variables["RAY_AUTH_MODE"] == "token"
            assert "RAY_AUTH_TOKEN" not in variables


@pytest.mark.parametrize("cluster", CLUSTERS, ids=["cluster", "job"])
def test_cluster_is_closed_to_the_outside_and_has_data_and_runs(cluster):
    assert cluster["authOptions"] == {"mode": "token", "secretName": "lbp-ray-token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not cluster["enableInTreeAutoscaling"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        claims = {volume["name"]: volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"]}
        mounts = {claims[mount["name"]]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts == {"lbp-data": "/data", "lbp-runs": "/runs", None: "/tmp/ray"}


def ray_start_options():
    return {option for parameter in scripts.start.params for option in parameter.opts}


@pytest.mark.parametrize("cluster", CLUSTERS, ids=["cluster", "job"])
def test_parameters_of_ray_start_exist(cluster):
    given = [group["rayStartParams"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    assert {f"--{key}" for parameters in given for key in parameters} <= ray_start_options()


def test_study_of_the_manifest_loads(monkeypatch):
    document = yaml.safe_load((CONFIGS / "rayjob.yaml").read_text())
    environment = cluster_of(document)["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    for variable in environment:
        monkeypatch.setenv(variable["name"], variable["value"])
    _, _, module, _, config, *overrides = shlex.split(document["spec"]["entrypoint"])
    assert module == "lbp_ray.tune"
    study = load_config(StudyConfig, ROOT / Path(config).relative_to("/opt/lbp_ray"), overrides)
    assert (study.paths.store, study.paths.runs) == (Path("/data/store.zarr"), Path("/runs"))


def local_cluster():
    return yaml.safe_load((CONFIGS / "ray.yaml").read_text())


def test_ray_up_takes_the_cluster_of_ones_own_hosts():
    validate_config(prepare_config(local_cluster()))


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"setup_command": []}, jsonschema.ValidationError, "'setup_command' was unexpected"),
        ({"auth": {"ssh_usr": "researcher"}}, jsonschema.ValidationError, "'ssh_usr' was unexpected"),
        ({"provider": {"type": "local"}}, click.ClickException, "`head_ip` and list of `worker_ips`"),
    ],
    ids=lambda wrong: next(iter(wrong)) if isinstance(wrong, dict) else "",
)
def test_ray_up_refuses_a_wrong_field(wrong, error, words):
    with pytest.raises(error, match=words):
        validate_config(prepare_config(local_cluster() | wrong))


def test_hosts_start_ray_with_a_token_and_a_closed_dashboard():
    config = local_cluster()
    for command in (config["head_start_ray_commands"][1], config["worker_start_ray_commands"][1]):
        assert subprocess.run(["bash", "-n"], input=command, text=True, check=False).returncode == 0
        assert "RAY_AUTH_MODE=token" in command
        words = shlex.split(command.partition("ray start")[2])
        assert {word.partition("=")[0] for word in words} <= ray_start_options()
        assert "--temp-dir=$(mktemp -d /tmp/ray-XXXX)/ray" in words  # only its owner can enter what mktemp makes
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


def test_no_token_is_ever_an_argument(tmp_path):
    """Neither of a process here, at any request of a submission, nor in what the cluster is told to run."""
    (tmp_path / ".rayignore").write_text(".ray\n")
    command = ("python", "-c", "1")
    root = os.environ.get("LBP_RAY_ROOT")  # of whoever runs the tests; the job is given it
    name = f"{read_submission(command, package.code_hash(tmp_path), root).identity}-1"
    answers = {"/api/version": {"ray_version": ray.__version__, "version": "4"}}
    package_path = f"/api/packages/gcs/_ray_pkg_{package.code_hash(tmp_path)}.zip"
    answers |= {"/api/jobs/": [], package_path: {}}
    with listening(404, answers) as cluster:
        given = {"RAY_API_SERVER_ADDRESS": f"http://{cluster.address}"}
        job(tmp_path, "--no-wait", "--", *command, **given)
    assert {token for _, token in cluster.seen} == {f"Bearer {SECRET}"}
    assert SECRET not in b"".join(cluster.told).decode()
    assert [json.loads(told)["submission_id"] for told in cluster.told if told] == [name]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, which needs no cluster for this")
def test_documented_commands_make_the_secret_that_the_manifests_name(tmp_path):
    page = (ROOT / "docs/howto-kubernetes.md").read_text()
    (block,) = [text for text in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL) if "create secret" in text]
    variables = {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    told = ["bash", "-ec", f"{block.rstrip()} --dry-run=client --output=yaml"]
    made = yaml.safe_load(subprocess.run(told, env=variables, check=True, capture_output=True, text=True).stdout)
    file = tmp_path / "lbp-ray-token"
    assert made["metadata"]["name"] == CLUSTERS[0]["authOptions"]["secretName"]
    assert base64.b64decode(made["data"]["auth_token"]).decode() == file.read_text()
    assert has_token({"RAY_AUTH_TOKEN_PATH": str(file)})
