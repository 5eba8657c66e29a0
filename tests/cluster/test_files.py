"""Check that Ray, KubeRay and Kubernetes would accept cluster/launcher.yaml and cluster/rayjob.yaml.

Ray's own validator checks the launcher's file. A schema of KubeRay's fields checks the RayJob, and the models of the
kubernetes package check the Kubernetes objects in it. All refuse keys they do not know.
"""

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError, validators

import llamaq
from llamaq.cluster.options import PATHS
from llamaq.cluster.submit import SECRET
from llamaq.config import packaged_configs

ROOT = Path(__file__).parent.parent.parent
LAUNCHER, RAYJOB = ROOT / "cluster/launcher.yaml", ROOT / "cluster/rayjob.yaml"
SCHEMA = json.loads((Path(__file__).parent / "kuberay_rayjob.schema.json").read_text())
WORKERS = "spec.rayClusterSpec.workerGroupSpecs.0"
POD = f"{WORKERS}.template.spec"


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def at(document: Any, path: str) -> Any:
    """Return the part of a document that a path of keys and indices leads to."""
    for key in filter(None, path.split(".")):
        document = document[int(key) if isinstance(document, list) else key]
    return document


def changed(document: dict, path: str, key: str, new: str | None = None, value: Any = None) -> dict:
    """Return a copy with `key` in the part at `path` renamed to `new`, or set to `value`."""
    document = json.loads(json.dumps(document))  # unlike deepcopy, it copies what YAML aliases share
    part = at(document, path)
    part[new or key] = part.pop(key) if new else value
    return document


# --- the launcher's file ----------------------------------------------------------------------------------------------


def validated(document: dict) -> dict:
    """Return the configuration as `ray up` would use it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(document)
    validate_config(prepared)
    return prepared


def test_ray_accepts_the_launchers_file():
    prepared = validated(read(LAUNCHER))
    assert prepared["available_node_types"]["gpu"]["max_workers"] == prepared["max_workers"]
    # Ray's default setup commands are not used: they install another Ray
    assert not [c for c in prepared["worker_setup_commands"] if "ray-wheels" in c]


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("", "setup_command"),
        ("auth", "ssh_username"),
        ("docker", "run_option"),
        ("available_node_types.gpu", "max_worker"),
    ],
)
def test_ray_refuses_an_unknown_key_in_the_launchers_file(path, key):
    with pytest.raises(ValidationError, match=f"'{key}' was unexpected"):
        validated(changed(read(LAUNCHER), path, key, value=[]))


def test_nodes_of_gpus_meet_over_efa():
    prepared = validated(read(LAUNCHER))
    gpu = at(prepared, "available_node_types.gpu.node_config")
    # what Ray's _configure_subnets_and_groups_from_network_interfaces refuses
    assert not {"SubnetId", "SubnetIds", "SecurityGroupIds"} & gpu.keys()
    interfaces = gpu["NetworkInterfaces"]
    assert all(i["SubnetId"] and i["Groups"] and i["InterfaceType"] == "efa" for i in interfaces)
    assert len(interfaces) == 1 or not any(i.get("AssociatePublicIpAddress") for i in interfaces)
    options = prepared["docker"]["worker_run_options"]
    devices = [o for o in options if o.startswith("--device=/dev/infiniband/uverbs")]
    assert len(devices) == len(interfaces) and "--ulimit memlock=-1" in options
    installed = " ".join(prepared["worker_setup_commands"])
    assert all(flag in installed for flag in ("--skip-kmod", "--skip-limit-conf", "--no-verify"))
    assert "/opt/amazon/ofi-nccl/lib" in prepared["worker_start_ray_commands"][-1]


def test_every_id_of_the_launcher_is_replaced_by_a_command_of_the_docs():
    kinds = set(re.findall(r"\b(\w+)-REPLACE_ME", LAUNCHER.read_text()))
    guide = (ROOT / "docs/cluster.md").read_text()
    assert kinds == {"ami", "sg", "subnet", "fs"} and kinds == set(re.findall(r"s/(\w+)-REPLACE_ME/\$", guide))
    # sed without g replaces the first of a line only
    assert not [line for line in LAUNCHER.read_text().splitlines()[8:] if line.count("REPLACE_ME") > 1]


def test_the_launchers_commands_are_shell_and_what_it_sends_is_there():
    prepared = validated(read(LAUNCHER))
    commands = [c for key, value in prepared.items() if key.endswith("_commands") for c in value]
    assert len(commands) > 10
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    sent = {k: v for k, v in prepared["file_mounts"].items() if not v.startswith("~")}
    assert all((ROOT / local).exists() for local in sent.values())
    # what pip needs to build llamaq: the project's file, what it names, and the folders that it maps
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = project["tool"]["setuptools"]["package-dir"].values()
    assert {"pyproject.toml", project["project"]["readme"], *folders} == set(sent.values())


def test_every_node_of_the_launcher_has_the_token_and_the_secrets():
    prepared = validated(read(LAUNCHER))
    options = prepared["docker"]["run_options"]
    assert "-e RAY_AUTH_MODE=token" in options and "-v /shared:/shared" in options
    folder = next(remote for remote, local in prepared["file_mounts"].items() if local == "~/.llamaq")
    assert f"-e RAY_AUTH_TOKEN_PATH={folder}/token" in options
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert f"set -a; . {folder}/env; set +a; ray start" in prepared[key][-1]
    assert "--dashboard-host=127.0.0.1" in prepared["head_start_ray_commands"][-1]


# --- the RayJob -------------------------------------------------------------------------------------------------------


def kubernetes(validator: Any, model: str, value: Any, schema: dict):
    """Check the schema's keyword "kubernetes": the value is an object of this model of the kubernetes package."""
    import kubernetes.client
    import pydantic

    try:
        parsed = getattr(kubernetes.client, model).model_validate(value)
    except pydantic.ValidationError as e:
        for error in e.errors():
            yield ValidationError(f"{error['msg']}: {error['loc'][-1]!r}", path=error["loc"])
        return
    if parsed.model_dump(by_alias=True, exclude_none=True) != value:  # the package also accepts Python's names
        yield ValidationError(f"a key is not spelled as in Kubernetes, or null, in {value}")


def errors(document: dict) -> list[str]:
    """Return what KubeRay and Kubernetes would not accept, as `where: what`."""
    validator = validators.extend(Draft202012Validator, {"kubernetes": kubernetes})(SCHEMA)
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in validator.iter_errors(document)]


def test_kuberay_accepts_the_rayjob():
    Draft202012Validator.check_schema(SCHEMA)
    assert not errors(read(RAYJOB))


@pytest.mark.parametrize(
    ("path", "key", "typo"),
    [
        ("spec", "shutdownAfterJobFinishes", "shutDownAfterJobFinishes"),
        ("spec", "preRunningDeadlineSeconds", "preRunningDeadline"),
        ("spec.rayClusterSpec", "enableInTreeAutoscaling", "enableInTreeAutoScaling"),
        ("spec.rayClusterSpec", "headGroupSpec", "headGroupSpecs"),
        ("spec.rayClusterSpec.authOptions", "mode", "modes"),
        ("spec.rayClusterSpec.autoscalerOptions", "idleTimeoutSeconds", "idleTimeoutS"),
        (WORKERS, "maxReplicas", "maxReplica"),
        (WORKERS, "rayStartParams", "rayStartParam"),
        ("metadata", "name", "named"),
        (f"{WORKERS}.template", "spec", "specs"),
        (POD, "tolerations", "toleration"),
        (f"{POD}.tolerations.0", "operator", "operators"),
        (f"{POD}.containers.0", "volumeMounts", "volumeMount"),
        (f"{POD}.containers.0", "volumeMounts", "volume_mounts"),
        (f"{POD}.containers.0.resources", "limits", "limit"),
        (f"{POD}.containers.0.env.0.valueFrom.secretKeyRef", "optional", "option"),
        (f"{POD}.volumes.1.emptyDir", "sizeLimit", "size"),
    ],
)
def test_a_typo_in_the_rayjob_is_refused(path, key, typo):
    assert typo in " ".join(errors(changed(read(RAYJOB), path, key, typo)))


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        ("spec", "submissionMode", "K8SJobMode"),
        ("spec", "activeDeadlineSeconds", 0),
        ("spec", "backoffLimit", "0"),
        ("spec", "deletionStrategy", {"onSuccess": {"policy": "DeleteSelf"}}),
        ("spec.rayClusterSpec.autoscalerOptions", "version", "v3"),
        (f"{WORKERS}.rayStartParams", "num-gpus", 8),
        (f"{POD}.containers.0", "image", None),
        (f"{POD}.containers.0.env.0", "value", 1),
    ],
)
def test_a_wrong_value_in_the_rayjob_is_refused(path, key, value):
    assert errors(changed(read(RAYJOB), path, key, value=value))


def pods(document: dict) -> dict[str, dict]:
    cluster = document["spec"]["rayClusterSpec"]
    groups = {g["groupName"]: g for g in cluster["workerGroupSpecs"]} | {"head": cluster["headGroupSpec"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def claims(pod: dict) -> dict[str, str]:
    """Return the persistent volume claims that a pod's container sees, by mount path."""
    volumes = {
        v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v
    }
    mounts = pod["containers"][0]["volumeMounts"]
    return {m["mountPath"]: volumes[m["name"]] for m in mounts if m["name"] in volumes}


def entrypoint(document: dict) -> tuple[str, Any, Any]:
    """Return recipe, configuration and options of the job, parsed as the job does it."""
    from llamaq.cluster.job import parse

    words = shlex.split(document["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "llamaq.cluster.job"]
    assert words[words.index("--config") + 1] in packaged_configs()
    return parse(words[3:])


def not_shared(document: dict) -> list[str]:
    """Return the settings of the job that name a path outside the volume that all pods mount at the same path."""
    everywhere = set.intersection(*(set(claims(pod).items()) for pod in pods(document).values()))
    _, config, _ = entrypoint(document)
    paths = {key: Path(getattr(config, key)) for key in PATHS} | {"tokenizer": Path(config.tokenizer["path"])}
    return [key for key, path in paths.items() if not any(path.is_relative_to(place) for place, _ in everywhere)]


def test_the_job_runs_a_packaged_config_on_shared_paths_with_a_rank_for_every_gpu():
    document = read(RAYJOB)
    recipe, _, options = entrypoint(document)
    assert recipe == "qat_lora_dpo"
    assert not not_shared(document)
    gpu = at(document, WORKERS)
    gpus = int(gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert (options.min_workers, options.max_workers) == (gpus, gpus * gpu["maxReplicas"])
    assert at(document, "spec.rayClusterSpec.headGroupSpec.rayStartParams")["num-cpus"] == "0"
    # the launcher's cluster is as large
    launcher = read(LAUNCHER)
    assert launcher["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert launcher["available_node_types"]["gpu"]["resources"]["GPU"] * launcher["max_workers"] == options.max_workers


def test_a_path_that_not_all_pods_share_is_noticed():
    document = read(RAYJOB)
    command = document["spec"]["entrypoint"].replace("output_dir=/shared/runs", "output_dir=/home/ray/runs")
    assert not_shared(changed(document, "spec", "entrypoint", value=command)) == ["output_dir"]
    head = "spec.rayClusterSpec.headGroupSpec.template.spec.volumes.0.persistentVolumeClaim"
    assert set(PATHS) < set(not_shared(changed(document, head, "claimName", value="another")))


def test_pods_get_what_they_ask_for_and_secrets_from_kubernetes():
    document = read(RAYJOB)
    for pod in pods(document).values():
        container = pod["containers"][0]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        key = next(e["valueFrom"]["secretKeyRef"] for e in container["env"] if e["name"] == "WANDB_API_KEY")
        assert key == {"name": "llamaq", "key": "WANDB_API_KEY", "optional": True}
    gpu = pods(document)["gpu"]
    shm = next(m["name"] for m in gpu["containers"][0]["volumeMounts"] if m["mountPath"] == "/dev/shm")
    assert next(v for v in gpu["volumes"] if v["name"] == shm)["emptyDir"]["medium"] == "Memory"
    assert at(document, "spec.rayClusterSpec.authOptions")["mode"] == "token"


# --- both -------------------------------------------------------------------------------------------------------------


def test_versions_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ray, below = re.findall(r"\d+\.\d+", next(d for d in project["optional-dependencies"]["cluster"] if "ray" in d))
    launcher, rayjob = read(LAUNCHER), read(RAYJOB)
    versions = [launcher["docker"][image].split(":")[1] for image in ("head_image", "worker_image")]
    for version in [*versions, rayjob["spec"]["rayClusterSpec"]["rayVersion"]]:
        assert version.startswith(f"{ray}.") and not version.startswith(f"{below}.")
    torch = next(d for d in project["dependencies"] if d.startswith("torch=="))
    assert launcher["setup_commands"][0] == f"pip install {torch}"
    assert {p["containers"][0]["image"].split(":")[1] for p in pods(rayjob).values()} == {llamaq.__version__}


# keys whose values are names of secrets or of files that hold them
NAMES = ("secretKeyRef", "secretName", "key", "KeyName", "ssh_private_key")


def secrets(text: str) -> list[str]:
    """Return the secrets in a file: under keys, in environments of containers, in commands and in comments."""
    found = re.findall(r"\bAKIA[0-9A-Z]{16}\b|\b[0-9a-f]{32,}\b|\b(?:hf|ghp)_\w{20,}|PRIVATE KEY", text)
    for name, value in re.findall(r"([\w.-]+)=(?![=\s])([^\s\"']+)", text):
        if SECRET.search(name) and not name.endswith("_PATH") and value[0] not in "$…":
            found.append(f"{name}={value}")

    def look(part: Any) -> None:
        if isinstance(part, dict):
            if SECRET.search(str(part.get("name", ""))) and part.get("value"):
                found.append(f"{part['name']}: {part['value']}")
            for key, value in part.items():
                if SECRET.search(str(key)) and key not in NAMES and isinstance(value, str | int):
                    found.append(f"{key}: {value}")
                look(value)
        elif isinstance(part, list):
            for item in part:
                look(item)

    look(yaml.safe_load(text))
    return found


@pytest.mark.parametrize("path", [LAUNCHER, RAYJOB], ids=lambda p: p.name)
def test_no_secret_is_in_the_file(path):
    assert not secrets(path.read_text())


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        (LAUNCHER, "-e RAY_AUTH_MODE=token", "-e RAY_AUTH_TOKEN=abc"),
        (LAUNCHER, "set -a; . /home/ray/.llamaq/env;", "export WANDB_API_KEY=abc;"),
        (LAUNCHER, "# In the container.", "# aws_secret_access_key=abc"),
        (LAUNCHER, "  ssh_user: ubuntu", "  ssh_user: ubuntu\n  ssh_password: abc"),
        (RAYJOB, "valueFrom: { secretKeyRef: { name: llamaq, key: WANDB_API_KEY, optional: true } }", "value: abc"),
        (RAYJOB, "python -m", "HF_TOKEN=abc python -m"),
        (RAYJOB, "  name: llamaq-3b", f"  name: llamaq-3b\n  labels: {{ owner: {'0123456789abcdef' * 2} }}"),
    ],
)
def test_a_secret_in_the_file_is_noticed(path, old, new):
    text = path.read_text()
    assert old in text
    assert secrets(text.replace(old, new, 1))
