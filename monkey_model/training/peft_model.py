"""A ``PeftModel`` that saves every tensor it trains.

peft saves LoRA and the copies of ``modules_to_save``. What trains besides (a thawed block of the
LLM, ``ln_post`` and the bare parameter ``proj`` with ``fix_vit=False``, ...) would be lost without
a word, in ``save_pretrained`` and in the Trainer's checkpoints. Here it goes to a second file in
the same directory, under upstream's names.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from monkey_model.checkpoint import check_finite
from monkey_model.files import atomic, check_pickle_allowed, list_problems, unreadable_pickle
from monkey_model.parameter_names import is_frozen_twin, upstream_name

#: Beside peft's ``adapter_model.safetensors``, where there is anything to put into it.
BASE_WEIGHTS = "trained_base.safetensors"


def adapter_weights(directory: Path, allow_pickle: bool) -> Path:
    """The file of a directory that peft would load.

    Raises:
        FileNotFoundError: no such file, or no ``adapter_config.json``.
        ValueError: a pickle without ``allow_pickle``.
    """
    weights, pickled = directory / SAFETENSORS_WEIGHTS_NAME, directory / WEIGHTS_NAME
    if not (directory / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"adapter has no {CONFIG_NAME}: {directory}")
    if weights.is_file():
        return weights
    if not pickled.is_file():  # peft would look for it on the Hub
        raise FileNotFoundError(f"adapter has no {weights.name}: {directory}")
    check_pickle_allowed("adapter", pickled, allow_pickle)
    return pickled


class MonkeyPeftModel(PeftModel):
    """As ``peft.PeftModel``; ``save_pretrained`` and ``load_adapter`` keep trained base weights.

    Directories only: peft fetches its own files from the Hub, and not the second one.

    Raises:
        ValueError: a config with a ``task_type``, for which ``from_pretrained`` would make another
            class.
    """

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        if peft_config.task_type is not None:
            raise ValueError(f"peft_config.task_type must be None; got {peft_config.task_type!r}")
        super().__init__(model, peft_config, *args, **kwargs)
        self._loaded_base: set[str] = set()

    def save_pretrained(  # type: ignore[override] # all but the directory by keyword
        self,
        save_directory: str | os.PathLike[str],
        *,
        selected_adapters: list[str] | None = None,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As peft's, and the base weights that train, or came with the adapter, beside it.

        Raises:
            ValueError: ``state_dict`` lacks one of :meth:`saved_parameters`, which DeepSpeed has
                sharded.
        """
        saved = self.saved_parameters()
        if state_dict is not None:
            # The Trainer's is without frozen parameters under ZeRO-3.
            missing = {
                name: _check_whole(name, parameter).detach()
                for name, parameter in saved.items()
                if name not in state_dict
            }
            state_dict = {**missing, **state_dict}
        super().save_pretrained(
            os.fspath(save_directory),
            selected_adapters=selected_adapters,
            is_main_process=is_main_process,
            state_dict=state_dict,
            **kwargs,
        )
        if not is_main_process:
            return
        values = self.state_dict() if state_dict is None else state_dict
        base = {
            short: values[name].contiguous()
            for name in saved
            if (short := upstream_name(name)) is not None
        }
        for adapter in self.peft_config if selected_adapters is None else selected_adapters:
            directory = Path(save_directory, adapter if adapter != "default" else "")
            if base:
                with atomic(directory / BASE_WEIGHTS) as file:
                    save_file(base, file, metadata={"format": "pt"})
            else:
                (directory / BASE_WEIGHTS).unlink(missing_ok=True)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        *args: Any,
        allow_pickle: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As peft's, and the base weights that :meth:`save_pretrained` put beside the adapter.

        Args:
            model_id: directory.
            args: peft's.
            allow_pickle: whether ``adapter_model.bin`` may be read where there is no
                ``adapter_model.safetensors``; only from a source you trust.
            kwargs: peft's.

        Raises:
            FileNotFoundError: no adapter in the directory.
            ValueError: pickles without ``allow_pickle``; a damaged file; weights that are missing
                or too many; NaN or infinity; a base weight that the model lacks, or has in another
                shape, quantised or offloaded. No base weight has changed then.
        """
        directory = Path(model_id, kwargs.get("subfolder") or "")
        weights = adapter_weights(directory, allow_pickle)
        try:
            result = super().load_adapter(os.fspath(model_id), *args, **kwargs)
        except SafetensorError as error:
            raise ValueError(f"{weights} is no readable safetensors file: {error}") from None
        except UnpicklingError:
            raise unreadable_pickle(weights) from None
        problems = [f"missing {key}" for key in result.missing_keys]
        problems += [f"unexpected {key}" for key in result.unexpected_keys]
        if problems:  # peft warns of the first, and says nothing of the second
            raise ValueError(
                f"{weights} does not fit its {CONFIG_NAME} and the model: {list_problems(problems)}"
            )
        check_finite(weights, self.saved_parameters().items())
        path = directory / BASE_WEIGHTS
        if not path.is_file():
            return result
        try:
            base = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no readable safetensors file: {error}") from None
        check_finite(path, base.items())
        parameters = {
            short: parameter
            for name, parameter in self.named_parameters()
            if (short := upstream_name(name)) is not None
        }
        for name, value in base.items():
            _check_target(path, name, value, parameters.get(name))
        with torch.no_grad():
            for name, value in base.items():
                parameters[name].copy_(value)
        self._loaded_base |= set(base)
        return result

    def saved_parameters(self) -> dict[str, nn.Parameter]:
        """What :meth:`save_pretrained` writes, by the model's names.

        All that is LoRA or a copy of ``modules_to_save``, trained or not, and the base weights that
        train or came with an adapter.
        """

        def saved(name: str, parameter: nn.Parameter) -> bool:
            short = upstream_name(name)
            if short is None:
                return not is_frozen_twin(name)
            return parameter.requires_grad or short in self._loaded_base

        return {name: p for name, p in self.named_parameters() if saved(name, p)}


def load_peft_model(
    model: nn.Module, directory: str | Path, *, allow_pickle: bool = False
) -> PeftModel:
    """``model`` with the adapter of a directory, where peft's own errors name it.

    Raises:
        OSError, ValueError: those of :meth:`MonkeyPeftModel.load_adapter`; an adapter that does not
            fit the model, or whose ``adapter_config.json`` makes no sense.
    """
    try:
        return MonkeyPeftModel.from_pretrained(model, directory, allow_pickle=allow_pickle)
    except (AttributeError, LookupError, RuntimeError, TypeError, re.error) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"adapter {directory} does not fit the model: {reason}") from error


def _check_whole(name: str, parameter: nn.Parameter) -> nn.Parameter:
    if parameter.numel() == 0:
        size = getattr(parameter, "ds_numel", 0)
        raise ValueError(
            f"state_dict must hold {name}, which DeepSpeed has sharded: only a "
            f"stage3_param_persistence_threshold of at least {size} keeps it whole"
        )
    return parameter


def _check_target(path: Path, name: str, value: Tensor, target: nn.Parameter | None) -> None:
    if target is None:
        raise ValueError(f"{path} holds {name}, which the model has not")
    if target.shape != value.shape or not target.is_floating_point():
        raise ValueError(
            f"{path} holds {name} {list(value.shape)}; the model has {list(target.shape)} "
            f"{target.dtype}"
        )
    if target.is_meta:
        raise ValueError(f"{path} holds {name}, which the model has offloaded: load it on a device")
