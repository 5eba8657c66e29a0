"""The schema as data: every section and setting with its text, read from the source of the dataclasses.

A field's text is the string literal under it, and a section's is the literal under its field in `Config` or else the
docstring of its class. So what a setting means is written once, where it is defined.
"""

import ast
import inspect
import textwrap
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from llamaq.config.load import section_type
from llamaq.config.schema import Config
from llamaq.config.values import MAY_BE_UNNAMED


@dataclass(frozen=True)
class Setting:
    """One setting."""

    path: str  # its full name, e.g. qat.max_steps; N stands for a position in a list
    text: str
    default: Any  # MISSING where it is required
    is_component: bool
    inherited: bool = False  # defined by the class that the section's class extends

    @property
    def name(self) -> str:
        """Return the name within its section."""
        return self.path.split(".", 1)[-1]


@dataclass(frozen=True)
class Section:
    """Settings that stand together. The settings of the run itself are a section without a name."""

    name: str
    text: str
    schema: type
    settings: tuple[Setting, ...]


@cache
def sections() -> tuple[Section, ...]:
    """Return all sections in the order of `Config`; the settings of the run itself come first."""
    texts = texts_of(Config)
    found = [Section("", _docstring(Config), Config, _settings(Config, ""))]
    for f in fields(Config):
        if schema := section_type(f.type):
            text = texts.get(f.name) or _docstring(schema)
            found.append(Section(f.name, text, schema, _settings(schema, f"{f.name}.")))
    return tuple(found)


def texts_of(schema: type) -> dict[str, str]:
    """Return the text under each field of a dataclass, of its base classes too."""
    texts: dict[str, str] = {}
    for cls in reversed([c for c in schema.__mro__ if is_dataclass(c)]):
        body = _definition(cls).body
        for node, after in pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_text(after):
                texts[node.target.id] = " ".join(ast.literal_eval(after.value).split())  # pyright: ignore
    return texts


def _definition(cls: type) -> ast.ClassDef:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    return definition


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _docstring(cls: type) -> str:
    return " ".join((inspect.getdoc(cls) or "").split())


def _settings(schema: Any, prefix: str) -> tuple[Setting, ...]:
    """Return the settings of a dataclass, without those of nested sections, with those of the items of a list."""
    texts, defaults, found = texts_of(schema), schema(), []
    of_bases = {f.name for base in schema.__mro__[1:] if is_dataclass(base) for f in fields(base)}
    for f in fields(schema):
        item = section_type(f.type)
        is_list = getattr(f.type, "__origin__", None) is list
        if item is None or is_list:
            default = getattr(defaults, f.name)
            named_options = default == {} and f.name not in MAY_BE_UNNAMED  # by their keys, e.g. export.adapters
            is_component = _is_dict(f.type) and not named_options
            found.append(Setting(prefix + f.name, texts.get(f.name, ""), default, is_component, f.name in of_bases))
        if item is not None and is_list:
            found += _settings(item, f"{prefix}{f.name}.N.")
    return tuple(found)


def _is_dict(annotation: Any) -> bool:
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return any(getattr(t, "__origin__", None) is dict for t in candidates)
