"""Fine-tuning in a test: quick, quiet, in float32."""

from __future__ import annotations

from pathlib import Path

from monkey_model.training.config import FinetuneConfig

#: The Trainer's arguments, to which a test adds how long it trains.
QUICK = {
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 3e-3,
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
    "report_to": "none",
}


def finetune_config(
    checkpoint: Path, data: Path, output: Path, training: dict, /, **settings
) -> FinetuneConfig:
    """The settings of a run; ``training`` are the Trainer's arguments."""
    return FinetuneConfig(
        **{
            "checkpoint": str(checkpoint),
            "data": str(data),
            "output_dir": str(output),
            "dtype": "float32",
            "training": training,
            **settings,
        }
    )
