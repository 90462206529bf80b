"""The 14 data sets of upstream's evaluation script: files, prompt, length and metric of each.

Source: eval/evaluate_vqa.py of https://github.com/Yuliang-Liu/Monkey.
"""

from __future__ import annotations

from dataclasses import dataclass

PROMPT = "{} Answer: "  # upstream: the space at its end gives better results
_UNANSWERABLE = (
    ' {} When the provided information is insufficient, respond with "unanswerable". Answer: '
)


@dataclass(frozen=True)
class DataSet:
    """A data set as upstream's script has it.

    Args:
        name: upstream's.
        data: JSONL, relative to the folder that holds ``data/``, as are the pictures in it.
        metrics: the first is upstream's score; a second is the published one, if that differs.
        max_new_tokens: longest answer.
        annotations: VQA's JSON of annotations.
        prompt: what follows the picture; ``{}`` is the question.
    """

    name: str
    data: str
    metrics: tuple[str, ...]
    max_new_tokens: int
    annotations: str | None = None
    prompt: str = PROMPT


_VQA = ("vqa_accuracy_upstream", "vqa_accuracy")
_ANLS = ("anls_upstream", "anls")

#: By name.
DATA_SETS = {
    one.name: one
    for one in (
        DataSet("estvqa_test", "data/estvqa/estvqa.jsonl", _ANLS, 100),
        DataSet("docvqa_test", "data/docvqa/test_ans.jsonl", _ANLS, 100),
        DataSet(
            "chartqa",
            "data/chartqa/chartqa.jsonl",
            ("relaxed_accuracy_upstream", "relaxed_accuracy"),
            100,
        ),
        DataSet("infovqa_test", "data/infographicVQA/infovqa_test.jsonl", _ANLS, 100),
        DataSet(
            "vizwiz_val",
            "data/vizwiz/vizwiz_val.jsonl",
            _VQA,
            10,
            "data/vizwiz/vizwiz_val_annotations.json",
            _UNANSWERABLE,
        ),
        DataSet("deepform", "data/test_DeepForm.jsonl", ("containment",), 100),
        DataSet("KLC", "data/test_KleisterCharity.jsonl", ("containment",), 100),
        DataSet("WTQ", "data/test_WikiTableQuestions.jsonl", ("containment",), 100),
        DataSet("gqa_testdev", "data/gqa/gqa_testdev_new.jsonl", ("gqa",), 10),
        DataSet(
            "okvqa_val",
            "data/okvqa/okvqa_val.jsonl",
            _VQA,
            10,
            "data/okvqa/mscoco_val2014_annotations.json",
        ),
        DataSet(
            "textvqa_val",
            "data/textvqa/textvqa_val.jsonl",
            _VQA,
            10,
            "data/textvqa/textvqa_val_annotations.json",
        ),
        DataSet("stvqa_test", "data/STVQA/stvqa.jsonl", _ANLS, 100),
        DataSet("ai2diagram_test", "data/ai2d/test.jsonl", ("containment",), 10),
        DataSet(
            "vqav2_val",
            "data/vqav2/vqav2_val.jsonl",
            _VQA,
            10,
            "data/vqav2/v2_mscoco_val2014_annotations.json",
        ),
    )
}
