"""Monkey as a model of lmms-eval: its requests are answered as ``monkey ask`` answers."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from monkey_model.serving.answer import Answerer, Question
from tests.helpers.checkpoint import COLOURS, write_checkpoint


@dataclass
class ModelManifest:
    model_id: str
    simple_class_path: str


class LMMs:
    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}


@pytest.fixture(scope="module")
def harness():
    """The module; where lmms-eval is not installed, on stand-ins for the two names it imports."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("lmms_eval") is None:
            for name, content in {
                "lmms_eval": {},
                "lmms_eval.api": {},
                "lmms_eval.models": {},
                "lmms_eval.api.model": {"lmms": LMMs},
                "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
            }.items():
                module = ModuleType(name)
                vars(module).update(content)
                patch.setitem(sys.modules, name, module)
        yield importlib.import_module("monkey_model.evaluation.lmms_eval_model")
        sys.modules.pop("monkey_model.evaluation.lmms_eval_model")


@pytest.fixture(scope="module")
def model(harness, tmp_path_factory):
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("harness") / "checkpoint")
    model = harness.Monkey(str(checkpoint), device="cpu", batch_size="2")
    model.task_dict = {"signs": {"test": [Image.new("RGB", (60, 40), c) for c in COLOURS]}}
    return model


def request(number, **options):
    return SimpleNamespace(
        args=("Colour?", options, lambda doc: [doc], number % len(COLOURS), "signs", "test")
    )


def test_requests_are_answered_in_their_order(model):
    longest = [6, 6, 6, 3, 6]
    requests = [request(i, max_new_tokens=n, temperature=0) for i, n in enumerate(longest)]
    expected = []
    for number, most in enumerate(longest):
        answerer = Answerer(
            model.answerer.model, model.answerer.processor,
            max_new_tokens=most, template="{} Answer: ",
        )  # fmt: skip
        picture = Image.new("RGB", (60, 40), COLOURS[number % len(COLOURS)])
        expected += answerer.answer([Question("Colour?", (picture,))])
    assert model.generate_until(requests) == expected and len(set(expected)) > 1
    end = expected[0][1]
    (short,) = model.generate_until([request(0, max_new_tokens=6, until=["", end])])
    assert short == expected[0].partition(end)[0].strip()


@pytest.mark.parametrize(
    "options", [{"do_sample": True}, {"temperature": 0.7}, {"num_beams": 3}]
)  # fmt: skip
def test_what_is_not_greedy_is_refused(options, model):
    (name,) = options
    with pytest.raises(ValueError, match=f"answers greedily: {name} must be "):
        model.generate_until([request(0, **options)])


def test_what_it_cannot_do_is_said(model):
    with pytest.raises(NotImplementedError, match="scores no given continuations"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one question at a time"):
        model.generate_until_multi_round([])


def test_the_entry_point_names_the_model(harness):
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert 'monkey = "monkey_model.evaluation.lmms_eval_model:manifest"' in project.read_text()
    manifest = harness.manifest()
    module, _, name = manifest.simple_class_path.rpartition(".")
    assert manifest.model_id == "monkey" and module == harness.__name__
    assert getattr(harness, name) is harness.Monkey
