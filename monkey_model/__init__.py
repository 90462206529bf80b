"""The Monkey multimodal model and its visual encoder, under upstream's module names.

Nothing is imported here: ``import monkey_model`` is quick, and each submodule brings what it needs.
"""
