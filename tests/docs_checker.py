"""The checks of tests/test_docs.py: what a document names as code must exist.

`complaints(text, folder)` returns one line for each command, option, file, module, function, setting or link that does
not exist. What exists is read from the code itself: the config's schema, the parsers, the Makefile, the source.
"""

import ast
import builtins
import dataclasses
import inspect
import itertools
import re
import shlex
import tomllib
import typing
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from llamaq.cli import OWN_COMMANDS, RAY_COMMANDS, RECIPES
from llamaq.config import Config, packaged_configs
from llamaq.data.hf_tokenizer import hf_tokenizer
from llamaq.data.tokenizer import OURS

ROOT = Path(__file__).parent.parent
WITH_WRONG_NAMES = Path(__file__).parent / "test_docs.py"

FOLDERS = r"(?:llamaq|recipes|cluster|tests|docs|\.ci|\.github)"
TORCHTUNES_COMMANDS = ("run", "ls", "cp", "cat", "validate", "download")
# names of other projects that the docs mention as code: files, classes, options
THEIR_FILES = {"node_visitor.py"}
THEIR_CLASSES = {
    "TransformerDecoder",
    "TiedLinear",
    "LoRALinear",
    "QATLoRALinear",
    "DPOLoss",
    "OpenAIToMessages",
    "DeepSpeedCPUAdam",
}
THEIR_OPTIONS = {"--method_name"}  # of ExecuTorch's llama_main
PLACEHOLDERS = {"key"}  # as in key=value
FILE_ENDINGS = {"md", "py", "json", "jsonl", "yaml", "txt", "pte", "pth", "safetensors", "model", "png"}

Check = Callable[[str, Path], Iterator[str]]


# --- what there is ----------------------------------------------------------------------------------------------------


@cache
def python_files() -> dict[str, str]:
    """Return every Python file of the repository by its path, with its text; not the test that names what is wrong."""
    found = [p for top in ("llamaq", "recipes", "cluster", "tests") for p in sorted((ROOT / top).rglob("*.py"))]
    return {p.relative_to(ROOT).as_posix(): p.read_text() for p in found if p != WITH_WRONG_NAMES}


@cache
def defined_in(file: str) -> frozenset[str]:
    """Return the functions, methods, classes and module-level names of a file."""
    tree, found = ast.parse(python_files()[file]), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
    for node in tree.body:
        targets: list[Any] = getattr(node, "targets", None) or [getattr(node, "target", None)]
        found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return frozenset(found)


@cache
def defined_anywhere() -> frozenset[str]:
    return frozenset().union(*(defined_in(file) for file in python_files()))


@cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


@cache
def submit_options() -> frozenset[str]:
    text = python_files()["cluster/submit.py"] + python_files()["cluster/options.py"]
    return frozenset(re.findall(r"\"(--[a-z][\w-]+)\"", text))


@cache
def torchrun_options() -> frozenset[str]:
    from torch.distributed.run import get_args_parser

    return frozenset(o.replace("-", "_") for a in get_args_parser()._actions for o in a.option_strings)


@cache
def extras() -> frozenset[str]:
    return frozenset(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


@cache
def configs() -> list[DictConfig]:
    loaded = [OmegaConf.load(path) for path in packaged_configs().values()]
    return [c for c in loaded if isinstance(c, DictConfig)]


def is_module(name: str) -> bool:
    """Tell whether a dotted name under `llamaq` is a module, or something that its file defines or imports."""
    parts = name.split(".")[1:]
    top = parts[0] if parts[0] in ("recipes", "cluster") else "llamaq"
    parts = parts[1:] if top != "llamaq" else parts
    for cut in range(len(parts), -1, -1):
        base, rest = "/".join([top, *parts[:cut]]), parts[cut:]
        file = next((f for f in (f"{base}.py", f"{base}/__init__.py") if f in python_files()), None)
        if file is not None:
            return not rest or (len(rest) == 1 and bool(re.search(rf"\b{rest[0]}\b", python_files()[file])))
    return False


def is_setting(path: str) -> bool:
    """Tell whether a dotted path is a setting.

    Arguments of components must occur in a packaged config, or be those of llamaq's tokenizers.
    """
    schema: Any = Config
    parts = path.split(".")
    for i, part in enumerate(parts):
        hints = typing.get_type_hints(schema)
        if part not in hints:
            return False
        annotation, rest = hints[part], parts[i + 1 :]
        section = next((t for t in _types_in(annotation) if dataclasses.is_dataclass(t)), None)
        if section is not None:
            schema = section
        elif not rest or "dict[str, str]" in str(annotation):
            return True
        elif parts[:2] == ["deepspeed", "settings"]:
            files = (ROOT / "cluster" / "deepspeed").glob("*.json")
            return any(all(f'"{key}"' in file.read_text() for key in rest) for file in files)
        else:
            if parts[0] == "tokenizer" and rest[0] in {*inspect.signature(hf_tokenizer).parameters, *OURS}:
                return True
            return "dict" in str(annotation) and any(OmegaConf.select(c, path) is not None for c in configs())
    return True


def _types_in(annotation: Any) -> list[Any]:
    return [annotation, *(t for a in typing.get_args(annotation) for t in _types_in(a))]


# --- parts of a document ----------------------------------------------------------------------------------------------


def blocks(text: str, *languages: str) -> list[str]:
    """Return the bodies of fenced code blocks in any of the languages."""
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.M | re.S)
    return [body for language, body in found if language in languages]


def spans(text: str) -> list[str]:
    """Return the inline code of a document."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    return [" ".join(s.split()) for s in re.findall(r"`([^`]+)`", prose)]


def commands(text: str) -> Iterator[list[str]]:
    """Yield the commands of a document, as words: from shell blocks, and inline code that begins like one."""
    lines = [line for body in blocks(text, "bash") for line in body.replace("\\\n", " ").splitlines()]
    lines += [s for s in spans(text) if s.startswith(("tune ", "make ", "python ", "bash ", "pip "))]
    for line in lines:
        for part in re.split(r"&&|\||;", re.sub(r"(^|\s)#.*$", "", line)):
            try:
                words = shlex.split(part)
            except ValueError:  # a quote that goes on in another line: a shell script of its own
                continue
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


def is_placeholder(word: str) -> bool:
    return "…" in word or word.isupper() or word.startswith("$")


# --- the checks -------------------------------------------------------------------------------------------------------


def check_commands(text: str, folder: Path) -> Iterator[str]:
    for words in commands(text):
        name, rest = words[0], words[1:]
        if name in ("tune", "llamaq") and rest:
            yield from check_tune(rest)
        elif name == "make":
            yield from (f"make has no target {w}" for w in rest if "=" not in w and w not in make_targets())
        elif name in ("python", "bash"):
            yield from check_script(rest)
        elif words[:2] == ["pip", "install"]:
            named = [e for w in rest if "[" in w for e in w[w.index("[") + 1 : w.index("]")].split(",")]
            yield from (f"llamaq has no extra {e}" for e in named if e not in extras())


def check_tune(words: list[str]) -> Iterator[str]:
    command, rest = words[0], words[1:]
    if command not in (*TORCHTUNES_COMMANDS, *RAY_COMMANDS, *OWN_COMMANDS, "--help") and not is_placeholder(command):
        yield f"tune has no command {command}"
    options = [w.partition("=")[0] for w in rest if w.startswith("--")]
    if command == "run":
        while rest and rest[0].startswith("--"):
            option = rest.pop(0).partition("=")[0]
            if option.replace("-", "_") not in torchrun_options() and option != "--help":
                yield f"torchrun has no option {option}"
            rest = rest[1:]
        options = [w.partition("=")[0] for w in rest if w.startswith("--")]
        yield from (f"tune run has no option {o}" for o in options if o not in ("--config", "--help"))
    if command == "submit":
        yield from (f"tune submit has no option {o}" for o in options if o not in submit_options())
        rest = rest if rest and not rest[0].startswith("-") else []
    elif command in OWN_COMMANDS:
        code = python_files()[f"{OWN_COMMANDS[command].replace('.', '/')}.py"]
        yield from (f"tune {command} has no option {o}" for o in options if f'add_argument("{o}"' not in code)
    if command in ("run", "submit") and rest and rest[0] not in RECIPES and not is_placeholder(rest[0]):
        yield f"there is no recipe {rest[0]}"
    for option, value in itertools.pairwise(rest):
        if option == "--config" and not is_config(value):
            yield f"there is no config {value}"
    if command in ("cp", "cat", "validate") and rest and not is_config(rest[0]) and rest[0] not in RECIPES:
        yield f"there is no recipe or config {rest[0]}"


def is_config(name: str) -> bool:
    return name in packaged_configs() or name.endswith(".yaml") or is_placeholder(name)


def check_script(words: list[str]) -> Iterator[str]:
    """Check a script or `-m MODULE`, and that its file mentions the options it is given."""
    options = [w for w in words if w.startswith("--")]
    if words[:1] == ["-m"]:
        name = words[1]
        if not name.startswith("llamaq"):
            return
        if "." in name and not is_module(name):
            yield f"there is no module {name}"
        file = f"{name.replace('.', '/')}.py"
    else:
        file = next((w for w in words if not w.startswith("-")), "")
        if file.endswith(".py") and "/" not in file:
            file = next((f for f in python_files() if f.endswith(f"/{file}")), file)
        if not (ROOT / file).is_file() and not is_placeholder(file):
            yield f"there is no file {file}"
    if file in python_files():
        yield from (f"{file} has no option {o}" for o in options if o not in python_files()[file])


def check_options(text: str, folder: Path) -> Iterator[str]:
    """Options in prose must occur in the code."""
    code = "\n".join(python_files().values()) + (ROOT / "Makefile").read_text()
    for span in spans(text):
        for option in re.findall(r"(?:^|\s)(--[a-z][\w-]+)", span):
            known = option in THEIR_OPTIONS or option.replace("-", "_") in torchrun_options()
            if option not in code and not known:
                yield f"there is no option {option}"


def check_files(text: str, folder: Path) -> Iterator[str]:
    for path in re.findall(rf"(?<![\w/.~$-]){FOLDERS}/[\w./*-]*", text):
        path = path.rstrip(".")
        if not any(ROOT.glob(path.rstrip("/"))):
            yield f"there is no file {path}"
    names = {file.rsplit("/", 1)[-1] for file in python_files()} | THEIR_FILES
    for name in re.findall(r"(?<![\w/.-])([\w-]+\.py)\b", text):
        if name not in names:
            yield f"there is no file {name}"


def check_modules(text: str, folder: Path) -> Iterator[str]:
    for name in re.findall(r"(?<![\w./-])llamaq(?:\.\w+)+", text):
        if not is_module(name):
            yield f"there is no module {name}"
    for body in blocks(text, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llamaq"):
                package = node.module or ""
                for alias in node.names:
                    if not is_module(f"{package}.{alias.name}"):
                        yield f"{package} has no {alias.name}"


def check_functions(text: str, folder: Path) -> Iterator[str]:
    """`name()` must be defined somewhere, and `name` in `file` in that very file; so must classes."""
    for span in spans(text):
        if (match := re.fullmatch(r"(?:\w+\.)*(\w+)\(\)", span)) and match[1] not in defined_anywhere():
            yield f"there is no function {match[1]}"
        if re.fullmatch(r"[A-Z][a-z]+(?:[A-Z]+[a-z]*)+", span):
            known = span in defined_anywhere() or span in THEIR_CLASSES or hasattr(builtins, span)
            yield from () if known else (f"there is no class {span}",)
    for name, file in re.findall(rf"`(?:\w+\.)*(\w+)(?:\(\))?`\s+in\s+`({FOLDERS}/[\w/]+\.py)`", text):
        if file in python_files() and name not in defined_in(file):
            yield f"{file} does not define {name}"


def check_settings(text: str, folder: Path) -> Iterator[str]:
    sections = "|".join(f.name for f in dataclasses.fields(Config))
    for code in [*spans(text), *blocks(text, "bash")]:
        for key in re.findall(r"(?<![\w.$/(~=-])([a-z_]+(?:\.\w+)*)=(?!=)", code):
            if key not in PLACEHOLDERS and not is_setting(key):
                yield f"there is no setting {key}"
        for key in re.findall(rf"(?<![\w./-])((?:{sections})(?:\.\w+)+)(?![\w/=(])", code):
            if key.rsplit(".", 1)[-1] not in FILE_ENDINGS and not is_setting(key):
                yield f"there is no setting {key}"
        for name in re.findall(r"(?<![\w./-])llama3_2/\w+", code):
            if name not in packaged_configs():
                yield f"there is no config {name}"
    for body in blocks(text, "yaml"):
        yield from (f"there is no setting {key}" for key in keys_of(yaml.safe_load(body)) if not is_setting(key))


def keys_of(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted settings of a YAML snippet, down to components."""
    if isinstance(node, list):
        for item in node:
            yield from keys_of(item, prefix)
    elif isinstance(node, dict) and "_component_" not in node:
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from keys_of(value, f"{prefix}{key}.")


def check_variables(text: str, folder: Path) -> Iterator[str]:
    known = set(re.findall(r"\bLLAMAQ_[A-Z_]+\b", "\n".join(python_files().values())))
    yield from (f"nothing reads {v}" for v in set(re.findall(r"\bLLAMAQ_[A-Z_]+\b", text)) if v not in known)


def check_links(text: str, folder: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = folder / path if path else None
        if file is not None and not file.exists():
            yield f"the link {target} leads nowhere"
        elif anchor and anchor not in anchors(file.read_text() if file else text):
            yield f"the link {target} names no heading"


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.+?)\s*$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


CHECKS: list[Check] = [
    check_commands,
    check_options,
    check_files,
    check_modules,
    check_functions,
    check_settings,
    check_variables,
    check_links,
]


def complaints(text: str, folder: Path = ROOT) -> list[str]:
    """Return a line for every name in a document that does not exist."""
    return sorted({complaint for check in CHECKS for complaint in check(text, folder)})
