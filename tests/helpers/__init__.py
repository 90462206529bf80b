"""What the tests share: models, checkpoints and runs made small, upstream's outputs, error rules.

Import them as ``from tests.helpers.X import Y``; a test module imports no other test module.
"""
