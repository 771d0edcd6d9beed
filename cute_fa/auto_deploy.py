"""The interface of TensorRT-LLM's auto_deploy: ``cute_fa.integrations.auto_deploy`` under its public name."""

from cute_fa.integrations.auto_deploy import *  # noqa: F403
