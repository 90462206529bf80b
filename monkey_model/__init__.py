"""The Monkey multimodal model and its visual encoder, under upstream's module names.

``from monkey_model import MonkeyLMHeadModel, freeze, load_visual`` works for every name below, and
imports what that name needs, no more: ``import monkey_model`` alone brings not even torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monkey_model.checkpoint import load_model as load_model
    from monkey_model.checkpoint import load_visual as load_visual
    from monkey_model.configuration_monkey import MonkeyConfig as MonkeyConfig
    from monkey_model.configuration_qwen import QWenConfig as QWenConfig
    from monkey_model.freeze import FreezeReport as FreezeReport
    from monkey_model.freeze import freeze as freeze
    from monkey_model.freeze import freeze_report as freeze_report
    from monkey_model.freeze import trainable_names as trainable_names
    from monkey_model.image_processing_monkey import MonkeyImageProcessor as MonkeyImageProcessor
    from monkey_model.inputs.images import load_image as load_image
    from monkey_model.modeling_monkey import MonkeyLMHeadModel as MonkeyLMHeadModel
    from monkey_model.modeling_monkey import MonkeyModel as MonkeyModel
    from monkey_model.modeling_qwen import QWenLMHeadModel as QWenLMHeadModel
    from monkey_model.modeling_qwen import QWenModel as QWenModel
    from monkey_model.patching import patch_visual as patch_visual
    from monkey_model.patching import unpatch_visual as unpatch_visual
    from monkey_model.processing_monkey import MonkeyProcessor as MonkeyProcessor
    from monkey_model.tokenization_qwen import QWenTokenizer as QWenTokenizer
    from monkey_model.training.peft_model import MonkeyPeftModel as MonkeyPeftModel
    from monkey_model.training.peft_presets import lora_config as lora_config
    from monkey_model.training.unfreeze import ProgressiveUnfreeze as ProgressiveUnfreeze
    from monkey_model.visual import VisionTransformer as VisionTransformer

# The names above by their modules: a test holds the two against each other.
_NAMES = {
    "checkpoint": ("load_model", "load_visual"),
    "configuration_monkey": ("MonkeyConfig",),
    "configuration_qwen": ("QWenConfig",),
    "freeze": ("FreezeReport", "freeze", "freeze_report", "trainable_names"),
    "image_processing_monkey": ("MonkeyImageProcessor",),
    "inputs.images": ("load_image",),
    "modeling_monkey": ("MonkeyLMHeadModel", "MonkeyModel"),
    "modeling_qwen": ("QWenLMHeadModel", "QWenModel"),
    "patching": ("patch_visual", "unpatch_visual"),
    "processing_monkey": ("MonkeyProcessor",),
    "tokenization_qwen": ("QWenTokenizer",),
    "training.peft_model": ("MonkeyPeftModel",),
    "training.peft_presets": ("lora_config",),
    "training.unfreeze": ("ProgressiveUnfreeze",),
    "visual": ("VisionTransformer",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """``monkey_model.freeze`` is the function, whether or not the module has been imported.

    An import of the submodule puts it on the package, under the function's name. The module is what
    ``from monkey_model.freeze import ...`` and ``importlib.import_module`` read.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
