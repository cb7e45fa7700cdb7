"""Rewards, and the process in which they run."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from lorapar_ray.engines.record import GroupHead
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.failures import Failures
from lorapar_ray.grpo.groups import Group
from lorapar_ray.grpo.rewards import RewardPool, RewardSpec, get_reward
from lorapar_ray.grpo.rewards.calling import call
from lorapar_ray.grpo.rewards.process import open_environment
from tests.unit import trl_rewards
from tests.waiting import wait_until

TAGGED = "<reasoning>\nadd\n</reasoning>\n<answer>\n6\n</answer>"


@pytest.mark.parametrize(
    ("name", "completion", "value"),
    [
        ("numeric_answer", "It is 6.0", 1.0),
        ("numeric_answer", "12/2", 1.0),
        ("numeric_answer", "7", 0.0),
        ("numeric_answer", "no idea", 0.0),
        ("numeric_answer", [{"role": "assistant", "content": "6"}], 1.0),
        ("exact_answer", " 6. ", 1.0),
        ("exact_answer", "six", 0.0),
        ("integer_answer", TAGGED, 0.5),
        ("integer_answer", "<answer>6.5</answer>", 0.0),
        ("strict_format", TAGGED, 0.5),
        ("strict_format", f"well {TAGGED}", 0.0),
        ("soft_format", f"well {TAGGED}", 0.5),
        ("tag_count", TAGGED, 0.5),
        ("tag_count", "<answer>6</answer>", 0.25),
    ],
)
def test_rewards_by_hand(name: str, completion: object, value: float) -> None:
    assert get_reward(name)(["q"], [completion], answer=["6"], response=["6"]) == [value]


def test_option_letters_overlap_and_expressions() -> None:
    assert get_reward("option_letter")(["q"] * 3, ["B", "(B) because", "A"], answer=["B"] * 3) == [1.0, 1.0, 0.0]
    overlap = get_reward("reference_overlap")(["q"], ["the cat sat"], response=["the cat sat down"])
    assert overlap == [pytest.approx(6 / 7)]
    assert get_reward("numeric_answer")(["q"], [r"\boxed{2\sqrt{2}}"], answer=["$\\sqrt{8}$"]) == [1.0]


def test_unknown_rewards_are_named() -> None:
    with pytest.raises(UserError, match="'brilliance' is unknown; use numeric_answer"):
        get_reward("brilliance")
    for name in ("no_such_module:reward", ":", ":x", "os:", "..x:y"):
        with pytest.raises(UserError, match=f"'{name}' cannot be imported"):
            get_reward(name)
    with pytest.raises(UserError, match="'os:path' is no function and no class but a module"):
        get_reward("os:path")


@pytest.mark.parametrize("body", ["raise RuntimeError('[/INST]')", "import sys; sys.exit(7)", "def f(:", "1 / 0", "\0"])
def test_a_module_that_breaks_while_it_is_imported_is_one_line(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_rewards.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="'broken_rewards:f' cannot be imported"):
        get_reward("broken_rewards:f")


@pytest.mark.parametrize(
    ("reward", "cause"),
    [
        ("raises", "raised"),
        ("hangs", "timeout"),
        ("dies", "crashed"),
        ("eats", "raised"),
        ("divides_by_zero", "not_finite"),
    ],
)
@pytest.mark.slow
def test_a_bad_sample_loses_only_itself(reward: str, cause: str) -> None:
    specs = [RewardSpec(f"tests.unit.bad_rewards:{reward}"), RewardSpec("numeric_answer", 2.0)]
    limit_s = 0.7 if reward == "hangs" else 60
    with RewardPool(specs, time_limit_s=limit_s, memory_limit_mb=512) as pool:
        result = pool.score(["q"] * 4, ["1", "2", "bad", "3"], {"answer": ["1", "0", "1", "3"]})
    assert result.parts[specs[0].name] == [1.0, 1.0, None, 1.0]
    assert result.failures == {cause: 1}
    assert result.total == [3.0, 1.0, 0.0, 3.0]


class Judging(BaseHTTPRequestHandler):
    """Returns nothing for "bad", and one value too few for "few"."""

    def do_POST(self) -> None:
        completions = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "bad" in completions:
            threading.Event().wait(20)
        values = json.dumps([float(each) for each in completions if each != "few"]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(values)))
        self.end_headers()
        self.wfile.write(values)

    def log_message(self, format: str, *arguments: object) -> None: ...


@pytest.mark.slow
def test_an_asynchronous_reward_calls_a_server_and_a_missing_answer_loses_its_call() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judging)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    completions = ["bad", "3", "few", "4"]  # the server does not answer to all of them; then the call is halved
    url = [f"http://127.0.0.1:{server.server_port}"] * len(completions)
    with RewardPool([RewardSpec("tests.unit.bad_rewards:remote")], time_limit_s=1, memory_limit_mb=1024) as pool:
        result = pool.score(["q"] * len(completions), completions, {"url": url})
    server.shutdown()
    assert result.total == [0.0, 3.0, 0.0, 0.0] and result.failures == {"timeout": 1, "wrong_count": 2}


def test_a_reward_that_a_worker_cannot_import_is_the_users_error() -> None:
    pool = RewardPool([RewardSpec("no_such_module:reward")], time_limit_s=5, memory_limit_mb=512)
    with pool, pytest.raises(UserError, match="'no_such_module:reward' cannot be imported"):
        pool.score(["q"], ["1"], {"answer": ["1"]})


def test_a_start_that_takes_too_long_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with RewardPool([RewardSpec("numeric_answer")], time_limit_s=5, memory_limit_mb=512) as pool:
        with monkeypatch.context() as patch:
            patch.setattr("lorapar_ray.grpo.rewards.process.START_LIMIT_S", 0.0)
            assert pool.score(["q"], ["1"], {"answer": ["1"]}).failures == {"timeout": 1}
        for right in ("1", "2"):
            scored = pool.score(["q"] * 2, ["1", "2"], {"answer": [right] * 2})
            assert scored.total == [float(right == "1"), float(right == "2")]


COLUMNS = {
    "answer": ["4", "5"],
    "response": ["4", "5"],
    "columns": [json.dumps({"answer": value, "ground_truth": {"value": value}}) for value in (4, 5)],
    "messages": ["", ""],
    "completion_ids": [[1], [2, 3]],
    "trainer_state": [{"global_step": 3, "max_steps": 9}] * 2,
}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("right", [1.0, 0.0]),
        ("by_column", [4.0, 5.0]),
        ("keyword_only", [1.0, 1.0]),
        ("names", [1.0, 2.0]),
        ("no_kwargs", [1.0, 1.0]),
        ("ours", [0.0, 0.0]),  # the data's answers are numbers
        ("nothing", [None, None]),
        ("arrays", [1.0, 1.0]),
        ("tensors", [1.0, 1.0]),
        ("bools", [1.0, 0.0]),
        ("later", [1.0, 1.0]),
        ("instance", [2.0, 2.0]),
    ],
)
def test_rewards_are_called_as_trl_calls_them(name: str, values: list[float | None]) -> None:
    request = {"prompts": ["q", "q"], "completions": ["4", "6"], "columns": COLUMNS}
    assert call(getattr(trl_rewards, name), request, own=False) == values


def test_chats_are_messages_and_our_own_signature_still_works() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "2+2?"}]
    columns = {"answer": ["4"], "messages": [messages]}
    request = {"prompts": ["2+2?"], "completions": ["4"], "columns": columns}
    assert call(trl_rewards.chat, request, own=False) == [1.0]
    assert call(trl_rewards.ours, request | {"columns": {"answer": ["4"]}}, own=False) == [1.0]
    assert call(get_reward("numeric_answer"), request, own=True) == [1.0]


def test_the_first_failure_of_each_reward_is_told() -> None:
    told = {
        "forgot_return": "it returns nothing; a reward returns a list with one number for each completion",
        "one_number": "it returns a value of type float",
        "too_many": "it returns 7 values for 2 completions",
        "typo": "KeyError: 'grund_truth'",
    }
    specs = [RewardSpec(f"tests.unit.trl_rewards:{name}") for name in told]
    with RewardPool(specs, time_limit_s=20, memory_limit_mb=512) as pool:
        scored = pool.score(["q", "q"], ["4", "6"], COLUMNS)
    assert scored.failures == {"wrong_count": 6, "raised": 2} and scored.failed == {spec.name: 2 for spec in specs}
    for spec, text in zip(specs, told.values(), strict=True):
        assert text in scored.errors[spec.name]


def test_a_failure_on_a_group_is_told_although_each_part_of_it_would_succeed() -> None:
    told = {
        "one_mean": "it returns 1 values for 4 completions; a reward returns one for each",
        "unlike": "it returns 3 values for 4 completions; a reward returns one for each",
        "at_most_two": "on 4 samples together, but on none of their parts: RuntimeError: too many",
    }
    specs = [RewardSpec(f"tests.unit.bad_rewards:{name}") for name in told]
    with RewardPool(specs, time_limit_s=20, memory_limit_mb=512) as pool:
        scored = pool.score(["q"] * 4, ["1", "2", "3", "3"], {})
    assert scored.errors == {spec.name: text for spec, text in zip(specs, told.values(), strict=True)}
    assert [scored.parts[spec.name] for spec in specs] == [[None] * 4, [None] * 4, [1.0] * 4]
    assert scored.failed == {specs[0].name: 4, specs[1].name: 4} and scored.failures == {"wrong_count": 8}


@pytest.mark.slow
def test_a_reward_process_is_contained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.setenv("HF_TOKEN", "hf-very-secret")
    specs = [RewardSpec(f"tests.unit.trl_rewards:{name}") for name in ("sees_secrets", "forges", "breeds")]
    seconds = f"{3600 + os.getpid()}"

    def sleepers() -> int:
        return sum(process.info["cmdline"] == ["sleep", seconds] for process in psutil.process_iter(["cmdline"]))

    with RewardPool(specs, time_limit_s=20, memory_limit_mb=512) as pool:
        scored = pool.score(["q"], [seconds], {})
        assert [scored.parts[spec.name] for spec in specs] == [[0.0], [1.0], [1.0]] and not scored.failures
        wait_until("both have begun", lambda: sleepers() == 2)
    assert sleepers() == 0


def test_a_rewards_environment_holds_nothing_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = {
        "FAR_PLACE": "named by api_key_env",
        "DATABASE": "postgres://me:hunter22@db/x",
        "DB_PASS": "hunter22",
        "GITHUB_PAT": "x",
        "ANY_NAME": "sk-abcdefgh12345678",
        "JOB_CONFIG": '{"env_vars": {"HF_TOKEN": "x"}}',
        "MLFLOW_TRACKING_PASSWORD": "x",
    }
    plain = {"COMPASS": "north", "TOKENIZERS_PARALLELISM": "false", "AUTHOR": "me", "DATA_URL": "https://host/x?n=1"}
    for name, value in (secret | plain).items():
        monkeypatch.setenv(name, value)
    found = open_environment(["FAR_PLACE"])
    assert {name: found.get(name) for name in secret | plain} == dict.fromkeys(secret) | plain
    assert {"PATH", "HOME"} <= found.keys()


def test_a_step_on_which_one_reward_fails_everywhere_stops_with_that_rewards_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    failures = Failures()

    def group(failed: dict[str, int], errors: dict[str, str]) -> Group:
        head = GroupHead(prompt_tokens=1, lengths=(1, 1), finished=(True, True), versions=(0, 0))
        return Group(0, None, head, rewards=[0.0, 0.0], failed=failed, errors=errors)

    some = [group({"rare": 1, "typo": 2}, {"rare": "ValueError: one", "typo": "KeyError: 'x'"}), group({}, {})]
    failures.report(some, step=0)
    failures.report(some, step=1)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("failed on some samples") == 1 and "typo: KeyError: 'x'" in said and "rare: ValueError" in said
    everywhere = [*some[:1], group({"typo": 2}, {"typo": "KeyError: 'y'"})]
    with pytest.raises(UserError, match=r"'typo' failed on all 4 samples of step 3: KeyError: 'x'"):
        failures.report(everywhere, step=2)
    failures.report([], step=3)
