"""``monkey finetune``, with adapters that drop nothing: processes draw other random numbers."""

from monkey_model.commands.__main__ import main
from monkey_model.encoder.crop_adapters import Lora_Adapter

rank, _dropout = Lora_Adapter.__init__.__defaults__
Lora_Adapter.__init__.__defaults__ = (rank, 0.0)
main()
