"""Fine-tune a Monkey model with transformers' Trainer, on one process or many.

This module decides what trains and in which dtype, and writes the results. Its neighbours read the
config (``config``), make the batches (``conversations``) and look after the directory of the run
(``run_directory``). transformers, accelerate and torchrun optimise, shard and launch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import unset_hf_deepspeed_config

from monkey_model.checkpoint import load_model, load_processor
from monkey_model.files import (
    atomic,
    atomic_directory,
    check_directory,
    check_file,
    writing,
)
from monkey_model.freeze import FLAGS, FreezeReport, freeze
from monkey_model.processing_monkey import MonkeyProcessor
from monkey_model.training.config import FinetuneConfig, training_arguments
from monkey_model.training.conversations import (
    Conversation,
    ConversationCollator,
    ConversationDataset,
    read_conversations,
)
from monkey_model.training.monitor import SampleAnswers, Speed
from monkey_model.training.packing import PackedConversations, pack
from monkey_model.training.peft_model import MonkeyPeftModel, adapter_weights, load_peft_model
from monkey_model.training.peft_presets import lora_config, quantization_config
from monkey_model.training.run_directory import (
    CompleteCheckpoints,
    begin_checkpoint,
    check_checkpoint,
    from_main_process,
    is_finished,
    mark_finished,
    only_run,
    resuming_from,
    starting_point,
    unmark_finished,
)
from monkey_model.training.run_settings import run_settings
from monkey_model.training.token_cache import TokenCache, fill_cache
from monkey_model.training.unfreeze import ProgressiveUnfreeze
from monkey_model.visual import VisionTransformer

#: The flags of ``freeze`` that each mode changes.
_MODE_FLAGS = {
    "lora": {},
    "frozen": {"train_llm_lora": False},
    "full": {"fix_llm": False, "fix_vit": False},
}


def encoder(model: Any) -> VisionTransformer:
    """The encoder inside a model, whatever is wrapped around it."""
    return next(module for module in model.modules() if isinstance(module, VisionTransformer))


class RunTrainer(Trainer):
    """transformers' Trainer. It takes no step after the last, logs its speed, and names bad files.

    Args:
        run_settings: kept with each checkpoint.
        args, kwargs: transformers'.
    """

    def __init__(self, *args: Any, run_settings: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run_settings = run_settings
        self.speed = Speed()

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """transformers' own, timed."""
        return super().get_batch_samples(self.speed.start(epoch_iterator), *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.speed.stop()
        if self.state.global_step >= self.state.max_steps:  # of fewer steps than logging_steps, too
            self.control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """transformers' own, after which training draws the numbers that it would have drawn."""
        with self.same_random_numbers():
            return super().evaluate(*args, **kwargs)

    def same_random_numbers(self) -> AbstractContextManager[None]:
        """What is done inside changes no number that training draws after it."""
        # Each iterator over a data loader draws a seed, even where nothing is shuffled.
        device = self.args.device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own; an encoder in which nothing trains drops nothing either."""
        visual = encoder(self.model)
        if not any(parameter.requires_grad for parameter in visual.parameters()):
            visual.eval()  # the model has just been put into training mode, as a whole
        return super().compute_loss(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """transformers' own; with the loss goes the speed."""
        if "loss" in logs:
            logs.update(self.speed.report(self.accelerator))
        super().log(logs, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers' own trains a step before it counts them. A run that was stopped between its
        # last step and its results has no step left.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        checkpoint = Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}")
        with writing(checkpoint):
            if self.args.should_save:
                begin_checkpoint(checkpoint, self.run_settings)
            super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with resuming_from(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with resuming_from(str(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with resuming_from(str(checkpoint)):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with resuming_from(str(checkpoint)):
            super()._load_rng_state(checkpoint)


def finetune(config: FinetuneConfig, *, resume: bool = False) -> FreezeReport | None:
    """Train as ``config`` says.

    ``output_dir`` gets ``checkpoint-STEP/`` while it runs and, at the end, ``model/`` (in mode
    ``"lora"`` adapters and resampler, else the whole model), ``merged/`` if asked for, and
    ``loss.png``. Each appears whole or not at all. ``runs/`` is TensorBoard's, ``samples.jsonl``
    has the answers to ``sample_data``.

    Args:
        config: what to do.
        resume: go on from the last complete checkpoint in ``output_dir``; where there is none,
            start. A run that has finished stays as it is.

    Returns:
        What trained; None if the run had finished before.

    Raises:
        OSError: a file that cannot be read or written. Checkpoints that were complete stay so.
        ValueError: a setting, a record or a checkpoint that does not fit; ``output_dir`` has a run
            already and ``resume`` is False; or another process is writing to it.
    """
    check_directory("checkpoint", config.checkpoint)
    check_file("data", config.data)
    for name in ("eval_data", "sample_data"):
        if getattr(config, name) is not None:
            check_file(name, getattr(config, name))
    if config.image_root is not None:
        check_directory("image_root", config.image_root)
    if config.cache_visual_tokens:
        _check_encoder_is_frozen(config)
    arguments = training_arguments(config)
    settings = run_settings(config, arguments)
    results = ["model", "loss.png", *["merged"] * config.merge]
    if resume and is_finished(config.output_dir, settings, results):
        return None
    with only_run(config.output_dir):
        start = starting_point(config.output_dir, resume)
        if start is not None:
            check_checkpoint(start, settings)
        report = _train(config, arguments, settings, start)
        if arguments.should_save:
            mark_finished(config.output_dir, settings)
    return report


def _train(
    config: FinetuneConfig,
    arguments: TrainingArguments,
    settings: Mapping[str, Any],
    start: Path | None,
) -> FreezeReport:
    arguments.save_total_limit, limit = None, arguments.save_total_limit
    processor = load_processor(config.checkpoint)
    train_data = _dataset(config, config.data, processor.tokenizer, packing=config.packing)
    eval_data = config.eval_data and _dataset(config, config.eval_data, processor.tokenizer)
    model, report = build_model(config, arguments)
    if arguments.should_log:
        print(report)
    callbacks: list[TrainerCallback] = [CompleteCheckpoints(limit)]
    if config.unfreeze is not None:
        callbacks.append(_progressive_unfreeze(config.unfreeze))
    samples = None if config.sample_data is None else _samples(config, processor)
    if samples is not None:
        callbacks.append(samples)
    collator = ConversationCollator(processor.tokenizer.eod_id, processor.image_processor)
    trainer = RunTrainer(
        model=model,
        args=arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=collator,
        processing_class=processor,
        callbacks=callbacks,
        run_settings=settings,
    )
    cache = None
    if config.cache_visual_tokens:
        sources = [source for source in (train_data, eval_data, samples) if source]
        conversations = [each for source in sources for each in source.conversations]
        cache = _fill_cache(config, trainer, conversations, processor)
        collator.read_tokens(cache, processor.tokenizer.img_start_id)
    if samples is not None:
        samples.attach(trainer, cache)
    unmark_finished(config.output_dir)  # not before: until here anything may be refused
    try:
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
    except ValueError as error:
        if not str(error).startswith("Caught ValueError in DataLoader worker"):
            raise
        # A worker sends its error as the text of a traceback.
        raise ValueError(str(error).strip().rsplit("\nValueError: ", 1)[-1]) from error

    output = Path(config.output_dir)
    with atomic_directory(output / "model", write=arguments.should_save) as place:
        PartialState().wait_for_everyone()
        trainer.save_model(str(place))
        PartialState().wait_for_everyone()
    if arguments.should_save:
        draw_loss_curve(trainer.state.log_history, output / "loss.png")
        if config.merge:
            unset_hf_deepspeed_config()  # This process loads the model alone: nothing to shard.
            merge(
                config.checkpoint,
                output / "model",
                output / "merged",
                allow_pickle=config.allow_pickle,
            )
    return report


def build_model(
    config: FinetuneConfig, arguments: TrainingArguments
) -> tuple[nn.Module, FreezeReport]:
    """The model that ``config`` asks for, frozen by its mode, and a report of what trains.

    In mode ``"lora"`` the model is a :class:`MonkeyPeftModel`.
    """
    if arguments.deepspeed:
        import deepspeed

        # ZeRO-3 shards the weights while they load, so DeepSpeed has to know the processes before.
        # On a GPU transformers has told it; on a CPU it has not.
        deepspeed.init_distributed()
    dtype = getattr(torch, config.dtype)
    settings: dict[str, Any] = {"dtype": dtype, "allow_pickle": config.allow_pickle}
    if config.quantization is not None:
        settings["quantization_config"] = quantization_config(
            config.quantization, dtype, arguments.device
        )
        settings["device_map"] = {"": arguments.device}
    # The whole path: an adapter names its checkpoint by it, wherever it is asked from.
    checkpoint = os.path.realpath(config.checkpoint)
    model: nn.Module = load_model(checkpoint, without_adapters=True, **settings)
    if config.mode == "lora":
        # The loading above draws random numbers, and ZeRO-3's loading draws others. Seeded after
        # it, LoRA starts with the same weights however the model is sharded.
        set_seed(arguments.seed)
        # What does not train needs no copy beside LoRA, which ZeRO-3 could not save.
        kept = {name: _flags(config)[name] for name in ("train_resampler", "train_vit_lora")}
        try:
            lora = lora_config(model, **{**kept, **config.lora})
            # ZeRO-3 needs one dtype for everything that trains. peft's autocast would turn LoRA,
            # and nothing else, to float32.
            model = MonkeyPeftModel(model, lora, autocast_adapter_dtype=False)
        except (TypeError, ValueError) as error:  # The message names the key.
            raise ValueError(f"lora is refused: {error}") from None
    try:
        report = freeze(model, **{**_MODE_FLAGS[config.mode], **config.freeze})
    except TypeError as error:
        raise ValueError(f"freeze is refused: {error}") from None
    if arguments.deepspeed:  # DeepSpeed itself keeps what trains in float32.
        _check_sharding(model, arguments.hf_deepspeed_config)
    else:
        for parameter in model.parameters():
            # A 16-bit weight would round a step of 1e-5 away.
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model, report


def _check_sharding(model: nn.Module, settings: HfDeepSpeedConfig) -> None:
    # Without this the first save would fail, after a thousand steps by default.
    if not (isinstance(model, MonkeyPeftModel) and settings.is_zero3()):
        return
    key = "stage3_param_persistence_threshold"
    threshold = settings.get_value(f"zero_optimization.{key}", 100_000)
    frozen = {n: p for n, p in model.saved_parameters().items() if not p.requires_grad}
    for name, parameter in frozen.items():
        size = getattr(parameter, "ds_numel", parameter.numel())
        if threshold == "auto" or threshold < size:
            raise ValueError(
                f"deepspeed's {key} must be at least {size}, so that {name}, which is frozen, can "
                f"be saved with the adapter; got {threshold!r}"
            )


def merge(
    checkpoint: str | Path,
    adapter: str | Path,
    output_dir: str | Path,
    *,
    allow_pickle: bool = False,
) -> None:
    """Merge an adapter, and what trained beside it, into a checkpoint of upstream's layout.

    Args:
        checkpoint: directory that the adapter was trained on.
        adapter: directory that :func:`finetune` wrote in mode ``"lora"``.
        output_dir: appears whole or not at all; replaced if it is there.
        allow_pickle: as in :func:`monkey_model.checkpoint.load_model`, of both directories.

    Raises:
        OSError, ValueError: a directory that is not there, or not what it should be.
    """
    check_directory("adapter", adapter)
    adapter_weights(Path(adapter), allow_pickle)
    model = load_model(checkpoint, dtype="auto", allow_pickle=allow_pickle)
    dtype = model.dtype
    wrapped = load_peft_model(model, adapter, allow_pickle=allow_pickle)
    merged = wrapped.merge_and_unload()
    with atomic_directory(Path(output_dir)) as place:
        merged.to(dtype).save_pretrained(place)
        load_processor(checkpoint).save_pretrained(place)


def draw_loss_curve(history: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """A PNG of the loss over the steps, of training and evaluation, from a Trainer's log.

    Where no finite loss was logged, it says so.
    """
    history = list(history)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(entry["step"], float(entry[key])) for entry in history if key in entry]
        if any(math.isfinite(loss) for _, loss in points):
            # A line of one point is not seen.
            axes.plot(*zip(*points, strict=True), style if points[1:] else "o", label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "no finite loss was logged", ha="center", transform=axes.transAxes)
    with atomic(Path(path)) as file:
        figure.savefig(file, dpi=120)


def _dataset(
    config: FinetuneConfig, path: str, tokenizer: Any, *, packing: bool = False
) -> ConversationDataset | PackedConversations:
    # The main process checks every image and length. If it fails, the launcher ends the others.
    check = PartialState().is_main_process
    conversations = read_conversations(path, image_root=config.image_root, check_images=check)
    dataset = ConversationDataset(
        conversations, tokenizer, config.model_max_length, truncate_text=config.truncate_text
    )
    lengths = dataset.check(path) if check else []
    if not packing:
        return dataset
    packs = from_main_process(lambda: pack(lengths, config.model_max_length))
    if check:
        share = sum(lengths) / (len(packs) * config.model_max_length)
        print(
            f"{len(dataset)} conversations are packed into {len(packs)} sequences: {share:.0%} full"
        )
    return PackedConversations(dataset, packs)


def _flags(config: FinetuneConfig) -> dict[str, Any]:
    """Of ``freeze``, unchecked."""
    return {**FLAGS, **_MODE_FLAGS[config.mode], **config.freeze}


def _check_encoder_is_frozen(config: FinetuneConfig) -> None:
    flags = _flags(config)
    wanted = {"fix_vit": True, "train_resampler": False, "train_vit_lora": False}
    wrong = [f"{name}: {str(on).lower()}" for name, on in wanted.items() if flags[name] != on]
    if wrong:
        raise ValueError(
            "cache_visual_tokens needs an encoder in which nothing trains: set freeze: "
            f"{{{', '.join(wrong)}}}"
        )


def _fill_cache(
    config: FinetuneConfig,
    trainer: RunTrainer,
    conversations: Iterable[Conversation],
    processor: MonkeyProcessor,
) -> TokenCache:
    directory = config.cache_visual_tokens
    with trainer.same_random_numbers():
        return fill_cache(
            Path(config.output_dir, "visual_tokens") if directory is True else Path(str(directory)),
            encoder(trainer.model),
            conversations,
            processor.image_processor,
            trainer.accelerator,
            workers=trainer.args.dataloader_num_workers,
            show_progress=not trainer.args.disable_tqdm,
        )


def _samples(config: FinetuneConfig, processor: MonkeyProcessor) -> SampleAnswers:
    assert config.sample_data is not None
    conversations = read_conversations(
        config.sample_data,
        image_root=config.image_root,
        check_images=PartialState().is_main_process,
    )
    return SampleAnswers(conversations, processor, config.model_max_length, config.sample_tokens)


def _progressive_unfreeze(settings: dict[str, Any]) -> ProgressiveUnfreeze:
    try:
        return ProgressiveUnfreeze(**settings)
    except TypeError as error:
        raise ValueError(f"unfreeze is refused: {error}") from None
