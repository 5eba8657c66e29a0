"""The sandbox that chat templates run in: jinja2's, with what transformers gives templates."""

import json
from collections.abc import Callable
from datetime import date
from typing import Any

from llamaq.errors import UserError

OPEN, CLOSE = "\ufdd1", "\ufdd2"  # around what a `{% generation %}` block writes


def compile_template(code: str, day: date) -> Any:
    """Compile a template in a sandbox with what transformers gives templates.

    Raises:
        UserError: it is no Jinja code.
    """
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Reads `{% generation %}…{% endgeneration %}` and puts marks around what is inside."""

        tags = {"generation"}  # noqa: RUF012  (jinja2's way)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": day.strftime}
    try:
        return sandbox.from_string(code)
    except jinja2.TemplateSyntaxError as e:
        raise UserError(f"tokenizer.chat_template: no Jinja code that can be read: line {e.lineno}: {e.message}") from e
