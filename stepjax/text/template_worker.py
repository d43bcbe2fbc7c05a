"""The child process that renders chat templates: started as a script by `stepjax.text.template`, never imported by it.

A template is a program from a stranger's checkpoint. It runs here in Jinja's sandbox, with bounded memory, without the
right to write files or start processes, and is killed by the system when its processor time is up, or by the parent
when nothing comes. Imports only Jinja, so that starting one takes a fraction of a second. Speaks JSON, one object a
line: {} to see that it runs and {"source"} to compile, answered by {"ok"}; then {"variables", "max_chars"}, each
answered by {"text"}. An {"error"} answers anything.
"""

import contextlib
import json
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

_MAX_ERROR_CHARS = 500


def confine(memory_bytes: int) -> None:
    """Gives up what rendering does not need. Where the system lacks a limit, the others and the sandbox remain."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the group; the parent decides
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, which is what the limit of its time is for
    with contextlib.suppress(ImportError):
        import resource

        limits = (("RLIMIT_AS", memory_bytes), ("RLIMIT_FSIZE", 0), ("RLIMIT_NPROC", 0), ("RLIMIT_CORE", 0))
        for name, bound in limits:
            with contextlib.suppress(AttributeError, ValueError, OSError):
                resource.setrlimit(getattr(resource, name), (bound, bound))


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' `tojson`: keeps non-ASCII text and key order, and escapes nothing for HTML as Jinja's would."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def make_environment() -> jinja2.Environment:
    """Settings and names as transformers gives them, which is what checkpoints' templates are written for."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    del environment.globals["lipsum"]  # makes random text; of use only to an attacker
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment


def render(template: jinja2.Template, variables: dict[str, Any], *, max_chars: int) -> str:
    """Collects the output piece by piece, so that one without end is noticed early."""
    pieces, chars = [], 0
    for piece in template.generate(variables):
        chars += len(piece)
        if chars > max_chars:
            raise jinja2.TemplateError(f"the output exceeds {max_chars} characters")
        pieces.append(piece)
    return "".join(pieces)


def set_timers(cpu_s: float, wall_s: float) -> None:
    """Seconds after which the system ends this process, 0 for none. Wall time counts in case the parent died."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        signal.setitimer(signal.ITIMER_REAL, wall_s)


def answer(work: Callable[[], dict[str, Any]], *, cpu_s: float, wall_s: float) -> bytes:
    """The reply's line."""
    set_timers(cpu_s, wall_s)
    try:
        line = json.dumps(work(), ensure_ascii=False).encode("utf-8")
    except Exception as error:
        line = json.dumps({"error": f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS]}).encode("ascii")
    set_timers(0, 0)
    return line + b"\n"


def main() -> None:
    """Serves requests until the parent closes the pipe.

    Arguments: processor seconds of a request, memory in bytes, wall seconds of a request.
    """
    cpu_s, memory_bytes, wall_s = float(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    confine(memory_bytes)
    environment = make_environment()
    templates: list[jinja2.Template] = []

    def work(request: dict[str, Any]) -> dict[str, Any]:
        if "source" in request:
            templates[:] = [environment.from_string(request["source"])]
        if "variables" not in request:
            return {"ok": True}
        return {"text": render(templates[0], request["variables"], max_chars=request["max_chars"])}

    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(answer(lambda line=line: work(json.loads(line)), cpu_s=cpu_s, wall_s=wall_s))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
