"""Send a recipe to a Ray cluster as a job, and follow its log.

    tune submit RECIPE --config C --address http://HEAD:8265 --num-workers N [key=value …]

The job gets llamaq's own code, the whole configuration and, with --working-dir, a folder of yours. It gets no secrets:
put keys such as WANDB_API_KEY into the environment of the cluster's nodes, from where the workers inherit them.

The command returns the job's exit code; with --detach it returns at once. Afterwards use Ray's own commands: `ray job
status`, `ray job logs --follow` and `ray job stop`. Submitting again resumes the run.
"""

import argparse
import asyncio
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import llamaq
from llamaq.cluster.options import Options, add_options, parse_options, split_settings
from llamaq.config import Config, cluster_dir, deepspeed_settings, load, recipes_dir
from llamaq.errors import UserError

# Variables that travel if they are set: settings of libraries that the workers use. None of them holds a secret.
FORWARDED = (
    "WANDB_MODE",
    "WANDB_PROJECT",
    "WANDB_ENTITY",
    "WANDB_BASE_URL",
    "WANDB_TAGS",
    "WANDB_NOTES",
    "HF_HUB_OFFLINE",
    "LLAMAQ_TRACEBACK",
)
SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)  # found in the names of secrets
SECONDS_BETWEEN_LOOKS = 2.0
AGENT_SECONDS = 60.0  # the dashboard of a new head answers before the head can start jobs


def main(argv: list[str]) -> int:
    """Run `tune submit` and return its exit code, which is the job's."""
    try:
        return submit(argv)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        return 1


def submit(argv: list[str]) -> int:
    """Check the command line, send the job and follow it.

    Raises:
        UserError: a setting is wrong, a secret is on the command line, or no cluster answers at the address.
    """
    arguments, config, options = parse(argv)
    environment = environment_of(arguments.env)
    use_token(arguments.token_file)
    client = connect(arguments.address)
    name = arguments.submission_id or f"llamaq-{arguments.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    command = [arguments.recipe, "--config", "config.yaml", *options.arguments()]
    with tempfile.TemporaryDirectory(prefix="llamaq-submit-") as folder:
        pack(Path(folder), config, arguments.working_dir)
        send(
            client,
            entrypoint=shlex.join([arguments.python, "-m", "llamaq.cluster.job", *command]),
            submission_id=name,
            runtime_env={"working_dir": folder, "env_vars": environment},
            metadata={"recipe": arguments.recipe, "output_dir": config.output_dir, "llamaq": llamaq.__version__},
        )
    later = f"ray job status|logs|stop {name} --address {arguments.address}"
    print(f"submitted {name}: {config.output_dir} ({later})", flush=True)
    if arguments.detach:
        return 0
    try:
        return follow(client, name)
    except KeyboardInterrupt:
        print(f"\nnot following any more; the job goes on ({later})", file=sys.stderr)
        return 130  # what a shell returns for Ctrl-C


def parse(argv: list[str]) -> tuple[argparse.Namespace, Config, Options]:
    """Parse and check the command line.

    Raises:
        UserError: a setting or an option is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="tune submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"),
        help="address of the cluster's dashboard (default $RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265)",
    )
    parser.add_argument("--working-dir", type=Path, help="a folder of your own modules to send along")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an environment variable for driver and workers; never a secret",
    )
    parser.add_argument("--token-file", type=Path, help="the cluster's authentication token (RAY_AUTH_MODE=token)")
    parser.add_argument("--submission-id", help="the job's name (default llamaq-RECIPE-TIME)")
    parser.add_argument(
        "--python",
        default="python",
        help="the Python on the nodes that has llamaq's packages, if another one comes first on their PATH",
    )
    parser.add_argument("--detach", action="store_true", help="do not follow the job")
    words, settings = split_settings(argv)
    arguments = parser.parse_args(words)
    if arguments.recipe == "chat":
        raise UserError(
            "chat needs a terminal, which a job has not got; use `tune run chat …` where output_dir can be read"
        )
    config = load(arguments.config, settings)
    options = parse_options(arguments, config)
    options.check(config)
    return arguments, config, options


def environment_of(given: list[str]) -> dict[str, str]:
    """Return the environment variables to send. The job's metadata shows them, so they must not hold secrets.

    Args:
        given: what the user gave with --env.

    Raises:
        UserError: a name looks like a secret's, or an item is not NAME=VALUE.
    """
    environment = {name: os.environ[name] for name in FORWARDED if os.environ.get(name)}
    for item in given:
        name, separator, value = item.partition("=")
        if not separator or not name:
            raise UserError(f"--env {name}: give NAME=VALUE")
        if SECRET.search(name):
            raise UserError(
                f"--env {name}: it looks like a secret, and the environment of a job is shown to everyone on the "
                "cluster; set it on the nodes (docs/cluster.md, Secrets)"
            )
        environment[name] = value
    return environment | {"PYTHONUNBUFFERED": "1"}


def use_token(path: Path | None) -> None:
    """Authenticate with the token in the user's file, if one is given.

    Raises:
        UserError: the file does not exist, or other users can read it.
    """
    if path is None:
        return
    if not path.is_file():
        raise UserError(f"--token-file {path}: no such file")
    if path.stat().st_mode & 0o077:
        raise UserError(f"--token-file {path} can be read by others; chmod 600 {path}")
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path.absolute())}


def connect(address: str) -> Any:
    """Connect to the cluster's job server and return the client.

    Raises:
        UserError: Ray is not installed, nobody answers, or the cluster wants a token.
    """
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as e:
        raise UserError("tune submit needs Ray: pip install 'llamaq[cluster]'") from e
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address}: give the dashboard's, as in http://127.0.0.1:8265")
    try:
        client = JobSubmissionClient(address)
    except Exception as e:  # Ray raises ConnectionError, RuntimeError and its own AuthenticationError
        said = " ".join(str(e).split())
        if "oken" in said or "Authentication" in type(e).__name__:
            raise UserError(f"the cluster at {address} wants a token: --token-file FILE ({said[:200]})") from e
        raise UserError(f"no Ray cluster answers at {address}: is the address right, is the port forwarded?") from e
    # these modules log every package and every closed connection; their levels are set when they are imported
    for module in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)
    return client


def pack(folder: Path, config: Config, own: Path | None) -> None:
    """Copy into `folder` what the job gets: the user's modules, llamaq's package and the configuration.

    Raises:
        UserError: the user's folder does not exist or hides llamaq, or the configuration holds a secret of the
            environment.
    """
    if own is not None:
        _pack_own(own, folder)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(llamaq.__file__).resolve().parent, folder / "llamaq", ignore=ignored)
    for part in (recipes_dir(), cluster_dir()):  # beside the package in a checkout, inside it once installed
        shutil.copytree(part, folder / "llamaq" / part.name, ignore=ignored, dirs_exist_ok=True)
    (folder / "config.yaml").write_text(_config_text(config))


def _pack_own(own: Path, folder: Path) -> None:
    if not own.is_dir():
        raise UserError(f"--working-dir {own}: no such folder")
    if (own / "llamaq").exists():
        raise UserError(f"--working-dir {own} holds something called llamaq, which would hide ours")
    ignored = shutil.ignore_patterns("__pycache__", ".git", ".venv", ".env*")
    shutil.copytree(own, folder, dirs_exist_ok=True, ignore=ignored)


def _config_text(config: Config) -> str:
    """Return the configuration as YAML with all defaults written out.

    DeepSpeed's settings are written into it, because the file that `deepspeed.config` may name is not sent.
    """
    from omegaconf import OmegaConf

    settings = asdict(config) | {"deepspeed": {"config": "zero0", "settings": deepspeed_settings(config)}}
    text = OmegaConf.to_yaml(OmegaConf.create(settings))
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8 and value in text:
            raise UserError(f"the configuration holds the value of {name}, and it is sent as it is; take it out")
    return text


def send(client: Any, **job: Any) -> None:
    """Submit the job. A cluster that has just started gets a minute to accept it.

    Raises:
        UserError: the cluster refuses the job; with its reason.
    """
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            client.submit_job(**job)
            return
        except RuntimeError as e:
            if "No available agent" not in str(e) or time.monotonic() > deadline:
                raise UserError(f"the cluster refuses the job: {' '.join(str(e).split())[-300:]}") from e
        time.sleep(SECONDS_BETWEEN_LOOKS)


def follow(client: Any, name: str) -> int:
    """Print the job's log as it grows, until the job ends; return its exit code."""
    shown = 0  # characters printed so far

    async def tail() -> None:
        nonlocal shown
        seen = 0  # characters of this connection: each starts at the beginning of the log again
        async for text in client.tail_job_logs(name):
            new = text[max(0, shown - seen) :]
            seen += len(text)
            if new:
                shown += len(new)
                print(new, end="", flush=True)

    while True:
        try:
            asyncio.run(tail())
            info = client.get_job_info(name)
            if info.status.is_terminal():
                break
        except (RuntimeError, OSError) as e:
            print(f"(lost the log, trying again: {e})", file=sys.stderr)
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if str(info.status) == "SUCCEEDED":
        return 0
    code = info.driver_exit_code
    print(f"{name}: {str(info.status).lower()} (exit code {code})", file=sys.stderr)
    return code if code else 1
