"""The process that renders chat templates: what hostile templates cannot do, and how it lives and dies."""

import ast
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from stepjax.errors import TemplateError
from stepjax.text.chat import ChatTemplate
from stepjax.text.template import _WORKER, TemplateLimits, TemplateProcess


def user(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ x ", "{{" + "(" * 5000, "{{ x | no_such_filter }}", "{% no_such_tag %}"]
)
def test_templates_that_are_not_jinja_are_refused(source):
    with pytest.raises(TemplateError, match="not valid Jinja"):
        ChatTemplate(source).render([user("hi")])


def test_names_and_filters_that_checkpoints_use():
    source = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}{{ strftime_now('%Y') }}"
    source += (
        "{{ {'b': 'é<', 'a': 1} | tojson }}{{ [1] | tojson(indent=1) }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}"
    )
    expected = '01{year}{{"b": "é<", "a": 1}}[\n 1\n]{{"a": 2, "b": 1}}'.format(year=time.strftime("%Y"))
    assert ChatTemplate(source).render([user("hi")]) == expected


def test_a_template_may_refuse():
    with pytest.raises(TemplateError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render([user("hi")])


BOMBS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "huge range": "{% for i in range(10**12) %}{% endfor %}",
    "endless output": "{% for i in range(99999) %}{% for j in range(999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "string times": "{{ messages[0].content * 10**10 }}",
    "constant string times": "{{ 'x' * 10**10 }}",
    "list times": "{{ ([0] * 10**9) | length }}",
    "power": "{{ messages | length + 9**(9**9) }}",
    "power of a variable": "{% set n = messages | length + 8 %}{{ n**(n**n) }}",
    "recursive macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "forking macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "doubling": "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling list": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "width": "{{ '%0999999999d' % 1 }}",
    "format width": "{{ '{:>9999999999}'.format(1) }}",
    "center": "{{ 'x' | center(10**10) }}",
    "indent": "{{ [[1]] | tojson(indent=10**10) }}",
    "indent filter": "{{ 'a\nb' | indent(10**10) }}",
    "replace": "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
    "regular expression": "{{ ('x' * 10**6 + '.') | urlize | wordwrap(1) | length }}" * 50,
    "batch": "{% for b in range(99999) | batch(1) %}{% for c in range(99999) | batch(1) %}{% endfor %}{% endfor %}",
    "sort": "{% for i in range(99999) %}{% set x = range(99999) | sort(reverse=true) %}{% endfor %}",
    "slow join": "{{ range(99999) | map('string') | join('x' * 99999) }}",
    "cycler": "{% set c = cycler(1) %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% if c.next() %}{% endif %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
}


def time_of_children() -> float:
    """Processor seconds of those that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if at % 3 == 0 else pytest.mark.slow) for at, name in enumerate(BOMBS)]
)
def test_bombs_are_defused_in_time(name):
    """Whether compiling, rendering or allocating is what explodes. The bound leaves a second for starting the child."""
    limits = TemplateLimits(render_s=0.4, memory_bytes=1 << 29)
    template, before = ChatTemplate(BOMBS[name], limits=limits), time_of_children()
    with pytest.raises(TemplateError):
        template.render([user("hi")])
    template.close()
    assert time_of_children() - before < 2 * limits.render_s + 1


def test_a_busy_machine_is_no_reason_to_refuse():
    """A child that gets no processor for five times its limit."""
    template = ChatTemplate("fine", limits=TemplateLimits(render_s=0.2))
    template.render([user("hi")])
    process = template._process._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    wake = threading.Timer(1.0, os.kill, (process.pid, signal.SIGCONT))
    wake.start()
    began = time.monotonic()
    assert template.render([user("hi")]) == "fine"
    assert time.monotonic() - began > 0.5
    assert template._process._process is process
    wake.join()


def test_a_child_that_never_answers_is_killed_though_it_computes_nothing():
    template = ChatTemplate("fine")
    template.render([user("hi")])
    process = template._process._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    template._process._limits = replace(template._process._limits, wall_s=0.3)
    with pytest.raises(TemplateError, match=r"took more than 0\.3 s;"):
        template.render([user("hi")])
    assert process.poll() == -signal.SIGKILL


def test_a_killed_process_is_replaced():
    template = ChatTemplate(
        "{% if messages[0].content == 'loop' %}" + BOMBS["nested loops"] + "{% endif %}fine",
        limits=TemplateLimits(render_s=0.3),
    )
    for _ in range(2):
        assert template.render([user("hi")]) == "fine"
        with pytest.raises(TemplateError, match=r"took more than 0\.3 s of processor time"):
            template.render([user("loop")])
    template.close()
    assert template.render([user("hi")]) == "fine"


def test_the_child_sees_no_secrets_and_dies_with_its_owner(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "secret")
    template = ChatTemplate("fine")
    template.render([user("hi")])
    process = template._process._process
    assert process is not None
    environment = Path(f"/proc/{process.pid}/environ")
    if environment.exists():
        assert b"secret" not in environment.read_bytes()
    del template
    assert process.poll() is not None


def test_a_fork_starts_its_own_child():
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render([user("parent")]) == "parent"
    template._process._owner = os.getpid() + 1  # as a forked copy finds it
    first = template._process._process
    assert template.render([user("child")]) == "child"
    assert first is not None
    assert first.poll() is None
    first.kill()
    first.wait()
    template.close()


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__base__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ ('' | attr)('__class__') }}",
    "{{ [''] | map(attribute='__class__') | list }}",
    "{{ ['']| map('attr', '__class__') | list }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(1) }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ ['{0.__class__}'] | map('format', 1) | list }}",
    "{{ ('{0.__class__}' | attr('format'))(1) }}",
    "{% set f = ['{0.__class__}'] | map(attribute='format') | first %}{{ f(1) }}",
    "{% set f = '{0.__class__}'.format_map %}{{ f({'0': 1}) }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ namespace.__init__.__globals__.os }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ range.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__ }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ strftime_now.__builtins__ }}",
    "{{ messages.__class__.__init__ }}",
    "{{ messages[0].get.__self__.__class__ }}",
    "{{ loop.__class__ }}{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% macro f() %}{% endmacro %}{{ f.__init__.__globals__ }}",
    "{% macro f() %}{{ caller.__class__ }}{% endmacro %}{% call f() %}{% endcall %}",
    "{{ (messages | items).gi_frame.f_globals }}",
    "{{ (messages | map('upper')).gi_frame.f_back.f_globals }}",
    "{{ (messages | select).ag_frame }}{{ (messages | select).gi_code }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends '/etc/passwd' %}",
    "{% from '/etc/passwd' import x %}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].setdefault('a', 1) }}",
    "{{ [].extend([1]) }}{{ {}.pop('x', 1) }}{{ messages.sort() }}",
    "{{ open('/etc/passwd').read() }}",
    "{{ __import__('os') }}",
    "{{ get_flashed_messages.__globals__ }}{{ config.__class__ }}{{ request.application }}",
]
# Signs of an object that a template should not reach, or of the machine.
LEAKS = ["<class", "<function", "subclasses", "<module", "root:", "uid=", "builtin", "site-packages", "<code", "<frame"]


@pytest.fixture(scope="module")
def worker():
    """One child for all escapes: they must leave it unharmed as well."""
    process = TemplateProcess("fine")
    process.render({})
    child = process._process
    assert child is not None
    yield process
    assert child.poll() is None
    process.close()


@pytest.mark.parametrize("source", ESCAPES)
def test_sandbox_escapes_are_refused_or_harmless(worker, source):
    """Most raise; some render nothing, since Jinja's undefined names are empty."""
    reply = worker._ask({"source": source}, seconds=5, max_chars=0)
    if "error" not in reply:
        request = {"variables": {"messages": [user("hi")]}, "max_chars": 10_000}
        reply = worker._ask(request, seconds=5, max_chars=10_000)
    text = reply.get("text", "")
    assert not [leak for leak in LEAKS if leak in text], text


def test_the_worker_imports_nothing_but_jinja():
    """It must start in a fraction of a second, and an escape should find little."""
    tree = ast.parse(_WORKER.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"jinja2"}


def test_messages_from_a_child_that_broke_out_are_not_trusted(worker):
    for line in (b"\n", b"[" * 100_000 + b"\n", b"\xff\n"):
        with pytest.raises(TemplateError, match="no JSON"):
            worker._read_reply(line)
    assert worker._read_reply(b"5\n") == {}
