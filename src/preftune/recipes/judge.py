"""Win rate: both models answer the same prompts, and a judge compares, in both orders.

OUTPUT/win_rate.json              the rate with its interval, counts, lengths
       judge/pairs.jsonl          every prompt, both answers, both verdicts, the outcome
       judge/answers-*.jsonl, verdicts-*.jsonl   kept as they come, to go on from
"""

import inspect
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import torch
import xxhash
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from preftune.config.evaluate import EvaluateConfig
from preftune.config.lora import LoRAConfig
from preftune.config.model import ModelConfig
from preftune.data.chat import answer_frame
from preftune.errors import ConfigError, ModelError
from preftune.evaluation.jobs.subject import Subject
from preftune.evaluation.judging.endpoint import EndpointJudge
from preftune.evaluation.judging.function import FunctionJudge
from preftune.evaluation.judging.judge import AnswerPair, Judge, in_both_orders
from preftune.evaluation.judging.kept import Kept, digest
from preftune.evaluation.judging.reward_model import RewardModelJudge
from preftune.evaluation.samples import greedy_answers
from preftune.evaluation.scores import equally_long
from preftune.evaluation.win_rate import Outcome, Rate, Verdict, outcome, win_rate
from preftune.files import write_atomically
from preftune.model.adapters import StartAdapter, add_adapter
from preftune.model.load import load_model, load_model_config, load_tokenizer, stop_at
from preftune.recipes.evaluate import Target
from preftune.recipes.judge_prompts import prompts_of_file, prompts_of_run
from preftune.redaction import redacted_values
from preftune.schema import Message
from preftune.tracking.progress import ProgressDisplay

WIN_RATE, FOLDER = "win_rate.json", "judge"


def prepare_judge(
    config: EvaluateConfig, target: Target, display: ProgressDisplay
) -> Callable[[], str]:
    """Look at prompts, tokenizers and judge; loads no weights of the models that are compared.

    Args:
        config: who judges, and what.
        target: the two models.
        display: says what is done.

    Returns:
        What compares, and gives the result for people.

    Raises:
        PreftuneError: something is not there.
    """
    if target.base is None:
        raise ConfigError("judge compares two models, and there is one; give --eval_base, too")
    for side, subject in (("base", target.base), ("trained", target.trained)):
        if not _tokenizer(subject, config).chat_template:
            raise ModelError(
                f"the {side} model {subject.name} has no chat template, by which it would be "
                "asked; a judge needs models that chat"
            )
    if config.judge_prompts is not None:
        prompts = prompts_of_file(config.judge_prompts)
    else:
        prompts = prompts_of_run(target.run_config, display)
    prompts = prompts[: config.judge_num_prompts]
    judge, about = _judge(config)
    return lambda: _compare(config, target, display, prompts, judge, about)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _judge(config: EvaluateConfig) -> tuple[Judge, dict[str, Any]]:
    """The judge, and what its verdicts depend on."""
    about: dict[str, Any] = {"judge": config.judge}
    match config.judge:
        case "openai":
            url, model = str(config.judge_base_url), str(config.judge_model)
            return EndpointJudge(url, model), about | {"model": model, "base_url": url}
        case "reward_model":
            name = str(config.judge_model)
            found = Subject.named(name, None, "judge_model").digest
            judge = RewardModelJudge.load(
                name, _device(), trust_remote_code=config.trust_remote_code
            )
            return judge, about | {"model": name, "digest": found}
        case "function":
            function = FunctionJudge.named(str(config.judge_function))
            file = inspect.getsourcefile(inspect.unwrap(function.function))
            code = Path(file).read_bytes() if file else b""
            about |= {"function": function.name, "digest": xxhash.xxh3_64_hexdigest(code)}
            return function, about
        case None:
            raise AssertionError("without a judge nothing is compared")
        case _:
            assert_never(config.judge)


# ---------------------------------------------------------------- answers


def _model_config(subject: Subject, config: EvaluateConfig) -> ModelConfig:
    model = ModelConfig(
        model_name_or_path=subject.model,
        model_revision=subject.revision,
        tokenizer_name_or_path=subject.tokenizer,
        trust_remote_code=config.trust_remote_code,
    )
    stored = str(getattr(load_model_config(model), "dtype", None))
    if torch.cuda.is_available() and stored in ("torch.bfloat16", "torch.float16"):
        model.dtype = "bfloat16"
    return model


def _tokenizer(subject: Subject, config: EvaluateConfig) -> PreTrainedTokenizerBase:
    return load_tokenizer(_model_config(subject, config))


def _answers(
    side: str,
    subject: Subject,
    config: EvaluateConfig,
    folder: Path,
    prompts: Sequence[list[Message]],
    display: ProgressDisplay,
) -> list[str]:
    """The model's greedy answers; those of an earlier try are not made again."""
    model_config = _model_config(subject, config)
    length = config.judge_max_new_tokens
    assert length is not None  # the config fills it
    kept = Kept(folder / f"answers-{digest(subject.digest, length, model_config.dtype)[:16]}.jsonl")
    keys = [digest(prompt) for prompt in prompts]
    missing = [i for i, key in enumerate(keys) if key not in kept]
    if missing:
        display.say(f"judge: answers of the {side} model {subject.name}")
        model = load_model(model_config, _device()).policy.model
        if subject.adapter is not None:
            lora = LoRAConfig(
                use_lora=True,
                adapter_name_or_path=subject.adapter,
                adapter_revision=subject.adapter_revision,
            )
            add_adapter(model, StartAdapter(lora, seed=0))
            model.eval()
        tokenizer = load_tokenizer(model_config)
        # Or a base that was not trained to chat would write the user's next turn, too.
        stop_at(model, answer_frame(tokenizer).stop_id)
        with display.stage(f"answers, {side}", len(missing), "prompt") as update:
            for done, index in enumerate(missing, 1):
                (answer,) = greedy_answers(model, tokenizer, [prompts[index]], length)
                kept.add(keys[index], answer)
                update(done)
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return [kept[key] for key in keys]


# ---------------------------------------------------------------- verdicts


def _compare(
    config: EvaluateConfig,
    target: Target,
    display: ProgressDisplay,
    prompts: Sequence[list[Message]],
    judge: Judge,
    about: dict[str, Any],
) -> str:
    assert target.base is not None  # `prepare_judge` refuses one model
    folder = target.output / FOLDER
    base = _answers("base", target.base, config, folder, prompts, display)
    trained = _answers("trained", target.trained, config, folder, prompts, display)
    pairs = [AnswerPair(*row) for row in zip(prompts, base, trained, strict=True)]
    verdicts = _verdicts(pairs, judge, about, folder, display)
    document = summary(pairs, verdicts) | {"judge": about}
    document |= {"max_new_tokens": config.judge_max_new_tokens}
    text = "".join(
        json.dumps(
            {**asdict(pair), "trained_first": said[0], "trained_second": said[1]}
            | {"outcome": outcome(*said)}
        )
        + "\n"
        for pair, said in zip(pairs, verdicts, strict=True)
    )
    write_atomically(folder / "pairs.jsonl", text)
    path = target.output / WIN_RATE
    write_atomically(path, json.dumps(redacted_values(document), indent=1) + "\n")
    display.say(f"saved {path}")
    return told(document)


def _verdicts(
    pairs: Sequence[AnswerPair],
    judge: Judge,
    about: dict[str, Any],
    folder: Path,
    display: ProgressDisplay,
) -> list[tuple[Verdict, Verdict]]:
    """What is said of each pair, in both orders; equal answers are a tie that nobody is asked."""
    kept = Kept(folder / f"verdicts-{digest(about)[:16]}.jsonl")
    keys = [digest(pair.prompt, pair.base, pair.trained) for pair in pairs]
    asked = {
        key: pair
        for key, pair in zip(keys, pairs, strict=True)
        if pair.base != pair.trained and key not in kept
    }
    new = list(asked)
    with display.stage("judge", len(new), "pair") as update:

        def keep(number: int, first: Verdict, second: Verdict) -> None:
            kept.add(new[number], [first, second])
            update(number + 1)

        in_both_orders(judge, list(asked.values()), keep)
    return [
        ("tie", "tie") if pair.base == pair.trained else (kept[key][0], kept[key][1])
        for key, pair in zip(keys, pairs, strict=True)
    ]


def summary(
    pairs: Sequence[AnswerPair], verdicts: Sequence[tuple[Verdict, Verdict]]
) -> dict[str, Any]:
    """What win_rate.json says.

    Args:
        pairs: of answers.
        verdicts: on them, with the trained model's answer first and second.
    """
    outcomes: list[Outcome] = [outcome(*said) for said in verdicts]
    base = np.array([len(pair.base) for pair in pairs])
    trained = np.array([len(pair.trained) for pair in pairs])
    matched = equally_long(trained, base)
    flipped = sum(said in (("first", "first"), ("second", "second")) for said in verdicts)
    numbers = Counter(outcomes)
    return {
        "num_prompts": len(pairs),
        "wins": numbers["win"],
        "losses": numbers["loss"],
        "ties": numbers["tie"],
        "ties_by_order": flipped,
        "ties_of_equal_answers": sum(pair.base == pair.trained for pair in pairs),
        "without_verdict": numbers[None],
        "win_rate": _plain(win_rate(outcomes)),
        "win_rate_length_matched": _plain(
            win_rate([one for one, is_near in zip(outcomes, matched, strict=True) if is_near])
        ),
        "mean_characters": {
            "base": float(base.mean()),
            "trained": float(trained.mean()),
        },
    }


def _plain(rate: Rate | None) -> dict[str, Any] | None:
    return None if rate is None else asdict(rate)


def told(document: dict[str, Any]) -> str:
    """win_rate.json for people."""
    lengths = document["mean_characters"]
    lines = [
        f"win rate over base    {_rate(document['win_rate'])}",
        f"  of similar length   {_rate(document['win_rate_length_matched'])}",
        f"wins, losses, ties    {document['wins']}, {document['losses']}, {document['ties']} "
        f"({document['ties_by_order']} by order, "
        f"{document['ties_of_equal_answers']} of equal answers)",
        f"without a verdict     {document['without_verdict']} of {document['num_prompts']}",
        f"mean length           base {lengths['base']:.0f}, trained {lengths['trained']:.0f} "
        "characters",
    ]
    return "\n".join(lines)


def _rate(rate: dict[str, Any] | None) -> str:
    if rate is None:
        return "-"
    low, high = rate["low"], rate["high"]
    return f"{rate['rate']:.1%} (95 %: {low:.1%} to {high:.1%}; {rate['num_pairs']} pairs)"
