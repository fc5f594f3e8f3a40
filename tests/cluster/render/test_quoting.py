"""What a value is after shell, YAML or Kubernetes have read it, whatever is in it."""

from __future__ import annotations

import re
import subprocess

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.render.quoting import quote_argument, quote_command, quote_yaml
from shards.support.settings import parse_yaml

TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30)
HOSTILE = "a \"b\" 'c' $(touch x) `x` $HOME ${IFS} \\ ; & | # : {y: 1} [*] !!int % \u2028 ~"


def expand(text: str, environment: dict[str, str]) -> str:
    """What Kubernetes makes of a string in `args` (its documentation: $(NAME), and $$ for one $)."""

    def replace(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        return environment.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^()$]*)\)", replace, text)


@settings(max_examples=25, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=20))
@example([HOSTILE, "", "-n", "--set", "--a b", "~", "\n"])
def test_a_shell_reads_the_words_that_were_written(words):
    shown = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {quote_command(['x', *words])}"], capture_output=True, check=True
    )
    assert shown.stdout.decode().split("\0")[1:-1] == words


values = st.recursive(
    TEXTS | st.integers(-9, 9) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(values)
@example(HOSTILE)
@example({HOSTILE: [HOSTILE, True, 3]})
@example(["no", "1e3", "010", "null", "", "\t\n\r\0\x85\u2028\U0001f600"])
def test_both_versions_of_yaml_read_the_value_that_was_written(value):
    text = f"- {quote_yaml(value)}\n- end\n"
    assert yaml.safe_load(text) == [value, "end"]
    assert parse_yaml(text) == [value, "end"]


@settings(deadline=None)
@given(TEXTS)
@example(HOSTILE)
@example("$(HOME) $$(HOME) $$$(HOME) $")
def test_kubernetes_replaces_nothing(value):
    read = yaml.safe_load(quote_argument(value))
    assert expand(read, {"HOME": "/root", "": "nothing"}) == value
