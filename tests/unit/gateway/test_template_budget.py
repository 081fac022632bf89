"""No chat template runs without end or fills the memory, and templates of use never notice that they are counted.

Each hostile template here would run for minutes to ages, or take gigabytes, without what bounds it: a test that hangs
is one that has failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer, models

from gateway import template_budget, template_charges, template_units
from gateway.chat_template import TemplateError
from gateway.conversation import Conversation, Message
from gateway.template_units import Budget, TemplateTooCostlyError
from gateway.tokenization import TextCodec
from tests.builders_chat import chat_ids

pytestmark = pytest.mark.timeout(60)

TOKENIZER = Tokenizer(models.WordLevel({"x": 0}, unk_token="x")).to_str().encode()
HELLO = [Message("user", "hello")]


def render(template: str, messages: list[Message] = HELLO) -> str:
    return TextCodec(TOKENIZER, template, {"bos_token": "<s>"}).encode_chat(Conversation(tuple(messages))).rendered


R = "range(90000)"
P = 2**61 - 1  # Python's hash of a whole number is its remainder by it


def doubled(first: str, step: str, then: str = "") -> str:
    """A template that does `step` to ns.s 64 times."""
    return (
        f"{{% set ns = namespace(s={first}) %}}{{% for i in range(64) %}}{{% set ns.s = {step} %}}{{% endfor %}}{then}"
    )


HOSTILE = {
    "nested loops": f"{{% for a in {R} %}}" * 3 + "{% endfor %}" * 3,
    "a loop whose filter never holds": f"{{% for a in {R} %}}{{% for b in {R} if b < 0 %}}{{% endfor %}}{{% endfor %}}",
    "one loop of many": "".join(f"{{% for a in {R} %}}{{% endfor %}}" for _ in range(1000)),
    "a large body": f"{{% for a in {R} %}}{'{% set b = a %}' * 10000}{{% endfor %}}",
    "a loop over characters": "{% for a in 'x' * 1000000 %}{% endfor %}",
    "a macro of two calls": "{% macro f(n) %}{{ f(n - 1) + f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
    "a large macro": (
        f"{{% macro f() %}}{'{% set b = 1 %}' * 10000}{{% endmacro %}}{{% for a in {R} %}}{{{{ f() }}}}{{% endfor %}}"
    ),
    "a text doubled": doubled("'x'", "ns.s + ns.s"),
    "a text doubled by ~": doubled("'x'", "ns.s ~ ns.s"),
    "a text doubled by a block": "{% set s = 'x' %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 64,
    "a text doubled by join": doubled("'xy'", "ns.s.join(ns.s)"),
    "a list doubled": doubled("[1]", "ns.s + ns.s"),
    "a list of itself twice": doubled("[1]", "[ns.s, ns.s]", "{{ ns.s }}"),
    "a tuple of itself twice": doubled("1", "(ns.s, ns.s)", "{{ {}[ns.s] }}"),
    "a map of itself twice": doubled("1", "{1: ns.s, 2: ns.s}", "{{ ns.s | tojson }}"),
    "a map by keywords": doubled("1", "dict(a=ns.s, b=ns.s)", "{{ ns.s == ns.s }}"),
    "names that hold each other": (
        "{% set a = namespace() %}{% set b = namespace(x=a, y=a) %}{% set a.x = b %}{% set a.y = b %}{{ a }}"
    ),
    "a long text": "{{ 'x' * 10000000000 }}",
    "a long text, the other way": "{{ 10000000000 * 'x' }}",
    "a long list": "{{ ([1] * 10000000000) | length }}",
    "many digits": "{{ 10 ** 10000000000 }}",
    "many digits by squares": doubled("9", "ns.s * ns.s"),
    "a width of a method": "{{ 'x'.ljust(10000000000) }}",
    "a width of zeros": "{{ 'x'.zfill(10000000000) }}",
    "a width of a format": "{{ '{:>10000000000}'.format(1) }}",
    "a computed width": "{{ '{:>{}}'.format(1, 10000000000) }}",
    "a width of %": "{{ '%10000000000d' % 1 }}",
    "a computed width of %": "{{ '%*d' % (10000000000, 1) }}",
    "a width of the filter": "{{ '%10000000000d' | format(1) }}",
    "many formats": "{{ ('%999d' * 100000) % ((1,) * 100000) }}",
    "format_map": "{{ '{x:>{w}}'.format_map({'x': 1, 'w': 10000000000}) }}",
    "an indentation": "{{ 'x\\ny' | indent(10000000000) }}",
    "a text as indentation": "{{ ('\\n' * 100000) | indent('x' * 100000) }}",
    "an indentation of JSON": "{{ [1, 2] | tojson(indent=10000000000) }}",
    "a text as indentation of JSON": "{{ ([1] * 100000) | tojson(indent='x' * 100000) }}",
    "batches": "{{ [1] | batch(10000000000, 'x') | list }}",
    "slices": "{{ [1] | slice(10000000000) | list }}",
    "a replacement": "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
    "a replacement of nothing": "{{ ('x' * 100000).replace('', 'y' * 100000) }}",
    "the filter's replacement": "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}",
    "join": "{{ ('x' * 100000) | join('y' * 100000) }}",
    "join of a generator": "{{ range(90000) | map('string') | join('y' * 100000) }}",
    "the method join": "{{ ('y' * 100000).join('x' * 100000) }}",
    "a table": "{{ ('x' * 100000).translate({120: 'y' * 100000}) }}",
    "bytes": "{{ (5).to_bytes(10000000000, 'big') }}",
    "rounding": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "stripping": "{{ (('a' * 400000).strip('b' * 400000 + 'a')) | length }}",
    "finding from the end": "{{ ('a' * 500000).rfind('b' + 'a' * 250000) }}",
    "many generators": f"{{% for a in {R} %}}{{{{ {R} | select('odd') | list | length }}}}{{% endfor %}}",
    "many searches": f"{{% set t = 'x' * 500000 %}}{{% for a in {R} %}}{{% if 'y' in t %}}{{% endif %}}{{% endfor %}}",
    "many slices": f"{{% set t = 'x' * 500000 %}}{{% for a in {R} %}}{{% set u = t[1:] %}}{{% endfor %}}",
    "many texts": f"{{% set t = [1] * 50000 %}}{{% for a in {R} %}}{{% if t is lower %}}{{% endif %}}{{% endfor %}}",
    "sums of lists": "{{ ([[1] * 1000] * 1000) | sum(start=[]) }}",
    "sorting by a long attribute": "{% set a = 'real' ~ '.real' * 99 %}{{ range(30000) | list | sort(attribute=a) }}",
    "sorting by many attributes": "{{ range(10000) | list | sort(attribute='real' ~ ',real' * 99) | length }}",
    "sorting by many long attributes": (
        "{% set x = [{'x': [1] * 3000}, {'x': [1] * 3000}] %}{{ x | sort(attribute='x' ~ ',x' * 1000) }}"
    ),
    "mapping to a long attribute": "{{ range(3000) | map(attribute='real' ~ '.real' * 999) | list | length }}",
    "grouping by a long attribute": "{{ range(30000) | list | groupby('real' ~ '.real' * 99) | length }}",
    "the least by a long attribute": "{{ range(30000) | list | min(attribute='real' ~ '.real' * 99) }}",
    "a sum of a long attribute": "{{ range(30000) | list | sum(attribute='real' ~ '.real' * 99) }}",
    "a join of a long attribute": "{{ range(9000) | list | join(attribute='real' ~ '.real' * 99) }}",
    "different by a long attribute": "{{ range(30000) | list | unique(attribute='real' ~ '.real' * 99) | list }}",
    "selecting by a long attribute": "{{ range(30000) | selectattr('real' ~ '.real' * 99) | list }}",
    "rejecting by a long attribute": "{{ range(30000) | rejectattr('real' ~ '.real' * 99) | list }}",
    "numbers of one hash": f"{{{{ [{', '.join(f'{i} * {P}' for i in range(9000))}] | unique | list }}}}",
    "a map of numbers of one hash": f"{{{{ dict([{', '.join(f'({i} * {P}, 1)' for i in range(7000))}]) }}}}",
    "a map of batches": "{{ dict(range(90000) | batch(2)) }}",
    "marked texts": "{% for a in range(9000) %}{{ (('<a>' * 900) | safe).striptags() }}{% endfor %}",
    "division of a number without end": "{{ (('7' * 5000) | int(0, 16)) // 3 }}",
    "a rest of a number without end": "{{ 3 % (('7' * 5000) | int(0, 16)) }}",
    "divisible by a number without end": "{{ 3 is divisibleby(('7' * 5000) | int(0, 16)) }}",
    "output": f"{{% for a in {R} %}}{{{{ 'x' * 1000 }}}}{{% endfor %}}",
}


def refusal_of(template: str) -> str:
    """Why it is refused, in rendering or, being constant, in compilation; empty if it is not."""
    try:
        render(template)
    except (TemplateError, ValueError) as error:
        cause = error.__cause__
    else:
        return ""
    assert isinstance(cause, TemplateTooCostlyError), repr(cause)
    return str(cause)


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_template_that_would_not_end_is_refused(template: str) -> None:
    assert refusal_of(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% block f %}{{ self.f() }}{{ self.f() }}{% endblock %}",
        "{% for a in [[1]] recursive %}{{ loop([a, a, a, a, a, a, a, a, a, a]) }}{{ loop([a, a]) }}{% endfor %}",
        "{% macro f() %}{{ f(varargs, varargs) }}{% endmacro %}{{ f(1) }}",
        "{% macro f() %}{{ f(a=kwargs, b=kwargs) }}{% endmacro %}{{ f(a=1) }}",
    ],
)
def test_one_that_calls_itself_for_ever_is_refused(template: str) -> None:
    with pytest.raises((TemplateError, ValueError)):
        render(template)


def test_what_was_used_up_for_one_rendering_is_there_for_the_next() -> None:
    codec = TextCodec(TOKENIZER, f"{{% if messages|length > 1 %}}{HOSTILE['nested loops']}{{% endif %}}ok")
    for _ in range(3):
        with pytest.raises(TemplateError):
            chat_ids(codec, HELLO * 2)
        assert codec.encode_chat(Conversation(tuple(HELLO))).rendered == "ok"


@pytest.mark.parametrize(
    "template",
    [
        "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
        "{{ x | nothing }}",
        "{{ 'x' | urlize }}",
        f"{{% set x = {{{', '.join(f'{i * P}: 1' for i in range(1, 5000))}}} %}}",
    ],
    ids=["parentheses", "blocks", "an unknown filter", "a filter that is not there", "a map of numbers of one hash"],
)
def test_a_template_that_cannot_be_compiled_is_a_value_error(template: str) -> None:
    with pytest.raises(ValueError, match="does not compile"):
        render(template)


# The commands of templates in use, each with what it gives.
USEFUL = {
    "{{ bos_token + messages[0]['role'] + '\\n' ~ messages[0].content | trim ~ 1 }}": "<s>user\nhello1",
    "{% for m in messages %}{{ '%s: %d' % (m.role, loop.index) }}{{ '{}-{:>3}'.format(m.role, 7) }}{% endfor %}": (
        "user: 1user-  7"
    ),
    "{{ messages[0].content.split('l')[-1] }}{{ messages[0].content.replace('l', 'LL').rstrip('o') }}": "oheLLLL",
    "{{ ['a', messages[0].role] | join(', ') }}{{ messages | map(attribute='role') | join('|') }}": "a, useruser",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}": "1",
    "{{ (messages | rejectattr('role', 'eq', 'user') | list) == [] }}": "True",
    "{% set loop_messages = messages[1:] %}{{ loop_messages | length }}{{ messages[-1].content[:2] }}": "0he",
    "{% macro turn(m, end='!') %}{{ m.role }}{{ end }}{% endmacro %}{{ turn(messages[0], end='?') }}": "user?",
    "{% macro wrap() %}<{{ caller() }}>{% endmacro %}{% call wrap() %}x{% endcall %}": "<x>",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}": "role=user;content=hello;",
    "{% for k, v in messages[0] | dictsort %}{{ k }}{% endfor %}": "contentrole",
    "{{ messages[0] | tojson(indent=2) }}": '{\n  "role": "user",\n  "content": "hello"\n}',
    "{{ 'a\\nb' | indent(4) }}{{ 'x' * 3 }}{{ [1] + [2] }}": "a\n    bxxx[1, 2]",
    "{{ 2 ** 10 }} {{ 7 % 4 }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 1 - 2.5 }}": "1024 3 3 3.5 -1.5",
    "{% if 'ell' in messages[0].content and messages[0].role in ['user', 'tool'] %}y{% endif %}": "y",
    "{% if messages[0].content is string and tools is none and nothing is not defined %}y{% endif %}": "y",
    "{% set ns = namespace(n=0) %}{% for m in messages if m.role %}{% set ns.n = 1 %}{% endfor %}{{ ns.n }}": "1",
    "{% for i in range(3) %}{{ loop.cycle('a', 'b') }}{% if not loop.last %},{% endif %}{% endfor %}": "a,b,a",
    "{% filter upper %}x{{ messages[0].role }}{% endfilter %}": "XUSER",
    "{{ 'ok' if messages[0].content.startswith(('he', 'x')) else 'no' }}": "ok",
    "{{ 1.25 | round(1) }}{{ '12' | int + 1 }}{{ [3, 1] | sort | first }}{{ 'ab' | list | last }}": "1.2131b",
}


@pytest.mark.parametrize(("template", "expected"), USEFUL.items())
def test_what_templates_use_still_works_as_in_jinja(template: str, expected: str) -> None:
    assert render(template) == expected


CHAT = (
    "{% set ns = namespace(turns=0) %}{% for m in messages %}{% if loop.index0 == messages | length - 1 %}{% endif %}"
    "{% if m.role == 'system' %}{{ '<|' + m.role + '|>' + m.content | trim + '<|end|>' }}"
    "{% else %}{% set content = m.content.split('</think>')[-1].lstrip('\\n') %}{% set ns.turns = ns.turns + 1 %}"
    "{{- '<|' ~ m.role ~ '|>\\n' ~ content ~ '<|end|>\\n' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "messages",
    [
        [Message("user", "x" * (1 << 20))],
        [Message("user", "x\n" * (1 << 19)), Message("system", "y" * (1 << 20))],
        [Message("user", "")] * 4096,
        [
            Message("system", "long " * 50),
            *[Message("user", "question " * 20), Message("assistant", "answer " * 100)] * 500,
        ],
    ],
    ids=["a megabyte", "two megabytes", "4096 messages", "a long conversation"],
)
def test_long_conversations_have_the_budget_for_what_templates_do(messages: list[Message]) -> None:
    rendered = render(CHAT, messages)
    assert rendered.count("<|end|>") == len(messages)


# What is taken out, and the template that is then no longer refused; small enough to end all the same.
MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], object], str]] = {
    "everything": (
        lambda patch: patch.setattr(Budget, "charge", lambda self, units: None),
        "{% for a in range(90000) %}{% for b in range(10) %}{% endfor %}{% endfor %}",
    ),
    "bodies": (
        lambda patch: patch.setattr(
            template_budget._Charging, "visit_For", template_budget.NodeTransformer.generic_visit
        ),
        "{% for a in range(90000) %}{% endfor %}",
    ),
    "widths": (
        lambda patch: patch.setattr(template_charges, "_check_widths", lambda values: None),
        "{{ 'x'.ljust(5000) }}",
    ),
    "formats": (
        lambda patch: patch.setattr(template_charges, "_check_format", lambda *values: None),
        "{{ '%5000d' % messages | length }}",
    ),
    "powers": (
        lambda patch: patch.setattr(template_budget, "check_power", lambda base, exponent: None),
        "{{ 3 ** (100000 * messages | length) > 0 }}",
    ),
    "replacements": (
        lambda patch: patch.setattr(template_charges, "_check_replacement", lambda *values: None),
        "{% if ('x' * 3000).replace('z', 'y' * 800) %}{% endif %}",
    ),
    "look-ups": (
        lambda patch: patch.delattr(template_budget.BudgetedEnvironment, "getitem"),
        "{{ range(200) | map(attribute='real' ~ '.real' * 99) | list | length }}",
    ),
    "comparisons": (
        lambda patch: patch.setattr(template_charges, "_comparisons", lambda *values: 0),
        "{{ range(20000) | list | sort | length }}",
    ),
    "pairs": (
        lambda patch: patch.setattr(template_budget, "before_function", lambda *values: None),
        "{{ dict([[1, 2]] * 2000) | length }}",
    ),
    "methods": (
        lambda patch: patch.setattr(template_budget, "before_method", lambda *values: True),
        "{{ (5).to_bytes(8, 'big') }}",
    ),
}


@pytest.mark.parametrize(("mutate", "template"), MUTANTS.values(), ids=MUTANTS.keys())
def test_each_bound_is_needed(
    monkeypatch: pytest.MonkeyPatch, mutate: Callable[[pytest.MonkeyPatch], Any], template: str
) -> None:
    before = refusal_of(template)
    assert before
    mutate(monkeypatch)
    assert refusal_of(template) != before  # it passes, or another bound sees what has become of it


def test_a_weight_counts_what_is_held_twice_twice_and_stops_where_nothing_is_left() -> None:
    budget = Budget(10_000)
    once: Any = ["x" * 10]
    assert budget.weigh([once, once]) == 2 * budget.weigh(once) + 1 + 2 * template_units.ITEM
    for _ in range(64):
        once = [once, once]
    with pytest.raises(TemplateTooCostlyError):
        budget.weigh(once)


def test_what_a_look_up_costs_is_taken_from_the_budget_for_each_part_of_each_item() -> None:
    environment = template_budget.BudgetedEnvironment()
    environment.seal()
    template = environment.from_string("{{ items | sort(attribute=name) | length }}")

    def spent(name: str) -> int:
        with template_units.spending(Budget(10**9)) as _:
            budget = template_units.BUDGET.get()
            template.render(items=list(range(100)), name=name)
            return budget.spent

    assert spent("real" + ".real" * 9) - spent("real") >= 9 * 100 * template_units.STEP
    assert spent("real" + ",real" * 9) - spent("real") >= 9 * 100 * template_units.STEP


def test_a_template_is_quick_once_it_has_rendered_and_until_it_has_taken_long() -> None:
    codec = TextCodec(
        TOKENIZER,
        "{% for m in messages %}{{ m.role }}{{ m['content'] }}{% endfor %}"
        "{% if messages | length > 1 %}{% for a in range(9000) %}{% endfor %}{% endif %}",
    )
    assert not codec.is_quick
    chat_ids(codec, HELLO)
    assert codec.is_quick
    chat_ids(codec, [Message("user", "x" * 3000)] * 2)
    chat_ids(codec, [Message("user", "")] * 100)
    assert codec.is_quick, "such conversations are rendered aside in any case"
    chat_ids(codec, HELLO * 2)
    assert not codec.is_quick
    chat_ids(codec, HELLO)
    assert not codec.is_quick


def test_it_is_jinjas_immutable_sandbox() -> None:
    assert issubclass(template_budget.BudgetedEnvironment, jinja2.sandbox.ImmutableSandboxedEnvironment)
