"""Chat templates that ask for endless time or memory: generated ways to grow a value, with places
that read it. The oracle: an error of one line that names ``chat_template``, and a bounded peak of
memory. A hang is a failure of its own."""

import resource
from itertools import product

import pytest

from s1engine import template_work
from s1engine.chat_template import ChatTemplate
from s1engine.errors import RequestError

CHAT = [{"role": "user", "content": "x"}]
SMALL = 2**18  # budget of these tests: each attack that is stopped costs its time in full
MAX_GROWTH_KIB = 2**18

NUMBERS = [
    "9**9**9**9",
    "10**9999",
    "(2**900) * (2**900)",
    "2**-99999999",
    "('f' * 9999) | int(0, 16)",
    "('9' * 4300) | int // 7",
    "1.5 | round(99999999, 'floor')",
    "(1).to_bytes(999999999, 'big')",
]
WIDTHS = [
    "'x' | center(W)",
    "'x'.center(W)",
    "'x'.ljust(W)",
    "'x'.zfill(W)",
    "'\\t'.expandtabs(W)",
    "''['center'](W)",
    "'' | attr('center')(W)",
    "'%Wd' % 1",
    "'%*d' % (W, 1)",
    "'%.Wf' % 1.0",
    "'%(a)Ws' % {'a': 1}",
    "'%Wd' | format(1)",
    "'{:>W}'.format(1)",
    "'{:>{w}}'.format(1, w=W)",
    "'{a:>W}'.format_map({'a': 1})",
    "'x\\n' | indent(W)",
    "[[1]] | tojson(indent=W)",
    "range(9) | batch(W, 'x') | list",
    "messages | map('center', W) | list",
    "'x' * W",
    "W * [1]",
    "range(W) | list",
    "lipsum(W)",
]
GROWING = {  # steps that at least double ns.v
    "text": ["ns.v + ns.v", "ns.v ~ ns.v", "ns.v * 2", "'%s%s' % (ns.v, ns.v)",
             "ns.v.replace('x', 'xx')", "ns.v | replace('x', 'xx')", "[ns.v, ns.v] | join",
             "ns.v.join(['', ns.v, ''])", "'{0}{0}'.format(ns.v)", "'{0} {0}'.format(ns.v) | trim",
             "copy(ns.v)", "ns.v | batch(1) | map('join') | join + ns.v"],
    "list": ["ns.v + ns.v", "ns.v * 2", "(ns.v | list) + (ns.v | list)"],
    "nest": ["[ns.v, ns.v]", "(ns.v, ns.v)", "{'a': ns.v, 'b': ns.v}", "dict(a=ns.v, b=ns.v)",
             "[ns.v] * 2", "[ns.v, ns.v] | batch(2) | list", "(ns.v | batch(9) | list) * 2"],
}  # fmt: skip
STARTS = {"text": "'x'", "list": "[1]", "nest": "[1]"}
READING = ["", "{{ ns.v }}", "{{ ns.v ~ 1 }}", "{{ ns.v | string | length }}",
           "{{ ns.v | tojson }}", "{{ ns.v | tojson(indent=1) }}", "{{ '%s' % [ns.v] }}",
           "{{ '{}'.format(ns.v) }}", "{{ ns.v == ns.w }}", "{{ ns.v in [ns.w] }}",
           "{{ [ns.w].index(ns.v) }}", "{{ [ns.v, ns.w] | sort }}",
           "{{ [ns.v, ns.w] | unique | list }}",
           "{{ [ns.v] | select('eq', ns.w) | list }}", "{{ {(ns.v, 1): 1} }}", "{{ ns }}",
           "{{ {1: ns.v}.values() }}", "{{ ns.v | join }}", 
           "{{ raise_exception(ns.v) }}"]  # fmt: skip
PASSES = [  # bodies of a long loop
    "{% for j in range(99999) %}{% endfor %}",
    "{% for j in range(99999) if false %}{% endfor %}",
    "{{ range(99999) | sum }}",
    "{{ range(99999) | map('abs') | list | length }}",
    "{{ range(99999) | map('abs') | max }}",
    "{{ 5.5 in range(99999) | map('abs') }}",
    "{{ 'x' in range(99999) }}",
    "{{ dict.fromkeys(range(99999)) == 1 }}",
    "{{ cycler(*range(99999)) }}",
    "{{ range(99999) | groupby('x') | list }}",
    "{{ 'y' in s }}",
    "{{ s.count('y') }}",
    "{{ s[1:] == s }}",
    "{{ s | wordcount }}",
    "{{ s | striptags | length }}",
    "{{ (d.keys() - d.keys()) | length }}",
    "{{ 'x' in d.values() }}",
    "{{ d == d.copy() }}",
    "{{ d | dictsort | length }}",
    "{{ m() }}",
    "{{ self.b() }}",
]
PATHS = [
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% block b %}{{ self.b() }}{% endblock %}",
    "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{% call m() %}{% endcall %}",
    "{% set x %}{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endset %}",
    "{{ ('x' * 9999) | wordwrap(1, wrapstring='x' * 9999) | length }}",
    "{{ [1, 2] | tojson(separators=('x' * 999999, 'x')) }}",
    "{{ ('[' * 99999) | from_json }}",
    "{{ strftime_now('%Y' * 99999) }}",
    "{{ messages | sum(start=[]) }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% from 'x' import y %}",
    "{% extends 'x' %}",
    "{{ x | nothing }}",
    "{{ x is nothing }}",
    "{{ none.a.b }}",
    "{{ '' | pprint }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "+ ".join(["x"] * 2000) + " }}",
    "{{ " + "- " * 5000 + "1 }}",
    "{{ " + "[" * 300 + "]" * 300 + " }}",
    "{{ " + "9" * 5000 + " }}",
    "{% for a in x %}" * 40 + "{% endfor %}" * 40,
    "{% macro a() %}" * 120 + "{% endmacro %}" * 120,
    "{% if x %}" * 200 + "{% endif %}" * 200,
    "{{ x }}" * 50_000,
    "{{ '" + "x" * 300_000 + "' }}",
]


def grown(kind: str, step: str, reading: str) -> str:
    step = "{% set ns.KEY = " + step.replace("ns.v", "ns.KEY") + " %}"
    return (
        "{% macro copy(x) %}{{ x }}{{ x }}{% endmacro %}"
        f"{{% set ns = namespace(v={STARTS[kind]}, w={STARTS[kind]}) %}}"
        f"{{% for i in range(64) %}}{step.replace('KEY', 'v')}{step.replace('KEY', 'w')}"
        f"{{% endfor %}}{reading}"
    )


def looped(body: str) -> str:
    return (
        "{% set s = 'x ' * 9999 %}{% set d = dict.fromkeys(range(999)) %}"
        "{% macro m() %}{% for j in range(99) %}{% endfor %}{% endmacro %}"
        "{% if false %}{% block b scoped %}{% for j in range(99) %}{% endfor %}{% endblock %}"
        "{% endif %}{% for i in range(99999) %}" + body + "{% endfor %}"
    )


ATTACKS = [
    *(f"{{{{ {number} }}}}" for number in NUMBERS),
    *(f"{{{{ {width.replace('W', '999999999')} }}}}" for width in WIDTHS),
    *(grown(kind, step, reading) for kind in ("text", "list") for step in GROWING[kind]
      for reading in READING[:1]),
    *(grown("nest", step, reading) for step, reading in product(GROWING["nest"], READING[1:])),
    *map(looped, PASSES),
    *PATHS,
]  # fmt: skip


def test_endless_templates_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_work, "FREE_WORK", SMALL)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    passed = [source for source in ATTACKS if not is_stopped(source)]
    assert passed == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH_KIB


def is_stopped(source: str) -> bool:
    try:
        text = ChatTemplate(source, {}).render(CHAT, {})
    except RequestError as error:
        assert error.param in ("chat_template", "messages"), source
        assert "\n" not in str(error) and len(str(error)) < 2000, source
        return True
    return len(text) > SMALL  # never


@pytest.mark.parametrize("length", [1, 10**6])
def test_long_chats_may_cost_more(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """A template that copies its messages a few times renders chats of any length."""
    monkeypatch.setattr(template_work, "FREE_WORK", SMALL)
    source = (
        "{% for m in messages %}{% set c = m.content | trim %}{% set c = c.split('</think>')[-1] %}"
        "{{ '<|im_start|>' + m.role + '\n' + c.strip() + '<|im_end|>' }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "x" * length}, {"role": "assistant", "content": "y"}]
    text = ChatTemplate(source, {}).render(messages * 20, {})
    assert text == (
        f"<|im_start|>user\n{'x' * length}<|im_end|><|im_start|>assistant\ny<|im_end|>" * 20
    )


def test_values_of_a_request_cannot_make_a_plain_template_endless(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(template_work, "FREE_WORK", SMALL)
    deep: object = list(range(1000))
    for _ in range(100):
        deep = [deep]
    template = ChatTemplate("{{ tools | tojson(indent=4) }}", {})
    with pytest.raises(RequestError, match="more text"):
        template.render(CHAT, {}, [{"a": deep}] * 10)
