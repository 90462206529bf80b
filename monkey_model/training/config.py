"""What a fine-tuning run is told: a YAML (or JSON) file and flags, checked before anything loads.

::

    checkpoint: checkpoints/monkey      # directory: weights, config and tokenizer
    data: train.json                    # see monkey_model.training.conversations
    output_dir: runs/first
    mode: lora                          # lora | full | frozen
    training:                           # transformers.TrainingArguments
      learning_rate: 2e-5
      per_device_train_batch_size: 2

Paths are relative to the working directory. Every key is a field of :class:`FinetuneConfig`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import yaml

from monkey_kernels.checks import check_choice, check_number, check_positive_int
from monkey_model.files import check_file

if TYPE_CHECKING:
    from transformers import TrainingArguments

MODES = ("lora", "full", "frozen")
DTYPES = ("bfloat16", "float16", "float32")
QUANTIZATIONS = ("4bit", "8bit")

#: Upstream's recipe (``finetune/finetune_ds_debug.sh``, ``finetune_multitask.py``), as
#: ``transformers.TrainingArguments``; a warm-up below 1 is a share of all steps.
RECIPE: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "learning_rate": 1e-5,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "warmup_steps": 0.02,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1000,
    "save_total_limit": 10,
    "prediction_loss_only": True,
    "seed": 46,
    "dataloader_num_workers": 2,
}

# TrainingArguments that have a key of their own, or that the pictures of a batch depend on.
_OWN = {
    "output_dir": "output_dir",
    "bf16": "dtype",
    "fp16": "dtype",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "resume_from_checkpoint": "--resume",
    "remove_unused_columns": "this project: a batch's pictures are among those columns",
    "label_names": "this project",
}


#: The least value of an argument that transformers does not check, or not before the model loads.
_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "torch_empty_cache_steps": 1,
    "save_total_limit": 1,
    "dataloader_prefetch_factor": 1,
    "max_steps": -1,
    "learning_rate": 0,
    "num_train_epochs": 0,
    "dataloader_num_workers": 0,
    "seed": 0,
    "data_seed": 0,
}
_LARGEST = 2**32 - 1  # a seed, and far more of anything else than a run can use
_MAX_NODES = 100_000  # of a YAML file, with what its aliases repeat


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the floats of 1.2, where 1e-5 is a number; no key comes twice.

    A file of a few lines must not stand for a billion values, nor for itself.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and self._size(node, {}) > _MAX_NODES:
            problem = f"its aliases stand for more than {_MAX_NODES} values"
            raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return node

    def _size(self, node: yaml.Node, sizes: dict[int, int]) -> int:
        """Nodes below and with ``node``, each as often as it is named; ``sizes`` are known ones."""
        if id(node) in sizes:
            return sizes[id(node)]
        sizes[id(node)] = _MAX_NODES + 1  # for an alias that stands for what it is in
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = [child if isinstance(child, tuple) else (child,) for child in children]
        size = 1 + sum(self._size(child, sizes) for pair in pairs for child in pair)
        sizes[id(node)] = size
        return size

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {key.value!r} comes twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), "-+0123456789"
)


@dataclass(frozen=True)
class FinetuneConfig:
    """The settings of one run.

    Args:
        checkpoint: directory of the model to start from.
        data: file of conversations; see ``conversations.read_conversations``.
        output_dir: gets ``checkpoint-STEP/``, ``model/``, ``merged/`` and ``loss.png``. One run at
            a time holds its ``.lock``; ``finished.json`` marks its end.
        mode: ``"lora"`` trains LoRA in the LLM, the per-crop adapters of the ViT and the
            resampler; ``"frozen"`` the same without LoRA in the LLM; ``"full"`` everything.
        freeze: flags of :func:`monkey_model.freeze.freeze` that outrank those of the mode.
        lora: arguments of the LoRA preset, in mode ``"lora"``.
        unfreeze: arguments of ``unfreeze.ProgressiveUnfreeze``, if wanted.
        eval_data: conversations to evaluate on; ``training.eval_strategy`` says when.
        sample_data: up to 100 conversations whose last answer the model gives at each evaluation,
            into ``samples.jsonl`` and, with their pictures, TensorBoard.
        sample_tokens: most tokens of such an answer.
        image_root: folder of relative image paths; by default that of each file of conversations.
        model_max_length: longest sequence in tokens; an image takes 1282. Upstream trains with
            2048, 4096 or 8192.
        truncate_text: cut longer conversations at their end; see
            :func:`monkey_model.training.conversations.encode_conversation`.
        packing: put short conversations into sequences of up to model_max_length tokens, each
            masked from the others: the same loss and gradients, with less padding. A batch then
            counts packed sequences. Evaluation is not packed.
        dtype: of the arithmetic: ``"bfloat16"``, ``"float16"`` or ``"float32"``. Frozen weights
            are kept in it too; what trains is kept in float32.
        quantization: frozen weights in ``"4bit"`` or ``"8bit"`` (bitsandbytes).
        gradient_checkpointing: in LLM and ViT.
        cache_visual_tokens: encode each picture once, before training, and keep its visual tokens
            (10 MiB each, in 16 bits) in this directory, or with ``true`` in
            ``output_dir/visual_tokens``. For runs in which nothing in the encoder trains:
            ``freeze: {train_resampler: false, train_vit_lora: false}``.
        launch: how processes share the work: ``"ddp"``, ``"fsdp2"``, ``"zero2"``, ``"zero3"`` (the
            files of ``monkey_model/training/launch``), or a file of your own like them.
        merge: also write a checkpoint in upstream's layout, LoRA merged.
        allow_pickle: whether the checkpoint's ``pytorch_model*.bin`` may be read where it has no
            safetensors; only from a source you trust.
        training: ``transformers.TrainingArguments`` that outrank :data:`RECIPE` and ``launch``.
            Without ``report_to``, the run reports to TensorBoard if that is installed.

    Raises:
        TypeError: a value of another type.
        ValueError: a value that is none of the choices.
    """

    checkpoint: str
    data: str
    output_dir: str
    mode: str = "lora"
    freeze: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    unfreeze: dict[str, Any] | None = None
    eval_data: str | None = None
    sample_data: str | None = None
    sample_tokens: int = 32
    image_root: str | None = None
    model_max_length: int = 2048
    truncate_text: bool = False
    packing: bool = False
    dtype: str = "bfloat16"
    quantization: str | None = None
    gradient_checkpointing: bool = True
    cache_visual_tokens: bool | str = False
    launch: str = "ddp"
    merge: bool = False
    allow_pickle: bool = False
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(FinetuneConfig).items():
            hints = get_args(hint) if isinstance(hint, UnionType) else (hint,)
            value = getattr(self, name)
            if type(value) not in [get_origin(kind) or kind for kind in hints]:
                expected = " or ".join(
                    {dict: "a section", type(None): "nothing"}.get(kind, kind.__name__)
                    for kind in (get_origin(kind) or kind for kind in hints)
                )
                raise TypeError(f"{name} must be {expected}; got {value!r}")
        for name, value in vars(self).items():
            if isinstance(value, str) and (not value or "\0" in value):
                raise ValueError(f"{name} must not be empty or hold a zero byte; got {value!r}")
        check_choice("mode", self.mode, MODES)
        check_choice("dtype", self.dtype, DTYPES)
        if self.quantization is not None:
            check_choice("quantization", self.quantization, QUANTIZATIONS)
        for name in ("model_max_length", "sample_tokens"):
            check_positive_int(name, getattr(self, name))
        if self.sample_data is not None and self.sample_tokens >= self.model_max_length:
            raise ValueError(
                f"sample_tokens must be below model_max_length, {self.model_max_length}; got "
                f"{self.sample_tokens}"
            )
        for name in ("lora", "merge"):
            if getattr(self, name) and self.mode != "lora":
                raise ValueError(f"{name} belongs to mode 'lora'; got mode {self.mode!r}")


def check_keys(section: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise a ValueError for the first key of ``given`` that is not ``known``, with the likes."""
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"{section} has no key {key!r}{hint}")


def _parse(text: str, expected: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError(f"{expected}: lists and sections are nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter: no such day, an endless integer
        reason = " ".join(str(error).split())  # of several lines
        raise ValueError(f"{expected}: {reason}") from None


def read_mapping(path: str | Path) -> dict[str, Any]:
    """A YAML or JSON file that holds one mapping.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no YAML, or no mapping.
    """
    check_file("config", path)
    expected = f"{path} must be YAML or JSON"
    try:
        content = _parse(Path(path).read_text(encoding="utf-8"), expected)
    except UnicodeDecodeError as error:
        raise ValueError(f"{expected}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values; got {type(content).__name__}")
    return content


def load_config(
    path: str | Path | None,
    settings: Iterable[str] = (),
    flags: Mapping[str, Any] = MappingProxyType({}),
) -> FinetuneConfig:
    """The config of a file, with settings and flags that outrank it.

    Args:
        path: YAML or JSON; None for none.
        settings: ``"KEY=VALUE"``, the value in YAML; ``training.KEY`` reaches into a section.
        flags: keys and values.

    Raises:
        OSError: the file cannot be read.
        TypeError: a value of another type.
        ValueError: no YAML, an unknown or missing key, or a value that is none of the choices.
    """
    content = {**({} if path is None else read_mapping(path)), **flags}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise ValueError(f"--set must be KEY=VALUE; got {setting!r}")
        *sections, last = key.split(".")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ValueError(f"--set {key}: {section} is no section; got {place!r}")
        place[last] = _parse(value, f"--set {key} must be a YAML value; got {value!r}")
    check_keys("the config", content, [f.name for f in fields(FinetuneConfig)])
    for name in ("checkpoint", "data", "output_dir"):
        if name not in content:
            raise ValueError(
                f"the config must have {name!r}; got {', '.join(content) or 'no keys'}"
            )
    return FinetuneConfig(**content)


def launch_arguments(launch: str) -> dict[str, Any]:
    """The ``TrainingArguments`` of a shipped way to launch, or of a file.

    Raises:
        ValueError: neither a shipped name nor a file.
    """
    shipped = files("monkey_model.training") / "launch"
    names = sorted(Path(str(file)).stem for file in shipped.iterdir())
    if launch in names:
        return read_mapping(str(shipped / f"{launch}.yaml"))
    if not os.path.isfile(launch):
        raise ValueError(f"launch must be one of {', '.join(names)}, or a file; got {launch!r}")
    return read_mapping(launch)


def training_arguments(config: FinetuneConfig) -> TrainingArguments:
    """The arguments for transformers' Trainer: recipe, then launch, then the config's own.

    Create them before the model: under ZeRO-3 they decide how its weights load.

    Raises:
        ValueError: an unknown key, one that has a place of its own, or a value that transformers
            refuses.
    """
    from transformers import TrainingArguments
    from transformers.integrations import (
        get_reporting_integration_callbacks,
        is_tensorboard_available,
    )

    from monkey_model.transformers_compat import checkpointing_argument

    launch = launch_arguments(config.launch)
    for section, given in (("launch", launch), ("training", config.training)):
        check_arguments(section, given)
    checkpointing = checkpointing_argument([f.name for f in fields(TrainingArguments)])
    own = {
        "output_dir": config.output_dir,
        "bf16": config.dtype == "bfloat16",
        "fp16": config.dtype == "float16",
        checkpointing: config.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False},
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    board = is_tensorboard_available()
    given = {**RECIPE, "report_to": "tensorboard" if board else "none", **launch, **config.training}
    report_to = given["report_to"] or []
    if not board and "tensorboard" in ([report_to] if isinstance(report_to, str) else report_to):
        raise ValueError(
            "training.report_to is tensorboard, which is not installed: pip install "
            '"monkey-vision[tensorboard]"'
        )
    try:
        arguments = TrainingArguments(**{**given, **own})
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # says what is not installed; the Trainer makes its own
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"training is refused: {reason}") from error
    if arguments.eval_strategy != "no" and config.eval_data is None:
        raise ValueError("eval_data must be given with training.eval_strategy; got None")
    if arguments.eval_strategy == "no" and config.sample_data is not None:
        raise ValueError(
            "sample_data must come with training.eval_strategy, which says when its questions are "
            "answered; got none"
        )
    if arguments.fp16 and arguments.device.type == "cpu":
        raise ValueError("dtype must be bfloat16 or float32 on a CPU; got 'float16'")
    return arguments


def check_arguments(section: str, given: Mapping[str, Any]) -> None:
    """``given`` are ``TrainingArguments`` that a file may set, of their types.

    transformers itself checks few of them, and some only when the model has loaded.

    Raises:
        ValueError: one that is not; each by ``section`` and its name.
    """
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    known = {f.name: hints[f.name] for f in fields(TrainingArguments) if f.init}
    for key in given:
        if key in _OWN:
            raise ValueError(f"{section}.{key} is set by {_OWN[key]}; remove it")
    check_keys(section, given, known)
    for key, value in given.items():
        name, hint = f"{section}.{key}", known[key]
        kinds = {get_origin(kind) or kind for kind in (get_args(hint) or (hint,))}
        numbers = kinds & {int, float}
        if kinds - {type(None)} == {str}:  # `fsdp`, too, which takes more than it says
            continue
        if type(value) not in kinds | ({int} if numbers else set()):
            words = {bool: "true or false", str: "a text", dict: "a section", list: "a list"}
            expected = [word for kind, word in words.items() if kind in kinds]
            expected += ["a number" if float in numbers else "a whole number"] * bool(numbers)
            # An object of accelerate's, say.
            raise ValueError(
                f"{name} must be {' or '.join(expected) or 'left out of a file'}; got {value!r}"
            )
        if type(value) in (int, float):
            check_number(name, value, _LEAST.get(key, -_LARGEST), most=_LARGEST)
