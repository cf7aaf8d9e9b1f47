"""How a model's texts compare with a split's own: repetition, variety, and how far their tokens' frequencies are apart.

rep-n: the share of a text's n-grams that came before in it, in percent, mean over texts; diversity: the product of
1 - rep-n over n = 2, 3, 4 (Su et al. 2022, "A Contrastive Framework for Neural Text Generation"). distinct-n:
different n-grams over all n-grams of all texts (Li et al. 2016, "A Diversity-Promoting Objective Function"). n-grams
are of tokens.

In place of MAUVE, whose library brings faiss and scikit-learn and whose published figures need gpt2-large's hidden
states: the Jensen-Shannon divergence in bits (0 the same, 1 nothing in common) between the token frequencies of the
model's texts and those of the split's. Small samples of one source differ too, so its value between the two halves of
the split's own texts stands beside it. It sees words, not order: a text of shuffled words passes it.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wikift.base.errors import UserError
from wikift.data.store import TokenStore
from wikift.settings.fields import GenerateSettings
from wikift.settings.run_plan import ranks_started

if TYPE_CHECKING:
    from wikift.generation.writer import Writer

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 32, 128


@dataclasses.dataclass(frozen=True)
class Quality:
    """Figures of a set of texts; `divergence` is against the split's texts."""

    texts: int
    tokens: int
    rep_2: float
    rep_3: float
    rep_4: float
    diversity: float
    distinct_1: float
    distinct_2: float
    divergence: float


def measure(texts: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> Quality:
    """The figures of `texts`, each a list of token ids, against `reference`. Texts shorter than n have no rep-n."""
    rep_2, rep_3, rep_4 = (_repetition(texts, n) for n in (2, 3, 4))
    diversity = (1 - rep_2 / 100) * (1 - rep_3 / 100) * (1 - rep_4 / 100)
    count = sum(map(len, texts))
    return Quality(
        len(texts),
        count,
        rep_2,
        rep_3,
        rep_4,
        diversity,
        _distinct(texts, 1),
        _distinct(texts, 2),
        _apart(texts, reference),
    )


def compare(
    writer: Writer,
    store: TokenStore,
    split: str,
    settings: GenerateSettings,
    *,
    count: int = PROMPTS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Quality]:
    """{"model": figures, "split": those of the text that really follows} for `count` prompts, evenly over the split.

    A prompt is PROMPT_TOKENS of the split; the model writes `settings.max_new_tokens`, and as many of the split follow.
    Raises UserError where the split is too short.
    """
    ids = store.tokens(split)
    size = PROMPT_TOKENS + settings.max_new_tokens
    count = min(count, len(ids) // size)
    if count < 2:
        raise UserError(f"--split {split}: has {len(ids):,} tokens, --generation needs {2 * size:,}; name a longer one")
    prompts, real = [], []
    for place in np.linspace(0, len(ids) - size, count).astype(np.int64).tolist():
        window = [int(token) for token in ids[place : place + size]]
        prompts.append(_text(writer, window[:PROMPT_TOKENS]))
        real.append(_ids(writer, _text(writer, window[PROMPT_TOKENS:])))
    written = []
    for place in range(0, count, settings.batch_size):
        batch = list(enumerate(prompts))[place : place + settings.batch_size]
        written += [_ids(writer, answer.text) for answer in writer.answers(batch, settings)]
        if progress is not None:
            progress(len(written), count)
    halves = measure(real[::2], real[1::2])  # how far one half is from the other
    return {
        "model": measure(written, real),
        "split": dataclasses.replace(measure(real, real), divergence=halves.divergence),
    }


def report(names: Sequence[tuple[str, str, TokenStore]], split: str, *, device: str, as_json: bool) -> None:
    """Print the figures of models, (name, source, store) each, with the settings that made them."""
    if ranks_started() > 1:
        raise UserError(
            f"--generation: is work for one process, torchrun started {ranks_started()}; start it with python"
        )
    from wikift.generation.writer import load_writer

    settings = GenerateSettings(max_new_tokens=NEW_TOKENS, repetition_penalty=1.0, top_k=0)
    shown = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "precision")
    made = {"prompt_tokens": PROMPT_TOKENS, **{name: getattr(settings, name) for name in shown}}
    for number, (name, source, store) in enumerate(names):
        found = compare(load_writer(source, device, settings.precision), store, split, settings)
        if as_json:
            content = {key: dataclasses.asdict(value) for key, value in found.items()}
            print(json.dumps({"model": name, "split": split, "generation": content, "settings": made}), flush=True)
            continue
        if number == 0:
            print("".join(f"{head:>11}" for head in (f.name for f in dataclasses.fields(Quality))) + "  text of")
        for key, text in (("model", name), ("split", f"{split} itself (divergence: its halves)")):
            print(_cells(found[key]) + f"  {text}", flush=True)
    if not as_json:
        print(", ".join(f"{key} {value}" for key, value in made.items()))


def _cells(quality: Quality) -> str:
    values: dict[str, Any] = dataclasses.asdict(quality)
    return "".join(f"{value:>11,}" if isinstance(value, int) else f"{value:>11.3f}" for value in values.values())


def _text(writer: Writer, ids: list[int]) -> str:
    text: str = writer.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _ids(writer: Writer, text: str) -> list[int]:
    ids: list[int] = writer.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _grams(text: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(text[place : place + n]) for place in range(len(text) - n + 1)]


def _repetition(texts: Sequence[Sequence[int]], n: int) -> float:
    shares = [1 - len(set(grams)) / len(grams) for text in texts if (grams := _grams(text, n))]
    return 100 * sum(shares) / len(shares) if shares else 0.0


def _distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _apart(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> float:
    """The Jensen-Shannon divergence of two sets' token frequencies, in bits; 1 where one of them has no token."""
    counts = [Counter(token for text in texts for token in text) for texts in (one, other)]
    totals = [sum(count.values()) for count in counts]
    if not all(totals):
        return 1.0
    p, q = (
        np.array([count[token] for token in sorted(counts[0] | counts[1])]) / total
        for count, total in zip(counts, totals, strict=True)
    )
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(part > 0, part * np.log2(part / middle), 0.0).sum() for part in (p, q)]
    return float(sum(parts) / 2)
