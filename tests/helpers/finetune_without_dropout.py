"""``monkey finetune``, with adapters that drop nothing: processes draw other random numbers."""

from torch import distributed

from monkey_model.commands.__main__ import main
from monkey_model.encoder.crop_adapters import Lora_Adapter

rank, _dropout = Lora_Adapter.__init__.__defaults__
Lora_Adapter.__init__.__defaults__ = (rank, 0.0)
try:
    main()
except SystemExit as end:
    # A process group that is left to Python's exit can abort a run that has done all its work.
    assert end.code or not distributed.is_initialized()
    raise
