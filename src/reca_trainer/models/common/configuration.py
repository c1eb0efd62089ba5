"""A configuration that is made of configurations."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig


class CompositeConfig(PreTrainedConfig):
    """A `PreTrainedConfig` whose fields named in `sub_configs` are configurations of the classes given there.

    Dictionaries become instances of these classes; a field that is `None` stays `None`.
    """

    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {}

    def __post_init__(self, **kwargs: Any) -> None:
        for name, config_class in self.sub_configs.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, config_class(**value))
        super().__post_init__(**kwargs)
