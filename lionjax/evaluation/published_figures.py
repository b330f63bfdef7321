# SPDX-License-Identifier: Apache-2.0
"""Figures that papers report, by benchmark and by the protocol under which they were made.

A figure can be compared only with one of the same protocol. `trained`: the model saw the benchmark's train split, so
that its figure is not zero-shot.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PublishedFigure:
    """One figure of a paper, as text, since some are several numbers."""

    benchmark: str
    protocol: str
    model: str
    figure: str
    trained: bool


# benchmark | protocol | model, and split where there are several | figure | "trained" where the train split was seen.
# LION: arXiv 2311.11860, tables 1 to 4; InstructBLIP: 2305.06500; BLIP-2: 2301.12597; LLaVA: 2304.08485; LLaVA-1.5:
# 2310.03744; Shikra: 2306.15195; NExT-Chat: 2311.04498; LISA: 2308.00692; Kosmos-2: 2306.14824; MME: 2306.13394.
_TABLE = """
coco_karpathy | lion | LION-4B, CIDEr | 138.20 | trained
coco_karpathy | lion | LION-12B, CIDEr | 139.25 | trained
flickr30k | lion | LION-4B, CIDEr | 85.57 |
flickr30k | lion | LION-12B, CIDEr | 87.12 |
flickr30k | lavis | InstructBLIP FlanT5-XL, CIDEr | 84.5 |
flickr30k | lavis | InstructBLIP FlanT5-XXL, CIDEr | 83.5 |
flickr30k | lavis | InstructBLIP Vicuna-7B, CIDEr | 82.4 |
textcaps | lion | LION-4B, CIDEr | 104.87 | trained
textcaps | lion | LION-12B, CIDEr | 108.76 | trained
nocaps | lavis | InstructBLIP FlanT5-XL, val, CIDEr | 119.9 |
nocaps | lavis | InstructBLIP FlanT5-XXL, val, CIDEr | 120.0 |
nocaps | lavis | InstructBLIP Vicuna-7B, val, CIDEr | 123.1 |
nocaps | blip2 | BLIP-2 FlanT5-XL, val, CIDEr, finetuned on COCO | 121.6 |
vqav2 | llava | LLaVA-1.5-7B, test-dev | 78.5 | trained
vqav2 | llava | LLaVA-1.5-13B, test-dev | 80.0 | trained
vqav2 | official | Shikra-13B, test-dev | 77.36 | trained
okvqa | lion | LION-4B | 51.08 | trained
okvqa | lion | LION-12B | 57.33 | trained
okvqa | lavis | InstructBLIP Vicuna-7B, finetuned | 62.1 | trained
okvqa | official | Shikra-13B | 47.16 |
aokvqa | lion | LION-4B, direct answer, val | 59.98 | trained
aokvqa | lion | LION-12B, direct answer, val | 60.87 | trained
aokvqa | lavis | InstructBLIP Vicuna-7B, multiple choice, val, finetuned | 75.7 | trained
gqa | lion | LION-4B | 49.50 |
gqa | lion | LION-12B | 51.56 |
gqa | lavis | InstructBLIP FlanT5-XL | 48.4 |
gqa | lavis | InstructBLIP FlanT5-XXL | 47.9 |
gqa | lavis | InstructBLIP Vicuna-7B | 49.2 |
gqa | lavis | BLIP-2 FlanT5-XL | 44.0 |
gqa | llava | LLaVA-1.5-7B | 62.0 | trained
gqa | llava | LLaVA-1.5-13B | 63.3 | trained
iconqa | lion | LION-4B | 54.91 |
iconqa | lion | LION-12B | 54.89 |
iconqa | lavis | InstructBLIP FlanT5-XL | 50.0 |
iconqa | lavis | InstructBLIP FlanT5-XXL | 51.2 |
iconqa | lavis | InstructBLIP Vicuna-7B | 43.1 |
vsr | lion | LION-4B | 72.96 |
vsr | lion | LION-12B | 73.77 |
vsr | lavis | InstructBLIP FlanT5-XL | 64.8 |
vsr | lavis | InstructBLIP FlanT5-XXL | 65.6 |
vsr | lavis | InstructBLIP Vicuna-7B | 54.3 |
vsr | official | people | 95.4 |
visdial | lion | LION-4B, MRR x 100 | 50.02 |
visdial | lion | LION-12B, MRR x 100 | 50.42 |
visdial | lavis | InstructBLIP FlanT5-XL, MRR x 100 | 46.6 |
visdial | lavis | InstructBLIP FlanT5-XXL, MRR x 100 | 48.5 |
visdial | lavis | InstructBLIP Vicuna-7B, MRR x 100 | 45.2 |
vizwiz | lavis | InstructBLIP FlanT5-XL | 32.7 |
vizwiz | lavis | InstructBLIP FlanT5-XXL | 30.9 |
vizwiz | lavis | InstructBLIP Vicuna-7B | 34.5 |
vizwiz | llava | LLaVA-1.5-7B | 50.0 |
vizwiz | llava | LLaVA-1.5-13B | 53.6 |
textvqa | lavis | InstructBLIP FlanT5-XL, with OCR tokens | 46.6 |
textvqa | lavis | InstructBLIP FlanT5-XXL, with OCR tokens | 46.6 |
textvqa | lavis | InstructBLIP Vicuna-7B, with OCR tokens | 50.1 |
textvqa | llava | LLaVA-1.5-7B, with OCR tokens | 58.2 |
textvqa | llava | LLaVA-1.5-13B, with OCR tokens | 61.3 |
scienceqa | lavis | InstructBLIP FlanT5-XL, with image | 70.4 |
scienceqa | lavis | InstructBLIP FlanT5-XXL, with image | 70.6 |
scienceqa | lavis | InstructBLIP Vicuna-7B, with image | 60.5 |
scienceqa | llava | LLaVA-13B, finetuned | 90.92 | trained
scienceqa | llava | LLaVA-1.5-7B, with image | 66.8 |
scienceqa | llava | LLaVA-1.5-13B, with image | 71.6 |
hateful_memes | lavis | InstructBLIP FlanT5-XL, AUROC | 56.6 |
hateful_memes | lavis | InstructBLIP FlanT5-XXL, AUROC | 54.1 |
hateful_memes | lavis | InstructBLIP Vicuna-7B, AUROC | 59.6 |
rec | shikra | Shikra-7B, RefCOCO val/A/B | 87.01 / 90.61 / 80.24 | trained
rec | shikra | Shikra-7B, RefCOCO+ val/A/B | 81.60 / 87.36 / 72.12 | trained
rec | shikra | Shikra-7B, RefCOCOg val/test | 82.27 / 82.19 | trained
rec | nextchat | NExT-Chat-7B, RefCOCO val/A/B | 85.5 / 90.0 / 77.9 | trained
rec | nextchat | NExT-Chat-7B, RefCOCO+ val/A/B | 77.2 / 84.5 / 68.0 | trained
rec | nextchat | NExT-Chat-7B, RefCOCOg val/test | 80.1 / 79.8 | trained
rec | lion | LION-4B, RefCOCO val/A/B | 89.73 / 92.29 / 84.82 | trained
rec | lion | LION-4B, RefCOCO+ val/A/B | 83.60 / 88.72 / 77.34 | trained
rec | lion | LION-4B, RefCOCOg val/test | 85.69 / 85.63 | trained
rec | lion | LION-12B, RefCOCO val/A/B | 89.80 / 93.02 / 85.57 | trained
rec | lion | LION-12B, RefCOCO+ val/A/B | 83.95 / 89.22 / 78.06 | trained
rec | lion | LION-12B, RefCOCOg val/test | 85.52 / 85.74 | trained
rec | minigpt_v2 | MiniGPT-v2, RefCOCO val/A/B | 88.69 / 91.65 / 85.33 | trained
rec | kosmos2 | Kosmos-2, RefCOCO val/A/B | 52.32 / 57.42 / 47.26 |
res | nextchat | NExT-Chat-7B, RefCOCO val/A/B, cIoU | 74.7 / 78.9 / 69.5 | trained
res | lisa | LISA-7B, RefCOCO val/A/B, cIoU | 74.1 / 76.5 / 71.1 | trained
res | lisa | LISA-7B, released checkpoint, RefCOCO val, cIoU | 67 | trained
reason_seg | lisa | LISA-7B, val, gIoU / cIoU | 44.4 / 46.0 |
reason_seg | lisa | LISA-7B finetuned, val, gIoU / cIoU | 52.9 / 54.0 | trained
flickr30k_entities | kosmos2 | Kosmos-2, R@1 val / test | 77.8 / 78.7 |
reg | nextchat | NExT-Chat-7B, RefCOCOg google val, CIDEr | 79.6 | trained
reg | kosmos2 | Kosmos-2, RefCOCOg google val, 4 shots, CIDEr | 62.3 |
pope | official | LION-12B, F1 random / popular / adversarial | 88.33 / 85.94 / 84.71 |
pope | llava | LLaVA-1.5-7B, mean F1 | 85.9 |
pope | shikra | NExT-Chat-7B, F1 random / popular / adversarial | 87.28 / 84.14 / 81.91 |
pope | official | InstructBLIP-7B, accuracy random / popular / adversarial | 88.57 / 82.77 / 72.10 |
mme | llava | LLaVA-1.5-7B, perception | 1510.7 |
mme | llava | LLaVA-1.5-13B, perception | 1531.3 |
mme | official | InstructBLIP-13B, perception + cognition | 1212.8 + 291.8 |
mme | official | MiniGPT-4, perception + cognition | 866.6 + 144.3 |
mme | official | mPLUG-Owl, perception + cognition | 967.3 + 276.1 |
mme | official | BLIP-2, perception + cognition | 1293.8 + 290.0 |
mmbench | vlmevalkit | LION-12B, test | 73.4 |
mmbench | vlmevalkit | LLaVA-1.5-7B, dev | 64.3 |
mmbench | vlmevalkit | LLaVA-1.5-13B, dev | 67.7 |
seed | llava | LLaVA-1.5-7B | 58.6 |
seed | llava | LLaVA-1.5-13B | 61.6 |
llava_bench | official | LLaVA-13B, COCO | 85.1 | trained
llava_bench | official | LLaVA-13B, in the wild | 67.3 | trained
"""

PUBLISHED = tuple(
    PublishedFigure(*cells[:4], trained=cells[4] == "trained")
    for cells in ([cell.strip() for cell in line.split("|")] for line in _TABLE.strip().splitlines())
)


def published_figures(benchmark: str) -> list[PublishedFigure]:
    """The published figures of a benchmark under all protocols."""
    return [figure for figure in PUBLISHED if figure.benchmark == benchmark]
