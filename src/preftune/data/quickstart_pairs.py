"""The quickstart's own preference pairs, made from phrase pools by a seeded generator.

The preference is one of voice. The chosen answer talks like a kind neighbour: to the reader, with
a first step to take now, a reason in plain words and some cheer. The rejected one talks like an
office circular: impersonal, hedged, general, sometimes naming the same step as a "prescribed
measure" and never saying why it works. A person sees which is which at a glance, and a small
language model learns it in about one pass over the training pairs.

The pairs would teach nothing about preference tuning if something trivial gave the side away, so
it is built in, and tested, that it cannot:

- length: in every second pair the chosen answer is the longer one, in words and in characters at
  once; both sides aim at the same lengths, so that the two distributions agree as well;
- first word: both sides use the same first words, each as often as the other side;
- single words: each side is composed from many phrasings, so no token is common on one side and
  rare on the other;
- memorising: held-out pairs share neither a prompt template nor a subject with training pairs.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from operator import itemgetter
from pathlib import Path

from preftune.data import quickstart_phrases as phrases
from preftune.files import write_atomically

SOURCE = "preftune-quickstart"
HELDOUT_SUBJECTS = 2  # a topic, its last ones
TRAIN_PAIRS_PER_SUBJECT = 5
HELDOUT_PAIRS_PER_SUBJECT = 3

# Lengths in words: what the two answers of a pair average to, and how far they are apart.
MEAN_WORDS = (18, 31)
EXTRA_WORDS = (2, 7)
CHARS_PER_WORD = 5.45

# The search for answers of these lengths: how many are drawn a side, how many of them are kept at
# the first attempt, how many attempts there are, and what counts against an answer: words of
# unusual length, and phrases that were used before (measured by share of the rows).
CANDIDATES = 200
SHORTLIST = 12
ATTEMPTS = 20
RATIO_WEIGHT = 10.0
REPEAT_WEIGHT = 400.0

# A length in words and one in characters, the latter divided by CHARS_PER_WORD.
Lengths = tuple[float, float]


@dataclass(frozen=True)
class Subject:
    """One task with the advice on it.

    Attributes:
        topic: the topic it belongs to.
        task: the task as a bare infinitive, e.g. "poach an egg".
        gerund: the task as a gerund, e.g. "poaching an egg".
        first: the first step, a bare infinitive.
        second: the second step, a bare infinitive.
        why: the reason the steps work, a clause.
    """

    topic: str
    task: str
    gerund: str
    first: str
    second: str
    why: str


@dataclass(frozen=True)
class Answer:
    """A composed answer.

    Attributes:
        text: what it says.
        lengths: how long it is.
        phrases: the lines of the pools it is made of.
    """

    text: str
    lengths: Lengths
    phrases: tuple[str, ...]


def make_quickstart_pairs(seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Make the training and the held-out pairs.

    Args:
        seed: chooses the wordings, the lengths and the order; the same seed gives the same rows.

    Returns:
        The training rows and the held-out rows.
    """
    by_topic: dict[str, list[Subject]] = {}
    for subject in _subjects():
        by_topic.setdefault(subject.topic, []).append(subject)
    train = [s for group in by_topic.values() for s in group[:-HELDOUT_SUBJECTS]]
    heldout = [s for group in by_topic.values() for s in group[-HELDOUT_SUBJECTS:]]
    return (
        _make_split(
            train,
            _lines(phrases.TRAIN_TEMPLATES),
            TRAIN_PAIRS_PER_SUBJECT,
            random.Random(f"{SOURCE}/train/{seed}"),
        ),
        _make_split(
            heldout,
            _lines(phrases.HELDOUT_TEMPLATES),
            HELDOUT_PAIRS_PER_SUBJECT,
            random.Random(f"{SOURCE}/heldout/{seed}"),
        ),
    )


def write_quickstart_pairs(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write the pairs as ``train.jsonl`` and ``heldout.jsonl``, one JSON object a line.

    Args:
        folder: where the two files go; made if missing.
        seed: as for ``make_quickstart_pairs``.

    Returns:
        The paths of the training file and of the held-out file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train, heldout = make_quickstart_pairs(seed)
    paths = folder / "train.jsonl", folder / "heldout.jsonl"
    for path, rows in zip(paths, (train, heldout), strict=True):
        write_atomically(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return paths


@cache
def _lines(block: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in block.strip().splitlines())


def _subjects() -> list[Subject]:
    """Parse the subjects block: a topic line, then two lines for each subject."""
    subjects: list[Subject] = []
    topic = ""
    lines = iter(_lines(phrases.SUBJECTS))
    for line in lines:
        if line.startswith("# "):
            topic = line[2:]
            continue
        name, first = line.split(" | ")
        second, why = next(lines).split(" | ")
        verbs, rest = name.split(" ", 1)
        verb, gerund = verbs.split("/")
        subjects.append(Subject(topic, f"{verb} {rest}", f"{gerund} {rest}", first, second, why))
    return subjects


def _openings() -> dict[str, dict[str, list[str]]]:
    """Parse the openings block into first word -> mark ("+" or "-") -> sentences."""
    openings: dict[str, dict[str, list[str]]] = {}
    for line in _lines(phrases.OPENINGS):
        mark, sentence = line.split(" ", 1)
        openings.setdefault(sentence.split(" ", 1)[0], {"+": [], "-": []})[mark].append(sentence)
    return openings


def _make_split(
    subjects: Sequence[Subject], templates: Sequence[str], each: int, rng: random.Random
) -> list[dict]:
    """Make the rows of one split: ``each`` pairs a subject, every one under another template."""
    openings = _openings()
    total = len(subjects) * each
    # Dealing both sides the same first words, in different orders, makes their counts equal.
    firsts = (list(openings) * (total // len(openings) + 1))[:total]
    chosen_firsts = rng.sample(firsts, total)
    rejected_firsts = rng.sample(firsts, total)
    stride = max(1, len(templates) // each)
    rows = []
    aims = (0.0, 0.0), (0.0, 0.0)
    used: Counter[str] = Counter()
    for index in range(total):
        if index % 2 == 0:
            mean, gap = rng.randint(*MEAN_WORDS), rng.randint(*EXTRA_WORDS)
            longer, shorter = mean + gap / 2, mean - gap / 2
            aims = (longer, longer), (shorter, shorter)
        subject = subjects[index // each]
        template = templates[(index // each + stride * (index % each)) % len(templates)]
        chosen, rejected = _pair_of_answers(
            lambda s=subject, f=chosen_firsts[index]: _warm_answer(s, openings[f]["+"], rng),
            lambda s=subject, f=rejected_firsts[index]: _distant_answer(s, openings[f]["-"], rng),
            aims=aims,
            # Without this, the few phrases of handy length would be in most of the answers.
            staleness=lambda a: REPEAT_WEIGHT * sum(used[p] for p in a.phrases) / total,
        )
        used.update(chosen.phrases + rejected.phrases)
        rows.append(_row(subject, template, chosen.text, rejected.text))
        # The next row aims at this row's lengths with the sides exchanged, so that neither side
        # is the longer, or the more spread out, of the two.
        aims = rejected.lengths, chosen.lengths
    rng.shuffle(rows)
    return rows


def _row(subject: Subject, template: str, chosen: str, rejected: str) -> dict:
    prompt = template.format(task=subject.task, ger=subject.gerund)
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "source": f"{SOURCE}/{subject.topic}",
        "topic": subject.topic,
        "template": template,
        "subject": subject.task,
    }


def _pair_of_answers(
    warm: Callable[[], Answer],
    distant: Callable[[], Answer],
    *,
    aims: tuple[Lengths, Lengths],
    staleness: Callable[[Answer], float],
) -> tuple[Answer, Answer]:
    """Draw a chosen and a rejected answer of about the wanted lengths.

    Args:
        warm: draws a chosen answer.
        distant: draws a rejected answer.
        aims: the lengths wanted of the chosen and of the rejected answer. The sizes are met as
            nearly as the draws allow; which side is the longer is met for certain.
        staleness: a penalty for phrases that were used often.

    Returns:
        The chosen and the rejected answer.

    Raises:
        RuntimeError: the phrase pools cannot reach such lengths.
    """
    for attempt in range(1, ATTEMPTS + 1):
        # Lengths at the edge of what a first word allows need a look further down the list.
        keep = SHORTLIST * attempt
        pairs = [
            (chosen, rejected)
            for chosen, rejected in product(
                _best(warm, aims[0], staleness, keep), _best(distant, aims[1], staleness, keep)
            )
            if all(
                (one - other) * (aim - other_aim) > 0
                for one, other, aim, other_aim in zip(
                    chosen[1].lengths, rejected[1].lengths, *aims, strict=True
                )
            )
        ]
        if pairs:
            _, _, chosen, rejected = min(
                (one + other, i, c, r) for i, ((one, c), (other, r)) in enumerate(pairs)
            )
            return chosen, rejected
    raise RuntimeError("the quickstart's phrase pools cannot balance the lengths of a pair")


def _best(
    draw: Callable[[], Answer], aim: Lengths, staleness: Callable[[Answer], float], keep: int
) -> list[tuple[float, Answer]]:
    """Draw several answers and keep those that fit best, each after its penalty."""
    answers = [draw() for _ in range(CANDIDATES)]
    scored = [(_misfit(answer, aim) + staleness(answer), answer) for answer in answers]
    return sorted(scored, key=itemgetter(0))[:keep]


def _misfit(answer: Answer, aim: Lengths) -> float:
    words, chars = answer.lengths
    # Distant answers use longer words. Unless words of ordinary length are insisted on, one side
    # has more words, or the other more characters, and a threshold on that tells them apart.
    return (words - aim[0]) ** 2 + (chars - aim[1]) ** 2 + RATIO_WEIGHT * (words - chars) ** 2


def _warm_answer(subject: Subject, openings: Sequence[str], rng: random.Random) -> Answer:
    """Compose an opening with a step, then some of: the other step, the reason, some cheer."""
    parts = [rng.choice(openings)]
    if "{both}" not in parts[0] and rng.random() < 0.8:
        parts.append(rng.choice(_lines(phrases.SECOND_STEPS)))
    # The reason is that of the two steps together, so it needs both of them to be there.
    complete = "{both}" in parts[0] or len(parts) == 2
    reason = complete and rng.random() < 0.7
    if reason:
        parts.append(rng.choice(_lines(phrases.REASONS)))
    if not reason or rng.random() < 0.4:
        parts.append(rng.choice(_lines(phrases.CHEERS)))
    return _fill(parts, subject, rng)


def _distant_answer(subject: Subject, openings: Sequence[str], rng: random.Random) -> Answer:
    """Compose an opening, then one or two remarks and perhaps a dismissal."""
    parts = [rng.choice(openings)]
    remarks, dismiss = rng.choice(((1, True), (1, True), (1, False), (2, False), (0, True)))
    parts += rng.sample(_lines(phrases.REMARKS), remarks)
    if dismiss:
        parts.append(rng.choice(_lines(phrases.DISMISSALS)))
    return _fill(parts, subject, rng)


def _fill(parts: Sequence[str], subject: Subject, rng: random.Random) -> Answer:
    steps = subject.first + subject.second
    joins = phrases.COMMA_JOINS if " and " in steps else phrases.COMMA_JOINS + phrases.AND_JOINS
    both = subject.first + rng.choice(joins) + subject.second
    text = " ".join(parts).format(
        ger=subject.gerund, s1=subject.first, s2=subject.second, both=both, why=subject.why
    )
    return Answer(text, (len(text.split()), len(text) / CHARS_PER_WORD), tuple(parts))
