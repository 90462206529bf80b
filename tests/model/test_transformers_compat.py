"""Names that changed between releases of transformers are those of the one that is installed."""

from __future__ import annotations

import pytest
from transformers import DynamicCache, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

from monkey_model.transformers_compat import CACHE, checkpointing_argument, one_cache


def test_name_of_the_cache():
    assert CACHE in ("cache", "past_key_values")
    assert CACHE in CausalLMOutputWithPast.__dataclass_fields__


def test_one_cache_by_either_name():
    cache = DynamicCache()
    assert one_cache(cache, None) is one_cache(None, cache) is cache
    assert one_cache(None, None) is None
    with pytest.raises(ValueError, match="two names of one argument; got both"):
        one_cache(cache, cache)


def test_argument_for_gradient_checkpointing():
    known = TrainingArguments.__dataclass_fields__
    name = checkpointing_argument(known)
    assert {name, f"{name}_kwargs"} <= set(known)
    assert checkpointing_argument(["gradient_checkpointing"]) == "gradient_checkpointing"
    both = ["gradient_checkpointing", "activation_checkpointing"]
    assert checkpointing_argument(both) == "activation_checkpointing"
