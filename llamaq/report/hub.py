"""Upload what a run ships: `tune publish runs/x --repo NAME [--private] [--dry-run]`.

The folder `bundle` of the run goes to a model repository of the Hugging Face Hub, as it is. The token comes from
`hf auth login` or from HF_TOKEN in the environment, and never from the command line, which others can read.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from llamaq.errors import UserError
from llamaq.report.tables import MIB
from llamaq.runs.manifest import MANIFEST, list_files, read_manifest, verify

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN in the environment"


def main(argv: list[str]) -> int:
    """Run `tune publish` and return its exit code."""
    parser = argparse.ArgumentParser("tune publish", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's output_dir")
    parser.add_argument("--repo", required=True, metavar="NAME", help="OWNER/NAME, or NAME in your own account")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="list what would go, and send nothing")
    try:
        _refuse_tokens(argv)
        a = parser.parse_args(argv)
        publish(a.run, a.repo, a.private, a.dry_run)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


def _refuse_tokens(argv: list[str]) -> None:
    if any(word.startswith(("--token", "hf_")) or "=hf_" in word for word in argv):
        raise UserError(f"a token does not belong on the command line, where others can read it; {LOG_IN}")


def publish(run: Path, repo: str, private: bool = False, dry_run: bool = False) -> None:
    """Upload a run's bundle, or list what would go.

    Raises:
        UserError: no bundle, a damaged one or one of an older export, a wrong name, no token, or the Hub refuses.
    """
    folder = checked_bundle(run)
    _check_name(repo)
    files = [p for p in list_files(folder) if p.name != MANIFEST]
    for path in files:
        print(f"{path.stat().st_size / MIB:10,.2f} MiB  {path.name}")
    total = f"{len(files)} files, {sum(p.stat().st_size for p in files) / MIB:,.1f} MiB"
    _remind_of_licence(folder, repo)
    if dry_run:
        print(f"{total} would go to {repo}; nothing was sent")
        return
    print(f"{total} → {_upload(folder, repo, private)}")


def checked_bundle(run: Path) -> Path:
    """Return a run's bundle, checked file by file, and made from the file that the run exports now."""
    folder = run / "bundle"
    if not (run / "run.json").is_file():
        raise UserError(f"{run} is not a run (it has no run.json); give the output_dir of a run")
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{run} has no bundle yet; `tune run evaluate` with its settings makes one")
    bundled = verify(folder)["metrics"]["model"]
    if bundled != read_manifest(run / "export")["metrics"]["sha256"]:
        raise UserError(f"{folder} holds an earlier export; `tune run evaluate` with its settings makes it anew")
    return folder


def _check_name(repo: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise UserError(f"--repo={repo}: {str(e).splitlines()[0]}") from e


def _remind_of_licence(folder: Path, repo: str) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    if "\nlicense: llama" in card and not repo.rpartition("/")[2].startswith("Llama"):
        print("note: Llama's licence asks for a name that begins with “Llama”", file=sys.stderr)


def _upload(folder: Path, repo: str, private: bool) -> str:
    """Make the repository if there is none, upload the folder as one commit, and return the repository's address."""
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise UserError(f"no token for the Hub; {LOG_IN}")
    api: Any = huggingface_hub.HfApi()
    try:
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(
            folder_path=folder,
            repo_id=made.repo_id,
            ignore_patterns=[MANIFEST],
            commit_message="Upload a model quantized by llamaq",
        )
    except Exception as e:  # of many kinds: no network, a wrong token, a name that is taken, a card it does not like
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise UserError(f"the Hub did not take it: {reason}") from e
    return str(made)
