# SPDX-License-Identifier: Apache-2.0
"""Caption metrics BLEU, ROUGE-L and CIDEr-D, equal to coco-caption (tylin/coco-caption) up to tokenization.

All metrics count n-grams of the lower-case words of `tokenize`. A metric that is a mean returns one value per sample,
for bootstrap intervals; BLEU is a corpus score and returns one value per n-gram order. METEOR and SPICE need Java and
word lists and are not implemented.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Ngrams = Counter[tuple[str, ...]]
KEPT_SENTENCES = 2**16  # references are scored against several answers and by several metrics

ALNUM = r"[^\W_]"
TOKEN = re.compile(
    rf"""
    '(?:s|m|d|re|ve|ll)(?!{ALNUM}) | n't(?!{ALNUM})
  | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|ave|rd|mt|ft|blvd|inc|co)\.
  | nos?\.(?=\s*\d)
  | (?:[a-z]\.)+[a-z](?!{ALNUM})\.? | [a-z]\.(?=\s+\S)
  | \d+(?::\d+)+ | \d+(?:[.,/]\d+)+(?!{ALNUM})
  | (?:ma'am|'n'|[dol]'{ALNUM}+)(?!{ALNUM})
  | {ALNUM}+?(?=n't(?!{ALNUM}))
  | {ALNUM}+(?:[-_/.&]{ALNUM}+)*
  | \S
    """,
    re.VERBOSE,
)
# coco-caption lower-cases before it removes "-LRB-", so brackets remain as words.
PTB_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
PTB_CONTRACTIONS = {
    "".join(parts): parts
    for parts in (("can", "not"), ("gon", "na"), ("wan", "na"), ("got", "ta"), ("gim", "me"), ("lem", "me"))
}
PUNCTUATION = frozenset("'`\"“”‘’.?!,:;-–—…")


def tokenize(text: str) -> list[str]:
    """Lower-case Penn-Treebank-like words of `text` without punctuation.

    Replaces coco-caption's Java tokenizer (Stanford's PTBTokenizer, then removal of a list of punctuation). The rules
    were fitted to COCO val2017, where all but 3 of 30,429 captions are tokenized the same as by the Java tokenizer;
    other kinds of text were not measured.
    """
    words: list[str] = []
    for token in TOKEN.findall(text.lower().replace("’", "'")):
        if token not in PUNCTUATION:
            words.extend(PTB_CONTRACTIONS.get(token) or (PTB_BRACKETS.get(token, token),))
    return words


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """BLEU-1, -2, -3 and -4 of a corpus: array (4,), each in 0..1.

    Papineni et al. 2002 with the reference length closest to the candidate's (the shorter of two equally close ones),
    and with coco-caption's smoothing constants 1e-15 and 1e-9.
    """
    check_pairs(candidates, references)
    matched, total = np.zeros(4), np.zeros(4)
    length = closest = 0
    for candidate, sample_references in zip(candidates, references, strict=True):
        words = _words(candidate)
        tokenized_references = [_words(reference) for reference in sample_references]
        length += len(words)
        closest += min(
            (abs(len(reference_words) - len(words)), len(reference_words)) for reference_words in tokenized_references
        )[1]
        max_counts: Ngrams = Counter()
        for reference in sample_references:
            max_counts |= _ngrams_of(reference)
        for ngram, count in _ngrams_of(candidate).items():
            total[len(ngram) - 1] += count
            matched[len(ngram) - 1] += min(count, max_counts[ngram])
    precision = (matched + 1e-15) / (total + 1e-9)
    score = np.cumprod(precision) ** (1 / np.arange(1, 5))
    ratio = (length + 1e-15) / (closest + 1e-9)
    return score * math.exp(1 - 1 / ratio) if ratio < 1 else score


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """ROUGE-L of each sample, array (B,) in 0..1; the corpus score is its mean.

    Lin 2004 as in coco-caption: the F-measure (beta = 1.2) of the best precision and the best recall over the
    references, which may come from different references. An empty candidate scores 0.
    """
    check_pairs(candidates, references)
    scores = []
    for candidate, sample_references in zip(candidates, references, strict=True):
        words = _words(candidate)
        precision = recall = 0.0
        for reference_words in map(_words, sample_references):
            common = longest_common_subsequence(words, reference_words)
            if common:
                precision = max(precision, common / len(words))
                recall = max(recall, common / len(reference_words))
        f_measure = (1 + 1.2**2) * precision * recall
        scores.append(f_measure / (recall + 1.2**2 * precision) if f_measure else 0.0)
    return np.array(scores)


def cider_d(
    candidates: Sequence[str], references: Sequence[Sequence[str]], corpus: Sequence[Sequence[str]] | None = None
) -> np.ndarray:
    """CIDEr-D of each sample, array (B,) in 0..10; the corpus score is its mean.

    Vedantam et al. 2015 (arXiv 1411.5726), section 5: clipped cosine of tf-idf vectors of 1- to 4-grams, with a
    Gaussian penalty on the length difference (sigma 6), times 10. This is the value that coco-caption prints as
    "CIDEr"; papers multiply it by 100 (1.2 here is their 120).

    Document frequencies are counted over `corpus` (the references of each image), by default `references`. Scores
    therefore depend on the whole set, and a set of a single image always scores 0.
    """
    check_pairs(candidates, references)
    documents = references if corpus is None else corpus
    document_frequency = Counter(ngram for texts in documents for ngram in set().union(*map(_ngrams_of, texts)))

    @functools.lru_cache(KEPT_SENTENCES)
    def vector(text: str) -> TfIdfVector:
        return tf_idf(_ngrams_of(text), document_frequency, len(documents))

    scores = []
    for candidate, texts in zip(candidates, references, strict=True):
        similarities = [clipped_cosine(vector(candidate), vector(text)) for text in texts]
        scores.append(10 * sum(similarities) / len(texts))
    return np.array(scores)


@dataclass(frozen=True)
class TfIdfVector:
    """A sentence as four tf-idf vectors (n-gram orders 1 to 4), their L2 norms, and its word count."""

    vectors: tuple[dict[tuple[str, ...], float], ...]
    norms: tuple[float, ...]
    length: int


def tf_idf(counts: Ngrams, document_frequency: Ngrams, num_documents: int) -> TfIdfVector:
    """The tf-idf vector: each n-gram's count times log(num_documents / its document frequency)."""
    orders: tuple[dict[tuple[str, ...], float], ...] = ({}, {}, {}, {})
    for ngram, count in counts.items():
        idf = math.log(max(1, num_documents)) - math.log(max(1, document_frequency[ngram]))
        orders[len(ngram) - 1][ngram] = count * idf
    norms = tuple(math.sqrt(sum(w * w for w in order.values())) for order in orders)
    return TfIdfVector(orders, norms, sum(c for ngram, c in counts.items() if len(ngram) == 1))


def clipped_cosine(candidate: TfIdfVector, reference: TfIdfVector) -> float:
    """Mean over n-gram orders of the cosine with weights clipped to the reference's, times the length penalty: 0..1."""
    total = 0.0
    for order in range(4):
        reference_weights = reference.vectors[order]
        norm = candidate.norms[order] * reference.norms[order]
        weight_pairs = [
            (w, reference_weights[g]) for g, w in candidate.vectors[order].items() if g in reference_weights
        ]
        if norm:
            total += (
                sum(min(weight, reference_weight) * reference_weight for weight, reference_weight in weight_pairs)
                / norm
            )
    length_difference = candidate.length - reference.length
    return total / 4 * math.exp(-(length_difference**2) / (2 * 6.0**2))


def caption_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """{"bleu_1".."bleu_4" and "rouge_l" in 0..1, "cider" in 0..10 (see `cider_d`)} of a corpus."""
    scores = {f"bleu_{n}": float(v) for n, v in enumerate(bleu(candidates, references), start=1)}
    scores["rouge_l"] = float(rouge_l(candidates, references).mean())
    scores["cider"] = float(cider_d(candidates, references).mean())
    return scores


def ngrams(words: Sequence[str]) -> Ngrams:
    """The counts of all 1- to 4-grams."""
    return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


@functools.lru_cache(KEPT_SENTENCES)
def _words(text: str) -> tuple[str, ...]:
    return tuple(tokenize(text))


@functools.lru_cache(KEPT_SENTENCES)
def _ngrams_of(text: str) -> Ngrams:
    """The counts of all 1- to 4-grams of a sentence; callers must not change them."""
    return ngrams(_words(text))


def longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """The length of the longest common subsequence of words."""
    best = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for i, other in enumerate(right, start=1):
            above = best[i]
            best[i] = diagonal + 1 if word == other else max(above, best[i - 1])
            diagonal = above
    return best[-1]


def check_pairs(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise ValueError unless each sample has one candidate and a non-empty list of references."""
    if len(candidates) != len(references):
        raise ValueError(
            f"{len(candidates)} sentences but references for {len(references)} samples; give one sentence per sample"
        )
    if not candidates:
        raise ValueError("no sentences to score; give at least one sample")
    for i, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"references of sample {i} are {texts!r}; give a list of at least one sentence")
