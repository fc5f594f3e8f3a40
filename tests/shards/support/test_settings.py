import pytest
from pydantic import Field

from shards.support.errors import ConfigError
from shards.support.settings import (
    Settings,
    apply_overrides,
    dump_yaml,
    find_config,
    load_settings,
    parse_yaml,
    read_config,
    validate,
)


class Inner(Settings):
    rate: float = 0.1
    name: str = "a"


class Outer(Settings):
    inner: Inner = Inner()
    count: int = Field(1, ge=1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("no", "no"),
        ("on", "on"),
        ("010", 10),
        ("0x10", 16),
        ("0o10", 8),
        ("-3", -3),
        ("true", True),
        ("null", None),
        ("2026-11-21", "2026-11-21"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("'1'", "1"),
        ("[1, 2e0]", [1, 2.0]),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_the_rules_do_not_leak_into_pyyaml():
    import yaml

    assert yaml.safe_load("no") is False


def test_dumped_settings_read_back_equal():
    data = {"a": 1e-4, "b": "no", "c": "010", "d": None, "e": [1.0, "1e-4"]}
    assert parse_yaml(dump_yaml(data)) == data


def test_a_key_given_twice_is_an_error():
    with pytest.raises(ConfigError, match="appears twice"):
        parse_yaml("a: 1\na: 2\n")


def test_python_tags_are_refused():
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_yaml("!!python/object/apply:os.system ['true']")


def test_an_unknown_key_is_named_with_those_allowed():
    with pytest.raises(ConfigError, match=r"unknown key 'inner.rat' \(allowed here: rate, name\)"):
        validate(Outer, {"inner": {"rat": 1}}, where="f.yaml")


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        validate(Outer, {"inner": {"rate": "fast"}, "count": 0}, where="f.yaml")
    assert "'inner.rate'" in str(caught.value)
    assert "'count'" in str(caught.value)
    assert caught.value.exit_code == 2


def test_bases_are_merged_and_overridden(tmp_path):
    (tmp_path / "base.yaml").write_text("inner: {rate: 1e-3, name: base}\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\ninner: {name: top}\n")
    settings = load_settings(Outer, tmp_path / "top.yaml", ["count=3"])
    assert settings == Outer(inner=Inner(rate=1e-3, name="top"), count=3)


def test_a_file_that_inherits_from_itself_is_an_error(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="inherits from itself"):
        read_config(tmp_path / "a.yaml")


def test_an_override_leaves_its_source_alone():
    data = {"inner": {"rate": 1.0}}
    assert apply_overrides(data, ["inner.rate=2", "inner.name=x"]) == {"inner": {"rate": 2, "name": "x"}}
    assert data == {"inner": {"rate": 1.0}}


@pytest.mark.parametrize("override", ["count", "=3", "count.x=1"])
def test_a_malformed_override_is_an_error(override):
    with pytest.raises(ConfigError):
        apply_overrides({"count": 1}, [override])


def test_shipped_configs_are_found_by_name():
    assert find_config("demo/retmae").name == "retmae.yaml"
    with pytest.raises(ConfigError, match=r"demo/retmae\.yaml"):
        find_config("demo/retmea")
