"""Foreign text is shown as text: no markup, no control characters, no secrets."""

import io
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lorapar_ray import redact
from lorapar_ray.config import Config
from lorapar_ray.config_file import load_config
from lorapar_ray.errors import UserError
from lorapar_ray.pipeline import PIPELINE
from lorapar_ray.progress import SafeConsole
from lorapar_ray.redact import has_secret, is_secret_name, redacted, remember_config, url_secrets
from lorapar_ray.text import markup, one_line, printable, reason, shown


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redact, "_known", set())
    monkeypatch.setattr(redact, "_forms", ())


def on_console(text: str, **options: bool) -> str:
    written = io.StringIO()
    SafeConsole(file=written, width=200, soft_wrap=True, markup=False, emoji=False).print(text, **options)
    return written.getvalue()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("bad near [/INST] [bold]x[/] :bug:", "bad near [/INST] [bold]x[/] :bug:"),
        ("\x1b[2Jgone\a", "\\x1b[2Jgone\\x07"),
        ("a\u2028b\u2029c\x85d", "a\\u2028b\\u2029c\\x85d"),
        ("half \ud83d emoji", "half \\ud83d emoji"),
        ("evil\u202etxt.exe", "evil\\u202etxt.exe"),
        ("ends in \\", "ends in \\"),
    ],
)
def test_foreign_text_is_shown_unchanged(text: str, wanted: str) -> None:
    assert on_console(text) == f"{wanted}\n"
    assert on_console(f"[bold]x[/] {markup(text)}[green][/]", markup=True) == f"x {wanted}\n"


@given(st.text(alphabet=st.characters(codec=None)))
def test_any_text_can_be_shown_and_is_one_line(text: str) -> None:
    line = one_line(text, 80)
    assert len(line) <= 80 and len((line + "x").splitlines()) == 1 and line.encode() == line.encode(errors="replace")
    assert printable(printable(text)) == printable(text)
    assert on_console(f"[bold]{markup(text)}[/bold]", markup=True) == on_console(text)


def test_a_reason_names_the_cause_and_stays_short() -> None:
    assert reason(ValueError("two\n lines")) == "ValueError: two lines"
    assert reason(TimeoutError()) == "TimeoutError"
    assert len(reason(ValueError("x" * 1000))) < 180


def test_what_a_config_hides_of_secrets_is_known_in_every_form() -> None:
    teacher = {
        "base_url": "http://me:hunter%2F22@far/v1?api_key=in-the-query",
        "extra_body": {"headers": {"Authorization": "Bearer sk-in-the-body"}, "stop_token": "</answer>"},
        "api_key": 'with"quote',
    }
    remember_config({"label": {"teachers": [teacher]}, "max_tokens": 4096})
    for leak in ("hunter%2F22", "hunter/22", "in-the-query", "sk-in-the-body", 'with\\"quote', "with%22quote"):
        assert shown(f"the service said {leak}!") == "the service said ***!"
    assert shown("basic bWU6aHVudGVyLzIy") == "basic ***"  # base64 of me:hunter/22
    assert shown("</answer> 4096 far me") == "</answer> 4096 far me"
    assert redacted({"in-the-query": ["sk-in-the-body", 1, None]}) == {"***": ["***", 1, None]}


def test_a_secret_is_taken_out_before_a_text_is_cut() -> None:
    remember_config({"token": "0123456789abcdef"})
    assert one_line("x" * 30 + "0123456789abcdef", 36) == "x" * 30 + "***"


def test_a_config_is_shown_without_what_stands_where_secrets_do() -> None:
    shown_of = {
        "http://u:x@far/v1?api_key=y&n=1": "http://***@far/v1?api_key=***&n=1",
        "see http://u:x@far, or https://far/v1": "see http://***@far, or https://far/v1",
        "https://far/sk-abcdefgh12345678/v1": "https://far/***/v1",
    }
    remember_config({"base_url": list(shown_of)})
    assert [redacted(text) for text in shown_of] == list(shown_of.values())
    assert redacted({"headers": {"authToken": "x", "n": "x"}, "password": ""}) == {
        "headers": {"authToken": "***", "n": "x"},
        "password": "",
    }
    tree = yaml.safe_load(Path("jobs/configs/quickstart.yaml").read_text())
    tree["label"] |= {
        "quorum": 1,
        "teachers": [
            {
                "name": "a",
                "kind": "remote",
                "model": "m",
                "base_url": "http://u:x@h",
                "extra_body": {"api_key": "it's y"},
            }
        ],
    }
    config = Config.model_validate(tree)
    assert "http://***@h" in PIPELINE["label"].resources(config)
    kept = config.to_yaml(hide_secrets=True)
    assert "http://***@h" in kept and "it" not in yaml.safe_load(kept)["label"]["teachers"][0]["extra_body"]["api_key"]


def test_a_name_that_begins_like_a_key_is_not_a_key() -> None:
    names = ["/models/sk-llama-finetuned-v2-large", "pk-something-with-a-long-name-2024", "hf_transformers_cache_dir_2"]
    remember_config({"model": {"path": names}})
    assert [redacted(name) for name in names] == names
    remember_config({"note": "sk-ant-api03-abcdefghij0123456789-_x"})
    assert shown("sk-ant-api03-abcdefghij0123456789-_x") == "***"


def test_a_password_in_a_url_is_known_wherever_it_comes_from() -> None:
    assert shown("no server at http://u:p4ss@h:1/x (http://:p@h) or http://h:1/a@b") == (
        "no server at http://***@h:1/x (http://***@h) or http://h:1/a@b"
    )


def test_a_key_in_place_of_its_variables_name_is_known() -> None:
    remember_config({"api_key_env": "my-own-9fj2kfj2kf"})
    assert shown("my-own-9fj2kfj2kf") == "***"
    remember_config({"api_key_env": "FAR_KEY"})
    assert shown("FAR_KEY") == "FAR_KEY"


@pytest.mark.parametrize(
    "name",
    [
        "api_key",
        "apiKey",
        "HF_TOKEN",
        "x-api-key",
        "password",
        "AWS_SECRET",
        "auth",
        "openaiApiKey",
        "api_keys",
        "DB_PWD",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["max_tokens", "eos_token", "keys", "monkey", "author", "tokenizer", "api_key_env", "PWD"]
)
def test_names_that_are_not_secrets(name: str) -> None:
    assert not is_secret_name(name)


def test_a_url_without_secrets_has_none() -> None:
    assert url_secrets("https://host:8000/v1?model=x") == [] and url_secrets("http://[broken") == []
    assert has_secret(["http://u:passwd@h/"]) and not has_secret(["http://h/", {"top_p": 1, "choice": ["1", "2"]}])


@pytest.mark.parametrize("field", ["label.teachers.0.extra_body.api_key", "label.nonsense.api_key"])
def test_no_message_about_a_config_holds_its_secrets(tmp_path: Path, field: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("label: {teachers: [{name: a, kind: remote, model: m, extra_body: {token: 'sk-7654321', 1: [}]}\n")
    with pytest.raises(UserError) as broken:  # PyYAML's own text quotes the line
        load_config(file)
    assert "sk-7654321" not in str(broken.value) and "line 1" in str(broken.value)
    file.write_text("label: {teachers: [{name: a, kind: remote, model: m, extra_body: {token: 'sk-7654321'}}]}\n")
    with pytest.raises(UserError) as wrong:
        load_config(file, [f"{field}=sk-1234567"])
    assert "sk-" not in str(wrong.value)
