"""Judges: an endpoint that is biased, right, overloaded or broken; functions; reward models."""

import json
import sys
import textwrap

import pytest
import torch
from transformers import LlamaForSequenceClassification

from preftune.errors import ConfigError, ModelError
from preftune.evaluation.judging.endpoint import EndpointFailed, EndpointJudge, read_verdict
from preftune.evaluation.judging.function import FunctionJudge
from preftune.evaluation.judging.judge import AnswerPair, in_both_orders
from preftune.evaluation.judging.kept import Kept
from preftune.evaluation.judging.reward_model import RewardModelJudge
from preftune.evaluation.win_rate import outcome, win_rate
from tests.judges import endpoint
from tests.tiny import tiny_model, tiny_tokenizer

PROMPT = [{"role": "user", "content": "What is 2 + 2?"}]
PAIRS = [
    AnswerPair(PROMPT, base="five", trained="four (good)"),
    AnswerPair(PROMPT, base="four (good)", trained="three"),
    AnswerPair(PROMPT, base="good four", trained="good and four"),
]


def right(prompt, first, second):
    good = ["good" in answer for answer in (first, second)]
    said = "tie" if good[0] == good[1] else "A" if good[0] else "B"
    return f"They differ. Verdict: B would be rash.\nVerdict: {said}"


def outcomes(judge):
    found = []
    in_both_orders(judge, PAIRS, lambda number, *said: found.append((number, outcome(*said))))
    return found


def test_a_judge_that_is_right():
    with endpoint(right) as server:
        judge = EndpointJudge(server.url, "judge-1")
        assert outcomes(judge) == [(0, "win"), (1, "loss"), (2, "tie")]
    assert len(server.bodies) == 6  # both orders of each
    assert {body["model"] for body in server.bodies} == {"judge-1"}
    assert {body["temperature"] for body in server.bodies} == {0}
    assert [m["role"] for m in server.bodies[0]["messages"]] == ["system", "user"]


@pytest.mark.parametrize("always", ["A", "B"])
def test_a_judge_that_only_sees_the_order_finds_ties(always):
    with endpoint(lambda *_: f"Verdict: {always}") as server:
        found = [one for _, one in outcomes(EndpointJudge(server.url, "m"))]
    assert found == ["tie"] * 3
    assert win_rate(found).rate == 0.5


def test_a_judge_that_rambles_gives_no_verdict():
    with endpoint(lambda *_: "Both have merits.") as server:
        assert [one for _, one in outcomes(EndpointJudge(server.url, "m"))] == [None] * 3


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Verdict: A", "first"),
        ("x\n**Verdict: B**\n", "second"),
        ("verdict : Tie.", "tie"),
        ("**Verdict:** A", "first"),
        ("Verdict: A\nOn reflection:\nVerdict: B", "second"),
        ("Verdict: A or B", None),
        ("The verdict: A is better", None),
        ("", None),
        (None, None),
        (["Verdict: A"], None),
    ],
)
def test_reading_a_verdict(said, expected):
    assert read_verdict(said) == expected


def test_limits_and_faults_are_waited_for(monkeypatch):
    """429 with the time to wait, 503 without; then it answers. The key goes into the header."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    waited = []
    with endpoint(right, (429, {"Retry-After": "7"}), (503, {})) as server:
        judge = EndpointJudge(server.url, "m", parallel=1, sleep=waited.append)
        assert judge.compare(PROMPT, "good", "bad") == "first"
    assert waited == [7.0, 2.0]
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"


def test_a_refusal_ends_at_once_and_faults_in_the_end(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with endpoint(right, (401, {})) as server:
        with pytest.raises(EndpointFailed, match=r"401 .*OPENAI_API_KEY"):
            EndpointJudge(server.url, "m").compare(PROMPT, "a", "b")
        assert len(server.bodies) == 1
        assert "Authorization" not in server.headers[0]
    waited = []
    judge = EndpointJudge(server.url, "m", tries=3, sleep=waited.append)  # nobody is there now
    with pytest.raises(EndpointFailed, match="after 3 tries"):
        judge.compare(PROMPT, "a", "b")
    assert waited == [1.0, 2.0]


def test_a_reply_that_is_no_completion():
    with endpoint(right, (200, {})) as server, pytest.raises(EndpointFailed, match="no chat comp"):
        EndpointJudge(server.url, "m").compare(PROMPT, "a", "b")


def write_module(tmp_path, monkeypatch, name, text):
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_functions(tmp_path, monkeypatch):
    write_module(
        tmp_path,
        monkeypatch,
        "my_judges",
        """
        def longer(prompt, a, b):
            assert prompt == "What is 2 + 2?"
            return len(a) - len(b)

        def word(prompt, a, b):
            return " a "

        def odd(prompt, a, b):
            return {"x": float("nan"), "y": "perhaps", "z": None}[a]

        def broken(prompt, a, b):
            raise KeyError(a)

        number = 3
        """,
    )
    longer = FunctionJudge.named("my_judges:longer")
    assert longer.compare(PROMPT, "abc", "d") == "first"
    assert longer.compare(PROMPT, "d", "abc") == "second"
    assert longer.compare(PROMPT, "d", "e") == "tie"
    assert FunctionJudge.named("my_judges:word").compare(PROMPT, "d", "e") == "first"
    odd = FunctionJudge.named("my_judges:odd")
    assert [odd.compare(PROMPT, letter, "") for letter in "xyz"] == [None] * 3
    with pytest.raises(ConfigError, match="my_judges:broken' raised KeyError"):
        FunctionJudge.named("my_judges:broken").compare(PROMPT, "a", "b")
    with pytest.raises(ConfigError, match="did you mean 'longer'"):
        FunctionJudge.named("my_judges:longr")
    with pytest.raises(ConfigError, match="cannot be called"):
        FunctionJudge.named("my_judges:number")


def reward_model(folder, **overrides):
    config = tiny_model().config
    config.num_labels = 1
    config.update(overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_reward_models(tmp_path):
    """Prefers what its own forward scores higher; the other order is the mirror."""
    folder = reward_model(tmp_path / "rm")
    judge = RewardModelJudge.load(str(folder), torch.device("cpu"), trust_remote_code=False)
    model = LlamaForSequenceClassification.from_pretrained(folder)
    tokenizer, scores = tiny_tokenizer(), []
    for answer in ("The capital is Paris.", "It is warm"):
        turns = [*PROMPT, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
        scores.append(model(input_ids=ids).logits.item())
    assert scores[0] != scores[1]
    expected = "first" if scores[0] > scores[1] else "second"
    answers = ("The capital is Paris.", "It is warm")
    assert judge.compare(PROMPT, *answers) == expected
    assert {judge.compare(PROMPT, *reversed(answers)), expected} == {"first", "second"}
    assert judge.compare(PROMPT, "same", "same") == "tie"


def test_models_that_are_no_reward_models(tmp_path):
    tiny_model().save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    with pytest.raises(ModelError, match=r"lack score\.weight"):
        RewardModelJudge.load(str(tmp_path / "lm"), torch.device("cpu"), trust_remote_code=False)
    folder = reward_model(tmp_path / "rm", num_labels=2)
    with pytest.raises(ModelError, match="has 2 outputs"):
        RewardModelJudge.load(str(folder), torch.device("cpu"), trust_remote_code=False)


def test_what_is_kept_survives_a_cut_line(tmp_path):
    path = tmp_path / "kept.jsonl"
    kept = Kept(path)
    kept.add("a", "tea\nfor two\ud800")
    kept.add("b", None)
    whole = path.read_bytes()
    for cut in range(1, len(json.dumps(["b", None])) + 1):
        path.write_bytes(whole[:-cut])
        again = Kept(path)
        assert "a" in again
        assert "b" not in again
        again.add("b", None)
        assert path.read_bytes() == whole
    assert Kept(path)["a"] == "tea\nfor two\ud800"
