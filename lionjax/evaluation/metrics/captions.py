# SPDX-License-Identifier: Apache-2.0
"""Scores of a sentence against reference sentences: BLEU, ROUGE-L and CIDEr-D, as coco-caption.

Everything here is counting n-grams of lower-case words; `tokenize` decides what a word is and is
the only place that does. A metric that is a mean gives one value a sample, so that a report can
keep them and draw an interval; BLEU is a score of the whole set and gives one value an order.
METEOR and SPICE need Java and word lists and are left out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Ngrams = Counter[tuple[str, ...]]

ALNUM = r"[^\W_]"
TOKEN = re.compile(
    rf"""
    '(?:s|m|d|re|ve|ll)(?!{ALNUM}) | n't(?!{ALNUM})
  | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|ave|rd|mt|ft|blvd|inc|co)\.
  | (?:[a-z]\.)+[a-z](?!{ALNUM})\.? | [a-z]\.(?=\s+\S)
  | \d+(?::\d+)+ | \d+(?:[.,/]\d+)+(?!{ALNUM})
  | (?:ma'am|'n'|[dol]'{ALNUM}+)(?!{ALNUM})
  | {ALNUM}+?(?=n't(?!{ALNUM}))
  | {ALNUM}+(?:[-_/.&]{ALNUM}+)*
  | \S
    """,
    re.VERBOSE,
)
# coco-caption lower-cases before it looks for "-LRB-", so its brackets survive as words.
PTB_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
PTB_CONTRACTIONS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "wanna": ("wan", "na"),
    "gotta": ("got", "ta"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
}
PUNCTUATION = frozenset("'`\"“”‘’.?!,:;-–—…")


def tokenize(text: str) -> list[str]:
    """Lower-case Penn-Treebank-like words of `text`, punctuation dropped.

    Stands in for coco-caption's Java tokenizer (Stanford's PTBTokenizer, then a list of
    punctuation removed). The rules were fitted to COCO val2017: run beside the Java one, all but
    3 of 30,429 captions there come out the same; other kinds of text were not measured.
    """
    words: list[str] = []
    for token in TOKEN.findall(text.lower().replace("’", "'")):
        if token not in PUNCTUATION:
            words.extend(PTB_CONTRACTIONS.get(token) or (PTB_BRACKETS.get(token, token),))
    return words


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """BLEU-1, -2, -3 and -4 of a whole set: array (4,), each in 0..1.

    Papineni et al. 2002 with the reference length closest to the candidate's (the shorter of two
    equally close), and the tiny constants by which coco-caption keeps empty counts finite.
    """
    check_pairs(candidates, references)
    matched, guessed = np.zeros(4), np.zeros(4)
    length = closest = 0
    for candidate, sample_references in zip(candidates, references, strict=True):
        words = tokenize(candidate)
        referring = [tokenize(reference) for reference in sample_references]
        length += len(words)
        closest += min((abs(len(other) - len(words)), len(other)) for other in referring)[1]
        most: Ngrams = Counter()
        for other in referring:
            most |= ngrams(other)
        for ngram, count in ngrams(words).items():
            guessed[len(ngram) - 1] += count
            matched[len(ngram) - 1] += min(count, most[ngram])
    precision = (matched + 1e-15) / (guessed + 1e-9)
    score = np.cumprod(precision) ** (1 / np.arange(1, 5))
    ratio = (length + 1e-15) / (closest + 1e-9)
    return score * math.exp(1 - 1 / ratio) if ratio < 1 else score


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """ROUGE-L of each sample, array (B,) in 0..1; the set's score is its mean.

    Lin 2004 as coco-caption takes it: the best precision and the best recall over the references
    (they may come from two of them), joined with beta = 1.2. An empty sentence scores 0.
    """
    check_pairs(candidates, references)
    scores = []
    for candidate, sample_references in zip(candidates, references, strict=True):
        words = tokenize(candidate)
        precision = recall = 0.0
        for other in map(tokenize, sample_references):
            common = longest_common_subsequence(words, other)
            if common:
                precision = max(precision, common / len(words))
                recall = max(recall, common / len(other))
        joined = (1 + 1.2**2) * precision * recall
        scores.append(joined / (recall + 1.2**2 * precision) if joined else 0.0)
    return np.array(scores)


def cider_d(
    candidates: Sequence[str], references: Sequence[Sequence[str]], corpus: Sequence[Sequence[str]] | None = None
) -> np.ndarray:
    """CIDEr-D of each sample, array (B,) in 0..10; the set's score is its mean.

    Vedantam et al. 2015, section 5: clipped cosine of tf-idf vectors of 1- to 4-grams, a Gaussian
    penalty on the length difference (sigma 6), times 10. This is the value that coco-caption
    prints as "CIDEr"; papers print it times 100 (1.2 here is their 120).

    Document frequency is counted over `corpus` (references a picture), which is `references`
    unless given: so a score belongs to its set, and a set of a single picture always scores 0.
    """
    check_pairs(candidates, references)
    counted = [[ngrams(tokenize(text)) for text in texts] for texts in references]
    documents = counted
    if corpus is not None:
        documents = [[ngrams(tokenize(text)) for text in texts] for texts in corpus]
    frequency = Counter(ngram for texts in documents for ngram in set().union(*texts))
    scores = []
    for candidate, texts in zip(candidates, counted, strict=True):
        weighed = tf_idf(ngrams(tokenize(candidate)), frequency, len(documents))
        likeness = [clipped_cosine(weighed, tf_idf(t, frequency, len(documents))) for t in texts]
        scores.append(10 * sum(likeness) / len(texts))
    return np.array(scores)


@dataclass(frozen=True)
class TfIdfVector:
    """A sentence as four tf-idf vectors (orders 1 to 4), their lengths, and its word count."""

    vectors: tuple[dict[tuple[str, ...], float], ...]
    norms: tuple[float, ...]
    length: int


def tf_idf(counts: Ngrams, document_frequency: Ngrams, num_documents: int) -> TfIdfVector:
    """Each count times log(documents / documents that hold the n-gram)."""
    orders: tuple[dict[tuple[str, ...], float], ...] = ({}, {}, {}, {})
    for ngram, count in counts.items():
        idf = math.log(max(1, num_documents)) - math.log(max(1, document_frequency[ngram]))
        orders[len(ngram) - 1][ngram] = count * idf
    norms = tuple(math.sqrt(sum(w * w for w in order.values())) for order in orders)
    return TfIdfVector(orders, norms, sum(c for ngram, c in counts.items() if len(ngram) == 1))


def clipped_cosine(candidate: TfIdfVector, reference: TfIdfVector) -> float:
    """Mean over the orders of the cosine with weights clipped to the reference's, in 0..1."""
    total = 0.0
    for order in range(4):
        theirs = reference.vectors[order]
        norm = candidate.norms[order] * reference.norms[order]
        shared = [(w, theirs[g]) for g, w in candidate.vectors[order].items() if g in theirs]
        if norm:
            total += sum(min(mine, other) * other for mine, other in shared) / norm
    gap = candidate.length - reference.length
    return total / 4 * math.exp(-(gap**2) / (2 * 6.0**2))


def caption_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-1..4, ROUGE-L (0..1) and CIDEr-D (0..10, see `cider_d`) of a set, by name."""
    scores = {f"bleu_{n}": float(v) for n, v in enumerate(bleu(candidates, references), start=1)}
    scores["rouge_l"] = float(rouge_l(candidates, references).mean())
    scores["cider"] = float(cider_d(candidates, references).mean())
    return scores


def ngrams(words: Sequence[str]) -> Ngrams:
    """How often each run of 1 to 4 words occurs."""
    return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """The most words that both hold in the same order, gaps allowed."""
    best = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for i, other in enumerate(right, start=1):
            above = best[i]
            best[i] = diagonal + 1 if word == other else max(above, best[i - 1])
            diagonal = above
    return best[-1]


def check_pairs(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raises ValueError unless there is one candidate, and a list of references, a sample."""
    if len(candidates) != len(references):
        raise ValueError(
            f"{len(candidates)} sentences but references for {len(references)} samples; give one sentence a sample"
        )
    if not candidates:
        raise ValueError("no sentences to score; give at least one sample")
    for i, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"references of sample {i} are {texts!r}; give a list of at least one sentence")
