"""Rewards, and the process that contains them."""

import pytest

from lorapar_ray.errors import UserError
from lorapar_ray.grpo.rewards import RewardPool, RewardSpec, get_reward

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
    with pytest.raises(UserError, match="cannot be imported"):
        get_reward("no_such_module:reward")


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
def test_a_bad_sample_costs_itself_only(reward: str, cause: str) -> None:
    specs = [RewardSpec(f"tests.unit.bad_rewards:{reward}"), RewardSpec("numeric_answer", 2.0)]
    with RewardPool(specs, time_limit_s=0.7, memory_limit_mb=512) as pool:
        result = pool.score(["q"] * 4, ["1", "2", "bad", "3"], {"answer": ["1", "0", "1", "3"]})
    assert result.parts[specs[0].name] == [1.0, 1.0, None, 1.0]
    assert result.failures == {cause: 1}
    assert result.total == [3.0, 1.0, 0.0, 3.0]


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
