# SPDX-License-Identifier: Apache-2.0
"""Caption scores: known values, and the same figures as pycocoevalcap to the last digits."""

import gzip
import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st

from lionjax.evaluation.metrics.captions import bleu, caption_scores, cider_d, rouge_l, tokenize

DATA = shared_data.ROOT
needs_captions = shared_data.needs("captions_val2017.json.gz", "captions_pred")

CAPTIONS = ["A dog runs on the beach.", "Two men riding horses, quickly!", "a red bus", "A cat"]
REFERENCES = [
    ["A dog is running on a beach.", "The dog runs along the sand."],
    ["Two men ride horses.", "Men on horses.", "People riding horses in a field"],
    ["A red double-decker bus on the street", "a bus"],
    ["Nothing of the kind here"],
]


def real_captions(count: int) -> dict[int, list[str]]:
    captions: dict[int, list[str]] = {}
    with gzip.open(DATA / "captions_val2017.json.gz") as file:
        for note in json.load(file)["annotations"]:
            captions.setdefault(note["image_id"], []).append(note["caption"])
    return dict(list(captions.items())[:count])


def check_against_pycocoevalcap(captions, references):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    theirs = {i: [" ".join(tokenize(caption))] for i, caption in enumerate(captions)}
    truth = {i: [" ".join(tokenize(t)) for t in texts] for i, texts in enumerate(references)}
    bleu_n, _ = Bleu(4).compute_score(truth, theirs, verbose=0)
    _, rouge_B = Rouge().compute_score(truth, theirs)
    _, cider_B = Cider().compute_score(truth, theirs)
    np.testing.assert_allclose(bleu(captions, references), bleu_n, rtol=1e-12)
    np.testing.assert_allclose(rouge_l(captions, references), rouge_B, rtol=1e-12)
    np.testing.assert_allclose(cider_d(captions, references), cider_B, rtol=1e-9, atol=1e-12)


def test_tiny_set_scores_as_pycocoevalcap():
    check_against_pycocoevalcap(CAPTIONS, REFERENCES)


@pytest.mark.slow
@needs_captions
def test_real_captions_against_the_other_four_score_as_pycocoevalcap():
    captions = list(real_captions(1000).values())
    check_against_pycocoevalcap([five[0] for five in captions], [five[1:] for five in captions])


@pytest.mark.slow
@needs_captions
def test_real_predictions_score_as_pycocoevalcap():
    references, captions = real_captions(5000), {}
    with gzip.open(DATA / "captions_pred" / "VinVL_base_test_karpathy5k.tsv.gz", "rt") as file:
        for line in file:
            image, answers = line.split("\t")
            captions[int(image)] = json.loads(answers)[0]["caption"]
    both = sorted(set(captions) & set(references))
    assert len(both) == 593
    pair = [captions[image] for image in both], [references[image] for image in both]
    check_against_pycocoevalcap(*pair)
    assert caption_scores(*pair)["cider"] == pytest.approx(1.358, abs=2e-3)


@pytest.mark.slow
@needs_captions
@pytest.mark.skipif(shutil.which("java") is None, reason="the original tokenizer needs Java")
def test_caption_tokens_match_the_java_tokenizer_for_999_of_1000_captions(tmp_path):
    from pycocoevalcap.tokenizer import ptbtokenizer

    captions = [text for texts in real_captions(5000).values() for text in texts]
    lines = tmp_path / "captions.txt"
    lines.write_text("\n".join(text.replace("\n", " ") for text in captions), encoding="utf-8")
    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    java = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    done = subprocess.run([*java, "-preserveLines", "-lowerCase", str(lines)], capture_output=True)
    words = [
        [word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS]
        for line in done.stdout.decode().split("\n")
    ]
    differ = sum(tokenize(a) != b for a, b in zip(captions, words, strict=False))
    assert len(words) >= len(captions) == 25014
    assert differ <= len(captions) / 1000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # What Stanford's tokenizer made of each, punctuation then dropped as coco-caption does.
        ("He can't, won't and cannot: it's John's dogs' bone;", "he ca n't wo n't and can not it 's john 's dogs bone"),
        ("I'm, we've you'll they'd gonna wanna", "i 'm we 've you 'll they 'd gon na wan na"),
        (
            "A well-known t-shirt at 10:30 a.m. for $5.99 (or 1,000 dollars)",
            "a well-known t-shirt at 10:30 a.m. for $ 5.99 -lrb- or 1,000 dollars -rrb-",
        ),
        ('A sign reading "Stop!" -- with dashes - and more... end?', "a sign reading stop with dashes and more end"),
        ("Mr. Smith vs. Dr. Jones in St. Louis, 3rd 20's", "mr. smith vs. dr. jones in st. louis 3rd 20 's"),
        ("cafe café naïve and/or 50% off & more x:y a;b end.", "cafe café naïve and/or 50 % off & more x y a b end"),
        ("", ""),
        (" .,!? ", ""),
    ],
)
def test_caption_tokens_follow_the_penn_treebank(text, words):
    assert tokenize(text) == words.split()


def test_bleu_clips_repeated_words():
    score = bleu(["the the the the the the the"], [["The cat is on the mat.", "A cat, the mat"]])
    assert score[0] == pytest.approx(2 / 7)
    assert score[1] < 1e-4


def test_the_brevity_penalty_of_bleu_uses_the_closest_and_of_two_the_shorter_reference():
    assert bleu(["a b c"], [["a b c d", "a b c d e f g h"]])[0] == pytest.approx(math.exp(-1 / 3))
    assert bleu(["a b c"], [["a b c d", "a b"]])[0] == pytest.approx(1)


def test_bleu_is_computed_over_the_corpus_and_is_not_a_mean_over_samples():
    assert bleu(["a", "x x x"], [["a"], ["y y y"]])[0] == pytest.approx(1 / 4)


def test_rouge_l_takes_best_precision_and_best_recall_with_beta_1_2():
    score = rouge_l(["a b c d"], [["a b x", "c"]])  # precision 2/4 from the first, recall 1/1
    assert score[0] == pytest.approx((1 + 1.44) * 0.5 * 1 / (1 + 1.44 * 0.5))
    assert rouge_l(["", "..."], [["a"], [""]]).tolist() == [0, 0]


def test_cider_d_clips_repeated_words_and_penalizes_length():
    scores = cider_d(["cat", "cat cat cat cat", "bus"], [["cat"], ["cat"], ["bird"]])
    # One order of four has weight; four words are three more than one.
    assert scores == pytest.approx([2.5, 2.5 / 4 * math.exp(-(3**2) / 72), 0])


def test_cider_d_of_an_exact_copy_is_ten_and_no_score_is_more():
    copied = ["a small dog on grass", "two red buses parked outside"]
    assert cider_d(copied, [[text] for text in copied]) == pytest.approx([10, 10])


def test_cider_d_takes_document_frequencies_from_the_given_corpus():
    alone = cider_d(["a dog barks"], [["a dog sleeps"]])
    among = cider_d(["a dog barks"], [["a dog sleeps"]], [["a dog sleeps"], ["two cats"]])
    assert alone[0] == 0 < among[0]


words = st.lists(st.sampled_from("abcde"), min_size=1, max_size=8).map(" ".join)
sets = st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=2, max_size=5)


@settings(max_examples=100, deadline=None)
@given(sets)
def test_any_set_scores_as_pycocoevalcap_and_within_the_stated_range(samples):
    captions, references = (list(side) for side in zip(*samples, strict=True))
    check_against_pycocoevalcap(captions, references)
    for name, score in caption_scores(captions, references).items():
        assert 0 <= score <= (10 if name == "cider" else 1) + 1e-9


@pytest.mark.parametrize("score", [bleu, rouge_l, cider_d])
def test_unequal_or_missing_references_are_refused_in_a_sentence(score):
    with pytest.raises(ValueError, match="2 sentences but references for 1 samples"):
        score(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="at least one sentence"):
        score(["a"], [[]])
    with pytest.raises(ValueError, match="at least one sentence"):
        score(["a"], ["a"])
    with pytest.raises(ValueError, match="at least one sample"):
        score([], [])
