"""Where settings come from, and what is refused."""

from __future__ import annotations

import traceback

import pytest

from ragkv.config import Settings, load_settings
from ragkv.engine import _settings
from ragkv.errors import ConfigError


@pytest.fixture
def toml(tmp_path):
    def write(text: str) -> None:
        (tmp_path / "ragkv.toml").write_text(text)

    return write


def test_flags_win_over_environment_over_file_over_defaults(toml, monkeypatch):
    assert load_settings().top_k == 10
    toml("top_k = 3\nport = 4000\nratio = 0.5")
    assert load_settings().top_k == 3
    monkeypatch.setenv("RAGKV_TOP_K", "4")
    monkeypatch.setenv("RAGKV_PORT", "5000")
    assert load_settings().top_k == 4
    settings = load_settings(top_k=5)
    assert (settings.top_k, settings.port, settings.ratio) == (5, 5000, 0.5)


def test_none_means_that_a_flag_was_not_given(monkeypatch):
    monkeypatch.setenv("RAGKV_TOP_K", "4")
    assert load_settings(top_k=None).top_k == 4


def test_empty_environment_variables_count_as_not_given(monkeypatch):
    monkeypatch.setenv("RAGKV_TOP_K", "")
    assert load_settings().top_k == 10


def test_an_unknown_flag_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"'top_kk'.*'top_k'"):
        load_settings(top_kk=3)


def test_an_unknown_environment_variable_is_refused_with_a_suggestion(monkeypatch):
    monkeypatch.setenv("RAGKV_TOPK", "3")
    with pytest.raises(ConfigError, match=r"RAGKV_TOPK.*RAGKV_TOP_K"):
        load_settings()


@pytest.mark.parametrize("text", ["topk = 3", "[server]\nport = 1"])
def test_an_unknown_key_in_the_file_is_refused(toml, text):
    toml(text)
    with pytest.raises(ConfigError, match=r"unknown setting '(topk|server)'"):
        load_settings()


def test_a_value_out_of_range_is_refused_with_key_and_value(monkeypatch):
    monkeypatch.setenv("RAGKV_RATIO", "1.5")
    with pytest.raises(ConfigError, match=r"'ratio'.*less than or equal to 1.*1\.5"):
        load_settings()


def test_a_wrong_choice_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"'method'.*'hkvd'.*'blend'"):
        load_settings(method="blend")


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError, match=r"(?s)'top_k'.*'ratio'"):
        load_settings(top_k=0, ratio=2)


@pytest.mark.parametrize("content", [b"top_k = = 3", b"top_k = '\xff'"])
def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path, content):
    (tmp_path / "ragkv.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"ragkv\.toml is not valid TOML"):
        load_settings()


def test_another_file_can_be_named(tmp_path, monkeypatch):
    (tmp_path / "other.toml").write_text("top_k = 7")
    monkeypatch.setenv("RAGKV_CONFIG", str(tmp_path / "other.toml"))
    assert load_settings().top_k == 7


def test_a_named_file_that_is_missing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("RAGKV_CONFIG", str(tmp_path / "nowhere.toml"))
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load_settings()


def test_a_mistake_in_the_file_or_the_environment_names_it(toml, monkeypatch):
    toml("top_q = 3\nratio = 2")
    with pytest.raises(ConfigError) as caught:
        load_settings()
    told = set(str(caught.value).split("; "))
    assert "unknown setting 'top_q' in ragkv.toml" in told
    assert any(one.startswith("setting 'ratio' in ragkv.toml: ") for one in told)
    toml("")
    monkeypatch.setenv("RAGKV_RATIO", "2")
    with pytest.raises(ConfigError, match=r"setting 'ratio' in RAGKV_RATIO: "):
        load_settings()
    with pytest.raises(ConfigError, match=r"setting 'ratio': "):
        load_settings(ratio=3)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("[tenants.a]\nkey = 'long enough'\nwight = 2", "'tenants.a.wight' in ragkv.toml; did you mean 'weight'?"),
        ("[calibration]\nrati = 2", "'calibration.rati' in ragkv.toml; did you mean 'ratio'?"),
    ],
)
def test_a_mistake_in_a_table_suggests_what_the_table_has(toml, text, hint):
    toml(text)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert hint in str(caught.value)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "ragkv.toml").mkdir()
    with pytest.raises(ConfigError, match=r"ragkv\.toml is not a file"):
        load_settings()


def test_a_variable_that_must_be_json_is_refused_without_its_value(monkeypatch):
    monkeypatch.setenv("RAGKV_TENANTS", "{hunter2")
    with pytest.raises(ConfigError, match=r"must hold JSON.*tenants") as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"api_key": "hunter2"},
        {"remote_url": ["redis://:hunter2@host"]},
        {"store_salt": "hunter2"},
        {"tenants": {"a": {"key": "hunter2"}}},
        {"tenants": {"a": {"key": ["hunter2"]}}},
        {"tenants": {"a": {"kee": "hunter2"}}},
        {"tenants": {"a": "hunter2"}},
        {"tenants": "hunter2"},
    ],
)
def test_a_secret_is_not_repeated_in_the_error(wrong):
    with pytest.raises(ConfigError) as caught:
        load_settings(**wrong)
    assert next(iter(wrong)) in str(caught.value)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("wrong", [{"api_key": "hunter2"}, {"tenants": {"a": {"key": "hunter2"}}}])
def test_of_a_secret_that_is_too_short_it_is_told_how_long_it_must_be(wrong):
    with pytest.raises(ConfigError, match=r"it needs at least 8 characters$"):
        load_settings(**wrong)


def test_secrets_are_not_shown_with_the_settings():
    tenants = {"a": {"key": "hunter2-too"}}
    settings = load_settings(
        remote_url="redis://:hunter2@host", store_salt="salt-hunter2", api_key="key-hunter2", tenants=tenants
    )
    assert "hunter2" not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    other = _settings(settings, {"top_k": 4})
    assert other.remote_url.get_secret_value() == "redis://:hunter2@host"
    assert other.bearer_key == settings.bearer_key == "key-hunter2"


def test_every_setting_has_a_description():
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_settings_with_overrides_keep_the_others(monkeypatch):
    base = load_settings(top_k=3, port=4000)
    monkeypatch.setenv("RAGKV_PORT", "5000")
    settings = _settings(base, {"top_k": 4})
    assert (settings.top_k, settings.port) == (4, 4000)


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load_settings().top_k = 3
